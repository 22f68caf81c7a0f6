"""Ingest: what both ends of a link do to turn keys of two devices into lane bytes.

Owns what is durable about blocks and the messages in between (protocol 2.1 to 2.3): offers
and answers are stored and resent byte for byte, a block joins a lane at each end only when
the rules say so, a lost one leaves a hole at both ends, a mismatch is quarantined. The two
roles follow: ``BlockLeader`` (smaller KME id) takes keys and orders them, ``BlockFollower``
fetches the same keys and checks. Tags and bounds are in ``mesh.core.blocks``.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from google.protobuf.message import DecodeError

from mesh.core import blocks
from mesh.core.blocks import Block
from mesh.core.budget import RateCap
from mesh.core.lane import ROOT_BYTES
from mesh.core.ranges import Range
from mesh.errors import (
    CallerError,
    ErrorReason,
    MeshError,
    PeerError,
    TagMismatchError,
    UnavailableError,
)
from mesh.node.disk import DiskGuard
from mesh.node.lanes import AnyEnd
from mesh.sources.port import DeviceKey, KeySource
from mesh.store.tables import BlockRow, BlockState, ExtentRow, ExtentState, Tables
from mesh.v1.admin_pb2 import DeviceStatus
from mesh.v1.link_pb2 import BlockAnswer, BlockOffer

if TYPE_CHECKING:
    from mesh.node.link import Link
    from mesh.node.link_stream import LinkStream

_LOG = logging.getLogger("keymesh.ingest")
#: Answered blocks remembered per lane: more than a leader may have open.
KEPT_BLOCKS = 32
#: So many blocks lost in a row are no restart of a device: its URL or SAE ID is wrong, or the pair is.
LOST_BLOCKS_ALARM = 3
MAX_EPOCH_STEP = 1024
#: Offsets of the leader's outbound and inbound lane below which all blocks are decided.
Decided: TypeAlias = tuple[int, int]
_VERDICT_STATE = {
    BlockAnswer.LOST: BlockState.DISCARDED,
    BlockAnswer.MISMATCH: BlockState.QUARANTINED,
}
# Usable lane bytes at which ingest may take its time.
_COMFORT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class IngestSettings:
    """Sizes and times of ingest.

    Attributes:
        block_bytes: most key bytes of one block.
        gather_bytes: fewer than this are held back until more are there.
        poll_min_s, poll_max_s: pause between two takes while a lane is low, or full.
        resend_s: an offer without an answer is sent again after this.
        first_contact_per_s, first_contact_burst: cap on what clear offers cost (2.3).
    """

    block_bytes: int = blocks.MAX_BLOCK_BYTES
    gather_bytes: int = 1024
    poll_min_s: float = 0.05
    poll_max_s: float = 0.5
    resend_s: float = 1.0
    first_contact_per_s: float = 1.0
    first_contact_burst: int = 6


class Ingest:
    """What all roles share; links without a device are fed by ``mesh.node.psrd_link``.

    Args:
        link: the link it feeds.
        source: this end of the device pair, None for none.
        settings: sizes and times.
    """

    def __init__(self, link: Link, source: KeySource | None, settings: IngestSettings) -> None:
        self.link = link
        self.source = source
        self.settings = settings
        self.quarantined_blocks = 0
        self.bytes_per_s = 0.0
        self._added_bytes = 0
        self._added_at_s: float | None = None
        self._cap = RateCap(settings.first_contact_per_s, settings.first_contact_burst)
        self._wake = asyncio.Event()
        self._disk = DiskGuard(
            link.store, link.alarms, link.randomness, probe_bytes=max(settings.block_bytes, 64 << 10)
        )
        #: Held while blocks and lanes change: a reset waits for what is under way.
        self.lock = asyncio.Lock()

    def load(self) -> None:
        """Count what the store has."""
        for end in self._ends():
            rows = self._rows(end)
            self.quarantined_blocks += sum(row.state is BlockState.QUARANTINED for row in rows)

    async def run(self) -> None:
        """Work until cancelled."""
        await asyncio.Event().wait()

    @property
    def device_state(self) -> str:
        """How the last conversation with the device went; "none" without one."""
        return "none" if self.source is None else self.source.state

    @property
    def device_status(self) -> DeviceStatus | None:
        """What the device said of itself lately; None if it said nothing."""
        report = None if self.source is None else self.source.report
        if report is None:
            return None
        return DeviceStatus(
            stored_bytes=report.stored_bytes,
            capacity_bytes=report.capacity_bytes,
            secret_key_rate_bits_per_s=report.secret_key_rate_bits_per_s,
            qber=report.qber,
        )

    @property
    def unaccepted_bytes(self) -> int:
        """Inbound lane bytes of offers without an answer: the writer may not have them."""
        return 0

    def wake(self) -> None:
        """Something changed that ingest waits for."""
        self._wake.set()

    def on_greeted(self, stream: LinkStream) -> None:
        """Greetings are exchanged on a stream."""
        del stream
        self.wake()

    def on_offer(self, offer: bytes, stream: LinkStream, decided: Decided | None) -> None:
        """A leader's offer came, with ``decided`` if in a frame; only a follower takes it."""
        del offer, stream
        if decided is not None:
            raise PeerError("only the leader offers blocks")

    def on_answer(self, answer: BlockAnswer, *, in_frame: bool) -> None:
        """A follower's answer came; only a leader takes it."""
        del answer
        if in_frame:
            raise PeerError("only the follower answers offers")

    def on_discarded(self, block_ids: Iterable[bytes]) -> None:
        """The leader has discarded these blocks."""
        del block_ids

    def discarded_block_ids(self) -> list[bytes]:
        """What a leader tells in its hello."""
        return []

    def decided(self) -> Decided:
        """What a leader tells with its offers: below it, every block is decided."""
        return (0, 0)

    def on_filled(self, filled: int) -> None:
        """An authenticated frame says how far the reader's copy of our outbound lane is filled."""
        del filled

    def before_hello(self, *, peer_has_material: bool) -> None:
        """Our hello is due; the peer's greeting says whether it has bytes of our lane."""
        del peer_has_material

    def on_open(self) -> None:
        """Both hellos verified."""
        self.wake()

    def forget(self) -> None:
        """The lanes were thrown away, and all blocks with them; called with the lock held."""
        self.quarantined_blocks = 0
        self.wake()

    # -- shared steps ---------------------------------------------------------------------

    def _ends(self) -> tuple[AnyEnd, AnyEnd]:
        return self.link.lanes.tx, self.link.lanes.rx

    def _rows(self, end: AnyEnd) -> list[BlockRow]:
        return self.link.store.read(lambda tables: tables.blocks.list(end.lane_id))

    def _end(self, *, leader_writes: bool) -> AnyEnd:
        """The lane that an offer means, at this end."""
        lanes = self.link.lanes
        return lanes.tx if leader_writes == self.link.is_dialler else lanes.rx

    async def _write_pad(self, block: Block, data: bytes) -> str:
        name = f"{self.link.peer[:40]}-{block.block_id.hex()}"
        with self._disk.watching():
            await self.link.store.pads.create(name, blocks.lane_bytes(data))
        return name

    def _join(self, end: AnyEnd, extent: ExtentRow, *, is_usable: bool) -> None:
        """The block's bytes are synced here; usable says whether this end may use them."""
        end.material.add(extent)
        end.lane.extend(extent.stop)
        if is_usable:
            end.lane.add_material(Range(extent.start, extent.stop))
        self.link.material_changed()

    def _count(self, size: int) -> None:
        """Keep a smoothed rate of bytes that joined lanes."""
        now_s = self.link.now_s()
        self._added_bytes += size
        if self._added_at_s is None:
            self._added_at_s = now_s
        elif now_s - self._added_at_s >= 1.0:
            rate = self._added_bytes / (now_s - self._added_at_s)
            self.bytes_per_s = rate if self.bytes_per_s == 0 else 0.5 * self.bytes_per_s + 0.5 * rate
            self._added_bytes, self._added_at_s = 0, now_s

    def _prune(self, tables: Tables, end: AnyEnd) -> None:
        """Inside a change: forget blocks answered long ago whose offsets are used."""
        # Only those below the mark are read: a full pool has a thousand more, and this runs per block.
        for row in tables.blocks.list(end.lane_id, below=end.lane.mark)[:-KEPT_BLOCKS]:
            if row.state is not BlockState.OFFERED:
                tables.blocks.delete(row.block_id)
                end.blocks.discard(row.block_id)

    async def _give_up(self, end: AnyEnd, block_id: bytes, state: BlockState, answer: bytes | None) -> None:
        """Discard or quarantine a block here: its bytes go, a hole stays (2.3)."""

        def change(tables: Tables) -> tuple[BlockRow, list[str]] | None:
            row = tables.blocks.get(block_id)
            if row is None or row.state in (BlockState.DISCARDED, BlockState.QUARANTINED):
                return None
            tables.blocks.set_state(block_id, state, answer=answer)
            return row, tables.extents.delete(end.lane_id, row.start)

        done = await self.link.store.commit(change)
        if done is None:
            return
        row, files = done
        self.link.lanes.take_hole(end, Range(row.start, row.stop))
        if state is BlockState.QUARANTINED:
            self.quarantined_blocks += 1
            self._alarm_mismatch()
        self.link.material_changed()
        await self.link.store.pads.remove(*files)

    def _alarm_mismatch(self) -> None:
        self.link.alarms.raise_alarm(
            f"link/{self.link.peer}/mismatch",
            "critical",
            "the two devices of this link gave different keys under the same IDs; the block is quarantined",
            "have the device pair checked; keys of this block were never used",
        )

    def _alarm_device(self, error: MeshError) -> None:
        self.link.alarms.raise_alarm(
            f"link/{self.link.peer}/device",
            "warning",
            f"the link's device gives no keys: {error.message}",
            "see whether the device is up and its certificates fit",
        )

    def _device_answered(self) -> None:
        self.link.alarms.clear(f"link/{self.link.peer}/device")


