"""Keys over three hubs between two sites an ocean apart: the network ``dske`` as it ships."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.lab.networks import load_network
from mesh.lab.ready import encryptor, get_plain
from tests.labs import keymesh, lab_json, play, running_lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LIAR = Path(__file__).parents[1] / "liar_hub.py"
GRADE = "dske(2,3)"
ONE_WAY_MS = 42.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with running_lab("dske", tmp_path_factory.mktemp("dske") / "lab") as root:
        yield root


@pytest.fixture
def lab(root: Path) -> dict[str, Any]:
    return lab_json(root)


def test_hubs_stand_in_lab_json_beside_the_nodes_and_the_two_sites_share_no_qkd_link(
    lab: dict[str, Any],
) -> None:
    fields = {"id", "domain", "grpc", "http", "pid", "dir", "log", "cert", "key"}
    assert [hub["id"] for hub in lab["hubs"]] == ["hub-1", "hub-2", "hub-3"]
    assert all(fields <= hub.keys() for hub in lab["hubs"])
    assert {node["id"] for node in lab["nodes"]} == {"can-site-x", "uk-site-z"}
    assert lab["devices"] == []
    for hub in lab["hubs"]:
        command = Path(f"/proc/{hub['pid']}/cmdline").read_bytes().split(b"\0")
        assert command[command.index(b"hub") :][:2] == [b"hub", b"run"]
        assert get_plain(hub["http"], "/readyz")[0] == 200


def test_the_way_over_each_hub_is_as_long_as_the_ocean(lab: dict[str, Any]) -> None:
    delays = {frozenset(relay["between"]): relay["one_way_delay_ms"] for relay in lab["relays"]}
    a, b = (node["id"] for node in lab["nodes"])
    assert delays[frozenset((a, b))] == ONE_WAY_MS
    for hub in lab["hubs"]:
        assert delays[frozenset((a, hub["id"]))] + delays[frozenset((hub["id"], b))] == ONE_WAY_MS


def test_hubs_are_independent_by_the_document() -> None:
    hubs = load_network("dske").hubs
    assert len({hub.site for hub in hubs}) == len({hub.operator for hub in hubs}) == 3


def test_no_courier_file_stays(root: Path, lab: dict[str, Any]) -> None:
    assert not [*root.rglob("*.psrd"), *root.rglob("*.partial")]


def test_applications_an_ocean_apart_get_the_same_keys_and_the_grade_they_have(lab: dict[str, Any]) -> None:
    first, last = lab["saes"][0]["id"], lab["saes"][-1]["id"]
    for master, slave in ((first, last), (last, first)):
        with encryptor(lab, master) as a, encryptor(lab, slave) as b:
            keys = a.enc_keys(slave, number=5, size_bits=1024)
            fetched = {key.key_id: key.value for key in b.dec_keys(master, [key.key_id for key in keys])}
            assert fetched == {key.key_id: key.value for key in keys}
            assert a.status(slave)["status_extension"]["keymesh_grade"] == GRADE
            wanted = {"number": 1, "extension_optional": [{"keymesh_grade": "report"}]}
            container = a.container(slave, wanted)
            assert container["key_container_extension"] == {"keymesh_grade": GRADE}
            (key,) = container["keys"]
            assert len(b.dec_keys(master, [key["key_ID"]])) == 1


def test_one_request_id_leads_through_gateway_node_hubs_and_the_other_node(
    root: Path, lab: dict[str, Any]
) -> None:
    master, slave = lab["saes"][0], lab["saes"][-1]
    with encryptor(lab, master["id"]) as app:
        # Four times the reserve: most of it has to be made now.
        app.enc_keys(slave["id"], number=128, size_bits=65_536)
        request_id = app.request_id

    def told(log: str, field: str = "event") -> set[str]:
        lines = [json.loads(line) for line in Path(log).read_text().splitlines() if request_id in line]
        return {line[field] for line in lines if line["request_id"] == request_id}

    source, target = (
        next(one for one in lab["nodes"] if one["id"] == sae["node"]) for sae in (master, slave)
    )
    assert "established" in told(source["log"])
    assert "transfer appended" in told(target["log"])
    for hub in lab["hubs"]:
        assert "share relayed" in told(hub["log"])
    for member, result in ((master["gateway"], "delivered"), (source["id"], "ok")):
        assert told(str(root / "audit" / f"{member}.jsonl"), "result") == {result}


def test_operators_see_hubs_beside_nodes(root: Path, lab: dict[str, Any]) -> None:
    members = {entry["id"] for entry in lab["nodes"] + lab["hubs"]}
    status = keymesh("status", "--lab", str(root))
    assert status.returncode == 0, status.stderr
    psrd = keymesh("psrd", "status", "--lab", str(root))
    assert psrd.returncode == 0, psrd.stderr
    for answer in (status, psrd):
        assert all(member in answer.stdout for member in members)


@pytest.mark.parametrize(
    ("scenario", "options", "named"),
    [
        ("hub-killed", (), "hub-2 is named"),
        ("hub-liar", ("--stand-in", str(LIAR)), "hub-1 is named"),
    ],
)
def test_one_hub_killed_or_lying_costs_no_key_and_is_named(
    root: Path, scenario: str, options: tuple[str, ...], named: str
) -> None:
    said = play(root, scenario, *options)
    assert named in said
    assert "all as promised" in said


def test_a_liar_is_proven_and_not_only_suspected(root: Path) -> None:
    alarms = keymesh("alarms", "--lab", str(root)).stdout
    assert [line for line in alarms.splitlines() if "culprits" in line and "hub-1" in line], alarms


def test_two_of_three_hubs_dead_is_a_503_with_a_reason_and_recovers(root: Path) -> None:
    said = play(root, "two-of-three-hubs-dead")
    assert "HTTP 503" in said
    assert "keys come again" in said


def test_hub_liar_needs_a_liar(root: Path) -> None:
    refused = keymesh("lab", "run", "--dir", str(root), "--scenario", "hub-liar")
    assert refused.returncode == 2
    assert "--stand-in" in refused.stderr
