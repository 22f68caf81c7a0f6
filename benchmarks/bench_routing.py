"""Routing: the cheapest route and three disjoint ones, on networks of 1 000 and 10 000 nodes.

The networks are square meshes, every node with a link to its right, its lower and sometimes its
lower right neighbour, link costs random from 1 to 4 hops (scarcity), seeded. That is a hard case:
routes have tens of hops. "Sites" puts two neighbours into one failure domain each, so that nearly
every answer of the plain search collides. The floor is one plain breadth-first sweep over the same
adjacency lists.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from benchmarks.rows import Meter, Row, row
from mesh.core.topology import HOP, Graph, are_disjoint, cheapest_route, disjoint_routes
from mesh.errors import ShortageError

SEED = 2
PAIRS = 15
GOAL_MS = {1_000: 5.0, 10_000: 50.0}


def mesh(size: int, *, with_sites: bool) -> Graph:
    """A seeded mesh of at least ``size`` nodes."""
    source = random.Random(SEED)
    side = round(size**0.5 + 0.499)
    names = [f"n{number}" for number in range(side * side)]
    links = []
    for y in range(side):
        for x in range(side):
            for dx, dy in ((1, 0), (0, 1), (1, 1)):
                if x + dx < side and y + dy < side and (dx + dy < 2 or source.random() < 0.3):
                    cost = HOP + source.randrange(3 * HOP)
                    links.append((names[x + side * y], names[x + dx + side * (y + dy)], cost))
    labels = {name: [("site", number // 2)] if with_sites else [] for number, name in enumerate(names)}
    return Graph(labels, links)


def run() -> list[Row]:
    """All rows, in about twenty seconds."""
    rows = []
    for size, goal_ms in GOAL_MS.items():
        goal = f"<= {goal_ms:g} ms"
        plain, sited = mesh(size, with_sites=False), mesh(size, with_sites=True)
        floor = _median_ms(_sweep, plain)
        for what, search, graph, aim in (
            ("cheapest route", cheapest_route, plain, goal),
            ("3 disjoint routes", _disjoint, plain, goal),
            ("3 disjoint routes over colliding sites", _disjoint, sited, ""),
        ):
            name = f"routing, {size} nodes, {what}"
            meter = Meter()
            median_ms = _median_ms(search, graph)
            rows.append(row(name, median_ms, "ms", floor=floor, goal=aim, cpu=meter.used()))
    return rows


def _median_ms(search: Callable[[Graph, str, str], object], graph: Graph) -> float:
    times = []
    for number in range(PAIRS):
        source, target = random.Random(f"{SEED} {number}").sample(graph.ids, 2)
        start = time.perf_counter()
        search(graph, source, target)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _disjoint(graph: Graph, source: str, target: str) -> None:
    try:
        routes = disjoint_routes(graph, source, target, 3)
    except ShortageError:  # a corner of the mesh has two links only
        return
    if not are_disjoint(graph, routes):
        raise AssertionError("the routes share a failure domain")


def _sweep(graph: Graph, source: str, _target: str) -> int:
    start = graph.index[source]
    seen, frontier = {start}, [start]
    while frontier:
        reached = {there for node in frontier for there, _ in graph.adjacent[node]}
        frontier = list(reached - seen)
        seen |= reached
    return len(seen)
