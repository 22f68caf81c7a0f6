"""Attacks on a link by an adversary in the middle who holds the TLS keys (protocol 1 and 2).

Each test plays the attack that a rule was made against. Both sites record every pad range they use
(``Uses``), so that a byte used twice fails any of these tests by itself.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import apsw
import pytest

from mesh.core import frame as frames
from mesh.core.frame import FrameKind
from mesh.core.lane import ROOT_BYTES
from mesh.core.otp import xor
from mesh.errors import ErrorReason, RolledBackError, ShortageError, TagMismatchError, UnavailableError
from mesh.node.transport import unwrap, wrap_frame
from mesh.store.failpoints import arm, disarm_all
from mesh.store.tables import BlockState
from mesh.v1.link_pb2 import BlockAnswer, BlockOffer, FrameMeta, LinkMessage
from tests.fakes.link_sites import (
    FAST_INGEST,
    DevicePair,
    Pair,
    Tamper,
    WireStream,
    honest,
    proof_folder,
    send_share,
)
from tests.fakes.stillness import until_still

HELLO = 32


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """Two sites whose restarts are proven where the machine has a tmpfs, not yet started."""
    with proof_folder() as proof:
        yield Pair(tmp_path, proof=proof, devices=DevicePair(256 << 10))


def frame_of(data: bytes) -> frames.Frame | None:
    """The frame in a message, None if it carries none."""
    message = unwrap(data)
    return frames.parse(message) if isinstance(message, memoryview) else None


async def quiet(pair: Pair) -> None:
    """Wait until ingest is done."""
    await until_still(pair.a, pair.b, pair.devices)


def only(kind: FrameKind, *, from_dialler: bool, act: Callable[[WireStream, bytes], list[bytes]]) -> Tamper:
    """An adversary that acts on frames of one kind and direction, and lets the rest pass."""

    def tamper(stream: WireStream, data: bytes, was_dialler: bool) -> list[bytes]:
        frame = frame_of(data)
        if frame is not None and frame.kind is kind and was_dialler == from_dialler:
            return act(stream, data)
        return [data]

    return tamper


def has_more(count: Callable[[], int], than: int) -> bool:
    """Whether a count has risen."""
    return count() > than


def keep_in(held: list[bytes]) -> Callable[[WireStream, bytes], list[bytes]]:
    """Hold messages back in a list."""

    def act(stream: WireStream, data: bytes) -> list[bytes]:
        held.append(data)
        return []

    return act


async def test_withheld_frames_stop_the_writer_at_half_the_window(pair: Pair) -> None:
    """1.3: past the last authenticated report data goes W/2 and no further."""
    await pair.start()
    await quiet(pair)
    lane = pair.a.link.lanes.tx.lane
    reported = lane.reported
    pair.wire.tamper = only(FrameKind.DATA, from_dialler=True, act=lambda stream, data: [])
    with pytest.raises(ShortageError) as caught:
        for _ in range(1000):
            await send_share(pair.a, bytes(4000), timeout_s=0.3)
    assert caught.value.reason is ErrorReason.WINDOW_FULL
    assert lane.position <= reported + lane.limits.window_bytes // 2
    pair.wire.tamper = honest
    pair.wire.cut()
    await pair.a.until(lambda: pair.a.shares.opened == 2)
    await send_share(pair.a, b"after the cut")
    await pair.b.until(lambda: bool(pair.b.shares.got))
    await pair.stop()


async def test_two_full_lanes_do_not_deadlock(pair: Pair) -> None:
    """1.3: reports go beyond the data's bound, so two writers at their bounds free each other."""
    await pair.start()
    await quiet(pair)

    async def flood(here: str) -> None:
        site = pair.a if here == "a" else pair.b
        for _ in range(20):
            await send_share(site, bytes(4000))

    async with asyncio.timeout(60):
        await asyncio.gather(flood("a"), flood("b"))
    await pair.a.until(lambda: len(pair.a.shares.got) == 20)
    await pair.b.until(lambda: len(pair.b.shares.got) == 20)
    await pair.stop()


