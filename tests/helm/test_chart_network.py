"""The NetworkPolicies, evaluated: exactly the planes of the architecture pass, everything else does not.

``_Policies`` is the rule of networking.k8s.io/v1 for pods of one namespace and for addresses outside: a
pod that some policy selects for a direction gets only what one of them admits; both ends must agree.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.helm.chart import CI_VALUES, Object, containers, of_kind, pod_specs, render

EACH_FILE = pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem)
_FOLDER = CI_VALUES[0].parent
Edge = tuple[str, str, str]


def _selects(selector: Object, labels: Object) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(
        labels.get(one["key"]) in one["values"]
        for one in selector.get("matchExpressions", ())
        if one["operator"] == "In"
    )


class _Policies:
    """The policies and pods of one release."""

    def __init__(self, objects: tuple[Object, ...]) -> None:
        self._specs = [one["spec"] for one in of_kind(objects, "NetworkPolicy")]
        self.pods: dict[str, tuple[Object, dict[str, int]]] = {}
        for _, labels, spec in pod_specs(objects):
            ports = {
                port["name"]: port["containerPort"]
                for one in containers(spec)
                for port in one.get("ports", ())
            }
            self.pods[self._name(labels)] = (labels, ports)

    @staticmethod
    def _name(labels: Object) -> str:
        component = labels["app.kubernetes.io/component"]
        return f"{component}/{labels['keymesh.io/id']}" if "keymesh.io/id" in labels else str(component)

    def isolated(self, pod: str) -> set[str]:
        """Directions in which nothing passes by itself."""
        labels = self.pods[pod][0]
        return {
            kind for one in self._specs if _selects(one["podSelector"], labels) for kind in one["policyTypes"]
        }

    def rules(self, pod: str, direction: str) -> list[Object]:
        """Rules of all policies that select the pod."""
        labels = self.pods[pod][0]
        return [
            rule
            for one in self._specs
            if _selects(one["podSelector"], labels)
            for rule in one.get(direction, ())
        ]

    def edges(self) -> set[Edge]:
        """Who reaches which port of whom, within the release."""
        found: set[Edge] = set()
        for source, target in product(self.pods, self.pods):
            for port, number in self.pods[target][1].items():
                if self._agrees(self.rules(source, "egress"), "to", target, port, number) and self._agrees(
                    self.rules(target, "ingress"), "from", source, port, number
                ):
                    found.add((source, target, port))
        return found

    def _agrees(self, rules: list[Object], side: str, other: str, port: str, number: int) -> bool:
        return any(
            any(one["port"] in {port, number} for one in rule["ports"])
            and any("podSelector" in peer and "namespaceSelector" not in peer
                    and _selects(peer["podSelector"], self.pods[other][0]) for peer in rule[side])
            for rule in rules
        )  # fmt: skip

    def outside(self, direction: str) -> set[Edge]:
        """Pod, address or namespace, and port, for what comes from or goes to the outside."""
        side = {"ingress": "from", "egress": "to"}[direction]
        return {
            (pod, _place(peer), str(port["port"]))
            for pod in self.pods
            for rule in self.rules(pod, direction)
            for peer in rule[side]
            if "ipBlock" in peer or "namespaceSelector" in peer
            for port in rule["ports"]
        }


def _place(peer: Object) -> str:
    if "ipBlock" in peer:
        return str(peer["ipBlock"]["cidr"])
    found: Any = {
        **peer["namespaceSelector"]["matchLabels"],
        **peer.get("podSelector", {}).get("matchLabels", {}),
    }
    return " ".join(sorted(found.values()))


@EACH_FILE
def test_everything_is_shut_but_for_what_rules_name(values: Path) -> None:
    objects = render(values)
    policies = _Policies(objects)
    for pod in policies.pods:
        assert policies.isolated(pod) == {"Ingress", "Egress"}, pod
        for direction, side in (("ingress", "from"), ("egress", "to")):
            for rule in policies.rules(pod, direction):
                assert rule.get(side), f"{pod}: an empty list admits everybody"
                assert rule.get("ports"), f"{pod}: no ports admit all ports"
                assert all(one.keys() <= {"protocol", "port"} for one in rule["ports"])
                assert all(one.get("namespaceSelector") != {} for one in rule[side]), pod


def test_a_lab_has_exactly_these_paths() -> None:
    nodes, hubs = ("can-site-x", "uk-site-z"), ("hub-1", "hub-2", "hub-3")
    expected: set[Edge] = set()
    for member in [*(f"node/{one}" for one in nodes), *(f"hub/{one}" for one in hubs)]:
        expected |= {(member, "etcd", "client")}
    for one, other in (nodes, nodes[::-1]):
        expected |= {(f"node/{one}", f"node/{other}", "grpc")}
        expected |= {(f"gateway/gw-{one}", f"node/{one}", "grpc"), ("test", f"gateway/gw-{one}", "https")}
        for hub in hubs:
            expected |= {(f"node/{one}", f"hub/{hub}", "grpc"), (f"hub/{hub}", f"node/{one}", "grpc")}
            if (one, hub) != ("uk-site-z", "hub-3"):  # fed by hand
                device = f"device/{'-'.join(sorted((one, hub)))}"
                expected |= {(end, device, port) for end in (f"node/{one}", f"hub/{hub}") for port in "ab"}
    expected |= {("etcd", "etcd", "peer"), ("directory-job", "etcd", "client")}
    policies = _Policies(render(_FOLDER / "lab-dske-values.yaml"))
    assert policies.edges() == expected
    assert policies.outside("egress") == {(pod, "kube-dns kube-system", "53") for pod in policies.pods}
    saes = {
        (pod, cidr, "https")
        for pod in policies.pods
        if pod.startswith("gateway/")
        for cidr in ("0.0.0.0/0", "::/0")
    }
    assert policies.outside("ingress") == saes


def test_hubs_do_not_reach_each_other_nor_whom_they_have_no_link_with() -> None:
    sets = (
        'lab.links=[{"between":["can-site-x","hub-1"]},{"between":["can-site-x","hub-2"]},{"between":["uk-site-z","hub-3"]}]',
    )
    grades = ("network.grades.pairs=[]",)
    edges = _Policies(render(_FOLDER / "lab-dske-values.yaml", sets=sets + grades)).edges()
    hubs = {
        (source, target) for source, target, port in edges if "hub/" in source + target and port == "grpc"
    }
    linked = {
        ("node/can-site-x", "hub/hub-1"),
        ("node/can-site-x", "hub/hub-2"),
        ("node/uk-site-z", "hub/hub-3"),
    }
    assert hubs == linked | {(target, source) for source, target in linked}


def test_a_site_has_exactly_these_paths() -> None:
    policies = _Policies(render(_FOLDER / "site-values.yaml"))
    node, gateway = "node/kme-a", "gateway/gw-a"
    assert policies.edges() == {
        (gateway, node, "grpc"),
        ("import-job", node, "grpc"),
        ("test", gateway, "https"),
    }
    dns = {(pod, "kube-dns kube-system", "53") for pod in policies.pods}
    assert policies.outside("egress") - dns == {
        (node, "198.51.100.0/28", "7001"),  # kme-b
        (node, "203.0.113.7/32", "7101"),  # hub-1
        (node, "198.51.100.64/29", "2379"),  # etcd
        (node, "10.30.0.5/32", "8443"),  # the QKD device
        (gateway, "203.0.113.64/28", "443"),  # the other owner's key manager, ETSI 020
        ("test", "198.51.100.0/24", "443"),
    }
    assert policies.outside("ingress") == {
        (node, "198.51.100.0/28", "grpc"),
        (node, "203.0.113.7/32", "grpc"),
        (node, "10.0.9.0/24", "grpc"),  # operators
        (node, "monitoring", "ops"),
        (gateway, "10.20.0.0/16", "https"),
        (gateway, "true", "https"),
        (gateway, "203.0.113.64/28", "border"),
        (gateway, "monitoring", "ops"),
    }


def test_a_directory_admits_the_other_sites_and_a_hub_its_clients() -> None:
    policies = _Policies(render(_FOLDER / "site-existing-secrets-values.yaml"))
    assert {one for one in policies.outside("ingress") if one[0] == "etcd"} == {
        ("etcd", "192.0.2.0/24", "client")
    }
    assert ("etcd", "etcd", "peer") in policies.edges()
    hub = _Policies(render(_FOLDER / "hub-values.yaml"))
    assert hub.edges() == set()
    assert ("hub/hub-1", "monitoring", "4317") in hub.outside("egress")
    assert hub.outside("ingress") == {
        ("hub/hub-1", "192.0.2.0/24", "grpc"),
        ("hub/hub-1", "198.51.100.0/24", "grpc"),
    }


def test_the_kubelet_is_admitted_where_the_network_does_not_do_it() -> None:
    sets = ('networkPolicy.kubelet=[{"ipBlock":{"cidr":"10.9.0.0/16"}}]',)
    assert ("hub/hub-1", "10.9.0.0/16", "ops") in _Policies(
        render(_FOLDER / "hub-values.yaml", sets=sets)
    ).outside("ingress")
    metro = _Policies(render(_FOLDER / "lab-metro-values.yaml", sets=sets))
    admitted = metro.outside("ingress")
    for pod in ("device/can-site-x-can-site-y", "device/can-site-y-can-site-z"):
        assert {(pod, "10.9.0.0/16", port) for port in "ab"} <= admitted


def test_dns_is_reached_at_the_port_of_its_pods() -> None:
    sets = ("networkPolicy.dnsPort=5353",)
    policies = _Policies(render(_FOLDER / "lab-metro-values.yaml", sets=sets))
    assert policies.outside("egress") == {(pod, "kube-dns kube-system", "5353") for pod in policies.pods}
