"""Two link planes with real stores over real gRPC: the link's whole life, counted in bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from mesh.core.lane import ROOT_BYTES
from mesh.errors import CallerError, ErrorReason, ShortageError, UnavailableError
from mesh.node.lanes import AnyEnd
from mesh.node.services.link import LinkService, add_link_service
from mesh.node.transport import DialledTransport
from mesh.store.tables import ExtentRow, Tables
from mesh.v1.link_pb2 import ShareItem
from tests.fakes.link_sites import DevicePair, Document, Site, proof_folder, send_share, share_of
from tests.fakes.stillness import until_still

HELLO = 32


class GrpcPair:
    """kme-a and kme-b over loopback gRPC without TLS."""

    def __init__(self, root: Path, proof: Path | None, devices: DevicePair, pool: int = 1 << 20) -> None:
        self.root, self.proof, self.devices, self.pool = root, proof, devices, pool
        self.address = ""
        self.server: grpc.aio.Server | None = None
        self.channel: grpc.aio.Channel | None = None
        self.a: Site
        self.b: Site

    async def start_b(self, address: str = "127.0.0.1:0") -> None:
        self.b = Site(
            "kme-b",
            "kme-a",
            self.root,
            source=self.devices.follower,
            dial=self.dial,
            proof=self.proof,
            pool=self.pool,
        )
        await self.b.plane.start()
        self.server = grpc.aio.server()
        add_link_service(LinkService(self.b.plane, lambda: "kme-a"), self.server)
        port = self.server.add_insecure_port(address)
        self.address = f"127.0.0.1:{port}"
        await self.server.start()

    async def start_a(self) -> None:
        self.a = Site(
            "kme-a",
            "kme-b",
            self.root,
            source=self.devices.leader,
            dial=self.dial,
            proof=self.proof,
            pool=self.pool,
        )
        await self.a.plane.start()

    def dial(self, peer: str) -> DialledTransport:
        self.channel = self.channel or grpc.aio.insecure_channel(self.address)
        return DialledTransport(self.channel)

    async def until_open(self) -> None:
        await self.a.until_open()
        await self.b.until_open()

    async def until_quiet(self) -> None:
        """Wait until ingest has nothing more to do, so that bytes can be counted."""
        await until_still(self.a, self.b, self.devices)

    async def stop_a(self) -> None:
        await self.a.crash()
        if self.channel is not None:
            await self.channel.close()
            self.channel = None

    async def stop_b(self) -> None:
        await self.b.plane.stop()
        if self.server is not None:
            await self.server.stop(0.1)
        self.b.store.close()


@pytest.fixture
def proof_dir() -> Iterator[Path | None]:
    """A folder on tmpfs."""
    with proof_folder() as folder:
        yield folder


@pytest.fixture
async def pair(tmp_path: Path, proof_dir: Path | None) -> AsyncIterator[GrpcPair]:
    """An open, quiet pair with 128 KiB of material."""
    pair = GrpcPair(tmp_path, proof_dir, DevicePair(128 << 10))
    await pair.start_b()
    await pair.start_a()
    await pair.until_open()
    await pair.until_quiet()
    yield pair
    await pair.stop_a()
    await pair.stop_b()


async def test_first_contact_fills_both_lanes_alike(pair: GrpcPair) -> None:
    """Protocol 2: keys of the two devices become the same lanes at both ends."""
    for writer, reader in ((pair.a, pair.b), (pair.b, pair.a)):
        tx, rx = writer.link.lanes.tx, reader.link.lanes.rx
        assert tx.lane.filled == rx.lane.filled > 0
        assert tx.root == rx.root is not None
        here = tx.material.read(ROOT_BYTES + 4096, tx.lane.filled)
        assert here == rx.material.read(ROOT_BYTES + 4096, rx.lane.filled)
    assert abs(pair.a.link.lanes.tx.lane.filled - pair.a.link.lanes.rx.lane.filled) <= 64 << 10


@pytest.mark.parametrize("is_forward", [True, False], ids=["dialler-sends", "acceptor-sends"])
async def test_one_slot_share_costs_160_bytes(pair: GrpcPair, is_forward: bool) -> None:
    """1.4/goals: one slot of 48 bytes is a share of 128 bytes and burns exactly 160 per hop."""
    sender, receiver = (pair.a, pair.b) if is_forward else (pair.b, pair.a)
    before = sender.uses.spent("data")
    await send_share(sender, b"s" * 128)
    await receiver.until(lambda: bool(receiver.shares.got))
    assert sender.uses.spent("data") - before == 160
    assert receiver.uses.spent("data", is_outbound=False) == 160
    came_from, item, value = receiver.shares.got[0]
    assert (came_from, item.header, value) == (sender.name, b"header", b"s" * 128)


async def test_raw_share_sends_nothing_but_its_offset(pair: GrpcPair) -> None:
    """A raw share is the pad itself: the receiver reads the same bytes, nothing travels for it."""
    await pair.a.link.ready(1000 + 50, timeout_s=30)
    claim = pair.a.link.claim(1000, 50)
    pair.a.link.send(claim, [share_of(1000, is_raw=True), share_of(50)], b"e" * 50)
    await pair.b.until(lambda: len(pair.b.shares.got) == 2)
    assert [value for _, _, value in pair.b.shares.got] == [claim.raw, b"e" * 50]


async def test_relay_queue_coalesces_into_one_frame(pair: GrpcPair) -> None:
    """Many relayed shares share one frame: 32 bytes of tag key for all of them."""
    before = pair.b.uses.spent("data")
    for at in range(20):
        pair.b.link.enqueue(share_of(128, header=bytes([at])), bytes([at]) * 128)
    await pair.a.until(lambda: len(pair.a.shares.got) == 20)
    assert [item.header for _, item, _ in pair.a.shares.got] == [bytes([at]) for at in range(20)]
    assert pair.b.uses.spent("data") - before == 20 * 128 + 32


async def test_local_bytes_are_burnt_and_never_sent(pair: GrpcPair) -> None:
    """4.9: bytes for two SAEs at one KME are skipped by the reader."""
    await pair.a.link.ready(32, timeout_s=30)
    got = pair.a.link.take_local(48)
    assert len(got) == 48
    assert pair.a.uses.spent("local") == 48
    await send_share(pair.a, b"after")
    await pair.b.until(lambda: bool(pair.b.shares.got))
    assert pair.b.shares.got[0][2] == b"after"


async def test_cut_stream_resumes_at_positions(pair: GrpcPair) -> None:
    """1.4: a cut costs each end one hello and no stride."""
    await send_share(pair.a, b"one")
    await pair.b.until(lambda: len(pair.b.shares.got) == 1)
    position = pair.a.link.lanes.tx.lane.position
    for stream in pair.a.link.streams:
        stream.close(UnavailableError("cut by the test"))
    await pair.a.until(lambda: pair.a.shares.opened == 2)
    await pair.until_open()
    assert pair.a.link.lanes.tx.lane.position == position + HELLO
    await send_share(pair.a, b"two")
    await pair.b.until(lambda: len(pair.b.shares.got) == 2)


async def test_proven_restart_resumes_at_its_mark(pair: GrpcPair) -> None:
    """1.10: a mere process restart forfeits what lies between position and mark, no more."""
    if pair.proof is None:
        pytest.skip("no tmpfs on this machine")
    await send_share(pair.a, b"one")
    await pair.a.until(lambda: not pair.a.link.lanes.tx.is_moving)
    lane = pair.a.link.lanes.tx.lane
    mark, position, stride = lane.mark, lane.position, lane.limits.stride_bytes
    uses = pair.a.uses
    await pair.stop_a()
    await pair.start_a()
    assert pair.a.store.is_proven_restart
    await pair.until_open()
    assert pair.a.link.lanes.tx.lane.position == mark + HELLO
    assert mark - position <= 2 * stride
    await send_share(pair.a, b"two")
    await pair.b.until(lambda: len(pair.b.shares.got) == 2)
    assert max(stop for out, _, _, stop, _ in uses.ranges if out) <= mark


async def test_unproven_restart_resumes_beyond_the_window(tmp_path: Path) -> None:
    """1.10: without proof an end speaks second and goes W and a stride past its peer's position."""
    pair = GrpcPair(tmp_path, tmp_path, DevicePair(512 << 10))
    await pair.start_b()
    await pair.start_a()
    await pair.until_open()
    await pair.until_quiet()
    await send_share(pair.a, b"one")
    await pair.b.until(lambda: len(pair.b.shares.got) == 1)
    peer = pair.b.link.lanes.rx.lane.position
    limits = pair.a.link.lanes.tx.lane.limits
    await pair.stop_a()
    await pair.start_a()
    assert not pair.a.store.is_proven_restart
    await pair.until_open()
    start = peer + limits.window_bytes + limits.stride_bytes
    assert pair.a.link.lanes.tx.lane.position == start + HELLO
    await send_share(pair.a, b"two")
    await pair.b.until(lambda: len(pair.b.shares.got) == 2)
    await pair.stop_a()
    await pair.stop_b()