async def test_replayed_and_reordered_frames_are_taken_once(pair: Pair) -> None:
    """1.2: an offset below the position is refused, whatever it carries."""
    await pair.start()
    await quiet(pair)
    kept: list[bytes] = []

    def act(stream: WireStream, data: bytes) -> list[bytes]:
        kept.append(data)
        return [data, data, *kept]

    pair.wire.tamper = only(FrameKind.DATA, from_dialler=True, act=act)
    for at in range(5):
        await send_share(pair.a, bytes([at]) * 100)
    await pair.b.until(lambda: len(pair.b.shares.got) >= 5)
    await asyncio.sleep(0.05)
    assert [value[0] for _, _, value in pair.b.shares.got] == [0, 1, 2, 3, 4]
    await pair.stop()


async def test_known_plaintext_gives_no_tag_key(pair: Pair) -> None:
    """1.5: pad recovered from a held-back frame with known plaintext does not make a tag key."""
    await pair.start()
    await quiet(pair)
    held: list[bytes] = []
    pair.wire.tamper = only(FrameKind.DATA, from_dialler=True, act=keep_in(held))
    known = bytes(range(256)) * 2
    await send_share(pair.a, known)
    await pair.a.until(lambda: bool(held))
    frame = frame_of(held[0])
    assert frame is not None
    pad = xor(bytes(frame.ciphertext), known)
    # The recovered pad as tag key and pad of a frame of the adversary's own, at those offsets.
    offset = frame.offset + 32
    assert pad == pair.b.link.lanes.rx.material.read(offset, offset + len(pad))
    meta = FrameMeta(shares=[{"length_bytes": 64}]).SerializeToString()  # type: ignore[list-item]
    forged = frames.seal(
        FrameKind.DATA,
        frame.epoch,
        offset,
        pad=pad[:96],
        root=bytes(ROOT_BYTES),
        raw_bytes=0,
        plaintext=b"!" * 64,
        meta=meta,
    )
    # Without a root (all zero) the forgery verifies: the attack is real ...
    frames.open_frame(frames.parse(b"".join(forged)), pad=pad[:96], root=bytes(ROOT_BYTES))
    pair.wire.streams[-1].inject(wrap_frame(forged), to_dialler=False)
    await pair.b.until(lambda: pair.b.link.status().failed_tags >= 1)
    assert not pair.b.shares.got
    # ... and with it the honest frame still arrives afterwards.
    pair.wire.streams[-1].inject(held[0], to_dialler=False)
    await pair.b.until(lambda: bool(pair.b.shares.got))
    assert pair.b.shares.got[0][2] == known
    await pair.stop()


async def test_junk_at_the_next_offset_does_not_poison_it(pair: Pair) -> None:
    """1.7: forgeries move nothing; the honest frame at the same offset is taken."""
    await pair.start()
    await quiet(pair)

    def act(stream: WireStream, data: bytes) -> list[bytes]:
        junk = bytearray(data)
        junk[-1] ^= 1
        return [bytes(junk)] * 50 + [data]

    pair.wire.tamper = only(FrameKind.DATA, from_dialler=True, act=act)
    await send_share(pair.a, b"honest")
    await pair.b.until(lambda: bool(pair.b.shares.got))
    assert pair.b.shares.got[0][2] == b"honest"
    assert pair.b.link.status().failed_tags == 50
    await pair.stop()


async def test_too_many_failed_tags_close_the_stream(pair: Pair) -> None:
    """1.7: 2^10 failures in an hour close the stream, back off and alarm."""
    await pair.start()
    await quiet(pair)
    stream = pair.wire.streams[-1]
    junk = frames.seal(
        FrameKind.DATA,
        1,
        pair.b.link.lanes.rx.lane.position,
        pad=bytes(64),
        root=bytes(32),
        raw_bytes=0,
        plaintext=bytes(32),
        meta=b"",
    )
    for _ in range(1 << 10):
        stream.inject(wrap_frame(junk), to_dialler=False)
    await pair.b.until(lambda: pair.b.alarms.is_open("link/kme-a/failed-tags"))
    await pair.b.until(lambda: pair.b.shares.closed >= 1)
    assert pair.b.link.blocked_until_s > 0
    await pair.a.until(lambda: pair.a.shares.opened == 2)
    await pair.stop()


