"""Routes: cost, scarcity, disjointness, and refusing rather than falling back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from mesh.core.network import MAX_ROUTE_NODES, Grade, NetworkDocument, check_routes
from mesh.core.network_parse import parse_document
from mesh.core.topology import (
    HOP,
    Graph,
    LinkState,
    are_disjoint,
    build_graph,
    cheapest_route,
    disjoint_routes,
    routes_for_pair,
)
from mesh.errors import ErrorReason, PeerError, ShortageError


def graph(text: str, sites: dict[str, str] | None = None) -> Graph:
    """``"a-b a-c:2"``: links with costs in hops; sites by node."""
    links = []
    for word in text.split():
        ends, _, cost = word.partition(":")
        a, b = ends.split("-")
        links.append((a, b, round(float(cost or 1) * HOP)))
    names = sorted({end for a, b, _ in links for end in (a, b)})
    return Graph({n: {("site", (sites or {}).get(n, n))} for n in names}, links)


def document(links: list[list[str]], grade: dict[str, Any], hubs: tuple[str, ...] = ()) -> NetworkDocument:
    names = sorted({end for link in links for end in link})
    return parse_document(
        {
            "format": "keymesh-network/1",
            "serial": 1,
            "domain": "d",
            "nodes": {name: {"role": "hub"} if name in hubs else {} for name in names},
            "links": [{"between": link} for link in links],
            "grades": {"pairs": [{"between": ["a", "z"], **grade}]},
        }
    )


def test_the_cheapest_route_counts_cost_not_hops() -> None:
    net = graph("a-z:5 a-b b-c c-z")
    assert cheapest_route(net, "a", "z") == ("a", "b", "c", "z")
    assert net.cost(("a", "b", "c", "z")) == 3 * HOP


def test_only_permitted_nodes_lie_inside_a_route() -> None:
    net = graph("a-b b-z a-c:2 c-z:2")
    assert cheapest_route(net, "a", "z", permitted={"c"}) == ("a", "c", "z")
    with pytest.raises(ShortageError) as caught:
        cheapest_route(net, "a", "z", permitted=set())
    assert caught.value.reason is ErrorReason.NO_ROUTE


@pytest.mark.parametrize(("source", "target"), [("a", "a"), ("a", "nobody"), ("nobody", "a")])
def test_routes_need_two_known_ends(source: str, target: str) -> None:
    with pytest.raises(ShortageError):
        cheapest_route(graph("a-b"), source, target)


def test_the_trap_where_the_cheapest_route_blocks_both_others_is_undone() -> None:
    # a-b-c-z is cheapest, but only a-b-d-z and a-e-c-z are disjoint.
    net = graph("a-b b-c c-z b-d:3 d-z:3 a-e:3 e-c:3")
    assert cheapest_route(net, "a", "z") == ("a", "b", "c", "z")
    assert disjoint_routes(net, "a", "z", 2) == (("a", "b", "d", "z"), ("a", "e", "c", "z"))


def test_the_direct_link_counts_as_one_route() -> None:
    net = graph("a-z a-b b-z a-c:2 c-z")
    assert disjoint_routes(net, "a", "z", 3) == (("a", "z"), ("a", "b", "z"), ("a", "c", "z"))
    with pytest.raises(ShortageError) as caught:
        disjoint_routes(net, "a", "z", 4)
    assert caught.value.reason is ErrorReason.GRADE_UNAVAILABLE


def test_routes_through_one_site_are_not_disjoint() -> None:
    net = graph("a-b b-z a-c c-z a-d:4 d-z:4", {"b": "mid", "c": "mid"})
    assert disjoint_routes(net, "a", "z", 2) == (("a", "b", "z"), ("a", "d", "z")) or (
        disjoint_routes(net, "a", "z", 2) == (("a", "c", "z"), ("a", "d", "z"))
    )
    with pytest.raises(ShortageError):
        disjoint_routes(net, "a", "z", 3)


def test_one_route_may_pass_a_site_twice() -> None:
    net = graph("a-b b-c c-z a-d:9 d-z:9", {"b": "mid", "c": "mid"})
    assert disjoint_routes(net, "a", "z", 2) == (("a", "b", "c", "z"), ("a", "d", "z"))


def test_an_inner_node_may_share_the_site_of_an_end() -> None:
    net = graph("a-b b-z a-c c-z", {"a": "north", "b": "north"})
    routes = disjoint_routes(net, "a", "z", 2)
    assert are_disjoint(net, routes)


def test_scarcity_costs_from_below_half_full() -> None:
    assert LinkState(50, 100).scarcity() == 0
    assert LinkState(25, 100).scarcity() == 4 * HOP
    assert LinkState(0, 100).scarcity() == 8 * HOP


def test_scarce_and_cut_links_are_avoided_and_unknown_ones_count_as_plenty() -> None:
    doc = document([["a", "b"], ["b", "z"], ["a", "c"], ["c", "z"]], {"grade": "trusted-relay"})

    def via(**states: LinkState) -> str:
        known = {(key[0], key[1]): state for key, state in states.items()}
        return routes_for_pair(doc, build_graph(doc, known), "a", "z")[0][1]

    assert via(ab=LinkState(1, 100)) == "c"
    assert via(bz=LinkState(100, 100, is_up=False)) == "c"
    assert via(ab=LinkState(1, 100), ac=LinkState(100, 100, is_up=False)) == "b"
    with pytest.raises(ShortageError) as caught:
        via(ab=LinkState(is_up=False), ac=LinkState(is_up=False))
    assert caught.value.reason is ErrorReason.NO_ROUTE


HUBS = ("h1", "h2", "h3")
STAR = [[end, hub] for end in "az" for hub in HUBS]


def test_a_route_longer_than_a_transfer_may_name_is_refused() -> None:
    for inner, is_fit in ((MAX_ROUTE_NODES - 2, True), (MAX_ROUTE_NODES - 1, False)):
        names = ["a", *(f"n{number}" for number in range(inner)), "z"]
        net = document([list(pair) for pair in pairwise(names)], {"grade": "trusted-relay"})
        if is_fit:
            (route,) = routes_for_pair(net, build_graph(net), "a", "z")
            check_routes(net, "a", "z", Grade.parse("trusted-relay"), (route,))
            continue
        with pytest.raises(ShortageError) as caught:
            routes_for_pair(net, build_graph(net), "a", "z")
        assert caught.value.reason is ErrorReason.NO_ROUTE


def test_dske_takes_two_hop_routes_over_hubs_only() -> None:
    doc = document([*STAR, ["a", "b"], ["b", "z"]], {"grade": "dske(2,3)", "hubs": list(HUBS)}, HUBS)
    routes = routes_for_pair(doc, build_graph(doc), "a", "z")
    assert routes == (("a", "h1", "z"), ("a", "h2", "z"), ("a", "h3", "z"))


def test_dske_refuses_when_a_hub_is_down_and_never_falls_back() -> None:
    doc = document([*STAR, ["a", "b"], ["b", "z"]], {"grade": "dske(2,3)", "hubs": list(HUBS)}, HUBS)
    cut = build_graph(doc, {("h2", "z"): LinkState(is_up=False)})
    with pytest.raises(ShortageError) as caught:
        routes_for_pair(doc, cut, "a", "z")
    assert caught.value.reason is ErrorReason.GRADE_UNAVAILABLE
    with pytest.raises(ShortageError):
        routes_for_pair(doc, build_graph(doc), "a", "z", avoid=["h1"])


def test_dske_takes_the_cheapest_hubs() -> None:
    doc = document(STAR, {"grade": "dske(2,2)", "hubs": list(HUBS)}, HUBS)
    scarce = build_graph(doc, {("a", "h1"): LinkState(0, 100)})
    assert routes_for_pair(doc, scarce, "a", "z") == (("a", "h2", "z"), ("a", "h3", "z"))


def test_hubs_never_carry_a_trusted_relay_or_multipath() -> None:
    doc = document([["a", "h1"], ["h1", "z"]], {"grade": "trusted-relay"}, ("h1",))
    with pytest.raises(ShortageError):
        routes_for_pair(doc, build_graph(doc), "a", "z")


def test_a_mixed_set_has_qkd_paths_and_the_hubs_that_the_policy_names() -> None:
    """A hub that it does not name is left out, and none lies deeper inside a route."""
    links = [*STAR, ["a", "b"], ["b", "z"], ["b", "h1"], ["a", "c"], ["c", "h2"]]
    doc = document(links, {"grade": "multipath(2,3)", "hubs": ["h1", "h2"]}, HUBS)
    routes = routes_for_pair(doc, build_graph(doc), "a", "z")
    assert set(routes) == {("a", "b", "z"), ("a", "h1", "z"), ("a", "h2", "z")}
    check_routes(doc, "a", "z", Grade.parse("multipath(2,3)"), routes)
    deeper = (("a", "b", "z"), ("a", "h1", "z"), ("a", "c", "h2", "z"))
    with pytest.raises(PeerError, match="between the two ends"):
        check_routes(doc, "a", "z", Grade.parse("multipath(2,3)"), deeper)
    unnamed = (("a", "b", "z"), ("a", "h1", "z"), ("a", "h3", "z"))
    with pytest.raises(PeerError, match="does not admit"):
        check_routes(doc, "a", "z", Grade.parse("multipath(2,3)"), unnamed)
    cut = build_graph(doc, {("a", "h2"): LinkState(is_up=False)})
    with pytest.raises(ShortageError) as caught:
        routes_for_pair(doc, cut, "a", "z")
    assert caught.value.reason is ErrorReason.GRADE_UNAVAILABLE


def test_multipath_gives_n_disjoint_routes() -> None:
    links = [["a", "b"], ["b", "z"], ["a", "c"], ["c", "z"], ["a", "z"]]
    doc = document(links, {"grade": "multipath(2,3)"})
    routes = routes_for_pair(doc, build_graph(doc), "a", "z")
    assert routes == (("a", "z"), ("a", "b", "z"), ("a", "c", "z"))


def test_a_link_without_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Graph({"a": (), "b": ()}, [("a", "b", 0)])
