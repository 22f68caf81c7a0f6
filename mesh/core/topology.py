"""Routes: the cheapest one, and sets that share no failure domain.

Owns how a route is chosen: cost is hops plus scarcity, and routes of a set are disjoint
over nodes and over the document's failure domains (site, operator). If a pair has fewer
disjoint routes than its grade asks for, this refuses; it never falls back (architecture
2.7). Must not decide what a *target* accepts: that is ``mesh.core.network.check_routes``,
which looks at the document only. Pure: levels come in as values.

Costs are whole thousandths of a hop, so that sums are exact and equal costs are equal.
Among routes of equal cost the choice is deterministic for a graph, not otherwise defined.

The search for disjoint sets is Suurballe's (J. W. Suurballe, "Disjoint paths in a
network", Networks 4, 1974) with split nodes and potentials (Suurballe and Tarjan 1984).
It knows nothing of sites and operators; when its answer happens to respect them, that
answer is optimal, because it solves a relaxed problem. Otherwise the cheapest member of
the set is enumerated in order of cost (Yen 1971) and the rest solved for what that member
leaves over. Finding such sets is NP-hard in general, hence ``SEARCH_BUDGET``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import combinations, pairwise

from mesh.core.network import MAX_ROUTE_NODES, GradeKind, NetworkDocument, Route, permitted_transit
from mesh.errors import ErrorReason, ShortageError

HOP = 1000
"""Cost of one hop with plenty of material."""
MAX_SCARCITY = 8 * HOP
"""What an almost empty link costs on top: as much as a detour of eight hops."""
SEARCH_BUDGET = 30_000
"""Nodes times shortest-path searches that one call may spend once failure domains collide."""
THOROUGH_NODES = 2_000
"""In a larger network with colliding failure domains the first disjoint set found stands."""
_INFINITE = 1 << 60


@dataclass(frozen=True, slots=True)
class LinkState:
    """What is known of a link now: material usable over it and how much it can hold, both in bytes.

    Unknown levels count as plenty: etcd can take choices away, never decide (protocol 5.1).
    """

    usable_bytes: int = 1
    capacity_bytes: int = 1
    is_up: bool = True

    def scarcity(self) -> int:
        """0 at half full or more, rising to MAX_SCARCITY when empty; in thousandths of a hop."""
        half = max(1, self.capacity_bytes // 2)
        missing = max(0, half - self.usable_bytes)
        return MAX_SCARCITY * missing // half


class Graph:
    """A network prepared for searching: integer nodes, adjacency lists, failure-domain labels.

    Build once per document and level change (some 10 ms per 1 000 nodes and links), search often.

    Args:
        nodes: id and failure-domain labels of each node.
        links: (a, b, cost in thousandths of a hop, at least 1) per link that is up.
    """

    def __init__(
        self, nodes: Mapping[str, Collection[object]], links: Iterable[tuple[str, str, int]]
    ) -> None:
        self.ids = tuple(nodes)
        self.index = {kme_id: number for number, kme_id in enumerate(self.ids)}
        self.labels = tuple(frozenset(labels) for labels in nodes.values())
        self.members: dict[object, list[int]] = {}
        for number, own in enumerate(self.labels):
            for label in own:
                self.members.setdefault(label, []).append(number)
        self.adjacent: list[list[tuple[int, int]]] = [[] for _ in self.ids]
        for a, b, cost in links:
            if cost < 1:
                raise ValueError(f"cost must be at least 1, got {cost}")
            here, there = self.index[a], self.index[b]
            self.adjacent[here].append((there, cost))
            self.adjacent[there].append((here, cost))

    def cost(self, route: Route) -> int:
        """Cost of a route that exists in this graph, in thousandths of a hop."""
        return sum(
            min(cost for other, cost in self.adjacent[self.index[a]] if other == self.index[b])
            for a, b in pairwise(route)
        )


def build_graph(
    document: NetworkDocument, states: Mapping[tuple[str, str], LinkState] | None = None
) -> Graph:
    """The graph of a document, without the links known to be down.

    Args:
        document: decides which nodes and links exist.
        states: by ordered pair; links that are missing count as up, with plenty.
    """
    known = states or {}
    links = []
    for link in document.links:
        state = known.get((link.a, link.b))
        if state is None:
            links.append((link.a, link.b, round(link.cost * HOP)))
        elif state.is_up:
            links.append((link.a, link.b, round(link.cost * HOP) + state.scarcity()))
    labels = {kme_id: document.labels(kme_id) - {("node", kme_id)} for kme_id in document.nodes}
    return Graph(labels, links)


def routes_for_pair(
    document: NetworkDocument, graph: Graph, source: str, target: str, *, avoid: Collection[str] = ()
) -> tuple[Route, ...]:
    """The n routes that the pair's grade asks for, cheapest first, share i on route i - 1.

    Args:
        document: gives the grade and the nodes admitted.
        graph: of that document.
        source: one end.
        target: the other end.
        avoid: node ids to leave out, for example suspects.

    Raises:
        ShortageError: NO_ROUTE for trusted relay, GRADE_UNAVAILABLE when fewer than n disjoint
            routes exist, or one is longer than a transfer may name.
    """
    routes = _routes_for_pair(document, graph, source, target, avoid)
    if longest := max((len(route) for route in routes if len(route) > MAX_ROUTE_NODES), default=0):
        raise ShortageError(
            "a route of the pair is too long",
            reason=ErrorReason.GRADE_UNAVAILABLE if len(routes) > 1 else ErrorReason.NO_ROUTE,
            facts={"source": source, "target": target, "nodes": longest, "at_most": MAX_ROUTE_NODES},
        )
    return routes


def _routes_for_pair(
    document: NetworkDocument, graph: Graph, source: str, target: str, avoid: Collection[str]
) -> tuple[Route, ...]:
    policy = document.policy(source, target)
    permitted = permitted_transit(document, policy).difference(avoid)
    if policy.grade.kind is GradeKind.TRUSTED_RELAY:
        return (cheapest_route(graph, source, target, permitted=permitted),)
    if policy.grade.kind is GradeKind.DSKE:
        return hub_routes(graph, source, target, permitted, policy.grade.n)
    if policy.hubs:
        graph = _hubs_between(graph, policy.hubs, source, target)
    return disjoint_routes(graph, source, target, policy.grade.n, permitted=permitted)


def _hubs_between(graph: Graph, hubs: Collection[str], source: str, target: str) -> Graph:
    """The graph with these hubs linked to the two ends only: a hub relays for nobody in between."""
    ends = set(_ends(graph, source, target))
    inner = {graph.index[hub] for hub in hubs if hub in graph.index}
    less = copy(graph)
    less.adjacent = list(graph.adjacent)
    for hub in inner:
        less.adjacent[hub] = [link for link in graph.adjacent[hub] if link[0] in ends]
        for number, _ in graph.adjacent[hub]:
            if number not in ends:
                less.adjacent[number] = [link for link in less.adjacent[number] if link[0] not in inner]
    return less


def cheapest_route(
    graph: Graph, source: str, target: str, *, permitted: Collection[str] | None = None
) -> Route:
    """The route of least cost whose inner nodes are all permitted (None: any).

    Raises:
        ShortageError: NO_ROUTE.
    """
    start, goal = _ends(graph, source, target)
    path = _cheapest(graph, start, goal, _blocked(graph, permitted, start, goal), frozenset())
    if path is None:
        raise ShortageError(
            "no route between the pair",
            reason=ErrorReason.NO_ROUTE,
            facts={"source": source, "target": target},
        )
    return _named(graph, path)


def hub_routes(graph: Graph, source: str, target: str, hubs: Collection[str], n: int) -> tuple[Route, ...]:
    """The n cheapest two-hop routes over distinct hubs that share no failure domain.

    Raises:
        ShortageError: GRADE_UNAVAILABLE.
    """
    start, goal = _ends(graph, source, target)
    first = dict(graph.adjacent[start])
    second = dict(graph.adjacent[goal])
    wanted = {graph.index[hub] for hub in hubs if hub in graph.index}
    legs = sorted((first[h] + second[h], graph.ids[h], h) for h in wanted & first.keys() & second.keys())
    best: tuple[int, tuple[int, ...]] | None = None
    for chosen in combinations(legs, n):
        cost = sum(leg[0] for leg in chosen)
        if (best is None or cost < best[0]) and _share_nothing(
            graph, [(start, h, goal) for _, _, h in chosen]
        ):
            best = cost, tuple(h for _, _, h in chosen)
    if best is None:
        raise _too_few(source, target, n)
    return tuple((source, graph.ids[hub], target) for hub in best[1])


def disjoint_routes(
    graph: Graph, source: str, target: str, n: int, *, permitted: Collection[str] | None = None
) -> tuple[Route, ...]:
    """n routes of little total cost, no two of which share an inner node or one of its labels.

    Of least cost when the plain search's answer respects the failure domains already, and in small
    networks; otherwise disjoint and cheap, as far as ``SEARCH_BUDGET`` and ``THOROUGH_NODES`` allow.

    Raises:
        ShortageError: GRADE_UNAVAILABLE when there is no such set, or none was found in budget.
    """
    start, goal = _ends(graph, source, target)
    search = _Search(graph, start, goal)
    paths = search.best_set(n, _blocked(graph, permitted, start, goal), direct=True, bound=_INFINITE)
    if paths is None:
        raise _too_few(source, target, n)
    routes = (_named(graph, path) for path in paths)
    return tuple(sorted(routes, key=lambda route: (graph.cost(route), route)))


def are_disjoint(graph: Graph, routes: Collection[Route]) -> bool:
    """Whether no two routes share an inner node, a label of one, or the direct link."""
    return _share_nothing(graph, [[graph.index[kme_id] for kme_id in route] for route in routes])


# --- inside: nodes are integers, a blocked set is a bytearray with 1 per node left out ---------------

Path = list[int]


class _Search:
    """One search for a disjoint set; counts what it spends."""

    def __init__(self, graph: Graph, start: int, goal: int) -> None:
        self._graph, self._start, self._goal = graph, start, goal
        self._left = max(12, min(400, SEARCH_BUDGET // len(graph.ids)))
        # A first set is worth more than a better one.
        self._overdraft = -3 * self._left

    def best_set(self, n: int, blocked: bytearray, *, direct: bool, bound: int) -> list[Path] | None:
        """The cheapest set of n paths with total cost below ``bound``; None if there is none."""
        graph, start, goal = self._graph, self._start, self._goal
        self._left -= n
        relaxed = _suurballe(graph, start, goal, n, blocked, direct=direct)
        if relaxed is None or (least := _total(graph, relaxed)) >= bound:
            return None
        if _collision(graph, relaxed) is None:
            return relaxed
        best: list[Path] | None = None
        for number, first in enumerate(self._by_cost(blocked, direct=direct)):
            cost = _cost(graph, first)
            limit = self._overdraft if best is None else 0
            if cost * n >= bound or bound <= least or self._left <= limit:
                break
            rest_blocked = _without(graph, blocked, first)
            rest = self.best_set(n - 1, rest_blocked, direct=direct and len(first) > 2, bound=bound - cost)
            if rest is not None:
                best = [first, *rest]
                bound = _total(graph, best)
            if best is not None and len(graph.ids) > THOROUGH_NODES:
                break
            if number == 0:  # a set in hand, try the quick way to a better one before the thorough one
                better = self._by_blocking(n, relaxed, blocked, direct=direct, bound=bound)
                if better is not None:
                    best, bound = better, _total(graph, better)
        return best

    def _by_blocking(
        self, n: int, relaxed: list[Path], blocked: bytearray, *, direct: bool, bound: int
    ) -> list[Path] | None:
        """Best first: where two paths share a label, one of them loses its nodes of that label.

        Fast and nearly always optimal; misses only sets in which one path has both ends' nodes.
        """
        graph = self._graph
        heap = [(_total(graph, relaxed), 0, relaxed, blocked)]
        count = 0
        keep = self._left // 2
        while heap and self._left > keep:
            cost, _, paths, shut = heappop(heap)
            if cost >= bound:
                return None
            sides = _collision(graph, paths)
            if sides is None:
                return paths
            for side in sides:
                less = bytearray(shut)
                for node in side:
                    less[node] = 1
                self._left -= n
                found = _suurballe(graph, self._start, self._goal, n, less, direct=direct)
                if found is not None:
                    count += 1
                    heappush(heap, (_total(graph, found), count, found, less))
        return None

    def _by_cost(self, blocked: bytearray, *, direct: bool) -> Iterator[Path]:
        """Loopless paths in order of cost (Yen), as far as the budget goes."""
        graph, start, goal = self._graph, self._start, self._goal
        cut = frozenset() if direct else frozenset([(start, goal)])
        first = _cheapest(graph, start, goal, blocked, cut)
        if first is None:
            return
        heap: list[tuple[int, Path]] = [(_cost(graph, first), first)]
        seen = {tuple(first)}
        done: list[Path] = []
        while heap:
            _, path = heappop(heap)
            yield path
            done.append(path)
            closed = bytearray(blocked)
            for at in range(len(path) - 1):
                if self._left <= self._overdraft:
                    return
                self._left -= 1
                root = path[: at + 1]
                taken = {(p[at], p[at + 1]) for p in done if p[: at + 1] == root and len(p) > at + 1}
                spur = _cheapest(graph, path[at], goal, closed, cut | taken)
                closed[path[at]] = 1
                if spur is not None and tuple(found := root[:-1] + spur) not in seen:
                    seen.add(tuple(found))
                    heappush(heap, (_cost(graph, found), found))


def _cheapest(
    graph: Graph, start: int, goal: int, blocked: bytearray, cut: Collection[tuple[int, int]]
) -> Path | None:
    """Dijkstra from both ends; ``cut`` holds directed links not to use."""
    size = len(graph.ids)
    adjacent = graph.adjacent
    # One entry of a heap is distance * size + node: plain integers compare fastest.
    heaps: tuple[list[int], list[int]] = ([start], [goal])
    reached: tuple[dict[int, int], dict[int, int]] = ({start: 0}, {goal: 0})
    parents: tuple[dict[int, int], dict[int, int]] = ({}, {})
    best, meeting = _INFINITE, -1
    while heaps[0] and heaps[1]:
        if heaps[0][0] // size + heaps[1][0] // size >= best:
            break
        side = 0 if heaps[0][0] <= heaps[1][0] else 1
        distance, node = divmod(heappop(heaps[side]), size)
        mine, other, parent, heap = reached[side], reached[1 - side], parents[side], heaps[side]
        if distance > mine[node]:
            continue
        for there, cost in adjacent[node]:
            if blocked[there]:
                continue
            if cut and ((node, there) if side == 0 else (there, node)) in cut:
                continue
            new = distance + cost
            if new < mine.get(there, _INFINITE):
                mine[there] = new
                parent[there] = node
                heappush(heap, new * size + there)
                if (rest := other.get(there)) is not None and new + rest < best:
                    best, meeting = new + rest, there
    if meeting < 0:
        return None
    path = [meeting]
    while path[-1] != start:
        path.append(parents[0][path[-1]])
    path.reverse()
    while path[-1] != goal:
        path.append(parents[1][path[-1]])
    return path


def _potentials(graph: Graph, start: int, goal: int, blocked: bytearray, *, direct: bool) -> list[int] | None:
    """Distance of each node to the goal, capped at the start's; None if the start is cut off."""
    size = len(graph.ids)
    # A blocked node is one that no distance is below.
    distances = [-1 if shut else _INFINITE for shut in blocked]
    distances[goal] = 0
    heap = []
    adjacent = graph.adjacent
    for there, cost in adjacent[goal]:
        if cost < distances[there] and (direct or there != start):
            distances[there] = cost
            heap.append(cost * size + there)
    heapify(heap)
    while heap:
        key = heappop(heap)
        node = key % size
        distance = key // size
        if distance > distances[node]:
            continue
        if node == start:
            return [min(d, distance) for d in distances]
        for there, cost in adjacent[node]:
            new = distance + cost
            if new < distances[there]:
                distances[there] = new
                heappush(heap, new * size + there)
    return None


