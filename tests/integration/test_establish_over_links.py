"""The same three key planes over real link planes: real lanes, real frames, gRPC streams on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import pytest

from mesh.node.links import LinkConfig, LinkPlane
from mesh.node.services.link import LinkService, add_link_service
from mesh.node.transport import DialledTransport
from mesh.store.store import Store
from tests.fakes.key_network import LINE, NO_PREFILL, KeyNetwork, until
from tests.fakes.link_sites import FAST_INGEST, DevicePair, Document, Uses

NEIGHBOURS = {"kme-a": ["kme-b"], "kme-b": ["kme-a", "kme-c"], "kme-c": ["kme-b"]}


class LinkedNetwork(KeyNetwork):
    """A ``KeyNetwork`` whose links are real; every lane byte used is recorded and checked."""

    def __init__(self, root: Path, *, material: int, **options: object) -> None:
        super().__init__(root, LINE, **options)  # type: ignore[arg-type]  # passed on as they are
        self.devices = {"kme-a--kme-b": DevicePair(material), "kme-b--kme-c": DevicePair(material, seed=2)}
        self.planes: dict[str, LinkPlane] = {}
        self.uses: dict[str, dict[str, Uses]] = {kme: {} for kme in NEIGHBOURS}
        self.servers: dict[str, list[grpc.aio.Server]] = {}
        self.channels: dict[tuple[str, str], grpc.aio.Channel] = {}
        self.ports: dict[tuple[str, str], int] = {}

    def links_of(self, kme: str, store: Store, incarnation: bytes) -> LinkPlane:
        """A link plane fed by device pairs in memory."""
        links = []
        for peer in NEIGHBOURS[kme]:
            pair = self.devices["--".join(sorted((kme, peer)))]
            source = pair.leader if kme < peer else pair.follower
            links.append(
                LinkConfig(
                    peer,
                    source,
                    pool_max_bytes=4 << 20,
                    redial_min_s=0.02,
                    redial_max_s=0.1,
                    ingest=FAST_INGEST,
                )
            )
        recorder = Recorder(self.uses[kme])
        plane = self.planes[kme] = LinkPlane(
            kme,
            "metro",
            store,
            incarnation,
            links,
            dial=lambda peer: DialledTransport(self.channels[kme, peer]),
            alarms=self.sites[kme].alarms,
            document=Document(),
            recorder=recorder,
        )
        return plane

    async def start_links(self, kme: str) -> None:
        """Serves each dialling neighbour on a port of its own (there is no TLS to say who calls)."""
        plane = self.planes[kme]
        plane.handler = self.plane(kme).shares
        self.servers[kme] = []
        for peer in NEIGHBOURS[kme]:
            if peer < kme:
                server = grpc.aio.server()
                add_link_service(LinkService(plane, partial(str, peer)), server)
                port = server.add_insecure_port(f"127.0.0.1:{self.ports.get((kme, peer), 0)}")
                self.ports[kme, peer] = port
                self.channels[peer, kme] = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
                await server.start()
                self.servers[kme].append(server)
        await plane.start()

    async def stop_links(self, kme: str) -> None:
        """Ends streams and servers."""
        await self.planes[kme].stop()
        for server in self.servers[kme]:
            await server.stop(0.1)

    async def until_filled(self) -> None:
        """All devices are empty and all links open."""
        await until(lambda: all(pair.budget_bytes < 1024 for pair in self.devices.values()))
        await until(
            lambda: all(link.is_open for plane in self.planes.values() for link in plane.links.values()),
        )

    def spent(self, kme: str, peer: str) -> int:
        """Lane bytes that a node used for shares towards a neighbour."""
        return sum(one.spent("data") for link, one in self.uses[kme].items() if peer in link.split("--"))


class Recorder:
    """A ``PadRecorder`` per link: fails on any byte used twice."""

    def __init__(self, uses: dict[str, Uses]) -> None:
        self._uses = uses

    def record(
        self, link: str, *, is_outbound: bool, epoch: int, start: int, stop: int, purpose: str
    ) -> None:
        """Keeps and checks."""
        self._uses.setdefault(link, Uses()).record(
            link, is_outbound=is_outbound, epoch=epoch, start=start, stop=stop, purpose=purpose
        )


@pytest.fixture
async def linked(tmp_path: Path) -> AsyncIterator[LinkedNetwork]:
    """a - b - c over real links, no refills."""
    network = LinkedNetwork(tmp_path, material=1 << 20)
    await network.start("kme-c", "kme-b", "kme-a")
    await network.until_filled()
    yield network
    await network.stop()


async def test_one_key_over_real_links_costs_160_bytes_per_hop(linked: LinkedNetwork) -> None:
    for count in (1, 2, 3):
        drawn = await linked.get("sae-a", "sae-c")
        assert (await linked.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys
        assert linked.spent("kme-a", "kme-b") == linked.spent("kme-b", "kme-c") == 160 * count


async def test_keys_flow_both_ways_at_once(linked: LinkedNetwork) -> None:
    got = await asyncio.gather(
        *(linked.get("sae-a", "sae-c", 8) for _ in range(8)),
        *(linked.get("sae-c", "sae-a", 8) for _ in range(8)),
    )
    for index, drawn in enumerate(got):
        master, slave = ("sae-a", "sae-c") if index < 8 else ("sae-c", "sae-a")
        ids = [key_id for key_id, _ in drawn.keys]
        assert (await linked.redeem(slave, master, ids)).keys == drawn.keys


async def test_restarts_in_the_middle_heal_by_themselves(linked: LinkedNetwork) -> None:
    first = await linked.get("sae-a", "sae-c")
    for kme in ("kme-b", "kme-c", "kme-a"):
        await linked.restart(kme)
        await until(
            lambda: all(link.is_open for plane in linked.planes.values() for link in plane.links.values()),
        )
        drawn = await linked.get("sae-a", "sae-c")
        assert (await linked.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys
    assert (await linked.redeem("sae-c", "sae-a", [first.keys[0][0]])).keys == first.keys


async def test_refill_over_real_links_and_same_kme_keys(tmp_path: Path) -> None:
    config = replace(NO_PREFILL, prefill=True, high_water_bytes=64 * 1024, low_water_bytes=48 * 1024)
    network = LinkedNetwork(tmp_path, material=2 << 20, config=config)
    await network.start("kme-c", "kme-b", "kme-a")
    try:
        plane = network.plane("kme-a")
        books = plane.reserves.outbound
        await until(
            lambda: all(peer in books and books[peer].level_bytes >= 64 * 1024 for peer in ("kme-b", "kme-c"))
        )
        await until(lambda: plane.establisher.in_flight == 0)
        before = network.spent("kme-a", "kme-b")
        drawn = await network.get("sae-a", "sae-c", 100)
        ids = [key_id for key_id, _ in drawn.keys]
        assert (await network.redeem("sae-c", "sae-a", ids)).keys == drawn.keys
        assert network.spent("kme-a", "kme-b") == before
        local = await network.get("sae-c", "sae-c2", 2)
        ids = [key_id for key_id, _ in local.keys]
        assert (await network.redeem("sae-c2", "sae-c", ids)).keys == local.keys
    finally:
        await network.stop()
