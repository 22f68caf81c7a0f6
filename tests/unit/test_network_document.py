"""The network document: what it says, and that everything odd is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mesh.core.network import Grade, GradeKind, NetworkDocument, Role, check_routes
from mesh.core.network_parse import parse_document
from mesh.errors import ConfigError, ErrorReason, PeerError

SOURCE: dict[str, Any] = {
    "format": "keymesh-network/1",
    "serial": 7,
    "domain": "toronto",
    "nodes": {
        "kme-a": {"site": "north", "operator": "city"},
        "kme-b": {"site": "mid"},
        "kme-c": {"site": "south", "operator": "city"},
        "kme-d": {"site": "mid"},
        "kme-e": {"transit": False},
        "hub-1": {"role": "hub", "site": "cloud-1", "operator": "one"},
        "hub-2": {"role": "hub", "site": "cloud-2", "operator": "two"},
        "hub-3": {"role": "hub", "site": "cloud-3", "operator": "one"},
    },
    "links": [
        {"between": ["kme-b", "kme-a"]},
        {"between": ["kme-b", "kme-c"], "cost": 2},
        {"between": ["kme-a", "kme-d"]},
        {"between": ["kme-d", "kme-c"]},
        {"between": ["kme-a", "kme-e"]},
        {"between": ["kme-e", "kme-c"]},
        *({"between": [end, hub]} for end in ("kme-a", "kme-c") for hub in ("hub-1", "hub-2", "hub-3")),
    ],
    "saes": {
        "sae-a": {"home": "kme-a", "previous": [{"home": "kme-c", "until_s": 1000}]},
        "sae-c": "kme-c",
    },
    "foreign": [{"prefix": "uk-", "border": "kme-c", "domain": "cambridge"}],
    "grades": {
        "default": {"grade": "trusted-relay"},
        "pairs": [
            {
                "between": ["kme-c", "kme-a"],
                "grade": "dske(2,2)",
                "hubs": ["hub-1", "hub-2", "hub-3"],
                "priority": 3,
            }
        ],
    },
}


def document() -> NetworkDocument:
    return parse_document(SOURCE)


def test_homes_follow_the_present_entry() -> None:
    doc = document()
    assert doc.home("sae-a") == "kme-a"
    assert doc.home("sae-c") == "kme-c"
    assert doc.home("uk-1") is None
    assert doc.saes_of("kme-a") == ("sae-a",)


def test_homes_within_the_key_lifetime_include_the_old_home() -> None:
    doc = document()
    assert doc.homes_within("sae-a", now_s=1500, lifetime_s=600) == ("kme-a", "kme-c")
    assert doc.homes_within("sae-a", now_s=1601, lifetime_s=600) == ("kme-a",)
    assert doc.homes_within("nobody", now_s=0, lifetime_s=1) == ()


def test_protocol_4_8_only_home_or_border_may_name_a_master() -> None:
    doc = document()
    assert doc.may_name_master("kme-a", "sae-a", now_s=5000, lifetime_s=60)
    assert not doc.may_name_master("kme-b", "sae-a", now_s=5000, lifetime_s=60)
    assert not doc.may_name_master("kme-c", "sae-a", now_s=5000, lifetime_s=60)
    assert doc.may_name_master("kme-c", "uk-7", now_s=5000, lifetime_s=60)
    assert not doc.may_name_master("kme-a", "uk-7", now_s=5000, lifetime_s=60)
    assert not doc.may_name_master("kme-a", "unknown", now_s=5000, lifetime_s=60)


def test_policy_is_the_pairs_in_both_directions_else_the_default() -> None:
    doc = document()
    assert doc.policy("kme-a", "kme-c") is doc.policy("kme-c", "kme-a")
    assert doc.policy("kme-a", "kme-c").grade == Grade(GradeKind.DSKE, 2, 2)
    assert doc.policy("kme-a", "kme-c").priority == 3
    assert doc.policy("kme-a", "kme-b").grade == Grade()


def test_neighbours_and_roles() -> None:
    doc = document()
    assert doc.neighbours("kme-b") == ("kme-a", "kme-c")
    assert doc.neighbours("nobody") == ()
    assert doc.nodes["hub-1"].role is Role.HUB


@pytest.mark.parametrize("text", ["trusted-relay", "multipath(2,3)", "dske(2,3)"])
def test_grades_read_as_they_print(text: str) -> None:
    assert str(Grade.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "dske", "dske(3,2)", "dske(0,1)", "multipath(2,17)", "relay", "dske(2,3"]
)
def test_malformed_grades_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Grade.parse(text)


def _with(path: tuple[Any, ...], value: object) -> dict[str, Any]:
    changed = copy.deepcopy(SOURCE)
    place: Any = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("format",), "keymesh-network/2", "format"),
        (("serial",), 0, "serial"),
        (("serial",), True, "serial"),
        (("serial",), "7", "serial"),
        (("serial",), 2**63, "serial"),
        (("domain",), "To ronto", "domain"),
        (("domain",), None, "domain"),
        (("surprise",), 1, "surprise"),
        (("failure_domains",), ["planet"], "failure_domains"),
        (("nodes",), {}, "nodes"),
        (("nodes",), [], "nodes"),
        (("nodes", "KME-A"), {}, "nodes"),
        (("nodes", "kme-a"), {"rolle": "node"}, "nodes.kme-a"),
        (("nodes", "kme-a", "role"), "king", "nodes.kme-a.role"),
        (("nodes", "kme-a", "site"), 5, "nodes.kme-a.site"),
        (("nodes", "kme-a", "operator"), "x\ny", "nodes.kme-a.operator"),
        (("links", 0, "between"), ["kme-a"], "links[0].between"),
        (("links", 0, "between"), ["kme-a", "kme-a"], "links[0].between"),
        (("links", 0, "between"), ["kme-a", "kme-x"], "links[0].between"),
        (("links", 0, "between"), ["kme-b", "kme-c"], "links[1]"),
        (("links", 0, "between"), ["hub-1", "hub-2"], "links[0]"),
        (("links", 0, "cost"), 0.5, "links[0].cost"),
        (("saes", "sae-a", "home"), "kme-x", "saes.sae-a.home"),
        (("saes", "sae-a", "home"), "hub-1", "saes.sae-a.home"),
        (("saes", "sae-a", "previous", 0, "until_s"), "soon", "saes.sae-a.previous[0].until_s"),
        (("saes", "s" * 65), "kme-a", "saes"),
        (("saes", "a b"), "kme-a", "saes"),
        (("foreign", 0, "border"), "hub-1", "foreign[0].border"),
        (("foreign", 0, "prefix"), "sae-", "foreign[0].prefix"),
        (("foreign", 0, "prefix"), "", "foreign[0].prefix"),
        (("grades", "default", "grade"), "dske(2,3)", "grades.default.hubs"),
        (("grades", "default", "hubs"), ["hub-1"], "grades.default.hubs"),
        (("grades", "default", "grade"), "best", "grades.default.grade"),
        (("grades", "pairs", 0, "hubs"), ["hub-1"], "grades.pairs[0].hubs"),
        (("grades", "pairs", 0, "hubs"), ["hub-1", "hub-1"], "grades.pairs[0].hubs"),
        (("grades", "pairs", 0, "hubs"), ["hub-1", "kme-b"], "grades.pairs[0].hubs"),
        (("grades", "pairs", 0, "between"), ["kme-a", "hub-1"], "grades.pairs[0].between"),
        (("grades", "pairs", 0, "between"), ["kme-b", "kme-c"], "grades.pairs[0].hubs"),
        (("grades", "pairs", 0, "via"), ["hub-1"], "grades.pairs[0].via"),
        (("grades", "pairs", 0, "priority"), 10, "grades.pairs[0].priority"),
    ],
)
def test_a_wrong_field_is_named(path: tuple[Any, ...], value: object, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_document(_with(path, value))
    assert named in str(caught.value)
    assert caught.value.reason is ErrorReason.DOCUMENT_INVALID


def test_protocol_6_1_foreign_prefixes_overlap_neither_homes_nor_each_other() -> None:
    twice = [*SOURCE["foreign"], {"prefix": "uk-lon-", "border": "kme-a", "domain": "london"}]
    with pytest.raises(ConfigError, match="overlaps the prefix 'uk-'"):
        parse_document(_with(("foreign",), twice))
    with pytest.raises(ConfigError, match="covers our own SAE sae-c"):
        parse_document(_with(("foreign", 0, "prefix"), "sae-c"))


DSKE = Grade(GradeKind.DSKE, 2, 2)
OVER = {hub: ("kme-a", hub, "kme-c") for hub in ("hub-1", "hub-2", "hub-3")}


def test_the_target_accepts_the_routes_that_its_own_document_permits() -> None:
    check_routes(document(), "kme-a", "kme-c", DSKE, [OVER["hub-1"], OVER["hub-2"]])
    check_routes(document(), "kme-a", "kme-b", Grade(), [("kme-a", "kme-b")])
    check_routes(document(), "kme-b", "kme-d", Grade(), [("kme-b", "kme-a", "kme-d")])


@pytest.mark.parametrize(
    ("source", "target", "grade", "routes"),
    [
        # A hub says k = n = 1, so that its share alone is the secret.
        ("kme-a", "kme-c", Grade(GradeKind.DSKE, 1, 1), [OVER["hub-1"]]),
        ("kme-a", "kme-c", Grade(), [("kme-a", "kme-b", "kme-c")]),
        # Fewer routes than n.
        ("kme-a", "kme-c", DSKE, [OVER["hub-1"]]),
        # Same hub twice, and two hubs of one operator.
        ("kme-a", "kme-c", DSKE, [OVER["hub-1"], OVER["hub-1"]]),
        ("kme-a", "kme-c", DSKE, [OVER["hub-1"], OVER["hub-3"]]),
        # A node that is not one of the pair's hubs.
        ("kme-a", "kme-c", DSKE, [OVER["hub-1"], ("kme-a", "kme-b", "kme-c")]),
        # Not from the source, not to the target, empty.
        ("kme-a", "kme-b", Grade(), [("kme-c", "kme-b")]),
        ("kme-a", "kme-b", Grade(), [("kme-a", "kme-d")]),
        ("kme-a", "kme-b", Grade(), [()]),
        ("kme-a", "kme-b", Grade(), [("kme-a",)]),
        # A link that does not exist, a node twice, a node unknown.
        ("kme-b", "kme-d", Grade(), [("kme-b", "kme-d")]),
        ("kme-a", "kme-b", Grade(), [("kme-a", "kme-d", "kme-a", "kme-b")]),
        ("kme-a", "kme-b", Grade(), [("kme-a", "kme-x", "kme-b")]),
        # A hub, and a node that is no transit, on a trusted relay.
        ("kme-b", "kme-d", Grade(), [("kme-b", "kme-a", "hub-1", "kme-c", "kme-d")]),
        ("kme-b", "kme-d", Grade(), [("kme-b", "kme-a", "kme-e", "kme-c", "kme-d")]),
    ],
)
def test_protocol_3_3_other_routes_are_refused(
    source: str, target: str, grade: Grade, routes: list[tuple[str, ...]]
) -> None:
    with pytest.raises(PeerError):
        check_routes(document(), source, target, grade, routes)


def test_multipath_routes_may_not_share_a_site() -> None:
    pair = {"between": ["kme-a", "kme-c"], "grade": "multipath(2,2)"}
    doc = parse_document(_with(("grades", "pairs"), [pair]))
    through = [("kme-a", "kme-b", "kme-c"), ("kme-a", "kme-d", "kme-c")]
    with pytest.raises(PeerError, match="failure domain"):
        check_routes(doc, "kme-a", "kme-c", Grade(GradeKind.MULTIPATH, 2, 2), through)


def test_via_limits_the_trusted_nodes() -> None:
    pair = {"between": ["kme-a", "kme-c"], "grade": "trusted-relay", "via": ["kme-d"]}
    doc = parse_document(_with(("grades", "pairs"), [pair]))
    check_routes(doc, "kme-a", "kme-c", Grade(), [("kme-a", "kme-d", "kme-c")])
    with pytest.raises(PeerError, match="does not admit"):
        check_routes(doc, "kme-a", "kme-c", Grade(), [("kme-a", "kme-b", "kme-c")])