async def test_a_reset_per_second_burns_hellos_only(pair: Pair) -> None:
    """1.4: 20 resets cost each writer 20 hellos of 32 bytes, no stride."""
    await pair.start()
    await quiet(pair)
    positions = [site.link.lanes.tx.lane.position for site in (pair.a, pair.b)]
    marks = [site.link.lanes.tx.lane.mark for site in (pair.a, pair.b)]
    for count in range(20):
        opened = pair.a.shares.opened
        pair.wire.cut()
        await pair.a.until(partial(has_more, lambda: pair.a.shares.opened, opened))
        await pair.until_open()
        assert count < 20
    for site, position, mark in zip((pair.a, pair.b), positions, marks, strict=True):
        assert site.link.lanes.tx.lane.position == position + 20 * HELLO
        assert site.link.lanes.tx.lane.mark == mark
    await pair.stop()


async def test_a_crash_loop_without_a_peer_burns_32_bytes_a_hello(pair: Pair) -> None:
    """1.1: before the peer's hello has verified, a hello moves the mark by itself only."""
    await pair.start()
    await quiet(pair)
    await pair.restart_a()
    await pair.until_open()
    pair.wire.tamper = only(FrameKind.HELLO, from_dialler=True, act=lambda stream, data: [])
    await pair.a.until(lambda: not pair.a.link.lanes.tx.is_moving)
    await pair.a.crash()
    mark = pair.a.link.lanes.tx.lane.mark
    spent = pair.uses_a.spent("hello")
    for _ in range(5):
        pair.a = pair.make_a()
        await pair.a.plane.start()
        before = pair.uses_a.spent("hello")
        await pair.a.until(partial(has_more, lambda: pair.uses_a.spent("hello"), before))
        await pair.a.crash()
    burnt = pair.uses_a.spent("hello") - spent
    assert pair.a.link.lanes.tx.lane.mark == mark + burnt
    assert burnt <= 32 * 20
    await pair.b.crash()


async def test_a_reader_ahead_of_its_writer_keeps_what_the_next_hello_needs(pair: Pair) -> None:
    """1.2: each restart puts the reader a stride further; the writer never hears of it, and must."""
    await pair.start()
    await quiet(pair)
    writer = pair.a.link.lanes.tx.lane
    pair.wire.tamper = only(FrameKind.HELLO, from_dialler=False, act=lambda stream, data: [])
    for _ in range(4):
        await pair.restart_b()
        mark = pair.b.link.lanes.rx.lane.mark
        await pair.b.until(partial(has_more, lambda: pair.b.link.lanes.rx.lane.mark, mark))
        pair.b.link.tidy()
        await asyncio.sleep(0.05)
    assert pair.b.link.lanes.rx.lane.position > writer.mark
    await pair.restart_a()
    await pair.restart_b()
    spent = pair.uses_a.spent("hello")
    pair.wire.tamper = honest
    pair.wire.cut()
    await pair.until_open()
    assert pair.uses_a.spent("hello") - spent <= 10 * HELLO
    await send_share(pair.a, b"past what was forfeited")
    await pair.b.until(lambda: bool(pair.b.shares.got))
    end = pair.b.link.lanes.rx
    pair.b.link.tidy()
    await pair.b.until(lambda: end.material.wiped_to >= end.lane.position)
    await pair.stop()


async def test_no_peer_at_all_burns_nothing(pair: Pair) -> None:
    """1.8: greetings come first, so a node that reaches nobody uses no pad."""
    await pair.start()
    await quiet(pair)
    await pair.a.crash()
    await pair.b.crash()
    pair.wire.is_down = True
    spent = pair.uses_a.spent("hello")
    for _ in range(3):
        pair.a = pair.make_a()
        await pair.a.plane.start()
        await asyncio.sleep(0.1)
        await pair.a.crash()
    assert pair.uses_a.spent("hello") == spent