def _suurballe(
    graph: Graph, start: int, goal: int, n: int, blocked: bytearray, *, direct: bool
) -> list[Path] | None:
    """n node-disjoint paths of least total cost, labels ignored; None if there are fewer."""
    to_goal = _potentials(graph, start, goal, blocked, direct=direct)
    if to_goal is None:
        return None
    flow = _Flow(graph, start, goal, blocked, direct=direct, to_goal=to_goal)
    for _ in range(n):
        if not flow.augment():
            return None
    return flow.paths()


class _Flow:
    """Unit flow with split nodes: state 2 v is v's entrance, 2 v + 1 its exit.

    ``came[v]`` is the node that the flow enters v from, ``goes[v]`` the one it leaves to.
    Reduced costs (cost + potential there - potential here) never fall below 0.
    """

    def __init__(
        self, graph: Graph, start: int, goal: int, blocked: bytearray, *, direct: bool, to_goal: list[int]
    ) -> None:
        self._graph, self._start, self._goal = graph, start, goal
        self._blocked = bytearray(blocked)
        self._blocked[start] = 1
        self._blocked[goal] = 0
        # Potential of a state: minus its distance to the goal; kept as "distance so far".
        top = to_goal[start]
        self._potential = [top - d for d in to_goal for _ in (0, 1)]
        self._shut = set() if direct else {goal}
        self._came: dict[int, int] = {}
        self._goes: dict[int, int] = {}
        self._first: set[int] = set()

    def augment(self) -> bool:
        """Sends one more unit along the cheapest residual way; False if none fits."""
        potential, came, goes, blocked = self._potential, self._came, self._goes, self._blocked
        adjacent = self._graph.adjacent
        size = 2 * len(self._graph.ids)
        source, sink = 2 * self._start + 1, 2 * self._goal
        distances = [_INFINITE] * size
        parents = [-1] * size
        heap: list[int] = []
        distances[source] = 0
        touched = [source]

        def reach(state: int, before: int, distance: int) -> None:
            """Relaxes one arc; an entrance without flow leads on to its exit, and is not queued."""
            if distance >= distances[state]:
                return
            if distances[state] == _INFINITE:
                touched.append(state)
            distances[state] = distance
            parents[state] = before
            if state & 1 or state == sink or state >> 1 in came:
                heappush(heap, distance * size + state)
            else:
                reach(state + 1, state, distance + potential[state] - potential[state + 1])

        taken = self._first | self._shut
        for there, cost in adjacent[self._start]:
            if not blocked[there] and there not in taken:
                reach(2 * there, source, potential[source] + cost - potential[2 * there])
        while heap:
            key = heappop(heap)
            state = key % size
            distance = key // size
            if distance > distances[state]:
                continue
            if state == sink:
                # What lies within the length comes nearer by the rest: reduced costs stay >= 0.
                for near in touched:
                    if distances[near] < distance:
                        potential[near] += distances[near] - distance
                self._apply(parents)
                return True
            node = state >> 1
            here = distance + potential[state]
            if state & 1:
                used = goes.get(node, -1)
                for there, cost in adjacent[node]:
                    entrance = there + there
                    new = here + cost - potential[entrance]
                    if new < distances[entrance] and there != used and not blocked[there]:
                        reach(entrance, state, new)
                if node in came:  # undo the passage through the node
                    reach(state - 1, state, here - potential[state - 1])
            elif (before := came[node]) != self._start:  # undo the link that the flow comes by
                back = 2 * before + 1
                reach(back, state, here - self._link_cost(before, node) - potential[back])
        return False

    def _link_cost(self, a: int, b: int) -> int:
        return min(cost for there, cost in self._graph.adjacent[a] if there == b)

    def _apply(self, parents: Sequence[int]) -> None:
        start, goal = self._start, self._goal
        source, state = 2 * start + 1, 2 * goal
        added: list[tuple[int, int]] = []
        removed: list[tuple[int, int]] = []
        while state != source:
            before = parents[state]
            a, b = before >> 1, state >> 1
            if a != b:
                (added if before & 1 else removed).append((a, b) if before & 1 else (b, a))
            state = before
        for a, b in removed:
            self._goes.pop(a, None)
            self._came.pop(b, None)
        for a, b in added:
            if a == start:
                self._first.add(b)
            else:
                self._goes[a] = b
            if b != goal:
                self._came[b] = a

    def paths(self) -> list[Path]:
        """The flow as paths."""
        result = []
        for first in sorted(self._first):
            path = [self._start, first]
            while path[-1] != self._goal:
                path.append(self._goes[path[-1]])
            result.append(path)
        return result


