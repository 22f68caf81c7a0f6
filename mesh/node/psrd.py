"""The PSRD tables of one link at this end: issuing, importing, discarding, each one commit.

Owns what is durable about couriered material. A table is kept like a block of ingest, one
row per lane: *offered* when this end issued it and does not know yet that the other end has
it, *accepted* once both have. Order of an issue: pad files synced, courier file synced under
its ``.partial`` name, one commit, then the courier gets its name; of an import: pad files
synced, tag of the whole file verified, one commit. So a crash leaves either nothing or all,
and a courier file in somebody's hands is always one that the hub knows (protocol 2.1: the
client may write at once; the hub once an authenticated frame says that the client has it).

Layout of a file: ``mesh.sources.psrd_file``; which offsets: ``mesh.core.psrd``.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

from mesh.core.lane import NEW_BELOW_BYTES, ROOT_BYTES
from mesh.core.psrd import (
    MIN_DIRECTION_BYTES,
    TABLE_ID_BYTES,
    LaneSpan,
    LaneState,
    PsrdHeader,
    check_continues,
    check_parties,
)
from mesh.core.ranges import Range
from mesh.core.sizes import format_size
from mesh.errors import CallerError, ErrorReason, PeerError, RolledBackError, UnavailableError
from mesh.node.lanes import AnyEnd, LinkLanes
from mesh.node.psrd_courier import (
    ImportOrder,
    IssueOrder,
    check_room,
    create_partial,
    disk_full,
    is_half_named,
    name_courier,
    open_courier,
    remove_partial,
    wipe_courier,
)
from mesh.node.psrd_rows import (
    FROM_HUB,
    LANE_NAMES,
    TO_HUB,
    Made,
    TableRecord,
    is_table,
    next_span,
    pieces,
    prune,
    put_hole,
    put_material,
    records_of,
)
from mesh.sources.psrd_file import CourierReader, CourierWriter, Progress, no_progress
from mesh.sources.psrd_seal import COST_LOG2, SALT_BYTES
from mesh.sources.randomness import RandomSource
from mesh.store.database import disk_error
from mesh.store.failpoints import fail_at
from mesh.store.files import FileLayer, OsFiles
from mesh.store.store import Store
from mesh.store.tables import BlockRow, BlockState, ExtentRow, ExtentState, Tables

#: Left free on the disk beside a table's own bytes.
SPARE_BYTES = 16 << 20


class PsrdTables:
    """Issues and imports for one link. Not for two tasks at once: callers hold the ingest lock.

    Args:
        store: the node's.
        lanes: of the link, loaded.
        domain_id, own_id: who we are.
        changed: told when material came or went.
        came: told when a table was issued, discarded or imported: durable, whatever follows.
        randomness: for ids and the tag key, by number of bytes.
        files: where courier files are written.
        scrypt_cost_log2: see ``mesh.sources.psrd_seal``.
    """

    def __init__(
        self,
        store: Store,
        lanes: LinkLanes,
        *,
        domain_id: str,
        own_id: str,
        changed: Callable[[], None],
        came: Callable[[], None],
        randomness: Callable[[int], bytes] = os.urandom,
        files: FileLayer | None = None,
        scrypt_cost_log2: int = COST_LOG2,
    ) -> None:
        self._store = store
        self._lanes = lanes
        self._domain_id = domain_id
        self._own_id = own_id
        self._changed = changed
        self._came = came
        self._randomness = randomness
        self._files = OsFiles() if files is None else files
        self._cost_log2 = scrypt_cost_log2
        self._waiting: list[Range] = []
        self._discarded: list[Range] = []
        self._floor = 0
        self._told = 0
        self._issues = False
        self.reload()

    # -- what is here ---------------------------------------------------------------------

    def reload(self) -> None:
        """Read again which tables of the outbound lane wait for the client."""
        rows = self._rows(self._lanes.tx)
        self._told = 0
        self._issues = any(row.is_leader for row in rows)
        self._waiting = [Range(row.start, row.stop) for row in rows if row.state is BlockState.OFFERED]
        self._discarded = [Range(row.start, row.stop) for row in rows if row.state is BlockState.DISCARDED]
        accepted = [row.stop for row in rows if row.state is BlockState.ACCEPTED]
        self._floor = max(accepted, default=0)

    def records(self) -> list[TableRecord]:
        """The tables that are remembered, oldest first."""
        return records_of(self._rows(self._lanes.tx), self._rows(self._lanes.rx))

    @property
    def waiting_bytes(self) -> int:
        """Outbound bytes issued that are not imported yet, as far as this end knows."""
        if self._issues:
            return sum(len(one) for one in self._waiting)
        return max(0, self._told - self._lanes.tx.lane.filled)

    def _rows(self, end: AnyEnd) -> list[BlockRow]:
        return [
            row
            for row in self._store.read(lambda tables: tables.blocks.list(end.lane_id))
            if is_table(row) and row.message
        ]

    # -- issuing --------------------------------------------------------------------------

    async def issue(
        self, order: IssueOrder, source: RandomSource, *, now_s: int, progress: Progress = no_progress
    ) -> TableRecord:
        """Make a table, append it to both lanes, write the courier file; one commit.

        Args:
            order: sizes and file.
            source: of the table's bytes.
            now_s: seconds since 1970.
            progress: told of table bytes made.

        Raises:
            CallerError: sizes or file cannot be; this end imports from that peer.
            UnavailableError: a disk is full, or the random source fails; nothing is issued. Or the
                table is, and its file did not get its name.
        """
        header = self._plan(order, now_s)
        self._check_free(header.total_bytes)
        await asyncio.to_thread(check_room, self._files, order.path, header.total_bytes)
        made = Made()
        try:
            await self._make(header, order, source, made=made, progress=progress)
            await self._commit(header, made, order.path, is_issued=True)
        except Exception:
            # Not upon cancellation: the commit may go through, and names the files.
            await self._store.pads.remove(*made.files)
            await asyncio.to_thread(remove_partial, self._files, order.path)
            raise
        self._join(header, made, is_issued=True)
        self._came()
        await asyncio.to_thread(name_courier, self._files, order.path)
        return self._record(header)

    def _plan(self, order: IssueOrder, now_s: int) -> PsrdHeader:
        lanes = self._lanes
        tx, rx = self._rows(lanes.tx), self._rows(lanes.rx)
        if any(not row.is_leader for row in tx):
            raise CallerError(
                "peer: this end imports from it; only one end of a link issues", facts={"peer": lanes.peer}
            )
        for field, size, end in (
            ("to_client_bytes", order.to_client_bytes, lanes.tx),
            ("from_client_bytes", order.from_client_bytes, lanes.rx),
        ):
            if size < MIN_DIRECTION_BYTES:
                raise CallerError(
                    f"{field}: a direction takes at least {format_size(MIN_DIRECTION_BYTES)}",
                    facts={field: size},
                )
            held = end.lane.usable_bytes + (self.waiting_bytes if end.is_outbound else 0)
            if held + size > lanes.limits.pool_bytes:
                raise CallerError(
                    f"{field}: the lane would hold more than the link's pool; issue less, or raise "
                    "links[].pool_max_bytes at both ends",
                    reason=ErrorReason.LIMIT_EXCEEDED,
                    facts={"held_bytes": held, field: size, "pool_max_bytes": lanes.limits.pool_bytes},
                )
        return PsrdHeader(
            self._randomness(TABLE_ID_BYTES),
            self._domain_id,
            self._own_id,
            lanes.peer,
            next_span(lanes.tx, tx, order.to_client_bytes),
            next_span(lanes.rx, rx, order.from_client_bytes),
            now_s,
        )

    def _check_free(self, needed: int) -> None:
        if self._store.pads.free_bytes() < needed + SPARE_BYTES:
            raise disk_full("the data directory's disk has too little room", self._store.path, needed)

    async def _make(
        self,
        header: PsrdHeader,
        order: IssueOrder,
        source: RandomSource,
        *,
        made: Made,
        progress: Progress,
    ) -> None:
        """Write pad files and the courier file, piece by piece, both synced."""
        file = await asyncio.to_thread(create_partial, self._files, order.path)
        try:
            writer = await asyncio.to_thread(
                CourierWriter,
                file,
                header,
                await asyncio.to_thread(source.read, 32),
                passphrase=order.passphrase,
                salt=self._randomness(SALT_BYTES),
                progress=progress,
                cost_log2=self._cost_log2,
            )
            for name, span, _ in self._directions(header, is_issued=True):
                for piece in pieces(span):
                    data = await asyncio.to_thread(source.read, len(piece))
                    await self._write_pad(header, name, piece, data, made, is_issued=True)
                    await asyncio.to_thread(writer.write, data)
            fail_at("courier.before_sync")
            await asyncio.to_thread(writer.finish)
            await asyncio.to_thread(self._files.sync_dir, order.path.parent)
        except OSError as error:
            raise disk_error(error, order.path) from error
        finally:
            file.close()

    def finish_couriers(self) -> list[str]:
        """After a start: name the courier files whose issue a crash cut short; their paths."""
        finished: list[str] = []
        for record in self.records():
            path = Path(record.path)
            if record.is_issued and record.state == "issued" and is_half_named(self._files, path):
                name_courier(self._files, path)
                finished.append(record.path)
        return finished

    # -- importing ------------------------------------------------------------------------

    async def take(self, order: ImportOrder, *, progress: Progress = no_progress) -> TableRecord:
        """Append a courier file's table to both lanes; one commit, or nothing at all.

        Raises:
            CallerError: not for this link, imported before, not the next one, truncated, another
                version, wrong passphrase.
            IntegrityError: altered.
            UnavailableError: the disk is full. Or the table is imported, and its file not wiped.
        """
        file = await asyncio.to_thread(open_courier, order.path)
        made = Made()
        try:
            reader = await asyncio.to_thread(
                CourierReader, file, passphrase=order.passphrase, progress=progress
            )
            header = reader.header
            begins_epoch = self._check_next(header)
            self._check_free(header.total_bytes)
            try:
                for name, span, _ in self._directions(header, is_issued=False):
                    for piece in pieces(span):
                        data = await asyncio.to_thread(reader.read, len(piece))
                        await self._write_pad(header, name, piece, data, made, is_issued=False)
                await asyncio.to_thread(reader.finish)
                await self._commit(header, made, order.path, is_issued=False)
            except Exception:
                await self._store.pads.remove(*made.files)
                raise
        except OSError as error:
            raise disk_error(error, order.path) from error
        finally:
            file.close()
        if begins_epoch:
            await self._lanes.load()
        else:
            self._join(header, made, is_issued=False)
        self.reload()
        self._changed()
        self._came()
        if order.wipe:
            try:
                await asyncio.to_thread(wipe_courier, order.path)
            except UnavailableError as error:
                raise UnavailableError(
                    f"the table is imported; {error.message}", reason=error.reason, facts=error.facts
                ) from error
        return self._record(header)

    def _check_next(self, header: PsrdHeader) -> bool:
        """Whether the lanes must begin the table's epoch; refuses what is not for us now."""
        lanes = self._lanes
        check_parties(header, domain_id=self._domain_id, own_id=self._own_id, peer_id=lanes.peer)
        rows = self._rows(lanes.tx)
        if any(row.block_id[:TABLE_ID_BYTES] == header.table_id for row in rows):
            raise CallerError(
                "courier file: its table was imported already; wipe it (keymesh psrd wipe)",
                facts={"table_id": header.table_id.hex()},
            )
        if any(row.is_leader for row in rows):
            raise CallerError("peer: this end issues to it; only one end of a link issues")
        begins: list[bool] = []
        for name, span, end in self._directions(header, is_issued=False):
            lane = end.lane
            state = LaneState(lane.epoch, lane.filled, is_unused=not lane.filled and not lane.mark)
            begins.append(check_continues(span, state, LANE_NAMES[name]))
            if lane.usable_bytes + span.length_bytes > lanes.limits.pool_bytes:
                raise CallerError(
                    "courier file: the lane would hold more than the link's pool; raise "
                    "links[].pool_max_bytes",
                    reason=ErrorReason.LIMIT_EXCEEDED,
                    facts={"file_bytes": span.length_bytes, "pool_max_bytes": lanes.limits.pool_bytes},
                )
        if begins[0] != begins[1]:
            raise CallerError(
                "courier file: only one of its lanes begins a new epoch; reset the link at both ends"
            )
        return begins[0]

    # -- shared steps ---------------------------------------------------------------------

    async def _commit(self, header: PsrdHeader, made: Made, path: Path, *, is_issued: bool) -> None:
        """The one commit of an issue or an import."""
        message = json.dumps({"made_at_s": header.made_at_s, "path": str(path)}).encode()

        def change(tables: Tables) -> None:
            for name, span, end in self._directions(header, is_issued=is_issued):
                lane = tables.lanes.put_lane(self._lanes.peer, end.is_outbound)
                if span.epoch > lane.epoch:
                    lane, _ = tables.lanes.reset_lane(self._lanes.peer, end.is_outbound, span.epoch)
                if span.hole is not None and not is_issued:
                    put_hole(tables, lane, span.hole, self._randomness)
                state = BlockState.OFFERED if is_issued else BlockState.ACCEPTED
                row_id = header.table_id + name
                tables.blocks.put(
                    BlockRow(row_id, lane.lane_id, span.start, span.stop, state, message, None, is_issued)
                )
                put_material(tables, lane, made.extents[name], made.roots.get(name))
                prune(tables, lane)

        await self._store.commit(change)

    def _directions(self, header: PsrdHeader, *, is_issued: bool) -> list[tuple[bytes, LaneSpan, AnyEnd]]:
        """Both directions in the file's order, with the lane they mean here."""
        lanes = self._lanes
        from_hub, to_hub = (lanes.tx, lanes.rx) if is_issued else (lanes.rx, lanes.tx)
        return [(FROM_HUB, header.from_hub, from_hub), (TO_HUB, header.to_hub, to_hub)]

    async def _write_pad(
        self, header: PsrdHeader, name: bytes, piece: Range, data: bytes, made: Made, *, is_issued: bool
    ) -> None:
        file = f"psrd-{header.table_id.hex()}-{name[0]}-{piece.start}"
        made.files.append(file)
        await self._store.pads.create(file, data)
        # Issued bytes are written with only once the client is known to have them (2.1).
        is_usable = not is_issued
        state = ExtentState.USABLE if is_usable else ExtentState.SYNCED
        made.extents[name].append(ExtentRow(0, piece.start, piece.stop, file, 0, state))
        if piece.start == 0:
            made.roots[name] = data[:ROOT_BYTES]

    def _join(self, header: PsrdHeader, made: Made, *, is_issued: bool) -> None:
        """What is durable becomes part of the lanes; sync, right after the commit."""
        for name, span, end in self._directions(header, is_issued=is_issued):
            if name in made.roots:
                end.root = made.roots[name]
            if span.hole is not None and not is_issued:
                self._lanes.take_hole(end, span.hole)
            for extent in made.extents[name]:
                end.material.add(
                    ExtentRow(end.lane_id, extent.start, extent.stop, extent.file, 0, extent.state)
                )
            end.lane.extend(span.stop)
            end.blocks.add(header.table_id + name)
            if is_issued and end.is_outbound:
                self._issues = True
                self._waiting.append(span.span)
            else:
                end.lane.add_material(span.span)
        self._changed()

    def _record(self, header: PsrdHeader) -> TableRecord:
        return next(one for one in self.records() if one.table_id == header.table_id)

    # -- what the other end says ----------------------------------------------------------

    def on_filled(self, filled: int) -> bool:
        """The reader of the outbound lane says, authenticated, how far its copy is filled.

        Returns:
            Whether tables became usable: make that durable with :meth:`keep_accepted`.

        Raises:
            RolledBackError: it has more than this end ever issued: this end is a restored snapshot.
            PeerError: it has less than it had: the other end is. Or a table discarded here.
        """
        if filled in (0, self._told):
            return False
        end = self._lanes.tx
        if self._issues and filled > end.lane.filled:
            raise RolledBackError(
                "the peer holds tables that this node does not know",
                facts={"filled": end.lane.filled, "peer_filled": filled},
            )
        if any(one.start < filled <= one.stop for one in self._discarded):
            raise PeerError(
                "the client holds a table that was discarded here: reset the link at both ends",
                reason=ErrorReason.PEER_REFUSED,
                facts={"peer_filled": filled},
            )
        if filled < self._floor:
            raise PeerError(
                "the peer lacks tables that it had: a restored snapshot or a clone",
                reason=ErrorReason.PEER_REFUSED,
                facts={"had": self._floor, "peer_filled": filled},
            )
        self._told = filled
        arrived = [one for one in self._waiting if one.stop <= filled]
        for span in arrived:
            end.lane.add_material(span)
            end.has_first_block = True
            self._floor = span.stop
        self._waiting = [one for one in self._waiting if one.stop > filled]
        if arrived:
            self._changed()
        return bool(arrived)

    async def keep_accepted(self) -> None:
        """Write down which tables the client has; without it the next hello tells again."""
        lane_id, floor = self._lanes.tx.lane_id, self._floor

        def change(tables: Tables) -> None:
            for row in tables.blocks.list(lane_id, BlockState.OFFERED):
                if row.stop <= floor and is_table(row):
                    for name in (FROM_HUB, TO_HUB):
                        tables.blocks.set_state(row.block_id[:-1] + name, BlockState.ACCEPTED)
            for extent in tables.extents.list(lane_id):
                if extent.stop <= floor and extent.state is ExtentState.SYNCED:
                    tables.extents.set_state(lane_id, extent.start, ExtentState.USABLE)

        await self._store.commit(change)

    def lend_hello(self) -> None:
        """Let a hello use the first bytes of a waiting table, when nothing else is left.

        Only for a peer whose greeting says that it has material here. A hello carries nothing and
        its 32 bytes are burnt either way, so a greeting that lies costs no more than those.
        """
        lane = self._lanes.tx.lane
        if self._waiting and lane.is_new:
            first = self._waiting[0]
            start = max(first.start, lane.position)
            stop = min(start + NEW_BELOW_BYTES, first.stop)
            if start < stop:
                lane.add_material(Range(start, stop))

    # -- discarding -----------------------------------------------------------------------

    async def discard(self, table_id: bytes) -> TableRecord:
        """Give up the last table issued, whose courier was lost; its offsets become a hole.

        Raises:
            CallerError: no such table, the client has it, a later one was issued, or it holds the
                lanes' roots.
        """
        records = [one for one in self.records() if one.is_issued and one.state == "issued"]
        if not records or records[-1].table_id != table_id:
            raise CallerError(
                "table_id: not the last table issued that still waits for its client",
                facts={"table_id": table_id.hex()},
            )
        record = records[-1]
        if 0 in (record.transmit.start, record.receive.start):
            raise CallerError(
                "table_id: the first table of an epoch holds the lanes' roots; reset the link at both ends "
                "(keymesh links reset) and issue a new one"
            )
        lanes = self._lanes

        def change(tables: Tables) -> list[str]:
            files: list[str] = []
            for name, end, span in (
                (FROM_HUB, lanes.tx, record.transmit),
                (TO_HUB, lanes.rx, record.receive),
            ):
                tables.blocks.set_state(table_id + name, BlockState.DISCARDED)
                for extent in tables.extents.list(end.lane_id):
                    if span.start <= extent.start < span.stop:
                        files += tables.extents.delete(end.lane_id, extent.start)
            return files

        files = await self._store.commit(change)
        for end, span in ((lanes.tx, record.transmit), (lanes.rx, record.receive)):
            for piece in pieces(span):
                end.material.drop(piece.start)
            lanes.take_hole(end, span)
        self._waiting = [one for one in self._waiting if one != record.transmit]
        self._discarded.append(record.transmit)
        self._changed()
        self._came()
        await self._store.pads.remove(*files)
        return next(one for one in self.records() if one.table_id == table_id)
