"""The part of a lab's plan that belongs to one domain: its authority, etcd, nodes, gateways, links.

Nothing here knows of another domain but what stands at a border: where the other key manager listens
and which certificates it shows there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import yaml

from mesh.lab.ground import find_etcd
from mesh.lab.networks import GatewaySpec, HubSpec, LinkSpec, Network, NodeSpec
from mesh.lab.state import DomainFolder, LabDirectory
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


@dataclass(frozen=True, slots=True)
class BorderPlace:
    """How another key manager meets a border node over ETSI GS QKD 020.

    Attributes:
        url: base URL of its first gateway's 020 listener: peers post there.
        ca: root of the certificate that its gateways show there, and come with.
        name: what that certificate says.
    """

    url: str
    ca: Path
    name: str


def ports_needed(network: Network) -> int:
    """At most so many ports are taken for a domain."""
    gateways = sum(len(node.gateways) for node in network.nodes)
    members = network.members
    paths = 3 * sum(network.talks(a, b) for a, b in combinations(members, 2))
    return 2 * network.etcd.members + 3 * len(network.links) + 2 * len(members) + 3 * gateways + paths


class DomainPlanner:
    """Writes one domain's files.

    Args:
        network: what to plan.
        directory: of the lab.
        folder: of the domain.
        ports: free ones.
        etcd_prefix: before the ids of its etcd members.
        add: plans a process: kind, id, command.
        lab: the content of ``lab.json``, to which the domain is added.
    """

    def __init__(
        self,
        network: Network,
        directory: LabDirectory,
        folder: DomainFolder,
        *,
        ports: Iterator[int],
        etcd_prefix: str,
        add: Callable[[str, str, list[str]], None],
        lab: dict[str, Any],
    ) -> None:
        self.network = network
        self.folder = folder
        self._dir = directory
        self._ports = ports
        self._add = add
        self._lab = lab
        self._keymesh = [sys.executable, "-m", "mesh.cli"]
        self._pki = Pki.create(network.domain)
        self._roots = self._pki.save(folder.pki)
        self._grpc = {kme_id: self._place() for kme_id in network.members}
        self._dial: dict[str, dict[str, str]] = {kme_id: {} for kme_id in network.members}
        self._device_url: dict[tuple[str, str], str] = {}
        self._listen020 = {
            gateway.id: self._place()
            for node in network.nodes
            if node.id in network.borders
            for gateway in node.gateways
        }
        self.members = tuple(
            EtcdMember(f"{etcd_prefix}etcd-{index + 1}", next(ports), next(ports))
            for index in range(network.etcd.members)
        )
        self._etcd: dict[str, Any] = {}
        self._meets: Mapping[str, BorderPlace] = {}

    def borders(self) -> dict[str, BorderPlace]:
        """Where other key managers meet this domain, by border node."""
        return {
            node.id: BorderPlace(
                f"https://{self._listen020[node.gateways[0].id]}",
                self._roots["border"],
                f"{node.id}.border.{self.network.domain}.keymesh.internal",
            )
            for node in self.network.nodes
            if node.id in self.network.borders
        }

    def write(self, borders: Mapping[str, BorderPlace]) -> dict[str, Any]:
        """Write all files of the domain; ``borders`` has those of all domains.

        Returns:
            Its etcd, as in ``lab.json``.
        """
        self._meets = borders
        entry = self._domain()
        self._etcd = entry["etcd"]
        self._lab["domains"].append(entry)
        for member in self.members:
            self._plan_etcd(member)
        for link in self.network.links:
            if not link.is_couriered:
                self._plan_device(link)
        self._plan_wan()
        for hub in self.network.hubs:
            self._plan_hub(hub)
        for node in self.network.nodes:
            self._plan_node(node)
        for node in self.network.nodes:
            for gateway in node.gateways:
                self._plan_gateway(node, gateway)
        self.folder.network.mkdir(exist_ok=True, parents=True)
        (self.folder.network / "document.yaml").write_text(
            yaml.safe_dump(self.network.document_source(), sort_keys=False), encoding="utf-8"
        )
        return self._etcd

    def _place(self) -> str:
        return f"127.0.0.1:{next(self._ports)}"

    def _write_config(self, process_id: str, config: dict[str, Any]) -> str:
        path = self._dir.config / f"{process_id}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return str(path)

    def _tls(self, root: str, files: CredentialFiles) -> dict[str, str]:
        return {"ca": str(self._roots[root]), "cert": str(files.cert), "key": str(files.key)}

    def _domain(self) -> dict[str, Any]:
        # etcd takes the certificate's CN for the user when no password is given.
        client = self._pki.etcd_client("root").save(self.folder.pki, "etcd-root")
        tool = self._pki.tool(TOOL_ID).save(self.folder.pki, f"tool-{TOOL_ID}")
        return {
            "id": self.network.domain,
            "ca": {name: str(self._roots[name]) for name in ("sae", "node", "gateway")},
            "etcd": {
                "endpoints": [f"https://127.0.0.1:{member.client_port}" for member in self.members],
                **self._tls("etcd", client),
                "username": "root",
                "password_file": str(self.folder.password_file("root")),
                "pids": [0 for _ in self.members],
                "members": [member.id for member in self.members],
            },
            "document": str(self.folder.network / "document.signed"),
            "tool": {"cert": str(tool.cert), "key": str(tool.key)},
        }

    def _plan_etcd(self, member: EtcdMember) -> None:
        files = self._pki.etcd_server(member.id).save(self.folder.pki, member.id)
        root = str(self._roots["etcd"])
        client, peer = (f"https://127.0.0.1:{port}" for port in (member.client_port, member.peer_port))
        cluster = ",".join(f"{other.id}=https://127.0.0.1:{other.peer_port}" for other in self.members)
        options = {
            "name": member.id,
            "data-dir": str(self._dir.etcd / member.id),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": cluster,
            "initial-cluster-token": f"keymesh-{self.network.domain}",
            "initial-cluster-state": "new",
            "trusted-ca-file": root,
            "cert-file": str(files.cert),
            "key-file": str(files.key),
            "peer-trusted-ca-file": root,
            "peer-cert-file": str(files.cert),
            "peer-key-file": str(files.key),
            "auto-compaction-retention": "1",
            # Passwords here are 24 random bytes: nobody guesses them, and a dozen nodes that come up on a
            # busy machine would keep etcd hashing for callers that have long given up.
            "bcrypt-cost": "4",
            "log-level": "warn",
        }
        argv = [str(find_etcd()), "--client-cert-auth", "--peer-client-cert-auth"]
        self._add("etcd", member.id, argv + [f"--{name}={value}" for name, value in options.items()])

    def _plan_device(self, link: LinkSpec) -> None:
        device_id = f"qkd-{link.link_id}"
        ends: dict[str, Any] = {}
        for letter, kme_id in zip("ab", sorted(link.between), strict=True):
            server = self._pki.device_server(f"qkd-{kme_id}").save(self.folder.pki, f"{device_id}-{letter}")
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
        self._lab["devices"].append({"id": device_id, "pid": 0, "control": f"http://{control}"})

    def _plan_wan(self) -> None:
        for a, b in combinations(sorted(self.network.members), 2):
            delay_ms = self.network.delay_ms(a, b)
            if delay_ms == 0 or not self.network.talks(a, b):
                continue
            wan_id = f"wan-{a}--{b}"
            self._dial[a][b], self._dial[b][a] = self._place(), self._place()
            echo = self._place()
            config = self._write_config(
                wan_id,
                {
                    "wan_id": wan_id,
                    "one_way_delay_ms": delay_ms,
                    "echo": echo,
                    "paths": [
                        {"listen": self._dial[a][b], "target": self._grpc[b]},
                        {"listen": self._dial[b][a], "target": self._grpc[a]},
                    ],
                },
            )
            self._add("relay", wan_id, [sys.executable, "-m", "mesh.lab.wan", config])
            self._lab["relays"].append(
                {"id": wan_id, "pid": 0, "one_way_delay_ms": delay_ms, "between": [a, b], "echo": echo}
            )

    def _plan_hub(self, hub: HubSpec) -> None:
        files = self._pki.hub(hub.id, hosts=["127.0.0.1", "localhost"]).save(self.folder.pki, hub.id)
        self._plan_member("hub", hub.id, files, {"hub_id": hub.id})

    def _plan_node(self, node: NodeSpec) -> None:
        files = self._pki.node(node.id, hosts=["127.0.0.1", "localhost"]).save(self.folder.pki, node.id)
        own = {
            "kme_id": node.id,
            "reserves": msgspec.to_builtins(self.network.reserves),
            "limits": msgspec.to_builtins(self.network.limits),
            "quota": msgspec.to_builtins(self.network.quota),
            "access": "open",
            "gateways": [gateway.id for gateway in node.gateways],
            "audit_log": str(self._dir.audit / f"{node.id}.jsonl"),
        }
        saes = {sae for gateway in node.gateways for sae in gateway.saes}
        if buffers := [one for one in self.network.foreign_buffers if one.master in saes]:
            own["foreign_buffers"] = msgspec.to_builtins(buffers)
        if node.id in self.network.borders:
            own["border"] = self._border(node)
        self._plan_member("node", node.id, files, own)

    def _etsi020(self, node: NodeSpec, place: str) -> dict[str, Any]:
        files = self._pki.border(node.id).save(self.folder.pki, f"border-{node.id}")
        return {
            "listen": place,
            "cert": str(files.cert),
            "key": str(files.key),
            "peers": [
                {
                    "kme_id": peer,
                    "url": self._meets[peer].url,
                    "ca": str(self._meets[peer].ca),
                    "names": [self._meets[peer].name],
                }
                for peer in self._peers(node)
            ],
        }

    def _peers(self, node: NodeSpec) -> dict[str, list[str]]:
        """Prefixes by the key manager that a border node meets."""
        peers: dict[str, list[str]] = {}
        for one in self.network.foreign:
            if one.border == node.id:
                peers.setdefault(one.peer, []).append(one.prefix)
        return peers

    def _border(self, node: NodeSpec) -> dict[str, Any]:
        return {
            "gateways": [gateway.id for gateway in node.gateways],
            "url": self._meets[node.id].url,
            "peers": [
                {"kme_id": peer, "url": self._meets[peer].url, "prefixes": prefixes}
                for peer, prefixes in self._peers(node).items()
            ],
        }

    def _plan_member(self, kind: str, member_id: str, files: CredentialFiles, own: dict[str, Any]) -> None:
        """A node or a hub; ``own`` is what its kind's configuration has beyond the common."""
        http = self._place()
        data = self._dir.data / member_id
        etcd = self._etcd
        config = own | {
            "domain_id": self.network.domain,
            "data_dir": str(data),
            "listen": {"grpc": self._grpc[member_id], "http": http},
            "tls": self._tls("node", files),
            "directory": {
                "etcd": {
                    "endpoints": [endpoint.removeprefix("https://") for endpoint in etcd["endpoints"]],
                    **self._tls(
                        "etcd", self._pki.etcd_client(member_id).save(self.folder.pki, f"etcd-{member_id}")
                    ),
                    "username": member_id,
                    "password_file": str(self.folder.password_file(member_id)),
                }
            },
            "network": {"operator_public_key": str(self.folder.network / "operator.pub.pem")},
            "redial_max_s": _REDIAL_MAX_S,
            "links": [
                self._link(member_id, link) for link in self.network.links if member_id in link.between
            ],
        }
        if self._dir.proofs is not None:
            config["proof_dir"] = str(self._dir.proofs)
        if self.network.pad_audit:
            config["pad_audit_file"] = str(self._dir.pad_audit_of(member_id))
        if self._dial[member_id]:
            config["addresses"] = self._dial[member_id]
        path = self._write_config(member_id, config)
        self._add(kind, member_id, [*self._keymesh, kind, "run", "--config", path])
        self._lab["hubs" if kind == "hub" else "nodes"].append(
            {
                "id": member_id,
                "domain": self.network.domain,
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
            files = self._pki.device_client(kme_id).save(self.folder.pki, f"{kme_id}-at-{link.link_id}")
            section["device"] = {
                "url": self._device_url[link.link_id, kme_id],
                **self._tls("device", files),
                "sae_id": peer,
            }
        return section

    def _plan_gateway(self, node: NodeSpec, gateway: GatewaySpec) -> None:
        server = self._pki.gateway_server(gateway.id).save(self.folder.pki, f"{gateway.id}-server")
        client = self._pki.gateway_client(gateway.id).save(self.folder.pki, f"{gateway.id}-node")
        https, http = self._place(), self._place()
        config: dict[str, Any] = {
            "gateway_id": gateway.id,
            "domain_id": self.network.domain,
            "listen": {"https": https, "http": http},
            "node": {"address": self._grpc[node.id], "kme_id": node.id},
            "node_tls": self._tls("node", client),
            "tls": {**self._tls("sae", server)},
            "audit_log": str(self._dir.audit / f"{gateway.id}.jsonl"),
        }
        entry = {
            "id": gateway.id,
            "node": node.id,
            "url": f"https://{https}",
            "http": http,
            "pid": 0,
            "log": str(self._dir.log_of(gateway.id)),
        }
        if place := self._listen020.get(gateway.id):
            config["etsi020"] = self._etsi020(node, place)
            entry["url020"] = f"https://{place}"
        path = self._write_config(gateway.id, config)
        self._add("gateway", gateway.id, [*self._keymesh, "gateway", "run", "--config", path])
        self._lab["gateways"].append(entry)
        for sae_id in gateway.saes:
            files = self._pki.sae(sae_id).save(self.folder.pki, f"sae-{sae_id}")
            self._lab["saes"].append(
                {
                    "id": sae_id,
                    "node": node.id,
                    "gateway": gateway.id,
                    "cert": str(files.cert),
                    "key": str(files.key),
                }
            )