async def test_held_back_stream_and_rollback_reuse_nothing(tmp_path: Path) -> None:
    """1.3 and 1.10: the snapshot of a running start, restored, goes beyond all that was sent."""
    pair = Pair(tmp_path, proof=tmp_path, devices=DevicePair(512 << 10))
    await pair.start()
    await quiet(pair)
    snapshot = tmp_path / "snapshot"
    shutil.copytree(tmp_path / "kme-a", snapshot)
    pair.wire.tamper = only(FrameKind.DATA, from_dialler=True, act=lambda stream, data: [])
    sent = 0
    with pytest.raises(ShortageError):
        while True:
            await send_share(pair.a, bytes(2000), timeout_s=0.3)
            sent += 1
    assert sent > 5
    await pair.a.crash()
    shutil.rmtree(tmp_path / "kme-a")
    shutil.copytree(snapshot, tmp_path / "kme-a")
    pair.wire.tamper = honest
    pair.a = pair.make_a()
    assert not pair.a.store.is_proven_restart
    await pair.a.plane.start()
    await pair.until_open()
    await send_share(pair.a, b"fresh bytes only")
    await pair.b.until(lambda: bool(pair.b.shares.got))
    await pair.stop()


async def test_restored_directory_is_refused_with_the_next_step(pair: Pair) -> None:
    """1.9: a start that the peer knows and this disk does not: stop, alarm, stay down."""
    await pair.start()
    await pair.a.crash()
    shutil.copytree(pair.root / "kme-a", pair.root / "snapshot")
    pair.a = pair.make_a()
    await pair.a.plane.start()
    await pair.until_open()
    await quiet(pair)
    await pair.a.crash()
    shutil.rmtree(pair.root / "kme-a")
    shutil.copytree(pair.root / "snapshot", pair.root / "kme-a")
    spent = pair.uses_a.spent("hello")
    for _ in range(2):
        pair.a = pair.make_a()
        await pair.a.plane.start()
        await pair.a.until(lambda: pair.a.plane.refusal is not None)
        alarm = next(one for one in pair.a.alarms.open_alarms() if one.alarm_id.endswith("/rolled-back"))
        assert alarm.needs_operator
        assert "reset the link" in alarm.next_step
        assert pair.a.link.status().state == "refused"
        with pytest.raises(RolledBackError):
            await pair.a.link.ready(32, timeout_s=1)
        await pair.a.crash()
    assert pair.uses_a.spent("hello") == spent
    await pair.b.crash()


async def test_cloned_directory_is_refused(pair: Pair) -> None:
    """1.9: of two nodes on copies of one directory, the one that the peer does not know stops."""
    await pair.start()
    await pair.a.crash()
    elsewhere = pair.root / "clone"
    shutil.copytree(pair.root / "kme-a", elsewhere / "kme-a")
    pair.a = pair.make_a()
    await pair.a.plane.start()
    await pair.until_open()
    original, pair.root = pair.a, elsewhere
    clone = pair.make_a()
    await clone.plane.start()
    await clone.until(lambda: clone.plane.refusal is not None)
    assert not clone.store.is_proven_restart
    assert original.plane.refusal is None
    await clone.crash()
    await original.crash()
    await pair.b.crash()


async def test_operator_brings_a_refused_node_back(pair: Pair) -> None:
    """1.9: a reset at both ends is the way back."""
    await pair.start()
    await pair.a.crash()
    shutil.copytree(pair.root / "kme-a", pair.root / "snapshot")
    pair.a = pair.make_a()
    await pair.a.plane.start()
    await pair.until_open()
    await quiet(pair)
    await pair.a.crash()
    shutil.rmtree(pair.root / "kme-a")
    shutil.copytree(pair.root / "snapshot", pair.root / "kme-a")
    pair.a = pair.make_a()
    await pair.a.plane.start()
    await pair.a.until(lambda: pair.a.plane.refusal is not None)
    await pair.a.plane.reset_link("kme-b")
    await pair.b.plane.reset_link("kme-a")
    pair.devices.budget_bytes += 64 << 10
    await pair.until_open()
    assert pair.a.plane.refusal is None
    await send_share(pair.a, b"back")
    await pair.b.until(lambda: bool(pair.b.shares.got))
    await pair.stop()


