"""Two far KMEs and their hubs in one process: real nodes, hubs, TLS, stores and couriers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mesh.client.operator import OperatorTarget
from mesh.core.identity import Role
from mesh.errors import MeshError
from mesh.hub.config import load_hub_config
from mesh.hub.hub import Hub
from mesh.hub.policy import PolicyHook
from mesh.lab.ground import free_ports
from mesh.node.config import NodeConfig, load_node_config
from mesh.node.keyplane import DeliveredKeys
from mesh.node.node import Node
from mesh.node.psrd_offline import supply_offline
from mesh.pki.authority import Pki
from mesh.v1.keys_pb2 import KeyByIdRequest, KeyRequest

DOMAIN = "ocean"
NODES = ("kme-a", "kme-b")
POOL = 4 << 20


def document(hubs: tuple[str, ...], grade: str) -> dict[str, Any]:
    """The network document: one pair, its hubs, an SAE at each end."""
    pair = {"between": list(NODES), "grade": grade, "hubs": list(hubs)}
    return {
        "format": "keymesh-network/1",
        "serial": 1,
        "domain": DOMAIN,
        "nodes": {
            **{kme: {"site": kme} for kme in NODES},
            **{hub: {"role": "hub", "site": hub, "operator": hub} for hub in hubs},
        },
        "links": [{"between": sorted((kme, hub))} for kme in NODES for hub in hubs],
        "saes": {"sae-a": {"home": "kme-a"}, "sae-b": {"home": "kme-b"}},
        "grades": {"pairs": [pair]},
    }


@dataclass
class Running:
    """One running node or hub."""

    node: Node
    stack: contextlib.AsyncExitStack


@dataclass
class HubNetwork:
    """Builds files and certificates, supplies the lanes, starts and stops.

    Args:
        root: for everything.
        hubs: ids.
        grade: of the pair.
        supply_bytes: of each direction of each hub's link with each node; 0 for none.
    """

    root: Path
    hubs: tuple[str, ...] = ("hub-1", "hub-2", "hub-3")
    grade: str = "dske(2,3)"
    supply_bytes: int = 512 << 10
    running: dict[str, Running] = field(default_factory=dict)
    policies: dict[str, PolicyHook] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pki = Pki.create(DOMAIN)
        self.pki.save(self.root / "pki")
        self.pki.tool("operator").save(self.root / "pki", "operator")
        ids = (*NODES, *self.hubs)
        ports = free_ports(2 * len(ids))
        self.grpc = {one: f"127.0.0.1:{next(ports)}" for one in ids}
        self.http = {one: f"127.0.0.1:{next(ports)}" for one in ids}
        (self.root / "network.json").write_text(json.dumps(document(self.hubs, self.grade)))
        (self.root / "directory.yaml").write_text(
            yaml.safe_dump({"format": "keymesh-directory/1", "nodes": self.grpc, "document": "network.json"})
        )
        for one in ids:
            self._write(one)

    def _write(self, one: str) -> None:
        role = Role.HUB if one in self.hubs else Role.NODE
        self.pki.member(role, one, hosts=["localhost"]).save(self.root / "pki", one)
        common: Mapping[str, Any] = {
            "domain_id": DOMAIN,
            "data_dir": f"data/{one}",
            "listen": {"grpc": self.grpc[one], "http": self.http[one]},
            "tls": {"ca": "pki/node-ca.pem", "cert": f"pki/{one}.pem", "key": f"pki/{one}.key"},
            "directory": {"static": "directory.yaml"},
            "network": {"trust_directory": True},
            "redial_min_s": 0.05,
            "redial_max_s": 0.5,
            "links": [
                {"peer": peer, "pool_max_bytes": POOL} for peer in (NODES if role is Role.HUB else self.hubs)
            ],
        }
        own = (
            {"hub_id": one}
            if role is Role.HUB
            else {"kme_id": one, "access": "open", "reserves": {"prefill": False, "high_water_bytes": 0}}
        )
        self.path(one).write_text(yaml.safe_dump({**common, **own}))

    def path(self, one: str) -> Path:
        """Its configuration file."""
        return self.root / f"{one}.yaml"

    def config(self, one: str) -> NodeConfig:
        """Its configuration, as a node's."""
        return load_hub_config(self.path(one))[1] if one in self.hubs else load_node_config(self.path(one))

    async def supply(self, hub: str, kme: str) -> None:
        """Fill a link by courier while neither end runs."""
        await supply_offline(
            self.config(hub),
            self.config(kme),
            self.root / f"{hub}-{kme}.psrd",
            to_client_bytes=self.supply_bytes,
            from_client_bytes=self.supply_bytes,
        )

    async def start(self, *ids: str) -> None:
        """Start those named, all by default."""
        for one in ids or (*self.hubs, *NODES):
            stack = contextlib.AsyncExitStack()
            if one in self.hubs:
                settings, config = load_hub_config(self.path(one))
                serving = Hub.serving(settings, config, policy=self.policies.get(one))
            else:
                serving = Node.running(self.config(one))
            self.running[one] = Running(await stack.enter_async_context(serving), stack)

    async def stop(self, *ids: str) -> None:
        """Stop those named, all by default."""
        for one in ids or tuple(self.running):
            await self.running.pop(one).stack.aclose()

    def node(self, one: str) -> Node:
        """A running node or hub."""
        return self.running[one].node

    def is_open(self, one: str) -> bool:
        """Whether every link of it is open."""
        links = self.node(one).links.links.values()
        return all(link.is_open for link in links)

    async def until_open(self, *ids: str) -> None:
        """Wait until every link of those named, or of all, is open and the routes know it."""
        async with asyncio.timeout(60):
            while not all(self.is_open(one) for one in ids or tuple(self.running)):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.02)
        for one in NODES:
            await self.node(one).publisher._publish()

    def target(self, one: str) -> OperatorTarget:
        """How a tool reaches it."""
        pki = self.root / "pki"
        role = Role.HUB if one in self.hubs else Role.NODE
        return OperatorTarget(
            self.grpc[one],
            one,
            DOMAIN,
            pki / "node-ca.pem",
            pki / "operator.pem",
            pki / "operator.key",
            role,
        )

    async def draw(self, master: str, slave: str, number: int = 1) -> DeliveredKeys:
        """Keys for a master at its home."""
        request = KeyRequest(master_sae_id=master, slave_sae_id=slave, number=number, size_bytes=32)
        return _raised((await self.node(f"kme-{master[-1]}").plane.get_keys([request]))[0])

    async def redeem(self, slave: str, master: str, keys: DeliveredKeys) -> DeliveredKeys:
        """The same keys for a slave at its home."""
        request = KeyByIdRequest(
            slave_sae_id=slave, master_sae_id=master, key_ids=[key_id for key_id, _ in keys.keys]
        )
        return _raised((await self.node(f"kme-{slave[-1]}").plane.get_keys_by_id([request]))[0])


def _raised(result: DeliveredKeys | MeshError) -> DeliveredKeys:
    if isinstance(result, MeshError):
        raise result
    return result
