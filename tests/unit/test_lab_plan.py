"""What a lab writes before anything starts: configurations that their processes take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from cryptography import x509

from mesh.core.identity import Identity, Role
from mesh.hub.config import load_hub_config
from mesh.lab.configcheck import check_file
from mesh.lab.networks import Lab, load_lab, load_network
from mesh.lab.plan import LabPlan, Planner
from mesh.lab.state import LabDirectory
from mesh.node.config import BufferedPair


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> LabPlan:
    directory = LabDirectory(tmp_path_factory.mktemp("plan"))
    try:
        return Planner(Lab.of(load_network("dske")), directory).write()
    finally:
        directory.remove_proofs()


def names(certificate: Path) -> list[str]:
    loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
    extension = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return list(extension.value.get_values_for_type(x509.UniformResourceIdentifier))


def config(plan: LabPlan, member: str) -> dict[str, Any]:
    return dict(yaml.safe_load((plan.directory.config / f"{member}.yaml").read_text()))


def test_every_configuration_is_valid_for_its_process(plan: LabPlan) -> None:
    kinds = {
        process.kind: check_file(Path(process.argv[-1]))
        for process in plan.of_kind("node", "hub", "gateway", "device")
    }
    assert kinds == {
        "hub": "hub configuration",
        "node": "node configuration",
        "gateway": "gateway configuration",
    }


def test_hubs_have_a_hubs_certificate_and_nothing_that_ends_a_route(plan: LabPlan) -> None:
    for hub in plan.lab["hubs"]:
        settings, _ = load_hub_config(plan.directory.config / f"{hub['id']}.yaml")
        assert settings.hub_id == hub["id"]
        assert {"reserves", "access", "quota", "limits"}.isdisjoint(config(plan, hub["id"]))
        assert Identity("atlantic", Role.HUB, hub["id"]).uri in names(Path(hub["cert"]))
    assert {hub["id"] for hub in plan.lab["hubs"]}.isdisjoint(node["id"] for node in plan.lab["nodes"])


def test_a_couriered_link_has_no_device_and_room_for_its_table(plan: LabPlan) -> None:
    for member in ("can-site-x", "hub-1"):
        for link in config(plan, member)["links"]:
            assert "device" not in link
            assert link["pool_max_bytes"] >= 32 << 20
    assert plan.lab["devices"] == []


def test_ocean_paths_are_dialled_instead_of_the_peers_own_address(plan: LabPlan) -> None:
    places = {entry["id"]: entry["grpc"] for entry in plan.lab["nodes"] + plan.lab["hubs"]}
    dialled = config(plan, "can-site-x")["addresses"]
    assert dialled.keys() == {"uk-site-z", "hub-1", "hub-2", "hub-3"}
    assert all(dialled[peer] != places[peer] for peer in dialled)


def test_a_link_to_a_hub_may_be_fed_by_a_device_pair_like_any_other(tmp_path: Path) -> None:
    fed = load_network("dske")
    link = fed.links[0]
    fed = msgspec.structs.replace(fed, links=[msgspec.structs.replace(link, psrd_bytes=0), *fed.links[1:]])
    directory = LabDirectory(tmp_path)
    try:
        plan = Planner(Lab.of(fed), directory).write()
    finally:
        directory.remove_proofs()
    assert [entry["id"] for entry in plan.lab["devices"]] == [f"qkd-{link.link_id}"]
    _, hub = load_hub_config(directory.config / "hub-1.yaml")
    assert [section.device is not None for section in hub.links] == [True, False]
    assert check_file(directory.config / f"qkd-{link.link_id}.yaml") == "device configuration"


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> LabPlan:
    directory = LabDirectory(tmp_path_factory.mktemp("paper"))
    try:
        return Planner(load_lab("paper"), directory).write()
    finally:
        directory.remove_proofs()


def test_three_key_managers_share_neither_directory_nor_certificates(paper: LabPlan) -> None:
    domains = paper.lab["domains"]
    assert [domain["id"] for domain in domains] == ["can", "dske", "uk"]
    roots = {Path(path).read_bytes() for domain in domains for path in domain["ca"].values()}
    assert len(roots) == 9
    assert len({endpoint for domain in domains for endpoint in domain["etcd"]["endpoints"]}) == 3
    assert len({member for domain in domains for member in domain["etcd"]["members"]}) == 3
    for process in paper.of_kind("node", "hub", "gateway", "device"):
        check_file(Path(process.argv[-1]))
    assert len({process.id for process in paper.processes}) == len(paper.processes)


def test_borders_meet_in_pairs_and_know_each_other_by_certificate(paper: LabPlan) -> None:
    urls = {entry["node"]: entry["url020"] for entry in paper.lab["gateways"] if "url020" in entry}
    meetings = {"can-site-z": "dske-can-site-z", "uk-site-x": "dske-uk-site-x"}
    meetings |= {there: here for here, there in meetings.items()}
    assert urls.keys() == meetings.keys()
    for here, there in meetings.items():
        border = config(paper, here)["border"]
        (peer,) = border["peers"]
        assert border["url"] == urls[here]
        assert border["gateways"] == [f"gw-{here}"]
        assert (peer["kme_id"], peer["url"]) == (there, urls[there])
        (known,) = config(paper, f"gw-{here}")["etsi020"]["peers"]
        shown = x509.load_pem_x509_certificate(
            Path(config(paper, f"gw-{there}")["etsi020"]["cert"]).read_bytes()
        )
        names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert known["names"][0] in names.get_values_for_type(x509.DNSName)
        shown.verify_directly_issued_by(x509.load_pem_x509_certificate(Path(known["ca"]).read_bytes()))
    assert "etsi020" not in config(paper, "gw-can-site-x")
    assert "border" not in config(paper, "can-site-x")


def test_the_papers_ocean_lies_between_the_two_dske_nodes_only(paper: LabPlan) -> None:
    delays = {tuple(relay["between"]): relay["one_way_delay_ms"] for relay in paper.lab["relays"]}
    direct = delays.pop(("dske-can-site-z", "dske-uk-site-x"))
    for hub in paper.lab["hubs"]:
        assert sum(ms for ends, ms in delays.items() if hub["id"] in ends) == direct == 42.5
    assert len(delays) == 4
    rates = {device["id"]: config(paper, device["id"])["rate_bps"] for device in paper.lab["devices"]}
    assert sorted(rates.values()) == [352_000, 741_000, 2_890_000, 3_950_000]


def test_buffers_are_kept_where_their_master_is_homed(tmp_path: Path) -> None:
    lab = load_lab("paper")
    pair = BufferedPair(master="can-sae-a", slave="uk-sae-b", buffer=64)
    domains = [msgspec.structs.replace(lab.domains[0], foreign_buffers=[pair]), *lab.domains[1:]]
    directory = LabDirectory(tmp_path)
    try:
        plan = Planner(Lab(lab.name, tuple(domains)), directory).write()
    finally:
        directory.remove_proofs()
    assert config(plan, "can-site-x")["foreign_buffers"][0]["buffer"] == 64
    assert "foreign_buffers" not in config(plan, "can-site-z")