@pytest.mark.parametrize("field", ["nonce", "incarnation", "proven", "transmit_epoch", "receive_is_new"])
async def test_forged_greetings_latch_nothing(pair: Pair, field: str) -> None:
    """1.8: a changed greeting makes hellos fail; no record, mark or epoch comes from it."""
    await pair.start()
    await quiet(pair)
    known = pair.a.link.peer_incarnation, pair.b.link.peer_incarnation
    marks = [site.link.lanes.tx.lane.mark for site in (pair.a, pair.b)]

    def tamper(stream: WireStream, data: bytes, from_dialler: bool) -> list[bytes]:
        message = LinkMessage.FromString(data) if data[:1] == b"\x0a" else LinkMessage()
        if not message.HasField("greeting"):
            return [data]
        greeting = message.greeting
        if field in ("nonce", "incarnation"):
            setattr(greeting, field, bytes(len(getattr(greeting, field))))
        elif field == "transmit_epoch":
            greeting.transmit_epoch += 5
        else:
            setattr(greeting, field, not getattr(greeting, field))
        return [message.SerializeToString()]

    pair.wire.tamper = tamper
    pair.wire.cut()
    await asyncio.sleep(0.5)
    assert not pair.a.link.is_open
    assert not pair.b.link.is_open
    assert (pair.a.link.peer_incarnation, pair.b.link.peer_incarnation) == known
    assert [site.link.lanes.tx.lane.epoch for site in (pair.a, pair.b)] == [1, 1]
    for site, mark in zip((pair.a, pair.b), marks, strict=True):
        assert site.link.lanes.tx.lane.mark <= mark + 64 * HELLO
    pair.wire.tamper = honest
    pair.wire.cut()
    await pair.until_open()
    await pair.stop()


async def test_forged_unproven_greetings_are_paced_at_the_acceptor(pair: Pair) -> None:
    """1.8: anyone may claim to be unproven; the acceptor spends few hellos on that."""
    await pair.start()
    await quiet(pair)

    def tamper(stream: WireStream, data: bytes, from_dialler: bool) -> list[bytes]:
        message = LinkMessage.FromString(data) if data[:1] == b"\x0a" else LinkMessage()
        if from_dialler and message.HasField("greeting"):
            message.greeting.proven = False
            return [message.SerializeToString()]
        return [data]

    spent = pair.uses_b.spent("hello")
    pair.wire.tamper = tamper
    began_s = time.monotonic()
    pair.wire.cut()
    for _ in range(10):
        await asyncio.sleep(0.1)
        pair.wire.cut()
    # Four at once, then one a second.
    assert pair.uses_b.spent("hello") - spent <= HELLO * (4 + time.monotonic() - began_s + 1)
    await pair.stop()


async def test_forged_first_contact_offers_are_rate_capped(tmp_path: Path) -> None:
    """2.3: a fetch consumes at the device, so clear offers cost few of them."""
    pair = Pair(tmp_path, proof=tmp_path, devices=DevicePair(0))
    pair.b = pair.make_b()
    pair.a = pair.make_a()
    await pair.b.plane.start()
    await pair.a.plane.start()
    await pair.a.until(lambda: any(stream.theirs for stream in pair.b.link.streams))
    began_s = time.monotonic()
    for at in range(200):
        offer = BlockOffer(
            block_id=at.to_bytes(16, "big"),
            leader_writes=True,
            epoch=1,
            offset=0,
            length_bytes=1024 - 64,
            device_key_ids=[f"key-{at}"],
            tag=bytes(16),
        )
        message = LinkMessage(offer=offer.SerializeToString()).SerializeToString()
        pair.wire.streams[-1].inject(message, to_dialler=False)
    await pair.b.until(lambda: bool(pair.devices.follower.fetched))
    await asyncio.sleep(0.3)
    most = FAST_INGEST.first_contact_burst + FAST_INGEST.first_contact_per_s * (time.monotonic() - began_s)
    assert len(pair.devices.follower.fetched) <= most + 1
    assert pair.b.link.lanes.rx.lane.filled == 0
    pair.devices.budget_bytes = 128 << 10
    await pair.until_open()
    await pair.stop()


