"""The target's end of an establish: collect shares, append durably, then confirm.

Owns protocol 3.3 (what the target takes from its own configuration), 3.5 (no overlap), 3.6 (confirm
after the append, stored and resent byte for byte), 3.7, 3.8 and 3.9 (bounds per source) at the target.
A refusal never uses the confirm key: the source learns of it by a query, or from a silence.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mesh.core import mac, otp
from mesh.core.collector import Collector, Failed, Named, Outcome, Verified
from mesh.core.ranges import Range
from mesh.core.reserve import check_append_epoch
from mesh.core.sealed import decode_attachment
from mesh.core.transfer import (
    KEY_PART_BYTES,
    ConfirmMessage,
    SecretParts,
    SlotKind,
    TransferHeader,
    TransferId,
    check_target,
    split_secret,
)
from mesh.errors import ErrorReason, MeshError, PeerError, ShortageError
from mesh.node.deposits import Applied, InboundDeposits
from mesh.node.inbound import INLINE_MAX_BYTES, InboundBook
from mesh.node.keyports import DocumentView, Incarnation, PeerCaller, Surroundings
from mesh.node.refusals import WHOLE, Refusal, Refusals
from mesh.node.reports import Reports
from mesh.node.reserves import Reserves
from mesh.node.routewatch import RouteWatch
from mesh.node.tasks import Background
from mesh.ops.logging import log_soon, request_id, serving
from mesh.ops.tracing import span
from mesh.store.store import Store
from mesh.store.tables import AppendKind, AppendRow, ReserveRow, Tables
from mesh.v1.peer_pb2 import ConfirmRequest, TransferAnswer, TransferQuery

_MAX_PENDING = 4096
_MAX_PENDING_BYTES = 64 * 1024 * 1024
_MAX_CHECKED_BYTES = 16 * 1024 * 1024
#: A relay's queue lets a share go after ten seconds.
_KEEP_S = 12.0
_MAX_APPENDING_BYTES = 64 * 1024 * 1024
_APART_SLOTS = 4096
_CONFIRM_PAUSES_S = (0.2, 1.0, 3.0)
_CONFIRM_TIMEOUT_S = 2.0
_TAG_BYTES = 16

_LOG = logging.getLogger("keymesh.appends")


class Appender:
    """Takes the shares of transfers that end at this node.

    Args:
        inbound_max_bytes: key bytes that one source may have lying here unused.
    """

    def __init__(
        self,
        around: Surroundings,
        *,
        store: Store,
        reserves: Reserves,
        directory: DocumentView,
        peers: PeerCaller,
        deposits: InboundDeposits,
        tasks: Background,
        incarnation: Incarnation,
        inbound_max_bytes: int,
        watch: RouteWatch,
        reports: Reports,
    ) -> None:
        self._around = around
        self._watch = watch
        self._reports = reports
        self._store = store
        self._reserves = reserves
        self._directory = directory
        self._peers = peers
        self._deposits = deposits
        self._tasks = tasks
        self._incarnation = incarnation
        self._max_slots = inbound_max_bytes // KEY_PART_BYTES
        self._collector = Collector(
            max_pending=_MAX_PENDING,
            max_pending_bytes=_MAX_PENDING_BYTES,
            max_checked_bytes=_MAX_CHECKED_BYTES,
            keep_s=_KEEP_S,
            randomness=around.randomness,
        )
        self._refusals = Refusals()
        self._is_searching = False
        self._appending: set[TransferId] = set()
        self._appending_bytes = 0
        self._opening: dict[str, asyncio.Lock] = {}
        #: Told of a source that renewed its epoch: it may have lost its disk, and with it what we gave it.
        self.renewed: Callable[[str], None] = lambda _source: None

    def take(
        self, header: TransferHeader, encoded: bytes, tag: bytes, *, route: int, came_from: str, share: bytes
    ) -> None:
        """Takes one share that came over the link its route names.

        Raises:
            PeerError: our own configuration does not grant such a transfer (3.3).
            ShortageError: no document yet, or too much is being appended.
        """
        document = self._directory.document
        if document is None:
            raise ShortageError("no network document yet", reason=ErrorReason.DIRECTORY_UNAVAILABLE)
        try:
            check_target(header, document)
        except PeerError as exc:
            self._refuse(header.transfer, tag, exc.reason, came_from)
            raise
        if self._appending_bytes + len(share) > _MAX_APPENDING_BYTES:
            self._refuse(header.transfer, tag, ErrorReason.BUSY, came_from)
            raise ShortageError("too many bytes are being appended", reason=ErrorReason.BUSY)
        now_s = self._around.monotonic_s()
        for outcome in self._collector.add(
            header, encoded, tag, route=route, came_from=came_from, share=share, now_s=now_s
        ):
            if isinstance(outcome, Failed) and header.grade.n == 1:
                # One share that anybody may have made up.
                self._refuse(header.transfer, tag, ErrorReason.TAG_MISMATCH, came_from)
            else:
                self._act(outcome)
        if self._collector.is_searching and not self._is_searching:
            self._is_searching = True
            self._tasks.spawn(self._search())

    async def _search(self) -> None:
        """Goes on where liars left many subsets to try, for half of the time at most."""
        with serving(""):
            try:
                while self._collector.is_searching:
                    began_s = self._around.monotonic_s()
                    for outcome in self._collector.work():
                        self._act(outcome)
                    await asyncio.sleep(self._around.monotonic_s() - began_s)
            finally:
                self._is_searching = False

    def expire(self) -> None:
        """Drops transfers that waited too long for their other shares; call every few seconds."""
        for outcome in self._collector.expire(self._around.monotonic_s()):
            self._act(outcome)

    def _act(self, outcome: Outcome) -> None:
        transfer = outcome.header.transfer
        if isinstance(outcome, Verified):
            if transfer in self._appending:
                return  # with k = 1 a second share, or a replay, verifies by itself
            self._appending_bytes += len(outcome.secret)
            self._appending.add(transfer)
            self._tasks.spawn(self._append(outcome))
        elif isinstance(outcome, Failed):
            self._refuse(transfer, outcome.tag, ErrorReason.TAG_MISMATCH)
        else:
            self._name(outcome)

    def _name(self, named: Named) -> None:
        transfer = named.header.transfer
        routes = [named.header.routes[index] for index in named.routes]
        self._watch.name(
            routes,
            named.verdict,
            source=transfer.source,
            target=transfer.target,
            seen_by=self._around.own_id,
        )
        self._reports.named(transfer, named.verdict, named.routes)

    def _refuse(self, transfer: TransferId, tag: bytes, reason: ErrorReason, came_from: str = WHOLE) -> None:
        highest = self._reserves.highest_inbound(transfer.source)
        refusal = Refusal(reason, -1 if highest is None else highest)
        self._refusals.add(transfer, tag, refusal, came_from=came_from)

    # appending

    async def _append(self, verified: Verified) -> None:
        with span("append", source=verified.header.transfer.source, slots=verified.header.slot_count):
            await self._append_and_confirm(verified)

    async def _append_and_confirm(self, verified: Verified) -> None:
        header = verified.header
        try:
            parts = split_secret(verified.secret, len(header.attachment))
            confirm = await self._append_once(verified, parts)
        except MeshError as exc:
            self._refuse(header.transfer, verified.tag, exc.reason)
            _LOG.warning(
                "append refused",
                extra={
                    "source": header.transfer.source,
                    "slot": header.transfer.first_slot,
                    "cause": str(exc),
                },
            )
            return
        finally:
            self._appending_bytes -= len(verified.secret)
            self._appending.discard(header.transfer)
        if request_id.get():
            log_soon(
                _LOG,
                "transfer appended",
                source=header.transfer.source,
                slot=header.transfer.first_slot,
                slots=header.slot_count,
                grade=str(header.grade),
            )
        await self._confirm(header.transfer.source, confirm)

    async def _append_once(self, verified: Verified, parts: SecretParts) -> ConfirmRequest:
        header = verified.header
        source, epoch = header.transfer.source, header.transfer.epoch
        applied = self._open_attachment(header, parts)
        self._check_room(header)
        book = self._reserves.inbound(source, epoch)
        if book is not None and self._reserves.highest_inbound(source) == epoch:
            return await self._write(verified, parts, applied, book)
        async with self._opening.setdefault(source, asyncio.Lock()):
            opens = applied.opens if applied else None
            check_append_epoch(epoch, self._reserves.highest_inbound(source), opens=opens)
            return await self._write(verified, parts, applied, self._reserves.inbound(source, epoch))

    def _check_room(self, header: TransferHeader) -> None:
        """Bounds what a source may have lying here (3.9).

        Sealed slots and the opening of an epoch have some room apart: a retire comes in such slots, and
        without it what is full would stay full.
        """
        source = header.transfer.source
        sealed = sum(book.slots.held_sealed_slots for book in self._reserves.inbound_books(source))
        sealed += header.slot_count if header.kind is SlotKind.SEALED else 0
        held = self._reserves.held_inbound_slots(source) + header.slot_count - min(sealed, _APART_SLOTS)
        opens = self._reserves.inbound(source, header.transfer.epoch) is None
        alarm = f"reserve/{source}/full"
        if held > self._max_slots + (_APART_SLOTS if opens else 0):
            self._around.alarms.raise_alarm(
                alarm,
                "warning",
                "as many keys of this source as it may have lie here unused: no more are taken",
                "see whether their slaves fetch them, and whether the two nodes can call each other",
            )
            raise ShortageError("the source's reserve is full here", reason=ErrorReason.LIMIT_EXCEEDED)
        if held <= self._max_slots - self._max_slots // 8:
            self._around.alarms.clear(alarm)

    def _open_attachment(self, header: TransferHeader, parts: SecretParts) -> Applied | None:
        if not header.attachment:
            return None
        plaintext = otp.xor(header.attachment, parts.attachment_pad)
        job_id, number, lowest, body = decode_attachment(plaintext)
        return self._deposits.prepare_attachment(header.transfer.source, job_id, number, lowest, body)

    async def _write(
        self, verified: Verified, parts: SecretParts, applied: Applied | None, book: InboundBook | None
    ) -> ConfirmRequest:
        """File (if large), one commit, memory; the confirm is part of what is committed.

        Without a book the same commit opens the epoch.
        """
        header = verified.header
        transfer = header.transfer
        if book is not None and book.grade != str(header.grade):
            raise PeerError("a reserve epoch has one grade", reason=ErrorReason.PEER_REFUSED)
        span = Range(transfer.first_slot, header.stop_slot)
        if book is not None:
            book.slots.begin_append(span)
        opening = (
            None
            if book
            else self._reserves.opening_inbound(transfer.source, transfer.epoch, str(header.grade))
        )
        confirm = self._confirm_message(header, verified.tag, parts.confirm_key)
        is_inline = len(parts.payload) <= INLINE_MAX_BYTES
        file = "" if is_inline else f"in-{transfer.source}-{transfer.epoch}-{transfer.first_slot}"
        row = AppendRow(
            reserve_id=book.reserve_id if book else 0,
            first_slot=transfer.first_slot,
            count=header.slot_count,
            kind=AppendKind(header.kind.name.lower()),
            file=file,
            file_offset=0,
            inline=parts.payload if is_inline else None,
            confirm=confirm.message + confirm.tag,
            confirm_tag=verified.tag,
            is_confirmed=True,
            created_s=int(self._around.now_s()),
        )
        try:
            if file:
                await self._store.reserve_files.create(file, parts.payload)
            row, opened = await self._store.commit(lambda tables: _record(tables, row, opening, applied))
        except BaseException:
            if book is not None:
                book.slots.end_append(span, header.kind, is_durable=False)
            if file:
                self._tasks.spawn(self._store.reserve_files.remove(file))
            raise
        if opened is not None:
            if self._reserves.highest_inbound(opened.source) is not None:
                self.renewed(opened.source)
            book = self._reserves.opened_inbound(opened)
            book.slots.begin_append(span)
        if book is not None:
            book.appended(span, row)
        if applied is not None:
            applied.after()
        return confirm

    def _confirm_message(self, header: TransferHeader, tag: bytes, confirm_key: bytes) -> ConfirmRequest:
        message = ConfirmMessage(
            transfer=header.transfer,
            slot_count=header.slot_count,
            tag=tag,
            incarnation=self._incarnation.incarnation,
            lineage=self._reserves.lineage,
            is_proven=self._incarnation.is_proven,
        ).encode()
        return ConfirmRequest(message=message, tag=mac.one_time_tag(confirm_key, message))

    async def _confirm(self, source: str, confirm: ConfirmRequest) -> None:
        """Tells the source; it asks by itself should all of these be lost."""
        for pause_s in (*_CONFIRM_PAUSES_S, None):
            try:
                await self._peers.confirm(source, confirm, timeout_s=_CONFIRM_TIMEOUT_S)
            except MeshError as exc:
                _LOG.info("confirm not delivered", extra={"source": source, "cause": str(exc)})
                if pause_s is not None:
                    await asyncio.sleep(pause_s)
            else:
                return

    # queries

    def on_query(self, query: TransferQuery) -> TransferAnswer:
        """What became of a transfer; a positive answer is the stored confirm, byte for byte."""
        asked = query.transfer
        transfer = TransferId(asked.source_kme_id, asked.target_kme_id, asked.epoch, asked.first_slot)
        if transfer in self._appending:
            return TransferAnswer(state=TransferAnswer.PENDING)
        book = self._reserves.inbound(transfer.source, transfer.epoch)
        row = None
        if book is not None and transfer.target == self._around.own_id:
            reserve_id = book.reserve_id
            row = self._store.read(lambda tables: tables.appends.find(reserve_id, transfer.first_slot))
        is_same = row is not None and row.first_slot == transfer.first_slot and row.confirm_tag == query.tag
        if row is not None and is_same and row.confirm:
            stored = ConfirmRequest(message=row.confirm[:-_TAG_BYTES], tag=row.confirm[-_TAG_BYTES:])
            return TransferAnswer(state=TransferAnswer.APPENDED, confirm=stored)
        refusal = self._refusals.of_transfer(transfer, query.tag)
        if refusal is not None:
            return TransferAnswer(state=TransferAnswer.REFUSED, **_told(refusal))
        # Whoever relabels its share must neither hide what is above, nor end the transfer alone.
        arrived = self._collector.pending(transfer, query.tag)
        refused = self._refusals.of_shares(transfer, query.tag)
        return TransferAnswer(
            state=TransferAnswer.UNKNOWN if arrived is None else TransferAnswer.PENDING,
            arrived_routes=arrived or (),
            refused_links=len(refused),
            **(_told(refused[-1]) if refused else {}),
        )


def _told(refusal: Refusal) -> dict[str, Any]:
    return {"reason": refusal.reason.value, "highest_epoch": max(0, refusal.highest_epoch)}


def _record(
    tables: Tables,
    row: AppendRow,
    opening: Callable[[Tables], ReserveRow] | None,
    applied: Applied | None,
) -> tuple[AppendRow, ReserveRow | None]:
    """The one change of an append: epoch, row, confirm and attachment, or nothing."""
    opened = None
    if opening is not None:
        opened = opening(tables)
        row = replace(row, reserve_id=opened.reserve_id)
    tables.appends.put(row)
    if applied is not None:
        applied.change(tables)
    return row, opened
