"""Sealed messages between KMEs at the target: opened, applied once by job id, answered.

Owns protocol 4.7 (retire) and 4.8 (deposits) on the receiving side, and what an attachment may do.
A message is applied in one transaction with the use of its slots and with its stored answer; every
later copy gets that answer, byte for byte. The sending side is ``mesh.node.jobs``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from mesh.core.ranges import Range
from mesh.core.sealed import Envelope, answer_tag, unseal
from mesh.core.transfer import MAX_EPOCH, MAX_SLOT, SlotKind
from mesh.errors import ErrorReason, PeerError, ShortageError, TagMismatchError
from mesh.node.inbound import InboundBook
from mesh.node.keyports import DocumentView, Incarnation, Surroundings
from mesh.node.reserves import Reserves
from mesh.node.tasks import unbroken
from mesh.store.store import Store
from mesh.store.tables import KeyState, StoredKeyRow, Tables
from mesh.v1.peer_pb2 import (
    DepositRequest,
    DepositResponse,
    KeyDeposit,
    Retire,
    SealedAnswer,
    SealedMessage,
    VoidKeys,
)

_MAX_FAILED_TAGS = 1 << 10
_HOUR_S = 3600.0
_MAX_KEYS = 1024
_ATTACHED = b"\xff\xff"
_HEAD_BYTES = 2 + 8 + 16

_LOG = logging.getLogger("keymesh.deposits")


@dataclass(frozen=True, slots=True)
class Applied:
    """A message that passed every check: what to do inside the transaction, and after it.

    ``change`` returns None when applied, else the reason why nothing was.
    """

    change: Callable[[Tables], ErrorReason | None]
    after: Callable[[], None]
    opens: int | None = None


@dataclass(slots=True)
class _FailedTags:
    since_s: float
    count: int = 0


class InboundDeposits:
    """Opens and applies what other KMEs seal for this one."""

    def __init__(
        self,
        around: Surroundings,
        *,
        store: Store,
        reserves: Reserves,
        directory: DocumentView,
        incarnation: Incarnation,
        lifetime_s: float,
    ) -> None:
        self._around = around
        self._store = store
        self._reserves = reserves
        self._directory = directory
        self._incarnation = incarnation
        self._lifetime_s = lifetime_s
        self._failed: dict[str, _FailedTags] = {}
        self._busy: dict[tuple[str, bytes], asyncio.Future[None]] = {}

    async def on_deposit(self, request: DepositRequest) -> DepositResponse:
        """Applies a sealed message once and answers it, always with the same bytes.

        Raises:
            PeerError: not for us, unknown slots, or the tag does not fit; all look alike outside.
            ShortageError: too many wrong tags from this source.
            UnavailableError: the store could not be written; the sender tries again.
        """
        if (
            request.target_kme_id != self._around.own_id
            or len(request.job_id) != 16
            or len(request.tag) != 16
        ):
            raise _refused()
        busy_key = (request.source_kme_id, request.job_id)
        while busy_key in self._busy:
            await asyncio.shield(self._busy[busy_key])
        stored = self._stored(request)
        if stored is not None:
            return stored
        self._check_failed_tags(request.source_kme_id)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._busy[busy_key] = done
        # A caller that hangs up must not leave slots free that the commit uses up.
        return await unbroken(self._apply_alone(request, busy_key, done))

    async def _apply_alone(
        self, request: DepositRequest, busy_key: tuple[str, bytes], done: asyncio.Future[None]
    ) -> DepositResponse:
        try:
            return await self._apply(request)
        finally:
            del self._busy[busy_key]
            done.set_result(None)

    def _stored(self, request: DepositRequest) -> DepositResponse | None:
        result = self._store.read(
            lambda tables: tables.jobs.inbound_result(request.source_kme_id, request.job_id)
        )
        if (
            result is None
            or result[:2] == _ATTACHED
            or result[:10] != _place(request.epoch, request.first_slot)
        ):
            return None
        return DepositResponse(answer=result[_HEAD_BYTES:], tag=result[10:_HEAD_BYTES])

    async def _apply(self, request: DepositRequest) -> DepositResponse:
        book = self._reserves.inbound(request.source_kme_id, request.epoch)
        if book is None or not 2 <= request.slot_count <= 1 << 16:
            raise _refused()
        span = Range(request.first_slot, request.first_slot + request.slot_count)
        book.slots.take([span], SlotKind.SEALED)
        is_durable = False
        try:
            envelope = Envelope(
                source=request.source_kme_id,
                target=request.target_kme_id,
                epoch=request.epoch,
                first_slot=request.first_slot,
                slot_count=request.slot_count,
                job_id=request.job_id,
                job_number=request.job_number,
                lowest_open_job=request.lowest_open_job,
            )
            keys = book.key_parts(span)
            body = self._unseal(envelope, request, book.tag_parts(span), keys)
            applied = self._prepare(request.source_kme_id, body)
            response = await self._commit(book, span, envelope, keys, applied)
            is_durable = True
        finally:
            book.slots.settle([span], is_durable=is_durable)
        book.wipe([span])
        applied.after()
        return response

    def _unseal(self, envelope: Envelope, request: DepositRequest, tags: bytes, keys: bytes) -> bytes:
        try:
            return unseal(envelope, request.ciphertext, request.tag, tag_parts=tags, key_parts=keys)
        except TagMismatchError as exc:
            self._count_failed(envelope.source)
            raise _refused() from exc

    async def _commit(
        self, book: InboundBook, span: Range, envelope: Envelope, keys: bytes, applied: Applied
    ) -> DepositResponse:
        using = book.using([span])
        source, job_id = envelope.source, envelope.job_id

        def change(tables: Tables) -> DepositResponse:
            using(tables)
            known = tables.jobs.inbound_result(source, job_id)
            reason = None if known is not None else applied.change(tables)
            answer = self._answer(reason)
            tag = answer_tag(keys, envelope, answer)
            if known is None:
                result = _place(envelope.epoch, envelope.first_slot) + tag + answer
                tables.jobs.put_inbound_result(source, job_id, envelope.job_number, result)
            tables.jobs.forget_inbound_below(source, envelope.lowest_open_job)
            return DepositResponse(answer=answer, tag=tag)

        return await self._store.commit(change)

    def _answer(self, reason: ErrorReason | None) -> bytes:
        return SealedAnswer(
            applied=reason is None,
            reason="" if reason is None else reason.value,
            incarnation=self._incarnation.incarnation,
            proven=self._incarnation.is_proven,
            lineage=self._reserves.lineage,
        ).SerializeToString()

    def prepare_attachment(
        self, source: str, job_id: bytes, number: int, lowest: int, body: bytes
    ) -> Applied:
        """Checks an attachment; its change runs in the append's transaction, once by job id.

        Raises:
            PeerError: it may not be applied; then the whole transfer is refused.
        """
        applied = self._prepare(source, body)

        def change(tables: Tables) -> ErrorReason | None:
            if tables.jobs.inbound_result(source, job_id) is not None:
                return None
            reason = applied.change(tables)
            if reason is not None:
                raise PeerError("attachment refused", reason=reason)
            result = _ATTACHED + bytes(_HEAD_BYTES - 2) + self._answer(None)
            tables.jobs.put_inbound_result(source, job_id, number, result)
            tables.jobs.forget_inbound_below(source, lowest)
            return None

        return Applied(change, applied.after, applied.opens)

    # what a message may do

    def _prepare(self, source: str, body: bytes) -> Applied:
        try:
            message = SealedMessage.FromString(body)
        except Exception as exc:  # protobuf raises its own DecodeError, outside its typed surface
            raise PeerError("sealed message does not parse") from exc
        kind = message.WhichOneof("body")
        if kind == "retire":
            return self._prepare_retire(source, message.retire)
        if kind == "keys":
            return self._prepare_keys(source, message.keys)
        if kind == "void_keys":
            return self._prepare_void(source, message.void_keys)
        if kind == "open_epoch" and message.open_epoch.epoch <= MAX_EPOCH:
            return Applied(lambda tables: None, _nothing, opens=message.open_epoch.epoch)
        raise PeerError("sealed message of an unknown kind")

    def _prepare_retire(self, source: str, retire: Retire) -> Applied:
        book = self._reserves.inbound(source, retire.epoch)
        if book is None:
            return Applied(lambda tables: None, _nothing)
        retiring = book.retiring(retire.below_slot)
        is_all = retire.below_slot > MAX_SLOT and retire.epoch != self._reserves.highest_inbound(source)
        files: list[str] = []

        def change(tables: Tables) -> None:
            files.extend(retiring(tables))
            if is_all:
                files.extend(tables.reserves.delete(book.reserve_id))

        def after() -> None:
            book.retired(retire.below_slot, files)
            if is_all:
                self._reserves.forget_inbound(book)

        return Applied(change, after)

    def _prepare_keys(self, source: str, deposit: KeyDeposit) -> Applied:
        """Every master named must be homed at the source (4.8): else anybody deposits in anybody's name."""
        refusal = self._may_name(source, deposit.master_sae_id)
        document = self._directory.document
        own = self._around.own_id
        slaves = [sae for sae in deposit.slave_sae_ids if document is not None and document.home(sae) == own]
        if not slaves and refusal is None:
            refusal = ErrorReason.UNKNOWN_SAE
        if not 0 < len(deposit.keys) <= _MAX_KEYS or any(len(key.key_id) != 16 for key in deposit.keys):
            refusal = ErrorReason.INVALID_ARGUMENT
        now_s = int(self._around.now_s())
        rows = [
            StoredKeyRow(
                master=deposit.master_sae_id,
                key_id=key.key_id,
                value=key.value,
                expires_at_s=min(deposit.expires_at_s, now_s + int(2 * self._lifetime_s)),
                origin_domain=deposit.origin_domain_id,
                grade=deposit.grade,
                slaves=dict.fromkeys(slaves, False),
            )
            for key in deposit.keys
        ]

        def change(tables: Tables) -> ErrorReason | None:
            if refusal is not None:
                return refusal
            if any(tables.keystore.stored_key(row.master, row.key_id) is not None for row in rows):
                return ErrorReason.INVALID_ARGUMENT
            tables.keystore.put_stored_keys(rows)
            return None

        return Applied(change, _nothing)

    def _prepare_void(self, source: str, void: VoidKeys) -> Applied:
        refusal = self._may_name(source, void.master_sae_id)
        if len(void.key_ids) > _MAX_KEYS or any(len(key_id) != 16 for key_id in void.key_ids):
            refusal = ErrorReason.INVALID_ARGUMENT
        expires_at_s = int(self._around.now_s() + 2 * self._lifetime_s)

        def change(tables: Tables) -> ErrorReason | None:
            if refusal is not None:
                return refusal
            for key_id in void.key_ids:
                if tables.keystore.void(void.master_sae_id, key_id):
                    continue
                if tables.keystore.stored_key(void.master_sae_id, key_id) is None:
                    tombstone = StoredKeyRow(
                        void.master_sae_id, key_id, b"", expires_at_s, "", "", {}, KeyState.VOID
                    )
                    tables.keystore.bury_unknown(tombstone)
            return None

        return Applied(change, _nothing)

    def _may_name(self, source: str, master: str) -> ErrorReason | None:
        document = self._directory.document
        if document is None or not document.may_name_master(
            source, master, self._around.now_s(), self._lifetime_s
        ):
            _LOG.warning("deposit refused", extra={"source": source, "cause": "master is not homed there"})
            return ErrorReason.NOT_AUTHORIZED
        return None

    # wrong tags

    def _check_failed_tags(self, source: str) -> None:
        failed = self._failed.get(source)
        if failed is None or failed.count < _MAX_FAILED_TAGS:
            return
        if self._around.monotonic_s() - failed.since_s > _HOUR_S:
            del self._failed[source]
            return
        raise ShortageError("too many wrong tags", reason=ErrorReason.BUSY, retry_after_s=_HOUR_S)

    def _count_failed(self, source: str) -> None:
        now_s = self._around.monotonic_s()
        failed = self._failed.get(source)
        if failed is None or now_s - failed.since_s > _HOUR_S:
            failed = self._failed[source] = _FailedTags(now_s)
        failed.count += 1
        if failed.count == _MAX_FAILED_TAGS:
            self._around.alarms.raise_alarm(
                f"deposit/{source}/tags",
                "critical",
                f"{_MAX_FAILED_TAGS} sealed messages with wrong tags within an hour",
                "look for someone who speaks in this node's name",
            )


def _place(epoch: int, first_slot: int) -> bytes:
    return epoch.to_bytes(2, "big") + first_slot.to_bytes(8, "big")


def _refused() -> PeerError:
    return PeerError("sealed message refused", reason=ErrorReason.PEER_REFUSED)


def _nothing() -> None:
    """No memory to bring up to date."""