async def test_clear_offers_fetch_nothing_once_hellos_verified(pair: Pair) -> None:
    """2.3: on an open link only offers in frames count."""
    await pair.start()
    await quiet(pair)
    fetched = len(pair.devices.follower.fetched)
    filled = pair.b.link.lanes.rx.lane.filled
    offer = BlockOffer(
        block_id=bytes(16),
        leader_writes=True,
        epoch=1,
        offset=filled,
        length_bytes=960,
        device_key_ids=["key"],
        tag=bytes(16),
    )
    message = LinkMessage(offer=offer.SerializeToString()).SerializeToString()
    pair.wire.streams[-1].inject(message, to_dialler=False)
    await asyncio.sleep(0.1)
    assert len(pair.devices.follower.fetched) == fetched
    await pair.stop()


async def test_forged_lost_verdict_at_first_contact_delays_only(tmp_path: Path) -> None:
    """2.2/2.3: an unauthenticated "lost" costs a block and a lane epoch, never agreement."""
    pair = Pair(tmp_path, proof=tmp_path, devices=DevicePair(256 << 10))
    forged = 0

    def tamper(stream: WireStream, data: bytes, from_dialler: bool) -> list[bytes]:
        nonlocal forged
        message = LinkMessage.FromString(data) if data[:1] == b"\x1a" else LinkMessage()
        if from_dialler and message.offer and forged < 2:
            forged += 1
            offer = BlockOffer.FromString(message.offer)
            answer = BlockAnswer(block_id=offer.block_id, verdict=BlockAnswer.LOST)
            stream.inject(LinkMessage(answer=answer).SerializeToString(), to_dialler=True)
        return [data]

    pair.wire.tamper = tamper
    await pair.start()
    assert forged == 2
    await quiet(pair)
    for writer, reader in ((pair.a, pair.b), (pair.b, pair.a)):
        assert writer.link.lanes.tx.lane.epoch == reader.link.lanes.rx.lane.epoch
        await send_share(writer, b"agreed")
        await reader.until(partial(has_more, reader.shares.got.__len__, 0))
    await pair.stop()


async def test_mismatch_quarantines_the_block_at_both_ends(pair: Pair) -> None:
    """2.3: different keys under one ID: never used, alarm at both ends, the link goes on."""
    await pair.start()
    await quiet(pair)
    filled = pair.a.link.lanes.tx.lane.filled, pair.a.link.lanes.rx.lane.filled
    pair.devices.corrupt_next = 1
    pair.devices.budget_bytes += 128 << 10
    await pair.a.until(lambda: pair.a.alarms.is_open("link/kme-b/mismatch"))
    await quiet(pair)
    assert pair.b.alarms.is_open("link/kme-a/mismatch")
    assert pair.a.link.status().quarantined_blocks == pair.b.link.status().quarantined_blocks == 1
    holes = list(pair.a.link.lanes.tx.lane.holes) + list(pair.a.link.lanes.rx.lane.holes)
    assert len(holes) == 1
    assert holes[0].start in filled
    assert [*pair.b.link.lanes.rx.lane.holes, *pair.b.link.lanes.tx.lane.holes] == holes
    await pair.stop()