def _total(graph: Graph, paths: Iterable[Path]) -> int:
    return sum(_cost(graph, path) for path in paths)


def _collision(graph: Graph, paths: Sequence[Path]) -> tuple[list[int], list[int]] | None:
    """The inner nodes of two paths that carry one label; None if no two paths share a label."""
    owners: dict[object, int] = {}
    for number, path in enumerate(paths):
        for node in path[1:-1]:
            for label in graph.labels[node]:
                if (owner := owners.setdefault(label, number)) != number:
                    first, second = (
                        [n for n in paths[i][1:-1] if label in graph.labels[n]] for i in (owner, number)
                    )
                    return first, second
    return None


def _cost(graph: Graph, path: Path) -> int:
    return sum(min(c for there, c in graph.adjacent[a] if there == b) for a, b in pairwise(path))


def _share_nothing(graph: Graph, paths: Iterable[Collection[int]]) -> bool:
    seen: set[object] = set()
    direct = 0
    for path in paths:
        inner = list(path)[1:-1]
        labels = set(inner).union(*(graph.labels[node] for node in inner))
        if seen & labels:
            return False
        seen |= labels
        direct += not inner
    return direct <= 1


def _without(graph: Graph, blocked: bytearray, path: Path) -> bytearray:
    """Blocks the path's inner nodes and every node that shares a label with one."""
    rest = bytearray(blocked)
    for node in path[1:-1]:
        rest[node] = 1
        for label in graph.labels[node]:
            for other in graph.members[label]:
                rest[other] = 1
    rest[path[0]] = rest[path[-1]] = 0
    return rest


def _blocked(graph: Graph, permitted: Collection[str] | None, start: int, goal: int) -> bytearray:
    if permitted is None:
        return bytearray(len(graph.ids))
    allowed = permitted if isinstance(permitted, (set, frozenset)) else frozenset(permitted)
    blocked = bytearray(kme_id not in allowed for kme_id in graph.ids)
    blocked[start] = blocked[goal] = 0
    return blocked


def _ends(graph: Graph, source: str, target: str) -> tuple[int, int]:
    if source == target or source not in graph.index or target not in graph.index:
        raise ShortageError(
            "a route needs two different KMEs of the network document",
            reason=ErrorReason.NO_ROUTE,
            facts={"source": source, "target": target},
        )
    return graph.index[source], graph.index[target]


def _named(graph: Graph, path: Path) -> Route:
    return tuple(graph.ids[node] for node in path)


def _too_few(source: str, target: str, n: int) -> ShortageError:
    return ShortageError(
        "the pair has fewer disjoint routes than its grade asks for",
        reason=ErrorReason.GRADE_UNAVAILABLE,
        facts={"source": source, "target": target, "wanted": n},
    )
