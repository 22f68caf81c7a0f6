"""The source's end of one reserve epoch: bytes and durability around ``core.reserve.OutboundReserve``.

Owns where the drawn bytes come from and when marks are on disk (protocol 3.5, 4.5). Payloads of
refills lie in reserve files and survive a restart once confirmed; those of on-demand transfers are
drawn at once and live in memory only. The layout of a payload (docs/formats.md "Keys") is columns:
16 * count bytes of tag parts, then 32 * count bytes of key parts, so that a run of keys is one slice.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mesh.core.keyid import KeyAddress, tagger
from mesh.core.network import NetworkDocument
from mesh.core.ranges import Range, RangeSet
from mesh.core.reserve import DrawClock, OutboundReserve, slots_per_key
from mesh.core.transfer import KEY_PART_BYTES, TAG_PART_BYTES, SlotKind
from mesh.errors import MeshError
from mesh.node.inbound import INLINE_MAX_BYTES
from mesh.store.store import Store
from mesh.store.tables import AppendKind, AppendRow, ReserveRow, ReserveState, Tables

ASSIGN_STRIDE_SLOTS = 8192
DRAW_STRIDE_SLOTS = 2048
_CHUNK_SLOTS = 4096
_CLOCK_STEPS = 96

_LOG = logging.getLogger("keymesh.reserves")


@dataclass(slots=True, repr=False)
class _Segment:
    """The payload of one transfer, in memory or in a file."""

    first: int
    count: int
    kind: SlotKind
    payload: bytes | None
    file: str = ""
    persists: bool = False
    is_confirmed: bool = False
    is_recorded: bool = False

    @property
    def stop(self) -> int:
        return self.first + self.count

    def __lt__(self, other: _Segment) -> bool:
        return self.first < other.first

    def __repr__(self) -> str:
        return f"_Segment({self.first}, {self.count})"


class OutboundBook:
    """One outbound reserve epoch with its bytes.

    Everything that decides runs in sync functions on the event loop; ``await`` only stands where a
    mark is being made durable, and every decision is made again after it.
    """

    def __init__(
        self, store: Store, row: ReserveRow, *, lifetime_s: float, spawn: Callable[..., object]
    ) -> None:
        self.reserve_id = row.reserve_id
        self.peer = row.target
        self.grade = row.grade
        self.slots = OutboundReserve(row.epoch, assign_mark=row.assign_mark, draw_mark=row.draw_mark)
        self.is_open = row.state is ReserveState.OPEN
        # False until a confirm came in this run: until then transfers say that they open the epoch.
        self.is_opened = False
        # The network document that was last seen to ask for this grade.
        self.granted_by: NetworkDocument | None = None
        self.retired_below = row.retired_below
        self.clock = DrawClock(step_s=max(1.0, lifetime_s / _CLOCK_STEPS), retired_below=row.retired_below)
        self._store = store
        self._spawn = spawn
        self._segments: dict[SlotKind, list[_Segment]] = {kind: [] for kind in SlotKind}
        self._by_first: dict[int, _Segment] = {}
        self._chunk: tuple[int, int, bytes, bytes] = (0, 0, b"", b"")
        self._is_moving = False

    @property
    def epoch(self) -> int:
        """The reserve's epoch."""
        return self.slots.epoch

    @property
    def level_bytes(self) -> int:
        """Key-part bytes that can be drawn now."""
        return self.slots.held_slots * KEY_PART_BYTES if self.is_open else 0

    def restore(
        self, rows: Sequence[AppendRow], used: Sequence[Range], points: Sequence[tuple[int, float]]
    ) -> list[int]:
        """Brings confirmed appends back after a proven restart; returns the first slots of spent ones."""
        spent = []
        taken = RangeSet(used)
        self.clock = DrawClock(step_s=self.clock.step_s, known=points, retired_below=self.retired_below)
        for row in rows:
            kind = SlotKind.KEYS if row.kind is AppendKind.KEYS else SlotKind.SEALED
            if kind is SlotKind.KEYS and row.first_slot + row.count <= self.slots.draw_position:
                spent.append(row.first_slot)
                continue
            self._add(
                _Segment(
                    row.first_slot, row.count, kind, row.inline, row.file, is_confirmed=True, is_recorded=True
                )
            )
            self.slots.restore(row.first_slot, row.count, kind, taken)
        return spent

    # assigning

    async def assign(self, count: int, kind: SlotKind, *, draws: bool) -> int:
        """Assigns slots whose assign mark is durable; with ``draws`` their draw mark is too.

        Raises:
            ShortageError: EPOCHS_EXHAUSTED.
            UnavailableError: the store could not be written.
        """
        while True:
            mark = self.slots.assign_mark_wanted(count, ASSIGN_STRIDE_SLOTS)
            if mark is None:
                break
            end = self.slots.assign_position + count
            await self._move(
                mark, min(mark, end + DRAW_STRIDE_SLOTS) if draws and not self.slots.held_slots else None
            )
        first = self.slots.assign(count, kind)
        if draws and first + count > self.slots.draw_mark and not self.slots.held_slots:
            self._move_soon(first + count)
        return first

    async def _move(self, assign: int | None, draw: int | None) -> None:
        reserve_id = self.reserve_id

        def change(tables: Tables) -> None:
            # Moves overlap: one that asked for less may run after one that asked for more.
            row = tables.reserves.get(reserve_id)
            if assign is not None and assign > row.assign_mark:
                tables.reserves.set_assign_mark(reserve_id, assign)
            if draw is not None and draw > row.draw_mark:
                tables.reserves.set_draw_mark(reserve_id, draw)

        await self._store.commit(change)
        if assign is not None:
            self.slots.raise_assign_mark(assign)
        if draw is not None:
            self.slots.raise_draw_mark(draw)

    def _move_soon(self, end: int) -> None:
        """Moves the draw mark in the background, one move at a time."""
        mark = self.slots.draw_mark_wanted(end, DRAW_STRIDE_SLOTS)
        if mark is None or mark <= self.slots.draw_mark or self._is_moving:
            return
        self._is_moving = True

        async def move() -> None:
            try:
                await self._move(None, mark)
            finally:
                self._is_moving = False

        self._spawn(move())

    # transfers

    def hold(self, first: int, count: int, kind: SlotKind, payload: bytes, *, persists: bool) -> None:
        """Keeps the payload of a transfer that is under way; with ``persists`` it is to survive restarts."""
        self._add(_Segment(first, count, kind, payload, persists=persists))

    async def persist(self, first: int, now_s: int) -> None:
        """Writes the payload of a large refill to a reserve file, durably.

        Runs beside the network round trip; only a confirm makes the file count.
        """
        segment = self._by_first.get(first)
        if segment is None or segment.payload is None or len(segment.payload) <= INLINE_MAX_BYTES:
            return
        name = f"out-{self.reserve_id}-{first}"
        await self._store.reserve_files.create(name, segment.payload)
        if self._by_first.get(first) is not segment:
            await self._store.reserve_files.remove(name)
            return
        segment.file = name
        self._record(segment, now_s)

    def confirm(self, first: int, now_s: int) -> bool:
        """The target holds the transfer: its slots can be used. False when it is forfeited or unknown."""
        segment = self._by_first.get(first)
        is_usable = self.is_open and self.slots.confirm(first)
        if segment is None:
            return False
        if not is_usable:
            self._drop(segment)
            return False
        segment.is_confirmed = True
        self._record(segment, now_s)
        return True

    def _record(self, segment: _Segment, now_s: int) -> None:
        """What the target holds and is durable here survives a restart; small payloads go into the row."""
        inline = None if segment.file else segment.payload
        is_ready = segment.persists and segment.is_confirmed and not segment.is_recorded
        if not is_ready or (inline is not None and len(inline) > INLINE_MAX_BYTES):
            return
        segment.is_recorded = True
        row = AppendRow(
            reserve_id=self.reserve_id,
            first_slot=segment.first,
            count=segment.count,
            kind=AppendKind(segment.kind.name.lower()),
            file=segment.file,
            file_offset=0,
            inline=inline,
            confirm=None,
            confirm_tag=None,
            is_confirmed=True,
            created_s=now_s,
        )
        self._later(lambda tables: tables.appends.put(row))
        if segment.file and segment.kind is SlotKind.KEYS:
            segment.payload = None

    def forfeit(self, first: int) -> None:
        """Gives a transfer up; its slots stay holes."""
        self.slots.forfeit(first)
        segment = self._by_first.get(first)
        if segment is not None:
            self._drop(segment)

    # drawing

    def try_draw(
        self, number: int, size_bytes: int, master: str, slave: str, now_s: float
    ) -> list[tuple[bytes, bytes]] | None:
        """Draws keys now, without waiting: [(key_ID, key)]; None if too few or the mark is behind.

        The hot path: no disk, no await. The draw mark was durable before (protocol 4.5).
        """
        slots = self.slots
        if not self.is_open:
            return None
        per_key = slots_per_key(size_bytes)
        pieces = slots.plan(number, per_key)
        if pieces is None:
            return None
        end = pieces[-1].stop
        if end > slots.draw_mark:
            return None
        slots.draw(pieces)
        issue_run = tagger(master, slave).issue_run
        step = per_key * KEY_PART_BYTES
        keys: list[tuple[bytes, bytes]] = []
        for piece in pieces:
            tags, parts = self._read(piece)
            address = KeyAddress(slots.epoch, piece.start, size_bytes)
            ids = issue_run(address, len(piece) // per_key, tags)
            keys += zip(ids, [parts[at : at + size_bytes] for at in range(0, len(parts), step)], strict=True)
        self._after_draw(end, now_s)
        return keys

    async def ready_to_draw(self, number: int, per_key: int) -> bool:
        """Makes the draw mark cover a plan for that many keys; False if there are too few."""
        pieces = self.slots.plan(number, per_key) if self.is_open else None
        if pieces is None:
            return False
        mark = self.slots.draw_mark_wanted(pieces[-1].stop, DRAW_STRIDE_SLOTS)
        if mark is not None:
            await self._move(None, mark)
        return True

    def _after_draw(self, end: int, now_s: float) -> None:
        if self.slots.draw_mark - end < DRAW_STRIDE_SLOTS // 2:
            self._move_soon(end + DRAW_STRIDE_SLOTS // 2)
        self._note(self.slots.draw_position, now_s)
        segments = self._segments[SlotKind.KEYS]
        while segments and segments[0].stop <= end:
            self._drop(segments[0])

    def note_spent(self, now_s: float) -> None:
        """Notes what is drawn or forfeited by now for the key lifetime: the target may hold either.

        ``now_s`` is never held back.
        """
        self._note(self.slots.spent_below, now_s)

    def _note(self, position: int, now_s: float) -> None:
        for slot, at_s in self.clock.note(position, now_s):
            self._later(partial(_put_draw_time, self.reserve_id, slot, int(at_s)))

    def _read(self, span: Range) -> tuple[bytes, bytes]:
        """Tag parts and key parts of slots, across segments; wipes behind itself chunk by chunk."""
        first, stop, tags, keys = self._chunk
        if not first <= span.start or not span.stop <= stop:
            if stop > first:
                self._wipe_to(first, span.start)
            self._chunk = self._load(span)
            first, stop, tags, keys = self._chunk
        at, end = span.start - first, span.stop - first
        return tags[at * TAG_PART_BYTES : end * TAG_PART_BYTES], keys[
            at * KEY_PART_BYTES : end * KEY_PART_BYTES
        ]

    def _load(self, span: Range) -> tuple[int, int, bytes, bytes]:
        tags, keys = [], []
        at = span.start
        while at < span.stop:
            segment = self._segment_at(at)
            stop = min(segment.stop, max(span.stop, at + _CHUNK_SLOTS))
            tag_bytes, key_bytes = self._columns(segment, at, stop)
            tags.append(tag_bytes)
            keys.append(key_bytes)
            at = stop
        return span.start, at, b"".join(tags), b"".join(keys)

    def _segment_at(self, slot: int, kind: SlotKind = SlotKind.KEYS) -> _Segment:
        segments = self._segments[kind]
        return segments[bisect_right(segments, slot, key=lambda segment: segment.first) - 1]

    def _columns(self, segment: _Segment, start: int, stop: int) -> tuple[bytes, bytes]:
        a, b = start - segment.first, stop - segment.first
        tag_from, tag_to = a * TAG_PART_BYTES, b * TAG_PART_BYTES
        base = segment.count * TAG_PART_BYTES
        key_from, key_to = base + a * KEY_PART_BYTES, base + b * KEY_PART_BYTES
        if segment.payload is not None:
            return segment.payload[tag_from:tag_to], segment.payload[key_from:key_to]
        files = self._store.reserve_files
        return files.read(segment.file, tag_from, tag_to - tag_from), files.read(
            segment.file, key_from, key_to - key_from
        )

    def _wipe_to(self, start: int, stop: int) -> None:
        """Overwrites drawn slots of the file that they lie in; not synced: the mark already burnt them."""
        if stop <= start or not self._segments[SlotKind.KEYS]:
            return
        segment = self._segment_at(start)
        if not segment.file or not segment.first <= start < segment.stop:
            return
        stop = min(stop, segment.stop)
        a, b = start - segment.first, stop - segment.first
        base = segment.count * TAG_PART_BYTES
        files = self._store.reserve_files
        files.wipe(segment.file, a * TAG_PART_BYTES, (b - a) * TAG_PART_BYTES)
        files.wipe(segment.file, base + a * KEY_PART_BYTES, (b - a) * KEY_PART_BYTES)

    # sealed slots

    def sealed_parts(self, span: Range) -> tuple[bytes, bytes]:
        """Tag parts and key parts of sealed slots just taken (they lie in one append)."""
        return self._columns(self._segment_at(span.start, SlotKind.SEALED), span.start, span.stop)

    def using_sealed(self, span: Range) -> Callable[[Tables], None]:
        """A change that makes sealed slots used for ever and wipes them where they lie in a row."""
        segment = self._segment_at(span.start, SlotKind.SEALED)
        wipes = self._sealed_extents(segment, span)

        def change(tables: Tables) -> None:
            tables.slots.add_used(self.reserve_id, span.start, span.stop)
            for offset, length in wipes:
                tables.appends.wipe_inline(self.reserve_id, segment.first, offset, length)

        return change

    def wipe_sealed(self, span: Range) -> None:
        """After the commit: overwrites used sealed slots in memory and file.

        A retire may have dropped their append while the commit was on its way: it is overwritten already,
        and nothing of another append must be, for zeros are no pad.
        """
        if not self._segments[SlotKind.SEALED]:
            return
        segment = self._segment_at(span.start, SlotKind.SEALED)
        if not segment.first <= span.start < segment.stop:
            return
        for offset, length in self._sealed_extents(segment, span):
            if segment.payload is not None:
                segment.payload = (
                    segment.payload[:offset] + bytes(length) + segment.payload[offset + length :]
                )
            if segment.file:
                self._store.reserve_files.wipe(segment.file, offset, length)

    @staticmethod
    def _sealed_extents(segment: _Segment, span: Range) -> list[tuple[int, int]]:
        at = span.start - segment.first
        base = segment.count * TAG_PART_BYTES
        return [
            (at * TAG_PART_BYTES, len(span) * TAG_PART_BYTES),
            (base + at * KEY_PART_BYTES, len(span) * KEY_PART_BYTES),
        ]

    def forget_sealed_below(self, below: int) -> None:
        """Drops sealed appends wholly below a retire that is about to be sent."""
        self.slots.forfeit_sealed_below(below)
        for segment in [one for one in self._segments[SlotKind.SEALED] if one.stop <= below]:
            self._drop(segment)

    # closing

    def close(self) -> None:
        """Forfeits the undrawn rest: a new epoch follows (protocol 4.6)."""
        self.is_open = False
        self._later(lambda tables: tables.reserves.close(self.reserve_id))
        for segment in list(self._by_first.values()):
            self._drop(segment)
        self._chunk = (0, 0, b"", b"")

    def _add(self, segment: _Segment) -> None:
        insort(self._segments[segment.kind], segment)
        self._by_first[segment.first] = segment

    def _drop(self, segment: _Segment) -> None:
        self._segments[segment.kind].remove(segment)
        del self._by_first[segment.first]
        segment.payload = None
        if segment.file or segment.is_recorded:
            self._spawn(self._remove(segment))

    async def _remove(self, segment: _Segment) -> None:
        """First the row, then the file: a row must never name a file that is gone."""
        if segment.is_recorded:
            await self._store.commit(lambda tables: tables.appends.delete(self.reserve_id, segment.first))
        if segment.file:
            await self._store.reserve_files.remove(segment.file)

    def _later(self, change: Callable[[Tables], object]) -> None:
        """Queues bookkeeping that nobody waits for; it keeps its place before later changes."""
        try:
            self._spawn(_finished(self._store.commit_soon(change)))
        except MeshError as exc:
            _LOG.warning("bookkeeping of a reserve failed", extra={"peer": self.peer, "cause": str(exc)})


def _put_draw_time(reserve_id: int, slot: int, at_s: int, tables: Tables) -> None:
    tables.slots.put_draw_time(reserve_id, slot, at_s)


async def _finished(future: asyncio.Future[object]) -> None:
    await future
