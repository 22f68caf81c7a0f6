"""A network of real key planes over the fake wire, with real stores, for tests of the key plane."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mesh.core.network import NetworkDocument
from mesh.core.network_parse import parse_document
from mesh.core.policy import AccessTable
from mesh.core.topology import build_graph, routes_for_pair
from mesh.errors import MeshError, UnavailableError
from mesh.node.keyplane import DeliveredKeys, KeyPlane
from mesh.node.keyports import Incarnation, KeyPlaneConfig, RoutePort, Surroundings
from mesh.node.ports import LinkPlanePort
from mesh.ops.alarms import Alarms
from mesh.store.files import OsFiles
from mesh.store.store import Store
from mesh.v1.keys_pb2 import KeyByIdRequest, KeyRequest
from mesh.v1.peer_pb2 import (
    ConfirmRequest,
    ConfirmResponse,
    DepositRequest,
    DepositResponse,
    RouteReport,
    TransferAnswer,
    TransferQuery,
)
from tests.fakes.link_wire import FakeLinks, Silent, Wire

NO_PREFILL = KeyPlaneConfig(
    access=AccessTable.open(), prefill=False, high_water_bytes=0, low_water_bytes=0, request_timeout_s=20.0
)
#: For requests whose time must run out.
HASTY = replace(NO_PREFILL, request_timeout_s=3.0)

REFILLED = replace(
    NO_PREFILL, prefill=True, high_water_bytes=16 * 1024, low_water_bytes=12 * 1024, lane_floor_bytes=4096
)

LINE: dict[str, Any] = {
    "format": "keymesh-network/1",
    "serial": 1,
    "domain": "metro",
    "nodes": {"kme-a": {}, "kme-b": {}, "kme-c": {}},
    "links": [{"between": ["kme-a", "kme-b"]}, {"between": ["kme-b", "kme-c"]}],
    "saes": {
        "sae-a": {"home": "kme-a"},
        "sae-a2": {"home": "kme-a"},
        "sae-b": {"home": "kme-b"},
        "sae-c": {"home": "kme-c"},
        "sae-c2": {"home": "kme-c"},
    },
}


async def until(reached: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    """Waits for the background to get somewhere."""
    async with asyncio.timeout(timeout_s):
        while not reached():  # noqa: ASYNC110 - what is awaited has no event
            await asyncio.sleep(0.005)


@dataclass
class Clock:
    """Seconds that a test may move: ``offset_s`` lets time pass, ``leap_s`` sets the wall clock."""

    offset_s: float = 0.0
    leap_s: float = 0.0
    base_s: float = 1_700_000_000.0

    def now_s(self) -> float:
        """Seconds since 1970."""
        return self.base_s + self.offset_s + self.leap_s

    def monotonic_s(self) -> float:
        """Seconds that never leap."""
        return asyncio.get_running_loop().time() + self.offset_s


@dataclass
class Documents:
    """The document in force at one node."""

    document: NetworkDocument | None


class FixedRoutes:
    """Routes over the document, as the directory would find them."""

    def __init__(self, own: str, documents: Documents) -> None:
        self._own = own
        self._documents = documents

    def routes(self, target: str, *, avoid: Collection[str] = ()) -> tuple[tuple[str, ...], ...]:
        """Cheapest disjoint routes."""
        document = self._documents.document
        assert document is not None
        return routes_for_pair(document, build_graph(document), self._own, target, avoid=avoid)

    def spare_bytes(self, route: tuple[str, ...]) -> int | None:
        """Nothing is known of levels further on."""
        return None

    def spend(self, route: tuple[str, ...], nbytes: int) -> None:
        """Nobody counts."""


class DirectPeers:
    """Calls other planes in the same process; a test may cut calls or meddle with them."""

    def __init__(self, network: KeyNetwork, own: str) -> None:
        self._network = network
        self._own = own

    async def confirm(self, kme_id: str, request: ConfirmRequest, *, timeout_s: float) -> ConfirmResponse:
        """Confirm."""
        await self._network.pass_call("confirm", self._own, kme_id, request)
        return ConfirmResponse(accepted=self._network.plane(kme_id).establisher.on_confirm(request))

    async def query(self, kme_id: str, request: TransferQuery, *, timeout_s: float) -> TransferAnswer:
        """Transfer query."""
        await self._network.pass_call("query", self._own, kme_id, request)
        return self._network.plane(kme_id).appender.on_query(request)

    async def report(self, kme_id: str, request: RouteReport, *, timeout_s: float) -> None:
        """Route report."""
        await self._network.pass_call("report", self._own, kme_id, request)
        self._network.plane(kme_id).establisher.on_report(self._own, request)

    async def deposit(self, kme_id: str, request: DepositRequest, *, timeout_s: float) -> DepositResponse:
        """Deposit."""
        await self._network.pass_call("deposit", self._own, kme_id, request)
        response = await self._network.plane(kme_id).deposits.on_deposit(request)
        await self._network.pass_call("deposit-answer", kme_id, self._own, response)
        return response


@dataclass
class Site:
    """One node of the network."""

    kme_id: str
    path: Path
    documents: Documents
    alarms: Alarms = field(default_factory=Alarms)
    store: Store | None = None
    plane: KeyPlane | None = None


class KeyNetwork:
    """Nodes by id; start, stop, crash and restart them; ask as gateways would."""

    def __init__(
        self,
        root: Path,
        document: Mapping[str, Any],
        *,
        filled: int = 16 << 20,
        config: KeyPlaneConfig = NO_PREFILL,
    ) -> None:
        self.root = root
        self.config = config
        self.configs: dict[str, KeyPlaneConfig] = {}
        self.document = parse_document(document)
        self.wire = Wire([(link.a, link.b) for link in self.document.links], filled=filled)
        self.clock = Clock()
        self.calls: list[tuple[str, str, str, Any]] = []
        self.on_call: Callable[[str, str, str, Any], bool] = lambda *_: True
        self.delay_s = 0.0
        self.sites = {kme: Site(kme, root / kme, Documents(self.document)) for kme in self.document.nodes}

    async def pass_call(self, kind: str, own: str, peer: str, message: Any) -> None:
        """Records a call; fails it when the test says so."""
        self.calls.append((kind, own, peer, message))
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if not self.on_call(kind, own, peer, message) or self.sites[peer].plane is None:
            raise UnavailableError("cut by the test")

    def plane(self, kme: str) -> KeyPlane:
        """The running plane of a node."""
        plane = self.sites[kme].plane
        assert plane is not None
        return plane

    def store(self, kme: str) -> Store:
        """The open store of a node."""
        store = self.sites[kme].store
        assert store is not None
        return store

    async def start(self, *kmes: str, is_proven: bool | None = None) -> None:
        """Starts nodes, all by default."""
        for kme in kmes or tuple(self.sites):
            site = self.sites[kme]
            store = Store.open(site.path, kme_id=kme, proof_dir=self.proof_dir())
            if is_proven is not None:
                store.is_proven_restart = is_proven
            incarnation = os.urandom(16)
            store.begin_incarnation(incarnation)
            around = Surroundings(
                own_id=kme,
                now_s=self.clock.now_s,
                monotonic_s=self.clock.monotonic_s,
                randomness=os.urandom,
                alarms=site.alarms,
            )
            plane = KeyPlane(
                around,
                self.configs.get(kme, self.config),
                store=store,
                links=self.links_of(kme, store, incarnation),
                directory=site.documents,
                routes=self.routes_of(kme),
                peers=DirectPeers(self, kme),
                incarnation=Incarnation(incarnation, store.is_proven_restart),
            )
            site.store, site.plane = store, plane
            await plane.start()
            await self.start_links(kme)

    def proof_dir(self) -> Path | None:
        """A folder on tmpfs of this network's own; the same for another process on the same root."""
        shared = Path("/dev/shm")
        if not OsFiles().is_tmpfs(shared):
            return None
        folder = shared / f"keymesh-test-{hashlib.sha256(str(self.root).encode()).hexdigest()[:16]}"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def routes_of(self, kme: str) -> RoutePort:
        """The routes of a node: over the document alone."""
        return FixedRoutes(kme, self.sites[kme].documents)

    def links_of(self, kme: str, store: Store, incarnation: bytes) -> LinkPlanePort:
        """The links of a node: of the fake wire."""
        del store, incarnation
        return self.wire.planes.get(kme) or FakeLinks(self.wire, kme)

    async def start_links(self, kme: str) -> None:
        """Lets shares arrive."""
        if kme in self.wire.planes:
            self.wire.planes[kme].handler = self.plane(kme).shares

    async def stop_links(self, kme: str) -> None:
        """Lets no more shares arrive."""
        if kme in self.wire.planes:
            self.wire.planes[kme].handler = Silent()

    async def stop(self, *kmes: str) -> None:
        """Stops nodes, all by default."""
        for kme in kmes or tuple(self.sites):
            site = self.sites[kme]
            plane, site.plane = site.plane, None
            if plane is not None:
                await self.stop_links(kme)
                await plane.stop()
            if site.store is not None:
                site.store.close()
                site.store = None
        proofs = self.proof_dir()
        if not kmes and proofs is not None:
            shutil.rmtree(proofs)

    async def restart(self, kme: str, *, is_proven: bool = True) -> None:
        """A process restart: proven, or as after a reboot."""
        await self.stop(kme)
        await self.start(kme, is_proven=is_proven)

    def set_document(self, document: Mapping[str, Any], *kmes: str) -> None:
        """Another network document, at all nodes by default."""
        for kme in kmes or tuple(self.sites):
            self.sites[kme].documents.document = parse_document(document)

    async def get(
        self,
        master: str,
        slave: str,
        number: int = 1,
        size_bytes: int = 32,
        more: Sequence[str] = (),
        at: str = "",
    ) -> DeliveredKeys:
        """Keys for a master at its home; raises what the gateway would get."""
        kme = at or self.document.home(master)
        assert kme is not None
        request = KeyRequest(
            master_sae_id=master,
            slave_sae_id=slave,
            number=number,
            size_bytes=size_bytes,
            additional_slave_sae_ids=more,
        )
        return _raised((await self.plane(kme).get_keys([request]))[0])

    async def redeem(self, slave: str, master: str, key_ids: Sequence[bytes], at: str = "") -> DeliveredKeys:
        """Keys for a slave at its home."""
        kme = at or self.document.home(slave)
        assert kme is not None
        request = KeyByIdRequest(slave_sae_id=slave, master_sae_id=master, key_ids=key_ids)
        return _raised((await self.plane(kme).get_keys_by_id([request]))[0])


def _raised(result: DeliveredKeys | MeshError) -> DeliveredKeys:
    if isinstance(result, MeshError):
        raise result
    return result
