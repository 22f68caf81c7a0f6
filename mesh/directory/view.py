"""What a node asks of the directory when it works for a pair: homes, policies, routes.

Owns the prepared graph: built from the network document, weighed by levels, kept until
either changes. Decisions come from the document (protocol 5.1); levels only say which of
the permitted routes is cheaper, or gone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping

from mesh.core.network import NetworkDocument, PairPolicy, Route, ordered
from mesh.core.topology import Graph, LinkState, build_graph, routes_for_pair
from mesh.directory.port import Directory, NodeLevels
from mesh.errors import ErrorReason, UnavailableError

REBUILD_S = 1.0
"""Levels are taken up at most this often: a graph of 10 000 nodes takes some 150 ms to prepare."""
MAX_CACHED_ROUTES = 4096


class NetworkView:
    """Reads the directory for one node; every call answers from memory.

    Args:
        directory: started elsewhere.
        own_links: this node's links as it sees them itself, by neighbour; fresher than what it
            published, so it wins.
        kme_id: this node.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        directory: Directory,
        kme_id: str,
        *,
        own_links: Callable[[], Mapping[str, LinkState]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._kme_id = kme_id
        self._own_links = own_links or (lambda: {})
        self._clock = clock
        self._graph: Graph | None = None
        self._built_from: NetworkDocument | None = None
        self._built_at_s = float("-inf")
        self._is_stale = True
        self._routes: OrderedDict[tuple[str, str, frozenset[str]], tuple[Route, ...]] = OrderedDict()
        self.close = directory.subscribe(self.touch)

    def touch(self) -> None:
        """Has the next route search look at levels and own links again."""
        self._is_stale = True

    @property
    def document(self) -> NetworkDocument:
        """The network document.

        Raises:
            UnavailableError: DIRECTORY_UNAVAILABLE, there is none yet.
        """
        document = self._directory.document
        if document is None:
            raise UnavailableError(
                "no network document yet", reason=ErrorReason.DIRECTORY_UNAVAILABLE, retry_after_s=1.0
            )
        return document

    def home(self, sae_id: str) -> str | None:
        """The KME where an SAE is homed now, None if unknown or foreign. Raises as ``document``."""
        return self.document.home(sae_id)

    def policy(self, peer: str) -> PairPolicy:
        """How keys with another KME are established. Raises as ``document``."""
        return self.document.policy(self._kme_id, peer)

    def routes(self, target: str, *, avoid: Collection[str] = ()) -> tuple[Route, ...]:
        """Routes from this node to another as their grade asks, cheapest first, share i on route i - 1.

        Args:
            target: KME id.
            avoid: nodes and hubs to leave out, for example suspects.

        Raises:
            ShortageError: NO_ROUTE or GRADE_UNAVAILABLE; never fewer routes than asked.
            UnavailableError: as ``document``.
        """
        document, graph = self.document, self._current_graph()
        key = (self._kme_id, target, frozenset(avoid))
        routes = self._routes.get(key)
        if routes is None:
            routes = routes_for_pair(document, graph, self._kme_id, target, avoid=avoid)
            self._routes[key] = routes
            if len(self._routes) > MAX_CACHED_ROUTES:
                self._routes.popitem(last=False)
        return routes

    def _current_graph(self) -> Graph:
        document, now_s = self.document, self._clock()
        is_due = self._is_stale and now_s - self._built_at_s >= REBUILD_S
        if self._graph is None or document is not self._built_from or is_due:
            states = link_states(self._directory.levels)
            for peer, state in self._own_links().items():
                states[ordered(self._kme_id, peer)] = state
            self._graph = build_graph(document, states)
            self._built_from, self._built_at_s, self._is_stale = document, now_s, False
            self._routes.clear()
        return self._graph


def link_states(levels: Mapping[str, NodeLevels]) -> dict[tuple[str, str], LinkState]:
    """Link states from what nodes published: of two ends' statements the worse one holds."""
    states: dict[tuple[str, str], LinkState] = {}
    for kme_id, own in levels.items():
        for peer, level in own.links.items():
            state = LinkState(max(0, level.usable_bytes), max(1, level.capacity_bytes), level.is_up)
            pair = ordered(kme_id, peer)
            other = states.get(pair)
            if other is None or (state.is_up, -state.scarcity()) < (other.is_up, -other.scarcity()):
                states[pair] = state
    return states
