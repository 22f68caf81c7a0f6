"""Network files: the shipped ones load, wrong ones are refused by the name of the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mesh.errors import ConfigError
from mesh.lab.networks import load_lab, load_network, parse_lab, shipped_networks


def minimal() -> dict[str, Any]:
    return {
        "name": "tiny",
        "domain": "lab",
        "nodes": [
            {"id": "kme-a", "gateways": [{"id": "gw-a", "saes": ["sae-a"]}]},
            {"id": "kme-b", "gateways": [{"id": "gw-b", "saes": ["sae-b"]}]},
        ],
        "links": [{"between": ["kme-b", "kme-a"]}],
    }


def parsed(data: dict[str, Any]) -> None:
    parse_lab(yaml.safe_dump(data), "here.yaml")


@pytest.mark.parametrize("name", shipped_networks())
def test_shipped_networks_load_and_make_a_valid_document(name: str) -> None:
    for network in load_lab(name).domains:
        document = network.document()
        assert document.domain_id == network.domain
        assert set(document.nodes) == set(network.members)


def test_metro_is_the_papers_toronto() -> None:
    network = load_network("metro")
    assert [link.rate_bps for link in network.links] == [3_950_000, 2_890_000]
    assert len(network.nodes) == 3
    for end in (network.nodes[0], network.nodes[-1]):
        assert sum(len(gateway.saes) for gateway in end.gateways) >= 2
    homes = network.document()
    first, *others = homes.saes
    assert any(homes.home(first) != homes.home(other) for other in others)


def test_a_users_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(minimal()))
    assert load_network(str(file)).links[0].link_id == "kme-a--kme-b"


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="metro"):
        load_network("no-such-network")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("nodes", 0, "id"), "KME A", r"nodes\[0\].id"),
        (("nodes", 1, "id"), "kme-a", "kme-a is there twice"),
        (("nodes", 1, "gateways", 0, "id"), "gw-a", "gw-a is there twice"),
        (("nodes", 1, "gateways", 0, "saes"), ["sae-a"], "sae-a is there twice"),
        (("nodes", 0, "gateways", 0, "saes"), ["Sae_A"], "saes"),
        (("nodes", 0, "gateways"), [], "two different nodes"),
        (("links", 0, "between"), ["kme-a", "kme-x"], r"links\[0\].between"),
        (("links", 0, "between"), ["kme-a"], "between"),
        (("links", 0, "rate"), 5, "rate"),
        (("links", 0, "rate_bps"), -5, "rate_bps"),
        (("links", 0, "one_way_delay_ms"), "slow", "one_way_delay_ms"),
        (("links", 0, "buffer_bytes"), 1, r"links\[0\].buffer_bytes"),
        (("links", 0, "psrd_bytes"), "many", "psrd_bytes"),
        (("links", 0, "psrd_bytes"), [1, 2, 3], "psrd_bytes"),
        (("links", 0, "psrd_bytes"), ["64MiB", 0], r"links\[0\].psrd_bytes"),
        (("hubs",), [{"id": "kme-a"}], "kme-a is there twice"),
        (("hubs",), [{"id": "hub-1", "saes": ["x"]}], "saes"),
        (("grades",), {"default": {"grade": "magic"}}, "grades.default.grade"),
        (("reserves",), {"high_water_bytes": 1, "low_water_bytes": 2}, "low_water_bytes"),
        (("etcd",), {"members": 9}, "members"),
        (("colour",), "blue", "colour"),
    ],
)
def test_wrong_fields_are_refused_by_name(path: tuple[str | int, ...], value: object, named: str) -> None:
    data = minimal()
    parsed(data)
    target: Any = data
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(ConfigError, match=named) as caught:
        parsed(data)
    assert "here.yaml" in str(caught.value)


def test_delays_add_up_along_the_quickest_way() -> None:
    data = minimal()
    data["nodes"] += [{"id": "kme-c"}, {"id": "kme-d"}]
    data["links"] = [
        {"between": ["kme-a", "kme-b"], "one_way_delay_ms": 10},
        {"between": ["kme-b", "kme-c"], "one_way_delay_ms": 5},
        {"between": ["kme-a", "kme-c"], "one_way_delay_ms": 40},
        {"between": ["kme-c", "kme-d"]},
    ]
    (network,) = parse_lab(yaml.safe_dump(data), "here.yaml").domains
    assert network.delay_ms("kme-a", "kme-d") == 15
    assert network.delay_ms("kme-d", "kme-a") == 15
    assert network.delay_ms("kme-c", "kme-d") == 0


def test_hubs_become_hubs_of_the_document_and_their_links_are_supplied_by_courier() -> None:
    network = load_network("dske")
    document = network.document()
    policy = document.policy("can-site-x", "uk-site-z")
    assert str(policy.grade) == "dske(2,3)"
    assert [document.nodes[hub].role for hub in policy.hubs] == ["hub"] * 3
    assert "can-site-x" not in document.neighbours("uk-site-z")
    for link in network.links:
        assert link.is_couriered
        assert network.issuer(link) in policy.hubs


def test_a_courier_brings_the_same_for_both_lanes_or_something_else_for_each() -> None:
    data = minimal()
    for psrd, there_and_back in (("64MiB", (64 << 20, 64 << 20)), (["1MiB", 4096], (1 << 20, 4096))):
        data["links"][0]["psrd_bytes"] = psrd
        (link,) = parse_lab(yaml.safe_dump(data), "here.yaml").domains[0].links
        assert link.courier_bytes == there_and_back
    assert parse_lab(yaml.safe_dump(data), "here.yaml").domains[0].issuer(link) == "kme-b"
    assert not load_network("metro").links[0].is_couriered


def test_paths_are_emulated_only_between_those_who_talk() -> None:
    network = load_network("multipath")
    assert network.talks("west", "north")
    assert network.talks("west", "harbour")
    assert not network.talks("north", "south")
    assert not network.talks("west", "nowhere")


def two_domains() -> dict[str, Any]:
    here = minimal() | {"domain": "here", "foreign": [border("b-", "kme-b", "far-a", "there")]}
    there = yaml.safe_load(yaml.safe_dump(minimal()).replace("kme-", "far-").replace("gw-", "far-gw-"))
    there |= {"domain": "there", "foreign": [border("s", "far-a", "kme-b", "here")]}
    for node, sae in zip(there["nodes"], ("b-a", "b-b"), strict=True):
        node["gateways"][0]["saes"] = [sae]
    for domain in (here, there):
        del domain["name"]
    return {"name": "two", "domains": [here, there]}


def border(prefix: str, kme_id: str, peer: str, domain: str) -> dict[str, str]:
    return {"prefix": prefix, "border": kme_id, "peer": peer, "domain": domain}


def test_several_domains_meet_at_borders() -> None:
    lab = parse_lab(yaml.safe_dump(two_domains()), "here.yaml")
    assert [network.borders for network in lab.domains] == [["kme-b"], ["far-a"]]
    assert lab.domains[0].document().border_for("b-b") == "kme-b"
    assert {network.name for network in lab.domains} == {"two"}


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("domains", 0, "foreign", 0, "border"), "far-a", r"here.foreign\[0\].border"),
        (("domains", 0, "foreign", 0, "peer"), "far-b", r"here.foreign\[0\].peer"),
        (("domains", 0, "foreign", 0, "prefix"), "sae-", "foreign"),
        (("domains", 1, "domain"), "here", "here is there twice"),
        (("domains", 1, "nodes", 0, "id"), "kme-a", "kme-a is there twice"),
        (("domains", 1, "colour"), "blue", r"domains\[1\].*colour"),
        (("domains",), {}, "a list of networks"),
        (("links",), [], "a list of networks"),
        (("domains", 1), 5, r"domains\[1\]"),
    ],
)
def test_wrong_fields_of_several_domains_are_refused_by_name(
    path: tuple[str | int, ...], value: object, named: str
) -> None:
    data = two_domains()
    target: Any = data
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(ConfigError, match=named):
        parse_lab(yaml.safe_dump(data), "here.yaml")


def test_one_domain_is_asked_for_where_there_are_several() -> None:
    with pytest.raises(ConfigError, match="several domains"):
        load_network("paper")