async def test_a_lost_first_block_never_leaves_a_lane_without_root_on_disk(pair: Pair) -> None:
    """1.5, 2.3: a crash at any moment may not keep the epoch whose root was discarded with its block."""
    moments: list[Path] = []

    def keep() -> None:
        for state in pair.root.glob("kme-?/state.db*"):
            if not state.name.endswith("-shm"):
                kept = pair.root / f"moment-{len(moments)}-{state.parent.name}"
                kept.mkdir(exist_ok=True)
                shutil.copy(state, kept)
        moments.extend(pair.root.glob(f"moment-{len(moments)}-*"))

    pair.devices.lose_next = 1
    pair.devices.corrupt_next = 1
    arm("commit.after", keep)
    try:
        await pair.start()
        await quiet(pair)
    finally:
        disarm_all()
    states = (BlockState.DISCARDED.value, BlockState.QUARANTINED.value)
    for moment in moments:
        with apsw.Connection(str(moment / "state.db")) as disk:
            if not disk.execute("SELECT 1 FROM sqlite_master WHERE name = 'blocks'").fetchall():
                continue
            query = "SELECT lane_id FROM blocks WHERE start = 0 AND state IN (?, ?)"
            assert disk.execute(query, states).fetchall() == [], moment.name
    assert len(moments) > 10
    assert {end.lane.epoch for end in (pair.a.link.lanes.tx, pair.a.link.lanes.rx)} != {1}
    await send_share(pair.a, b"over the new epoch")
    await pair.b.until(lambda: bool(pair.b.shares.got))
    await pair.stop()


async def test_lost_block_leaves_a_hole_that_no_frame_spans(pair: Pair) -> None:
    """2.1/2.3: "lost at my device" discards at both ends; traffic crosses the hole, also after restarts."""
    pair.pool = 4 << 20
    await pair.start()
    await quiet(pair)
    pair.devices.lose_next = 4
    pair.devices.budget_bytes += 2 << 20
    await quiet(pair)
    holes = {
        name: list(end.lane.holes)
        for name, end in (
            ("a-tx", pair.a.link.lanes.tx),
            ("a-rx", pair.a.link.lanes.rx),
            ("b-tx", pair.b.link.lanes.tx),
            ("b-rx", pair.b.link.lanes.rx),
        )
    }
    assert holes["a-tx"] == holes["b-rx"]
    assert holes["a-rx"] == holes["b-tx"]
    assert sum(len(one) for one in holes["a-tx"] + holes["a-rx"]) > 0
    await pair.restart_b()
    await pair.until_open()
    for sender, receiver, name in ((pair.a, pair.b, "a-tx"), (pair.b, pair.a, "b-tx")):
        sent = 0
        end = sender.link.lanes.tx.lane
        while holes[name] and end.position <= holes[name][-1].stop:
            await send_share(sender, bytes(3000))
            sent += 1
        await receiver.until(partial(has_more, receiver.shares.got.__len__, sent - 1))
        uses = pair.uses_a if sender is pair.a else pair.uses_b
        for out, _, start, stop, _ in uses.ranges:
            assert not out or not any(start < hole.stop and hole.start < stop for hole in holes[name])
    await pair.stop()


async def test_cut_during_offers_resends_them_byte_for_byte(pair: Pair) -> None:
    """2.1: offers and accepts are idempotent by block id; cuts lose no block and fetch none twice."""
    pair.devices.budget_bytes = 512 << 10
    await pair.start()
    for _ in range(8):
        await asyncio.sleep(0.03)
        pair.wire.cut()
    await pair.until_open()
    await quiet(pair)
    fetched = pair.devices.follower.fetched
    assert len(fetched) == len(set(fetched))
    assert pair.a.link.lanes.tx.lane.material.total == pair.b.link.lanes.rx.lane.filled - (
        pair.a.link.lanes.tx.lane.position
    )
    offers: dict[bytes, bytes] = {}
    for _, data in pair.wire.seen:
        if data[:1] == b"\x1a":
            offer = LinkMessage.FromString(data).offer
            assert offers.setdefault(BlockOffer.FromString(offer).block_id, offer) == offer
    await pair.stop()


