"""The two lanes of a link with everything durable about them.

Owns: rules of ``mesh.core.lane`` joined to marks on disk, pad files, roots and the audit
record. Every claim is one sync function; every mark goes through ``Store.commit``. Implements
protocol 1.1, 1.2 (wiping) and 1.5 (roots).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from mesh.core.lane import ROOT_BYTES, LaneLimits, Purpose, ReaderLane, WriterLane
from mesh.core.names import link_id
from mesh.core.ranges import Range
from mesh.errors import ErrorReason, IntegrityError, MeshError
from mesh.node.material import Material
from mesh.node.ports import PadRecorder
from mesh.store.store import Store
from mesh.store.tables import BlockState, ExtentRow, ExtentState, LaneRow, Tables

_LOG = logging.getLogger("keymesh.lanes")
WIPE_BATCH_BYTES = 256 << 10

_L = TypeVar("_L", WriterLane, ReaderLane)


@dataclass(slots=True, repr=False)
class LaneEnd(Generic[_L]):
    """One lane as this end holds it.

    Attributes:
        lane_id: its row.
        is_outbound: whether this end writes it.
        lane: the rules.
        material: the bytes.
        root: 32 secret bytes of 1.5, None until the first block is here.
        was_used: the mark had moved before this process: the other end may know this epoch.
        has_first_block: a block of this epoch was accepted.
        blocks: ids of the blocks whose rows are kept.
    """

    lane_id: int
    is_outbound: bool
    lane: _L
    material: Material
    root: bytes | None
    was_used: bool
    is_moving: bool = False
    has_first_block: bool = False
    blocks: set[bytes] = field(default_factory=set)

    @property
    def is_established(self) -> bool:
        """A hello of this epoch has verified at the reading end, or may have (2.3)."""
        if isinstance(self.lane, ReaderLane):
            return self.lane.mark > 0
        return self.was_used or self.lane.reported > ROOT_BYTES


AnyEnd: TypeAlias = LaneEnd[WriterLane] | LaneEnd[ReaderLane]


class LinkLanes:
    """Both lanes of a link at this end.

    Args:
        store: the node's store.
        own_id, peer: the two ends.
        limits: sizes, from the pool's cap.
        spawn: starts background work (wiping, marks ahead).
        recorder: told of every range used; None outside audits.
    """

    def __init__(
        self,
        store: Store,
        own_id: str,
        peer: str,
        limits: LaneLimits,
        *,
        spawn: Callable[[Coroutine[Any, Any, Any]], object],
        recorder: PadRecorder | None = None,
    ) -> None:
        self._store = store
        self.peer = peer
        self.limits = limits
        self._link_id = link_id(own_id, peer)
        self._spawn = spawn
        self._recorder = recorder
        #: A hello has verified in this life of the process.
        self.has_met = False
        self._wiping: set[int] = set()
        self.tx: LaneEnd[WriterLane]
        self.rx: LaneEnd[ReaderLane]
        self.is_settled = True

    async def load(self) -> None:
        """Read both lanes, made on first use, from the store."""

        def change(tables: Tables) -> tuple[LaneRow, LaneRow]:
            return tables.lanes.put_lane(self.peer, True), tables.lanes.put_lane(self.peer, False)

        tx, rx = await self._store.commit(change)
        self.is_settled = tx.is_settled and rx.is_settled
        self.tx = self._load_tx(tx)
        self.rx = self._load_rx(rx)

    def _load_tx(self, row: LaneRow) -> LaneEnd[WriterLane]:
        reported, base = self._store.read(
            lambda tables: [tables.meta.serial(name) for name in self._serials(row.epoch)]
        )
        lane = WriterLane(row.epoch, self.limits, mark=row.mark, reported=reported, base=base)
        return self._fill(LaneEnd(row.lane_id, True, lane, self._material(), row.root, row.mark > 0))

    def _load_rx(self, row: LaneRow) -> LaneEnd[ReaderLane]:
        lane = ReaderLane(row.epoch, self.limits, mark=row.mark)
        return self._fill(LaneEnd(row.lane_id, False, lane, self._material(), row.root, row.mark > 0))

    def _material(self) -> Material:
        return Material(self._store.pads)

    def _fill(self, end: LaneEnd[_L]) -> LaneEnd[_L]:
        def query(tables: Tables) -> tuple[list[ExtentRow], list[tuple[bytes, Range, bool]]]:
            blocks = tables.blocks.list(end.lane_id)
            return tables.extents.list(end.lane_id), [
                (
                    one.block_id,
                    Range(one.start, one.stop),
                    one.state in (BlockState.DISCARDED, BlockState.QUARANTINED),
                )
                for one in blocks
            ]

        extents, blocks = self._store.read(query)
        for block_id, span, is_hole in blocks:
            end.blocks.add(block_id)
            end.lane.extend(span.stop)
            if is_hole:
                end.lane.add_hole(span)
        for extent in extents:
            end.material.add(extent)
            end.lane.extend(extent.stop)
            if extent.state is ExtentState.USABLE or (
                extent.state is ExtentState.SYNCED and not end.is_outbound
            ):
                end.lane.add_material(Range(extent.start, extent.stop))
            end.has_first_block |= extent.state is ExtentState.USABLE
        end.has_first_block |= end.lane.mark > 0
        if isinstance(end.lane, WriterLane):
            end.lane.material.discard_below(end.lane.position)
        return end

    def _serials(self, epoch: int) -> tuple[str, str]:
        """Names of what is kept beside an outbound mark: the last report, the window's base."""
        return f"reported/{self.peer}/{epoch}", f"base/{self.peer}/{epoch}"

    # -- marks ----------------------------------------------------------------------------

    async def raise_mark(self, end: AnyEnd, mark: int) -> None:
        """Return once the lane's mark is on disk at ``mark`` or beyond.

        Raises:
            UnavailableError: the disk is full or fails; nothing may be used beyond the old mark.
        """

        def change(tables: Tables) -> None:
            self.put_mark(tables, end, mark)

        await self._store.commit(change)
        end.lane.mark_moved(max(end.lane.mark, mark))

    def put_mark(self, tables: Tables, end: AnyEnd, mark: int, *, base: int | None = None) -> None:
        """Inside a change: move the mark up to ``mark``, and note the last report with it."""
        if mark > tables.lanes.get(end.lane_id).mark:
            tables.lanes.set_mark(end.lane_id, mark)
        if isinstance(end.lane, WriterLane):
            values = end.lane.reported, end.lane.base if base is None else base
            for name, value in zip(self._serials(end.lane.epoch), values, strict=True):
                if value > tables.meta.serial(name):
                    tables.meta.raise_serial(name, value)

    def mark_ahead(self, end: AnyEnd) -> None:
        """Move a mark in the background when little is left below it.

        Not before a hello has verified: a crash loop without a peer would burn a stride each time.
        """
        mark = end.lane.next_mark
        if mark is not None and self.has_met and not end.is_moving:
            end.is_moving = True
            self._spawn(self._move_ahead(end, mark))

    async def _move_ahead(self, end: AnyEnd, mark: int) -> None:
        try:
            await self.raise_mark(end, mark)
        finally:
            end.is_moving = False

    # -- use ------------------------------------------------------------------------------

    def claim(self, total_bytes: int, purpose: Purpose, label: str) -> tuple[Range, bytes]:
        """Burn outbound bytes and read them. Sync: between choosing and recording nothing can happen.

        Raises:
            ShortageError: they cannot be claimed; nothing is burnt.
        """
        end = self.tx
        span = end.lane.claim(total_bytes, purpose)
        self._record(end, span, label)
        pad = end.material.read(span.start, span.stop)
        self._after_use(end)
        return span, pad

    def read_inbound(self, span: Range) -> bytes:
        """The bytes of a frame to verify; checked by the lane before."""
        return self.rx.material.read(span.start, span.stop)

    def accepted(self, span: Range, label: str) -> None:
        """A frame on these inbound bytes verified."""
        self._record(self.rx, span, label)
        self.rx.lane.accept(span.stop)
        self._after_use(self.rx)

    def root(self, end: AnyEnd) -> bytes:
        """The lane's root.

        Raises:
            IntegrityError: the lane has material but no root.
        """
        if end.root is None:
            raise IntegrityError("the lane has no root", reason=ErrorReason.STATE_CORRUPT)
        return end.root

    def _record(self, end: AnyEnd, span: Range, label: str) -> None:
        if self._recorder is not None:
            self._recorder.record(
                self._link_id,
                is_outbound=end.is_outbound,
                epoch=end.lane.epoch,
                start=span.start,
                stop=span.stop,
                purpose=label,
            )

    def _after_use(self, end: AnyEnd) -> None:
        self.mark_ahead(end)
        if end.lane.wipeable - end.material.wiped_to >= WIPE_BATCH_BYTES:
            self.wipe(end)

    # -- wiping ---------------------------------------------------------------------------

    def wipe(self, end: AnyEnd) -> None:
        """Wipe what was used or skipped, in the background; not before the first hello (1.2)."""
        below = end.lane.wipeable
        if not self.has_met or end.lane_id in self._wiping or below <= end.material.wiped_to:
            return
        if isinstance(end.lane, ReaderLane):
            end.lane.wiped(below)
        self._wiping.add(end.lane_id)
        self._spawn(self._wipe(end.lane_id, *end.material.spend(below), below))

    async def _wipe(
        self, lane_id: int, parts: list[tuple[str, int, int]], has_spent: bool, below: int
    ) -> None:
        pads = self._store.pads
        try:
            for file, offset, length in parts:
                await asyncio.to_thread(pads.wipe, file, offset, length)
            if has_spent:
                files = await self._store.commit(lambda tables: tables.extents.delete_below(lane_id, below))
                await pads.remove(*files)
        except MeshError as error:
            _LOG.warning("wiping failed, the bytes stay until the next start", extra={"cause": str(error)})
        finally:
            self._wiping.discard(lane_id)

    # -- epochs ---------------------------------------------------------------------------

    async def reset(
        self, *, transmit: int | None = None, receive: int | None = None, forget_peer: bool = False
    ) -> None:
        """Throw a lane's material away and begin a new epoch; None leaves that lane.

        Raises:
            IntegrityError: the epoch is not higher than all before.
        """

        def change(tables: Tables) -> tuple[LaneRow | None, LaneRow | None, list[str]]:
            files: list[str] = []
            rows: list[LaneRow | None] = [None, None]
            for at, epoch in enumerate((transmit, receive)):
                if epoch is not None:
                    rows[at], gone = tables.lanes.reset_lane(self.peer, at == 0, epoch)
                    files += gone
            if forget_peer:
                tables.peers.set_peer_incarnation(self.peer, b"", is_proven=False)
            return rows[0], rows[1], files

        tx, rx, files = await self._store.commit(change)
        if tx is not None:
            self.tx = self._load_tx(tx)
        if rx is not None:
            self.rx = self._load_rx(rx)
        await self._store.pads.remove(*files)

    def take_hole(self, end: AnyEnd, hole: Range) -> None:
        """A block of this lane was discarded: both rules and bytes forget it."""
        end.lane.add_hole(hole)
        end.material.drop(hole.start)

    def narrow(self, window_bytes: int) -> None:
        """Keep to the narrower of the two ends' windows."""
        narrowed = self.limits.narrowed(window_bytes)
        self.tx.lane.limits = narrowed
        self.rx.lane.report_bytes = narrowed.window_bytes // 8
