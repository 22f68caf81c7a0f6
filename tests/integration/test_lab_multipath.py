"""Keys over three disjoint ways of QKD links: the network ``multipath`` as it ships."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.core.topology import build_graph, routes_for_pair
from mesh.lab.networks import load_network
from mesh.lab.ready import encryptor
from tests.labs import keymesh, lab_json, play, running_lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with running_lab("multipath", tmp_path_factory.mktemp("multipath") / "lab") as root:
        yield root


@pytest.fixture
def lab(root: Path) -> dict[str, Any]:
    return lab_json(root)


def test_the_three_ways_share_neither_relay_nor_site_nor_operator() -> None:
    document = load_network("multipath").document()
    routes = routes_for_pair(document, build_graph(document), "west", "east")
    inner = [document.labels(relay) for route in routes for relay in route[1:-1]]
    assert len(routes) == len(inner) == 3
    assert len(frozenset().union(*inner)) == sum(len(labels) for labels in inner)


@pytest.mark.parametrize(
    ("master", "slave", "grade"),
    [
        ("sae-west-1", "sae-east-1", "multipath(2,3)"),
        ("sae-east-2", "sae-west-2", "multipath(2,3)"),
        ("sae-harbour-1", "sae-west-1", "trusted-relay"),
        ("sae-east-1", "sae-harbour-1", "trusted-relay"),
    ],
)
def test_each_pair_gets_its_own_grade_and_says_so(
    lab: dict[str, Any], master: str, slave: str, grade: str
) -> None:
    with encryptor(lab, master) as a, encryptor(lab, slave) as b:
        container = a.container(slave, {"extension_optional": [{"keymesh_grade": "report"}]})
        assert container["key_container_extension"] == {"keymesh_grade": grade}
        (key,) = container["keys"]
        assert b.dec_keys(master, [key["key_ID"]])[0].key_id == key["key_ID"]
        assert a.status(slave)["status_extension"]["keymesh_grade"] == grade


def test_a_cut_link_costs_no_key_and_its_neighbour_is_named(root: Path) -> None:
    said = play(root, "cut-link")
    assert "is named" in said
    assert "all as promised" in said


def test_a_scenario_that_needs_hubs_says_so(root: Path) -> None:
    refused = keymesh("lab", "run", "--dir", str(root), "--scenario", "hub-killed")
    assert refused.returncode == 2
    assert "no hubs" in refused.stderr
