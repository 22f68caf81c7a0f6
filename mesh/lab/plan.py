"""From a network to files and commands: certificates, configurations, ports, ``lab.json``.

Writes everything a lab needs before anything starts, so that every process is started,
and restarted, by the same command. Must not start or contact anything.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import msgspec
import yaml

from mesh.lab.ground import find_etcd, free_ports
from mesh.lab.networks import GatewaySpec, HubSpec, LinkSpec, Network, NodeSpec
from mesh.lab.processes import Process
from mesh.lab.state import LabDirectory
from mesh.pki.authority import CredentialFiles, Pki

TOOL_ID = "lab"
# People watch labs: what was killed is found again sooner than in production.
_REDIAL_MAX_S = 5.0


@dataclass(frozen=True, slots=True)
class EtcdMember:
    """One etcd member's ports."""

    id: str
    client_port: int
    peer_port: int


@dataclass(slots=True)
class LabPlan:
    """All that is needed to start a lab.

    Attributes:
        network: what is planned.
        directory: where its files are.
        members: etcd members.
        processes: in the order of starting; groups of one kind start together.
        lab: the content of ``lab.json``, pids still 0.
    """

    network: Network
    directory: LabDirectory
    members: list[EtcdMember]
    processes: list[Process] = field(default_factory=list)
    lab: dict[str, Any] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[Process]:
        """The processes of some kinds."""
        return [process for process in self.processes if process.kind in kinds]