async def test_crashes_between_offer_and_accept_lose_no_agreement(pair: Pair) -> None:
    """2.1: whatever was killed when, both ends hold the same bytes at the same offsets."""
    pair.devices.budget_bytes = 512 << 10
    await pair.start()
    for at in range(6):
        await asyncio.sleep(0.05)
        if at % 2:
            await pair.restart_a()
        else:
            await pair.restart_b()
    await pair.until_open()
    await quiet(pair)
    for writer, reader in ((pair.a, pair.b), (pair.b, pair.a)):
        tx, rx = writer.link.lanes.tx, reader.link.lanes.rx
        assert tx.lane.filled == rx.lane.filled
        for run in tx.lane.material:
            assert tx.material.read(run.start, run.stop) == rx.material.read(run.start, run.stop)
    await pair.stop()


async def test_frames_before_hellos_are_refused(pair: Pair) -> None:
    """1.8: before hellos verify nothing but first contact passes, not even an authentic frame."""
    await pair.start()
    await quiet(pair)
    held: list[bytes] = []
    pair.wire.tamper = only(FrameKind.DATA, from_dialler=True, act=keep_in(held))
    await send_share(pair.a, b"held back")
    await pair.a.until(lambda: bool(held))

    def early(stream: WireStream, data: bytes, from_dialler: bool) -> list[bytes]:
        frame = frame_of(data)
        if frame is not None and frame.kind is FrameKind.HELLO and from_dialler:
            return [held[0], data]
        return [data]

    pair.wire.tamper = early
    failed = pair.b.link.status().failed_tags
    pair.wire.cut()
    await pair.a.until(lambda: pair.a.shares.opened == 2)
    await pair.until_open()
    assert pair.b.link.status().failed_tags == failed + 1
    assert not pair.b.shares.got
    await pair.stop()


async def test_every_flipped_bit_of_a_frame_is_caught(pair: Pair) -> None:
    """1.6: header, metadata, ciphertext and tag are all covered."""
    await pair.start()
    await quiet(pair)
    held: list[bytes] = []
    pair.wire.tamper = only(FrameKind.DATA, from_dialler=True, act=keep_in(held))
    await send_share(pair.a, b"x" * 40)
    await pair.a.until(lambda: bool(held))
    frame = bytes(unwrap(held[0]))  # type: ignore[arg-type]
    for at in range(0, len(frame) * 8, 3):
        junk = bytearray(frame)
        junk[at // 8] ^= 1 << at % 8
        pair.wire.streams[-1].inject(wrap_frame([bytes(junk)]), to_dialler=False)
    pair.wire.streams[-1].inject(held[0], to_dialler=False)
    await pair.b.until(lambda: bool(pair.b.shares.got))
    assert len(pair.b.shares.got) == 1
    assert pair.b.shares.got[0][2] == b"x" * 40
    await pair.stop()


def test_raw_shares_are_covered_by_the_tag() -> None:
    """1.6: raw bytes that differ between the pools fail the frame, though they are never sent."""
    pad = bytes(range(32)) + bytes(100)
    parts = frames.seal(
        FrameKind.DATA, 1, 64, pad=pad, root=b"r" * 32, raw_bytes=100, plaintext=b"", meta=b"m"
    )
    other = bytearray(pad)
    other[-1] ^= 1
    frame = frames.parse(b"".join(parts))
    with pytest.raises(TagMismatchError):
        frames.open_frame(frame, pad=other, root=b"r" * 32)


async def test_a_stream_without_hello_is_given_up(pair: Pair) -> None:
    """1.8: a peer that greets and goes silent holds nothing for ever."""
    pair.open_timeout_s = 2.0
    await pair.start()
    await quiet(pair)
    pair.wire.tamper = only(FrameKind.HELLO, from_dialler=False, act=lambda stream, data: [])
    pair.wire.cut()
    await pair.a.until(lambda: "did not come in time" in pair.a.link.last_error)
    with pytest.raises(UnavailableError):
        await pair.a.link.ready(32, timeout_s=0)
    await pair.stop()