async def test_both_ends_unproven_recover(tmp_path: Path) -> None:
    """1.8: when both are unproven the dialler speaks first, and both go beyond the window."""
    pair = GrpcPair(tmp_path, tmp_path, DevicePair(512 << 10))
    await pair.start_b()
    await pair.start_a()
    await pair.until_open()
    await pair.until_quiet()
    await pair.stop_a()
    await pair.stop_b()
    await pair.start_b()
    await pair.start_a()
    await pair.until_open()
    await send_share(pair.a, b"there")
    await send_share(pair.b, b"back")
    await pair.a.until(lambda: bool(pair.a.shares.got))
    await pair.b.until(lambda: bool(pair.b.shares.got))
    await pair.stop_a()
    await pair.stop_b()


async def test_newer_document_is_handed_over(pair: GrpcPair) -> None:
    """5.1: a peer whose hello names a lower serial gets the document."""
    pair.b.document.number, pair.b.document.body = 7, b"7:signed"
    for stream in pair.a.link.streams:
        stream.close(UnavailableError("cut by the test"))
    await pair.a.until(lambda: pair.a.document.serial() == 7)
    assert pair.a.document.signed_bytes() == b"7:signed"


def _extents(end: AnyEnd, tables: Tables) -> list[ExtentRow]:
    return tables.extents.list(end.lane_id)


