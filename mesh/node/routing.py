"""Routes from this node: the pure topology over the document in force and the levels last heard.

The directory may take choices away (a link that is down, material that is scarce), never add one:
nodes, links and grades come from the network document alone (protocol 5.1).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

from mesh.core.network import NetworkDocument, ordered
from mesh.core.topology import MAX_SCARCITY, Graph, LinkState, build_graph, routes_for_pair
from mesh.directory.port import Directory, LinkLevel, NodeLevels
from mesh.errors import ErrorReason, ShortageError
from mesh.node.relay import kept_bytes

Route = tuple[str, ...]
Pair = tuple[str, str]

_MAX_CACHED = 1024
_LEAST_KEPT_BYTES = 64 * 1024
_TOLD_ANEW_S = 12.0


@dataclass(slots=True)
class _Spent:
    """What we used of a hop since its node told this level."""

    level: LinkLevel
    since_s: float
    nbytes: int = 0


class DirectoryRoutes:
    """Finds routes; keeps graphs and routes until the directory or an own link changes.

    Args:
        own_id: this KME, where all routes begin.
        directory: document and levels; ``subscribe`` must have been possible.
        link_is_open: what this node sees of its own links, sooner than the directory; None for a
            link that it does not have.
    """

    def __init__(
        self,
        own_id: str,
        directory: Directory,
        *,
        link_is_open: Callable[[str], bool | None] = lambda _peer: None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own_id = own_id
        self._directory = directory
        self._link_is_open = link_is_open
        self._monotonic_s = monotonic_s
        self._document: NetworkDocument | None = None
        self._levels: Mapping[str, NodeLevels] = {}
        self._states: dict[Pair, LinkState] = {}
        self._graphs: dict[bool, Graph] = {}
        self._own_links: dict[str, bool | None] = {}
        self._routes: dict[tuple[str, frozenset[str]], tuple[Route, ...]] = {}
        self._spent: dict[Pair, _Spent] = {}
        self._unsubscribe = directory.subscribe(self.forget)

    def close(self) -> None:
        """Stops following the directory."""
        self._unsubscribe()

    def forget(self) -> None:
        """Something changed: the next call looks again."""
        self._document = None

    def routes(self, target: str, *, avoid: Collection[str] = ()) -> tuple[Route, ...]:
        """The n routes of the pair's grade, cheapest first.

        Routes over links that are down are taken only to make up n, and only where at least k
        others are up: the share that cannot travel is one that n - k may miss.

        Raises:
            ShortageError: NO_ROUTE or GRADE_UNAVAILABLE; never fewer than n routes.
        """
        document = self._directory.document
        if document is None:
            raise ShortageError("no network document yet", reason=ErrorReason.NO_ROUTE)
        self._refresh(document)
        key = target, frozenset(avoid)
        found = self._routes.get(key)
        if found is None:
            found = self._find(document, target, avoid)
            if len(self._routes) >= _MAX_CACHED:
                self._routes.clear()
            self._routes[key] = found
        return found

    def _refresh(self, document: NetworkDocument) -> None:
        own_links = {peer: self._link_is_open(peer) for peer in document.neighbours(self._own_id)}
        if document is self._document and own_links == self._own_links:
            return
        self._document, self._own_links = document, own_links
        self._levels = self._directory.levels
        self._states = self._known_states()
        self._graphs.clear()
        self._routes.clear()

    def _find(self, document: NetworkDocument, target: str, avoid: Collection[str]) -> tuple[Route, ...]:
        try:
            return routes_for_pair(document, self._graph(document), self._own_id, target, avoid=avoid)
        except ShortageError:
            grade = document.policy(self._own_id, target).grade
            if grade.k == grade.n:
                raise
            graph = self._graph(document, with_down=True)
            routes = routes_for_pair(document, graph, self._own_id, target, avoid=avoid)
            if sum(map(self._is_up, routes)) < grade.k:
                raise
            return routes

    def _is_up(self, route: Route) -> bool:
        states = (self._states.get(ordered(a, b)) for a, b in pairwise(route))
        return all(state is None or state.is_up for state in states)

    def _graph(self, document: NetworkDocument, *, with_down: bool = False) -> Graph:
        graph = self._graphs.get(with_down)
        if graph is None:
            states = self._states
            if with_down:
                empty = LinkState(0, MAX_SCARCITY, is_up=True)
                states = {pair: state if state.is_up else empty for pair, state in states.items()}
            graph = self._graphs[with_down] = build_graph(document, states)
        return graph

    def _known_states(self) -> dict[Pair, LinkState]:
        """The worse of what both ends of each link say; of our own links we know best whether they are up."""
        states: dict[Pair, LinkState] = {}
        for kme_id, levels in self._levels.items():
            for peer, level in levels.links.items():
                own = self._own_links.get(peer) if kme_id == self._own_id else None
                is_up = level.is_up if own is None else own
                pair = ordered(kme_id, peer)
                state = LinkState(level.usable_bytes, max(1, level.capacity_bytes), is_up)
                other = states.get(pair)
                if other is None or not state.is_up or (other.is_up and state.scarcity() > other.scarcity()):
                    states[pair] = state
        for peer, is_open in self._own_links.items():
            if is_open is False:
                states[ordered(self._own_id, peer)] = LinkState(0, 1, is_up=False)
        return states

    # levels along a route

    def spare_bytes(self, route: Route) -> int | None:
        """Lane bytes that our bulk may still use on the scarcest hop beyond the first; None if unknown.

        What the hop's node said last, less what it keeps for others, less what we sent since.
        """
        spare: int | None = None
        for hop in pairwise(route[1:]):
            level = self._level(hop)
            if level is None:
                continue
            kept = max(kept_bytes(level.usable_bytes), _LEAST_KEPT_BYTES)
            left = max(0, level.usable_bytes - kept - self._spent_since(hop, level))
            spare = left if spare is None else min(spare, left)
        return spare

    def spend(self, route: Route, nbytes: int) -> None:
        """Our bulk is about to use that much on every hop beyond the first."""
        for hop in pairwise(route[1:]):
            level = self._level(hop)
            if level is None:
                continue
            if self._spent_since(hop, level) == 0:
                self._spent[hop] = _Spent(level, self._monotonic_s())
            self._spent[hop].nbytes += nbytes

    def _level(self, hop: Pair) -> LinkLevel | None:
        node = self._levels.get(hop[0])
        return None if node is None else node.links.get(hop[1])

    def _spent_since(self, hop: Pair, level: LinkLevel) -> int:
        spent = self._spent.get(hop)
        if spent is None or spent.level is not level:
            return 0
        # A level that was told again unchanged may not show as a change.
        return spent.nbytes if self._monotonic_s() - spent.since_s < _TOLD_ANEW_S else 0
