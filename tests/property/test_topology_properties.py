"""Routing against brute force on small graphs: cost optimal, really disjoint, nothing missed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.network import Route
from mesh.core.topology import Graph, are_disjoint, cheapest_route, disjoint_routes, hub_routes
from mesh.errors import ShortageError

NAMES = "abcdefgh"


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    size = draw(st.integers(2, 8))
    names = NAMES[:size]
    pairs = list(combinations(names, 2))
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True, min_size=1, max_size=len(pairs)))
    costs = draw(st.lists(st.integers(1, 9), min_size=len(chosen), max_size=len(chosen)))
    kinds = {}
    for kind, most in (("site", 7), ("operator", 9)):
        numbers = draw(st.lists(st.integers(0, most), min_size=size, max_size=size))
        # Half of the numbers stand for "states nothing".
        kinds[kind] = {n: (kind, i) for n, i in zip(names, numbers, strict=True) if i <= most // 2}
    labels = {n: {v[n] for v in kinds.values() if n in v} for n in names}
    return Graph(labels, [(a, b, cost) for (a, b), cost in zip(chosen, costs, strict=True)])


def simple_routes(graph: Graph, route: Route, target: str) -> Iterator[Route]:
    if route[-1] == target:
        yield route
        return
    for there, _ in graph.adjacent[graph.index[route[-1]]]:
        name = graph.ids[there]
        if name not in route:
            yield from simple_routes(graph, (*route, name), target)


def share_nothing(graph: Graph, routes: tuple[Route, ...]) -> bool:
    """Said again in other words than the code's."""
    if len(set(routes)) != len(routes):
        return False
    for one, other in combinations(routes, 2):
        if set(one[1:-1]) & set(other[1:-1]):
            return False
        for a in one[1:-1]:
            for b in other[1:-1]:
                if graph.labels[graph.index[a]] & graph.labels[graph.index[b]]:
                    return False
    return True


@given(graphs())
@settings(max_examples=200)
def test_the_cheapest_route_is_the_cheapest_of_all(graph: Graph) -> None:
    source, target = graph.ids[0], graph.ids[-1]
    all_routes = list(simple_routes(graph, (source,), target))
    try:
        found = cheapest_route(graph, source, target)
    except ShortageError:
        assert not all_routes
        return
    assert found in all_routes
    assert graph.cost(found) == min(map(graph.cost, all_routes))


@given(graphs(), st.integers(1, 4))
@settings(max_examples=400)
def test_disjoint_routes_are_disjoint_and_of_least_cost(graph: Graph, n: int) -> None:
    source, target = graph.ids[0], graph.ids[-1]
    all_routes = sorted(simple_routes(graph, (source,), target), key=graph.cost)[:60]
    is_whole = len(all_routes) < 60
    sets = [chosen for chosen in combinations(all_routes, n) if share_nothing(graph, chosen)]
    try:
        found = disjoint_routes(graph, source, target, n)
    except ShortageError:
        assert not sets
        return
    assert len(found) == n
    assert share_nothing(graph, found)
    assert are_disjoint(graph, found)
    for route in found:
        assert route in set(simple_routes(graph, (source,), target))
    if is_whole or sets:
        least = min((sum(map(graph.cost, chosen)) for chosen in sets), default=None)
        cost = sum(map(graph.cost, found))
        assert least is None or cost <= least
        assert not is_whole or cost == least


@given(graphs(), st.integers(1, 3))
@settings(max_examples=200)
def test_hub_routes_are_the_cheapest_disjoint_pairs_of_legs(graph: Graph, n: int) -> None:
    source, target = graph.ids[0], graph.ids[-1]
    hubs = graph.ids[1:-1]
    two_hops = [r for r in simple_routes(graph, (source,), target) if len(r) == 3]
    sets = [chosen for chosen in combinations(two_hops, n) if share_nothing(graph, chosen)]
    try:
        found = hub_routes(graph, source, target, hubs, n)
    except ShortageError:
        assert not sets
        return
    assert share_nothing(graph, found)
    assert sum(map(graph.cost, found)) == min(sum(map(graph.cost, chosen)) for chosen in sets)