def _is_wiped(site: Site, end: AnyEnd, position: int) -> bool:
    first = site.store.read(partial(_extents, end))[0]
    return not any(site.store.pads.read(first.file, 0, min(position, first.stop))[ROOT_BYTES:])


async def test_used_bytes_are_wiped_on_disk(pair: GrpcPair) -> None:
    """1.2: both ends wipe what was used, in batches."""
    await send_share(pair.a, b"k" * 128)
    await pair.b.until(lambda: bool(pair.b.shares.got))
    ends: tuple[tuple[Site, AnyEnd], ...] = (
        (pair.a, pair.a.link.lanes.tx),
        (pair.b, pair.b.link.lanes.rx),
    )
    for site, end in ends:
        position = end.lane.position
        site.link.tidy()
        await site.until(partial(_is_wiped, site, end, position))


async def test_claims_refuse_what_does_not_fit(pair: GrpcPair) -> None:
    """Nothing is burnt by a refusal; what is claimed stays burnt."""
    link = pair.a.link
    spent = pair.a.uses.spent("data")
    with pytest.raises(CallerError):
        link.claim(0, link.max_frame_bytes)
    with pytest.raises(CallerError):
        await link.ready(link.max_frame_bytes, timeout_s=0.1)
    assert pair.a.uses.spent("data") == spent
    await link.ready(64, timeout_s=30)
    claim = link.claim(0, 64)
    with pytest.raises(CallerError):
        link.send(claim, [share_of(63)], bytes(63))
    assert pair.a.uses.spent("data") == spent + 96
    with pytest.raises(CallerError):
        link.send(claim, [share_of(64)], bytes(64))


async def test_an_empty_lane_is_a_shortage(pair: GrpcPair) -> None:
    """1.1: data stops at the tail of the lane; hellos and reports still go."""
    link = pair.a.link
    most = link.max_frame_bytes - 32
    with pytest.raises(ShortageError) as caught:
        for _ in range(1000):
            await link.ready(most, timeout_s=0.5)
            link.claim(0, most)
    assert caught.value.reason in (ErrorReason.OUT_OF_MATERIAL, ErrorReason.WINDOW_FULL)
    assert link.lanes.tx.lane.usable_bytes >= link.lanes.tx.lane.tail_bytes


async def test_a_closed_link_is_unavailable(pair: GrpcPair) -> None:
    """The caller learns in time that the peer cannot be reached."""
    await pair.stop_b()
    await pair.a.until(lambda: not pair.a.link.is_open)
    assert pair.a.link.claimable() == 0
    with pytest.raises(UnavailableError):
        await pair.a.link.ready(32, timeout_s=0.05)
    with pytest.raises(ShortageError):
        pair.a.link.enqueue(ShareItem(length_bytes=1), b"x")
    await pair.start_b(pair.address)
    await pair.until_open()


async def test_operator_resets_both_ends(pair: GrpcPair) -> None:
    """Both lanes begin new epochs and fill again."""
    assert await pair.a.plane.reset_link("kme-b") == (2, 2)
    assert await pair.b.plane.reset_link("kme-a") == (2, 2)
    pair.devices.budget_bytes += 64 << 10
    await pair.until_open()
    await send_share(pair.a, b"new epoch")
    await pair.b.until(lambda: bool(pair.b.shares.got))
    assert pair.b.link.lanes.rx.lane.epoch == 2
    assert isinstance(pair.a.document, Document)