class Planner:
    """Writes one lab's files.

    Args:
        network: what to plan.
        directory: where.
    """

    def __init__(self, network: Network, directory: LabDirectory) -> None:
        self._network = network
        self._dir = directory
        gateways = sum(len(node.gateways) for node in network.nodes)
        members = len(network.members)
        wan = 2 * sum(network.talks(a, b) for a, b in combinations(network.members, 2))
        self._ports = free_ports(
            2 * network.etcd.members + 3 * len(network.links) + 2 * members + 2 * gateways + wan
        )
        self._keymesh = [sys.executable, "-m", "mesh.cli"]
        self._pki = Pki.create(network.domain)
        self._roots = self._pki.save(directory.pki)
        self._grpc = {kme_id: self._place() for kme_id in network.members}
        self._dial: dict[str, dict[str, str]] = {kme_id: {} for kme_id in network.members}
        self._device_url: dict[tuple[str, str], str] = {}
        etcd = [
            EtcdMember(f"etcd-{index + 1}", next(self._ports), next(self._ports))
            for index in range(network.etcd.members)
        ]
        self.plan = LabPlan(network, directory, etcd)

    def write(self) -> LabPlan:
        """Write all files; return what to start."""
        plan = self.plan
        tool = self._pki.tool(TOOL_ID).save(self._dir.pki, f"tool-{TOOL_ID}")
        plan.lab = {
            "version": 1,
            "network": self._network.name,
            "domains": [self._domain()],
            "nodes": [],
            "hubs": [],
            "gateways": [],
            "saes": [],
            "devices": [],
            "relays": [],
            "tool": {"cert": str(tool.cert), "key": str(tool.key)},
        }
        plan.lab["ca"] = plan.lab["domains"][0]["ca"]
        plan.lab["etcd"] = plan.lab["domains"][0]["etcd"]
        for member in plan.members:
            self._plan_etcd(member)
        for link in self._network.links:
            if not link.is_couriered:
                self._plan_device(link)
        self._plan_wan()
        for hub in self._network.hubs:
            self._plan_hub(hub)
        for node in self._network.nodes:
            self._plan_node(node)
        for node in self._network.nodes:
            for gateway in node.gateways:
                self._plan_gateway(node, gateway)
        for folder in (self._dir.audit, self._dir.data):
            folder.mkdir(exist_ok=True, mode=0o700)
        if self._dir.proofs is not None:
            self._dir.proofs.mkdir(mode=0o700)
        self._dir.network.mkdir(exist_ok=True)
        (self._dir.network / "document.yaml").write_text(
            yaml.safe_dump(self._network.document_source(), sort_keys=False), encoding="utf-8"
        )
        return plan

    def _place(self) -> str:
        return f"127.0.0.1:{next(self._ports)}"

    def _add(self, kind: str, process_id: str, argv: list[str]) -> None:
        self.plan.processes.append(
            Process(id=process_id, kind=kind, argv=argv, log=str(self._dir.log_of(process_id)))
        )

    def _write_config(self, process_id: str, config: dict[str, Any]) -> str:
        path = self._dir.config / f"{process_id}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return str(path)

    def _tls(self, root: str, files: CredentialFiles) -> dict[str, str]:
        return {"ca": str(self._roots[root]), "cert": str(files.cert), "key": str(files.key)}

    def _domain(self) -> dict[str, Any]:
        # etcd takes the certificate's CN for the user when no password is given.
        client = self._pki.etcd_client("root").save(self._dir.pki, "etcd-root")
        return {
            "id": self._network.domain,
            "ca": {name: str(self._roots[name]) for name in ("sae", "node", "gateway")},
            "etcd": {
                "endpoints": [f"https://127.0.0.1:{member.client_port}" for member in self.plan.members],
                **self._tls("etcd", client),
                "username": "root",
                "password_file": str(self._dir.password_file("root")),
                "pids": [0 for _ in self.plan.members],
                "members": [member.id for member in self.plan.members],
            },
        }

    def _plan_etcd(self, member: EtcdMember) -> None:
        files = self._pki.etcd_server(member.id).save(self._dir.pki, member.id)
        root = str(self._roots["etcd"])
        client, peer = (f"https://127.0.0.1:{port}" for port in (member.client_port, member.peer_port))
        cluster = ",".join(f"{other.id}=https://127.0.0.1:{other.peer_port}" for other in self.plan.members)
        options = {
            "name": member.id,
            "data-dir": str(self._dir.etcd / member.id),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": cluster,
            "initial-cluster-token": f"keymesh-{self._network.name}",
            "initial-cluster-state": "new",
            "trusted-ca-file": root,
            "cert-file": str(files.cert),
            "key-file": str(files.key),
            "peer-trusted-ca-file": root,
            "peer-cert-file": str(files.cert),
            "peer-key-file": str(files.key),
            "auto-compaction-retention": "1",
            "log-level": "warn",
        }
        argv = [str(find_etcd()), "--client-cert-auth", "--peer-client-cert-auth"]
        self._add("etcd", member.id, argv + [f"--{name}={value}" for name, value in options.items()])

    def _plan_device(self, link: LinkSpec) -> None:
        device_id = f"qkd-{link.link_id}"
        ends: dict[str, Any] = {}
        for letter, kme_id in zip("ab", sorted(link.between), strict=True):
            server = self._pki.device_server(f"qkd-{kme_id}").save(self._dir.pki, f"{device_id}-{letter}")
            place = self._place()
            ends[letter] = {
                "kme_id": f"qkd-{kme_id}",
                "sae_id": kme_id,
                "listen": place,
                "tls": self._tls("device", server),
            }
            self._device_url[link.link_id, kme_id] = f"https://{place}"
        control = self._place()
        config = self._write_config(
            device_id,
            {
                "device_id": device_id,
                "rate_bps": link.rate_bps,
                "qber": link.qber,
                "initial_bytes": link.initial_bytes,
                "buffer_bytes": link.buffer_bytes or max(64 << 20, link.initial_bytes),
                "control": control,
                **ends,
            },
        )
        self._add("device", device_id, [*self._keymesh, "qkd-device", "run", "--config", config])
        self.plan.lab["devices"].append({"id": device_id, "pid": 0, "control": f"http://{control}"})

    def _plan_wan(self) -> None:
        for a, b in combinations(sorted(self._network.members), 2):
            delay_ms = self._network.delay_ms(a, b)
            if delay_ms == 0 or not self._network.talks(a, b):
                continue
            wan_id = f"wan-{a}--{b}"
            self._dial[a][b], self._dial[b][a] = self._place(), self._place()
            config = self._write_config(
                wan_id,
                {
                    "wan_id": wan_id,
                    "one_way_delay_ms": delay_ms,
                    "paths": [
                        {"listen": self._dial[a][b], "target": self._grpc[b]},
                        {"listen": self._dial[b][a], "target": self._grpc[a]},
                    ],
                },
            )
            self._add("relay", wan_id, [sys.executable, "-m", "mesh.lab.wan", config])
            self.plan.lab["relays"].append(
                {"id": wan_id, "pid": 0, "one_way_delay_ms": delay_ms, "between": [a, b]}
            )

    def _plan_hub(self, hub: HubSpec) -> None:
        files = self._pki.hub(hub.id, hosts=["127.0.0.1", "localhost"]).save(self._dir.pki, hub.id)
        self._plan_member("hub", hub.id, files, {"hub_id": hub.id})

    def _plan_node(self, node: NodeSpec) -> None:
        files = self._pki.node(node.id, hosts=["127.0.0.1", "localhost"]).save(self._dir.pki, node.id)
        own = {
            "kme_id": node.id,
            "reserves": msgspec.to_builtins(self._network.reserves),
            "limits": msgspec.to_builtins(self._network.limits),
            "quota": msgspec.to_builtins(self._network.quota),
            "access": "open",
            "audit_log": str(self._dir.audit / f"{node.id}.jsonl"),
        }
        self._plan_member("node", node.id, files, own)

    def _plan_member(self, kind: str, member_id: str, files: CredentialFiles, own: dict[str, Any]) -> None:
        """A node or a hub; ``own`` is what its kind's configuration has beyond the common."""
        http = self._place()
        data = self._dir.data / member_id
        etcd = self.plan.lab["etcd"]
        config = own | {
            "domain_id": self._network.domain,
            "data_dir": str(data),
            "listen": {"grpc": self._grpc[member_id], "http": http},
            "tls": self._tls("node", files),
            "directory": {
                "etcd": {
                    "endpoints": [endpoint.removeprefix("https://") for endpoint in etcd["endpoints"]],
                    **self._tls(
                        "etcd", self._pki.etcd_client(member_id).save(self._dir.pki, f"etcd-{member_id}")
                    ),
                    "username": member_id,
                    "password_file": str(self._dir.password_file(member_id)),
                }
            },
            "network": {"operator_public_key": str(self._dir.network / "operator.pub.pem")},
            "redial_max_s": _REDIAL_MAX_S,
            "links": [
                self._link(member_id, link) for link in self._network.links if member_id in link.between
            ],
        }
        if self._dir.proofs is not None:
            config["proof_dir"] = str(self._dir.proofs)
        if self._network.pad_audit:
            config["pad_audit_file"] = str(self._dir.pad_audit_of(member_id))
        if self._dial[member_id]:
            config["addresses"] = self._dial[member_id]
        path = self._write_config(member_id, config)
        self._add(kind, member_id, [*self._keymesh, kind, "run", "--config", path])
        self.plan.lab["hubs" if kind == "hub" else "nodes"].append(
            {
                "id": member_id,
                "domain": self._network.domain,
                "grpc": self._grpc[member_id],
                "http": http,
                "pid": 0,
                "dir": str(data),
                "log": str(self._dir.log_of(member_id)),
                "cert": str(files.cert),
                "key": str(files.key),
            }
        )

    def _link(self, kme_id: str, link: LinkSpec) -> dict[str, Any]:
        peer = next(end for end in link.between if end != kme_id)
        section: dict[str, Any] = {
            "peer": peer,
            "pool_max_bytes": max(link.pool_max_bytes, *link.courier_bytes),
            "window_bytes": link.window_bytes,
        }
        if not link.is_couriered:
            files = self._pki.device_client(kme_id).save(self._dir.pki, f"{kme_id}-at-{link.link_id}")
            section["device"] = {
                "url": self._device_url[link.link_id, kme_id],
                **self._tls("device", files),
                "sae_id": peer,
            }
        return section

    def _plan_gateway(self, node: NodeSpec, gateway: GatewaySpec) -> None:
        server = self._pki.gateway_server(gateway.id).save(self._dir.pki, f"{gateway.id}-server")
        client = self._pki.gateway_client(gateway.id).save(self._dir.pki, f"{gateway.id}-node")
        https, http = self._place(), self._place()
        config = self._write_config(
            gateway.id,
            {
                "gateway_id": gateway.id,
                "domain_id": self._network.domain,
                "listen": {"https": https, "http": http},
                "node": {"address": self._grpc[node.id], "kme_id": node.id},
                "node_tls": self._tls("node", client),
                "tls": {**self._tls("sae", server)},
                "audit_log": str(self._dir.audit / f"{gateway.id}.jsonl"),
            },
        )
        self._add("gateway", gateway.id, [*self._keymesh, "gateway", "run", "--config", config])
        self.plan.lab["gateways"].append(
            {
                "id": gateway.id,
                "node": node.id,
                "url": f"https://{https}",
                "http": http,
                "pid": 0,
                "log": str(self._dir.log_of(gateway.id)),
            }
        )
        for sae_id in gateway.saes:
            files = self._pki.sae(sae_id).save(self._dir.pki, f"sae-{sae_id}")
            self.plan.lab["saes"].append(
                {
                    "id": sae_id,
                    "node": node.id,
                    "gateway": gateway.id,
                    "cert": str(files.cert),
                    "key": str(files.key),
                }
            )
