"""Routes from this node: the pure topology over the document in force and the levels last heard.

The directory may take choices away (a link that is down, material that is scarce), never add one:
nodes, links and grades come from the network document alone (protocol 5.1).
"""

from __future__ import annotations

from collections.abc import Collection

from mesh.core.network import NetworkDocument, ordered
from mesh.core.topology import Graph, LinkState, build_graph, routes_for_pair
from mesh.directory.port import Directory
from mesh.errors import ErrorReason, ShortageError

_MAX_CACHED = 1024


class DirectoryRoutes:
    """Finds routes; keeps the graph until the directory changes.

    Args:
        own_id: this KME, where all routes begin.
        directory: document and levels; ``subscribe`` must have been possible.
    """

    def __init__(self, own_id: str, directory: Directory) -> None:
        self._own_id = own_id
        self._directory = directory
        self._graph: Graph | None = None
        self._document: NetworkDocument | None = None
        self._routes: dict[str, tuple[tuple[str, ...], ...]] = {}
        self._unsubscribe = directory.subscribe(self.forget)

    def close(self) -> None:
        """Stops following the directory."""
        self._unsubscribe()

    def forget(self) -> None:
        """Something changed: the next call looks again."""
        self._graph = None
        self._routes.clear()

    def routes(self, target: str, *, avoid: Collection[str] = ()) -> tuple[tuple[str, ...], ...]:
        """The n routes of the pair's grade, cheapest first.

        Raises:
            ShortageError: NO_ROUTE or GRADE_UNAVAILABLE; never fewer than n routes.
        """
        document = self._directory.document
        if document is None:
            raise ShortageError("no network document yet", reason=ErrorReason.NO_ROUTE)
        if document is not self._document or self._graph is None:
            self._document = document
            self._graph = build_graph(document, self._states())
            self._routes.clear()
        known = None if avoid else self._routes.get(target)
        if known is not None:
            return known
        found = routes_for_pair(document, self._graph, self._own_id, target, avoid=avoid)
        if not avoid and len(self._routes) < _MAX_CACHED:
            self._routes[target] = found
        return found

    def _states(self) -> dict[tuple[str, str], LinkState]:
        """The worse of what both ends of each link say."""
        states: dict[tuple[str, str], LinkState] = {}
        for kme_id, levels in self._directory.levels.items():
            for peer, level in levels.links.items():
                pair = ordered(kme_id, peer)
                state = LinkState(level.usable_bytes, max(1, level.capacity_bytes), level.is_up)
                other = states.get(pair)
                if other is None or not state.is_up or (other.is_up and state.scarcity() > other.scarcity()):
                    states[pair] = state
        return states
