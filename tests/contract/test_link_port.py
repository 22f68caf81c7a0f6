"""One suite for links as the key plane sees them: on a store and a stream, and in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mesh.errors import CallerError, ErrorReason, ShortageError, UnavailableError
from mesh.node.ports import LinkPlanePort, LinkPort
from mesh.v1.link_pb2 import ShareItem
from tests.fakes.link_sites import DevicePair, Pair, Shares, share_of
from tests.fakes.link_wire import Wire
from tests.fakes.stillness import until_still

TAG_KEY = 32
FILLED = 128 << 10


@dataclass
class Joined:
    """A link from kme-a to kme-b, and what comes out at kme-b."""

    plane: LinkPlanePort
    arrived: Shares
    close: Callable[[], Awaitable[None]]

    @property
    def link(self) -> LinkPort:
        return self.plane.links["kme-b"]

    async def until_arrived(self, count: int) -> list[tuple[ShareItem, bytes]]:
        async with asyncio.timeout(30):
            while len(self.arrived.got) < count:
                self.arrived.wake.clear()
                await self.arrived.wake.wait()
        assert all(sender == "kme-a" for sender, _, _ in self.arrived.got)
        return [(share, value) for _, share, value in self.arrived.got]

    def position(self) -> int:
        return self.link.status().transmit.position


@pytest.fixture(params=["memory", "real"])
async def joined(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Joined]:
    if request.param == "memory":
        wire = Wire([("kme-a", "kme-b")], filled=FILLED)
        arrived = wire.planes["kme-b"].handler = Shares()

        async def cut() -> None:
            wire.cut("kme-a", "kme-b")

        yield Joined(wire.planes["kme-a"], arrived, cut)
        return
    pair = Pair(tmp_path, devices=DevicePair(2 * FILLED))
    await pair.start()
    await until_still(pair.a, pair.b, pair.devices)

    async def stop_peer() -> None:
        await pair.b.plane.stop()
        await pair.a.until(lambda: not pair.a.link.is_open)

    yield Joined(pair.a.plane, pair.b.shares, stop_peer)
    await pair.stop()


async def test_a_claim_burns_its_bytes_and_the_tag_key_and_send_delivers_in_order(joined: Joined) -> None:
    link = joined.link
    await link.ready(300, timeout_s=30)
    assert link.claimable() >= 300
    before = joined.position()
    claim = link.claim(100, 200)
    shares = [share_of(100, is_raw=True), share_of(150), share_of(50)]
    link.send(claim, shares, bytes(range(200)))
    assert joined.position() == before + TAG_KEY + 300
    assert (len(claim.raw), claim.cipher_bytes, len(claim.pad)) == (100, 200, TAG_KEY + 300)
    got = await joined.until_arrived(3)
    assert [value for _, value in got] == [claim.raw, bytes(range(150)), bytes(range(150, 200))]
    assert [share.is_raw for share, _ in got] == [True, False, False]


async def test_offsets_only_grow_and_claims_differ(joined: Joined) -> None:
    link = joined.link
    pads = []
    stop = 0
    for _ in range(5):
        await link.ready(64, timeout_s=30)
        claim = link.claim(64, 0)
        assert claim.offset >= stop
        stop = claim.offset + len(claim.pad)
        pads.append(claim.pad)
        link.send(claim, [share_of(64, is_raw=True)], b"")
    assert len(set(pads)) == 5
    assert "pad" not in repr(claim)


async def test_more_than_claimable_is_a_shortage_and_burns_nothing(joined: Joined) -> None:
    link = joined.link
    before = joined.position()
    with pytest.raises(ShortageError):
        link.claim(0, link.claimable() + 1)
    with pytest.raises(ShortageError):
        link.take_local(FILLED * 4)
    with pytest.raises(CallerError):
        await link.ready(link.max_frame_bytes, timeout_s=0.1)
    assert joined.position() == before


async def test_a_frame_that_does_not_fit_its_claim_is_refused_and_stays_burnt(joined: Joined) -> None:
    link = joined.link
    await link.ready(100, timeout_s=30)
    before = joined.position()
    short = link.claim(0, 100)
    with pytest.raises(CallerError):
        link.send(short, [share_of(100)], bytes(99))
    sent = link.claim(0, 100)
    link.send(sent, [share_of(100)], bytes(100))
    for claim in (sent, short):
        with pytest.raises(CallerError):
            link.send(claim, [share_of(100)], bytes(100))
    assert joined.position() == before + 2 * (TAG_KEY + 100)
    assert len(await joined.until_arrived(1)) == 1


async def test_what_is_queued_arrives_and_local_bytes_do_not(joined: Joined) -> None:
    link = joined.link
    await link.ready(64, timeout_s=30)
    local = link.take_local(64)
    assert len(local) == 64
    link.enqueue(share_of(40), bytes(40))
    ((share, value),) = await joined.until_arrived(1)
    assert (share.length_bytes, value) == (40, bytes(40))


async def test_a_closed_link_grants_nothing(joined: Joined) -> None:
    link = joined.link
    await joined.close()
    assert not link.is_open
    assert link.claimable() == 0
    with pytest.raises(UnavailableError) as caught:
        await link.ready(32, timeout_s=0.05)
    assert caught.value.reason is ErrorReason.PEER_UNREACHABLE
    for use in (lambda: link.claim(0, 32), lambda: link.take_local(32)):
        with pytest.raises(ShortageError):
            use()
    with pytest.raises(ShortageError) as busy:
        link.enqueue(share_of(32), bytes(32))
    assert busy.value.reason is ErrorReason.BUSY


async def test_links_are_found_by_peer(joined: Joined) -> None:
    assert joined.plane.link("kme-b") is joined.link
    assert joined.plane.link("kme-x") is None
    assert joined.link.peer == joined.link.status().peer_kme_id == "kme-b"
    assert joined.link.status().state == "open"
    with pytest.raises(CallerError):
        await joined.plane.reset_link("kme-x")