def parse_offer(offer: bytes) -> tuple[Block, bytes]:
    """Decode an offer and check its bounds.

    Raises:
        PeerError: it cannot be read, or a field is out of bounds.
    """
    try:
        message = BlockOffer.FromString(offer)
    except DecodeError as error:
        raise PeerError("a block offer that cannot be read") from error
    block = Block(
        message.block_id,
        message.leader_writes,
        message.epoch,
        message.offset,
        message.length_bytes,
        tuple(message.device_key_ids),
    )
    return block, message.tag


def encode_offer(block: Block, tag: bytes) -> bytes:
    """The offer as it is stored, sent and resent."""
    return BlockOffer(
        block_id=block.block_id,
        leader_writes=block.leader_writes,
        epoch=block.epoch,
        offset=block.offset,
        length_bytes=block.length_bytes,
        device_key_ids=block.device_key_ids,
        tag=tag,
    ).SerializeToString()


class BlockLeader(Ingest):
    """Takes fresh keys from its device and orders them into the two lanes."""

    def __init__(self, link: Link, source: KeySource | None, settings: IngestSettings) -> None:
        super().__init__(link, source, settings)
        self._rest_until_s = 0.0
        self._open: dict[bytes, BlockRow] = {}
        self._sent_at_s: dict[bytes, float] = {}
        self._gathered: list[DeviceKey] = []
        self._answers: deque[tuple[BlockAnswer, bool]] = deque(maxlen=64)
        self._discarded: deque[bytes] = deque(maxlen=KEPT_BLOCKS)

    def load(self) -> None:
        """Find the offers without an answer, to resend them byte for byte."""
        super().load()
        for end in self._ends():
            for row in self._rows(end):
                if row.state is BlockState.OFFERED and len(row.block_id) == blocks.BLOCK_ID_BYTES:
                    self._open[row.block_id] = row
                elif row.state is BlockState.DISCARDED:
                    self._discarded.append(row.block_id)

    def discarded_block_ids(self) -> list[bytes]:
        """What this leader has discarded lately."""
        return list(self._discarded)

    @property
    def unaccepted_bytes(self) -> int:
        """Counted over the open offers."""
        lane_id = self.link.lanes.rx.lane_id
        return sum(row.stop - row.start for row in self._open.values() if row.lane_id == lane_id)

    def decided(self) -> Decided:
        """The lowest offset of an open offer per lane, else the lane's end."""
        outbound, inbound = (
            min(
                (row.start for row in self._open.values() if row.lane_id == end.lane_id),
                default=end.lane.filled,
            )
            for end in self._ends()
        )
        return outbound, inbound

    def on_greeted(self, stream: LinkStream) -> None:
        """Resend at once what waits for an answer."""
        del stream
        self._sent_at_s.clear()
        self.wake()

    def on_open(self) -> None:
        """Resend at once, in frames now, what waits for an answer."""
        self._sent_at_s.clear()
        self.wake()

    def on_answer(self, answer: BlockAnswer, *, in_frame: bool) -> None:
        """Queue the answer for the worker; in clear only one that can count."""
        is_yes = answer.verdict == BlockAnswer.ACCEPTED
        if answer.block_id in self._open and (in_frame or is_yes or self.link.is_first_contact):
            self._answers.append((answer, in_frame))
            self.wake()

    def forget(self) -> None:
        """The lanes were thrown away: offers of their epochs are void."""
        self._open.clear()
        self._sent_at_s.clear()
        self._discarded.clear()
        super().forget()

    async def run(self) -> None:
        """Take answers, resend, take keys, offer; errors of the device or the disk only delay."""
        pause_s = self.settings.poll_min_s
        while True:
            try:
                async with self.lock:
                    await self._take_answers()
                    await self._meet_epochs()
                    self._resend()
                    pause_s = await self._offer_next()
            except UnavailableError as error:
                pause_s = max(self.settings.poll_max_s, error.retry_after_s)
                if error.reason is ErrorReason.DEVICE_UNAVAILABLE:
                    self._alarm_device(error)
                else:
                    _LOG.warning("ingest waits", extra={"peer": self.link.peer, "cause": str(error)})
            except PeerError as error:
                pause_s = self.settings.poll_max_s
                self._alarm_device(error)
            except MeshError as error:
                pause_s = self.settings.poll_max_s
                _LOG.error("ingest failed", extra={"peer": self.link.peer, "cause": str(error)})
            if not self._answers:
                await self._sleep(pause_s)

    async def _sleep(self, pause_s: float) -> None:
        self._wake.clear()
        try:
            async with asyncio.timeout(pause_s):
                await self._wake.wait()
        except TimeoutError:
            return

    # -- offers ---------------------------------------------------------------------------

    async def _offer_next(self) -> float:
        """Offer one block if there is room for it and a stream to carry it; the next pause."""
        settings, link = self.settings, self.link
        end = self._neediest()
        if self.source is None or end is None or not link.can_offer:
            return settings.poll_max_s
        usable = end.lane.usable_bytes
        is_comfortable = usable >= min(_COMFORT_BYTES, link.settings.limits.pool_bytes // 4)
        rest_s = self._rest_until_s - link.now_s()
        if is_comfortable and rest_s > 0:
            return rest_s
        want = min(settings.block_bytes, max(16 << 10, usable, 2 * blocks.MIN_BLOCK_BYTES))
        held = sum(len(key.value) for key in self._gathered)
        if held < want:
            await self._disk.check()
            self._gathered += await self.source.take(want - held)
            self._device_answered()
        taken, total = self._pick(want)
        if total < max(settings.gather_bytes, blocks.MIN_BLOCK_BYTES):
            return settings.poll_min_s
        await self._offer(end, taken, total)
        if not is_comfortable or total > want // 2:
            return settings.poll_min_s
        # Nobody waits for it: let key gather, few large blocks cost less than many small ones.
        self._rest_until_s = link.now_s() + settings.poll_max_s
        return settings.poll_max_s

    def _neediest(self) -> AnyEnd | None:
        """The lane with less material, offered blocks included; None when both are full."""
        if len(self._open) >= blocks.MAX_OUTSTANDING:
            return None
        levels: list[tuple[int, int, AnyEnd]] = []
        for order, end in enumerate(self._ends()):
            waiting = [row for row in self._open.values() if row.lane_id == end.lane_id]
            if waiting and not (end.has_first_block and self.link.is_open):
                continue  # at first contact one at a time: see _resend
            level = end.lane.usable_bytes
            if end.is_outbound:
                level += sum(row.stop - row.start for row in waiting)
            if level < self.link.settings.limits.pool_bytes:
                levels.append((level, order, end))
        return min(levels, key=lambda one: one[:2])[2] if levels else None

    def _pick(self, want: int) -> tuple[list[DeviceKey], int]:
        taken: list[DeviceKey] = []
        total = 0
        for key in self._gathered:
            if total + len(key.value) > want or len(taken) == blocks.MAX_KEY_IDS:
                break
            taken.append(key)
            total += len(key.value)
        return taken, total

    async def _offer(self, end: AnyEnd, keys: list[DeviceKey], total: int) -> None:
        """Sync the block, store the offer, then send it (2.1)."""
        data = b"".join(key.value.reveal() for key in keys)
        block = Block(
            self.link.randomness(blocks.BLOCK_ID_BYTES),
            end.is_outbound,
            end.lane.epoch,
            end.lane.filled,
            total - blocks.TAG_KEYS_BYTES,
            tuple(key.key_id for key in keys),
        )
        file = await self._write_pad(block, data)
        # Until here they may be tried again; a commit that failed may yet have reached the disk.
        del self._gathered[: len(keys)]
        span = block.span
        row = BlockRow(
            block.block_id,
            end.lane_id,
            span.start,
            span.stop,
            BlockState.OFFERED,
            encode_offer(block, blocks.offer_tag(block, data)),
            blocks.accept_tag(block, data),
            True,
        )
        extent = ExtentRow(end.lane_id, span.start, span.stop, file, 0, ExtentState.SYNCED)
        root = bytes(blocks.lane_bytes(data)[:ROOT_BYTES]) if span.start == 0 else None

        def change(tables: Tables) -> None:
            tables.blocks.put(row)
            tables.extents.put(extent)
            if root is not None:
                tables.lanes.set_root(end.lane_id, root)

        with self._disk.watching():
            await self.link.store.commit(change)
        if root is not None:
            end.root = root
        for key in keys:
            key.value.wipe()
        end.blocks.add(block.block_id)
        self._open[block.block_id] = row
        # A receiver reads a block once it has synced it; a writer waits for the accept.
        self._join(end, extent, is_usable=not end.is_outbound)
        self._resend()

    def _resend(self) -> None:
        """Send what is due, lower offsets first; in clear only the lowest of each lane.

        A clear offer has no ``decided`` beside it: that it is sent says that all below is.
        """
        now_s = self.link.now_s()
        lanes_done: set[int] = set()
        for row in sorted(self._open.values(), key=lambda one: (one.lane_id, one.start)):
            if row.lane_id in lanes_done:
                continue
            if not self.link.is_open:
                lanes_done.add(row.lane_id)
            if now_s - self._sent_at_s.get(row.block_id, -1e9) >= self.settings.resend_s:
                self._send(row)

    def _send(self, row: BlockRow) -> None:
        if not self.link.can_offer:
            return
        if not self.link.is_open and not self._cap.take(self.link.now_s()):
            return
        if self.link.post_offer(row.message):
            self._sent_at_s[row.block_id] = self.link.now_s()

    async def _meet_epochs(self) -> None:
        """Open the other end's higher epoch for a lane in which nothing was ever verified.

        After a reset at one end, or forged verdicts at first contact, the two ends may name
        different epochs. Nothing is lost by going up: no byte of ours was used there.
        """
        theirs = self.link.their_epochs
        if theirs is None:
            return
        for end, epoch in zip(self._ends(), theirs, strict=True):
            behind = epoch - end.lane.epoch
            if 0 < behind <= MAX_EPOCH_STEP and not end.is_established:
                await self._new_epoch(end, epoch)

    async def _new_epoch(self, end: AnyEnd, epoch: int) -> None:
        self._open = {key: row for key, row in self._open.items() if row.lane_id != end.lane_id}
        if end.is_outbound:
            await self.link.lanes.reset(transmit=epoch)
        else:
            await self.link.lanes.reset(receive=epoch)

    # -- answers --------------------------------------------------------------------------

    async def _take_answers(self) -> None:
        while self._answers:
            answer, in_frame = self._answers.popleft()
            row = self._open.get(answer.block_id)
            if row is None:
                continue
            end = next(one for one in self._ends() if one.lane_id == row.lane_id)
            if answer.verdict == BlockAnswer.ACCEPTED:
                await self._accepted(end, row, answer.tag)
            elif answer.verdict in _VERDICT_STATE and (in_frame or self.link.is_first_contact):
                await self._refused(end, row, _VERDICT_STATE[answer.verdict], in_frame=in_frame)

    async def _accepted(self, end: AnyEnd, row: BlockRow, tag: bytes) -> None:
        if row.answer is None or not hmac.compare_digest(row.answer, tag):
            self.link.count_failure(TagMismatchError())
            return

        def change(tables: Tables) -> None:
            tables.blocks.set_state(row.block_id, BlockState.ACCEPTED)
            tables.extents.set_state(end.lane_id, row.start, ExtentState.USABLE)
            self._prune(tables, end)

        await self.link.store.commit(change)
        del self._open[row.block_id]
        self._sent_at_s.pop(row.block_id, None)
        end.has_first_block = True
        if end.is_outbound:
            end.lane.add_material(Range(row.start, row.stop))
        self._count(row.stop - row.start)
        self.link.material_changed()
        self.wake()

    async def _refused(self, end: AnyEnd, row: BlockRow, state: BlockState, *, in_frame: bool) -> None:
        del self._open[row.block_id]
        self._sent_at_s.pop(row.block_id, None)
        self._discarded.append(row.block_id)
        if row.start == 0 and not end.has_first_block:
            # The root is gone: the lane begins anew in the next epoch. In one commit: a lane that
            # a crash left in this epoch would go on without a root and never open.
            if state is BlockState.QUARANTINED:
                self._alarm_mismatch()
            await self._new_epoch(end, end.lane.epoch + 1)
        else:
            await self._give_up(end, row.block_id, state, None)
            if not in_frame:
                self.link.post_discarded(row.block_id)
        self.wake()


class BlockFollower(Ingest):
    """Fetches the offered keys from its own device, checks them, accepts."""

    def __init__(self, link: Link, source: KeySource | None, settings: IngestSettings) -> None:
        super().__init__(link, source, settings)
        self._offers: deque[tuple[bytes, LinkStream, Decided | None]] = deque(maxlen=32)
        self._to_discard: deque[bytes] = deque(maxlen=KEPT_BLOCKS)
        self._lost_in_row = 0

    def on_offer(self, offer: bytes, stream: LinkStream, decided: Decided | None) -> None:
        """Queue the offer for the worker; in clear only at first contact (2.3).

        A block that is here already costs nothing but its stored answer, which the leader may lack.
        """
        if decided is None and not self.link.is_first_contact and not self._is_known(offer):
            return
        self._offers.append((offer, stream, decided))
        self.wake()

    def _is_known(self, offer: bytes) -> bool:
        try:
            block_id = parse_offer(offer)[0].block_id
        except PeerError:
            return False
        return any(block_id in end.blocks for end in self._ends())

    def on_discarded(self, block_ids: Iterable[bytes]) -> None:
        """Discard here what the leader has discarded, if it was accepted."""
        known = {block_id for end in self._ends() for block_id in end.blocks}
        self._to_discard.extend(block_id for block_id in block_ids if block_id in known)
        self.wake()

    async def run(self) -> None:
        """Take offers one by one; errors of the device or the disk only delay."""
        while True:
            self._wake.clear()
            try:
                while self._to_discard or self._offers:
                    async with self.lock:
                        if self._to_discard:
                            await self._discard(self._to_discard.popleft())
                        elif self._offers:
                            await self._take(*self._offers.popleft())
            except MeshError as error:
                _LOG.warning("an offer was not taken", extra={"peer": self.link.peer, "cause": str(error)})
                if error.reason is ErrorReason.PEER_REFUSED:
                    self.link.close_streams(error)
                continue
            await self._wake.wait()

    async def _discard(self, block_id: bytes) -> None:
        for end in self._ends():
            if block_id in end.blocks:
                await self._give_up(end, block_id, BlockState.DISCARDED, None)

    async def _take(self, offer: bytes, stream: LinkStream, decided: Decided | None) -> None:
        block, tag = parse_offer(offer)
        in_frame = decided is not None
        end = self._end(leader_writes=block.leader_writes)
        if block.block_id in end.blocks:
            stored = self.link.store.read(lambda tables: tables.blocks.get(block.block_id))
            if stored is not None:
                self._repeat(stored, offer, stream)
            return
        if not self._is_due(end, block, in_frame=in_frame):
            return
        if not in_frame and not (self.link.is_first_contact and self._cap.take(self.link.now_s())):
            return
        is_gap = block.epoch == end.lane.epoch and block.offset > end.lane.filled
        is_too_early = is_gap and decided is not None and block.offset > decided[not block.leader_writes]
        if is_too_early or end.lane.usable_bytes > 2 * self.link.settings.limits.pool_bytes:
            self._answer(block.block_id, BlockAnswer.BUSY, stream)
            return
        await self._fetch(end, block, tag, offer, stream, in_frame=in_frame)

    def _is_due(self, end: AnyEnd, block: Block, *, in_frame: bool) -> bool:
        """Whether the offer continues the lane as it is known here.

        Raises:
            PeerError: ``PEER_REFUSED``, a hello-authenticated leader offers what is long taken.
        """
        if block.epoch > end.lane.epoch:
            return not end.is_established and block.offset == 0
        is_due = block.epoch == end.lane.epoch and block.offset >= end.lane.filled
        if not is_due and in_frame:
            raise PeerError(
                "the leader offers offsets that are long taken: its state is older than ours",
                reason=ErrorReason.PEER_REFUSED,
                facts={"offset": block.offset, "filled": end.lane.filled},
            )
        return is_due

    def _repeat(self, stored: BlockRow, offer: bytes, stream: LinkStream) -> None:
        """The same block again: the same answer, byte for byte."""
        if stored.message == offer and stored.answer is not None:
            self._post(BlockAnswer.FromString(stored.answer), stream)

    async def _fetch(
        self, end: AnyEnd, block: Block, tag: bytes, offer: bytes, stream: LinkStream, *, in_frame: bool
    ) -> None:
        if self.source is None:
            self._answer(block.block_id, BlockAnswer.BUSY, stream)
            return
        try:
            await self._disk.check()
            keys = await self.source.fetch(block.device_key_ids)
        except CallerError:
            self._count_lost()
            await self._refuse(end, block, offer, BlockAnswer.LOST, stream, in_frame=in_frame)
            return
        except (UnavailableError, PeerError) as error:
            if not self._disk.is_doubted:
                self._alarm_device(error)
            self._answer(block.block_id, BlockAnswer.BUSY, stream)
            return
        self._device_answered()
        self._count_found()
        data = b"".join(key.value.reveal() for key in keys)
        for key in keys:
            key.value.wipe()
        try:
            blocks.verify_offer(block, data, tag)
        except (TagMismatchError, PeerError):
            await self._refuse(end, block, offer, BlockAnswer.MISMATCH, stream, in_frame=in_frame)
            return
        await self._accept(end, block, data, offer, stream)

    def _count_lost(self) -> None:
        self._lost_in_row += 1
        if self._lost_in_row >= LOST_BLOCKS_ALARM:
            self.link.alarms.raise_alarm(
                f"link/{self.link.peer}/lost",
                "warning",
                f"this end's device knew none of the last {self._lost_in_row} blocks' keys; both ends threw"
                " them away",
                "see whether device.url and device.sae_id at both ends name the two ends of one device pair",
            )

    def _count_found(self) -> None:
        if self._lost_in_row:
            self._lost_in_row = 0
            self.link.alarms.clear(f"link/{self.link.peer}/lost")

    async def _accept(self, end: AnyEnd, block: Block, data: bytes, offer: bytes, stream: LinkStream) -> None:
        """Sync the block, store the answer, then send it (2.1)."""
        if block.epoch > end.lane.epoch:
            if end.is_outbound:
                await self.link.lanes.reset(transmit=block.epoch)
            else:
                await self.link.lanes.reset(receive=block.epoch)
            end = self._end(leader_writes=block.leader_writes)
        span = block.span
        file = await self._write_pad(block, data)
        answer = BlockAnswer(
            block_id=block.block_id, verdict=BlockAnswer.ACCEPTED, tag=blocks.accept_tag(block, data)
        )
        row = BlockRow(
            block.block_id,
            end.lane_id,
            span.start,
            span.stop,
            BlockState.ACCEPTED,
            offer,
            answer.SerializeToString(),
            False,
        )
        extent = ExtentRow(end.lane_id, span.start, span.stop, file, 0, ExtentState.USABLE)
        root = bytes(blocks.lane_bytes(data)[:ROOT_BYTES]) if span.start == 0 else None
        gap = self._gap(end, span.start)

        def change(tables: Tables) -> None:
            if gap is not None:
                tables.blocks.put(gap)
            tables.blocks.put(row)
            tables.extents.put(extent)
            if root is not None:
                tables.lanes.set_root(end.lane_id, root)
            self._prune(tables, end)

        with self._disk.watching():
            await self.link.store.commit(change)
        if root is not None:
            end.root = root
        if gap is not None:
            self.link.lanes.take_hole(end, Range(gap.start, gap.stop))
        end.blocks.add(block.block_id)
        end.has_first_block = True
        self._join(end, extent, is_usable=True)
        self._count(block.length_bytes)
        self._post(answer, stream)

    async def _refuse(
        self,
        end: AnyEnd,
        block: Block,
        offer: bytes,
        verdict: BlockAnswer.Verdict.ValueType,
        stream: LinkStream,
        *,
        in_frame: bool,
    ) -> None:
        """Lost or mismatch: a hole here too, and the verdict stored.

        An offer in clear proves nothing until its tag fits: it may be forged, so it leaves no
        trace here; the leader's discard makes a gap that the next good block turns into a hole.
        """
        answer = BlockAnswer(block_id=block.block_id, verdict=verdict)
        if not in_frame:
            if verdict == BlockAnswer.MISMATCH:
                self._alarm_mismatch()
            self._post(answer, stream)
            return
        span = block.span
        row = BlockRow(
            block.block_id,
            end.lane_id,
            span.start,
            span.stop,
            _VERDICT_STATE[verdict],
            offer,
            answer.SerializeToString(),
            False,
        )
        gap = self._gap(end, span.start)

        def change(tables: Tables) -> None:
            if gap is not None:
                tables.blocks.put(gap)
            tables.blocks.put(row)

        await self.link.store.commit(change)
        if gap is not None:
            self.link.lanes.take_hole(end, Range(gap.start, gap.stop))
        self.link.lanes.take_hole(end, span)
        end.blocks.add(block.block_id)
        if verdict == BlockAnswer.MISMATCH:
            self.quarantined_blocks += 1
            self._alarm_mismatch()
        self._post(answer, stream)

    def _gap(self, end: AnyEnd, start: int) -> BlockRow | None:
        """The hole between what is known here and where the leader goes on."""
        if start <= end.lane.filled:
            return None
        return BlockRow(
            self.link.randomness(blocks.BLOCK_ID_BYTES),
            end.lane_id,
            end.lane.filled,
            start,
            BlockState.DISCARDED,
            b"",
            None,
            False,
        )

    def _answer(self, block_id: bytes, verdict: BlockAnswer.Verdict.ValueType, stream: LinkStream) -> None:
        self._post(BlockAnswer(block_id=block_id, verdict=verdict), stream)

    def _post(self, answer: BlockAnswer, stream: LinkStream) -> None:
        self.link.post_answer(answer, stream)
