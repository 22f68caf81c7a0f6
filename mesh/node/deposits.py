"""Sealed messages between KMEs at the target: opened, applied once by job id, answered.

Owns protocol 4.7 (retire) and 4.8 (deposits) on the receiving side, and what an attachment may do.
A message is applied in one transaction with the use of its slots and with its stored answer; every
later copy gets that answer, byte for byte. The sending side is ``mesh.node.jobs``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mesh.core.ranges import Range
from mesh.core.sealed import Envelope, answer_tag, unseal
from mesh.core.transfer import KEY_PART_BYTES, MAX_EPOCH, MAX_SLOT, SlotKind
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
    ExportKeys,
    KeyDeposit,
    RecallKeys,
    Retire,
    SealedAnswer,
    SealedMessage,
    VoidKeys,
)

_MAX_FAILED_TAGS = 1 << 10
_HOUR_S = 3600.0
_MAX_KEYS = 1024
_ATTACHED = b"\xff\xff"
_PENDING = b"\xff\xfe"
_PLACE_BYTES = 2 + 8
_HEAD_BYTES = _PLACE_BYTES + 16
# Less than the sender waits for its answer.
_HOLD_PENDING_S = 2.0

_LOG = logging.getLogger("keymesh.deposits")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a message came to.

    Attributes:
        reason: why nothing was applied; None when it was.
        failed: keys for which it could not be done, for messages that ask.
        is_pending: applied, and answered later by ``resolve``.
    """

    reason: ErrorReason | None = None
    failed: tuple[bytes, ...] = ()
    is_pending: bool = False


DONE = Outcome()


@dataclass(frozen=True, slots=True)
class Applied:
    """A message that passed every check: what to do inside the transaction, and after it.

    ``settled`` is told in any case whether the transaction became durable, before ``after``.
    """

    change: Callable[[Tables], Outcome]
    after: Callable[[], None]
    opens: int | None = None
    settled: Callable[[bool], None] = lambda _: None


class ForeignMessages(Protocol):
    """What concerns keys of other owners' key managers: borders, and where exported keys come from."""

    def prepare_keys(self, source: str, job_id: bytes, deposit: KeyDeposit) -> Applied | None:
        """Keys for slaves of which some lie behind this border; None when none does."""
        ...

    def prepare_export(self, source: str, job_id: bytes, export: ExportKeys) -> Applied:
        """Keys drawn towards this border."""
        ...

    def prepare_void(self, source: str, job_id: bytes, void: VoidKeys) -> Applied | None:
        """Keys of which some crossed this border; None when none did."""
        ...

    def prepare_recall(self, source: str, job_id: bytes, recall: RecallKeys) -> Applied:
        """Keys that a border wants back."""
        ...


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
        self._pending: dict[tuple[str, bytes], asyncio.Event] = {}
        #: Set by the key plane where there is such a thing.
        self.foreign: ForeignMessages | None = None

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
        if stored is None:
            self._check_failed_tags(request.source_kme_id)
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._busy[busy_key] = done
            # A caller that hangs up must not leave slots free that the commit uses up.
            stored = await unbroken(self._apply_alone(request, busy_key, done))
        return await self._resolved(request) if stored.is_pending else stored

    async def _resolved(self, request: DepositRequest) -> DepositResponse:
        """The answer of a message whose outcome others decide, or that it is still to come."""
        key = (request.source_kme_id, request.job_id)
        event = self._pending.setdefault(key, asyncio.Event())
        stored = self._stored(request)
        if stored is not None and stored.is_pending:
            try:
                async with asyncio.timeout(_HOLD_PENDING_S):
                    await event.wait()
            except TimeoutError:
                return stored
            stored = self._stored(request)
        self._pending.pop(key, None)
        if stored is None:
            raise _refused()
        return stored

    def resolve(
        self, tables: Tables, source: str, job_id: bytes, failed: Sequence[bytes] = ()
    ) -> Callable[[], None]:
        """Answers a message that is pending, in the transaction that decided it; else does nothing.

        Returns:
            what to call once that transaction is durable.
        """
        result = tables.jobs.inbound_result(source, job_id)
        if result is None or result[:2] != _PENDING:
            return _nothing
        answer_key = result[2 + _PLACE_BYTES :]
        answer = self._answer(Outcome(failed=tuple(failed)))
        place = result[2 : 2 + _PLACE_BYTES]
        tables.jobs.replace_inbound_result(
            source, job_id, place + answer_tag(answer_key, job_id, answer) + answer
        )

        def wake() -> None:
            event = self._pending.pop((source, job_id), None)
            if event is not None:
                event.set()

        return wake

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
        place = _place(request.epoch, request.first_slot)
        if result is not None and result[: 2 + _PLACE_BYTES] == _PENDING + place:
            return DepositResponse(is_pending=True)
        if result is None or result[:2] == _ATTACHED or result[:_PLACE_BYTES] != place:
            return None
        return DepositResponse(answer=result[_HEAD_BYTES:], tag=result[_PLACE_BYTES:_HEAD_BYTES])

    async def _apply(self, request: DepositRequest) -> DepositResponse:
        book = self._reserves.inbound(request.source_kme_id, request.epoch)
        if book is None or not 2 <= request.slot_count <= 1 << 16:
            raise _refused()
        span = Range(request.first_slot, request.first_slot + request.slot_count)
        book.slots.take([span], SlotKind.SEALED)
        is_durable = False
        applied: Applied | None = None
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
            applied = self._prepare(request.source_kme_id, request.job_id, body)
            response = await self._commit(book, span, envelope, keys, applied)
            is_durable = True
        finally:
            book.slots.settle([span], is_durable=is_durable)
            if applied is not None:
                applied.settled(is_durable)
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
            outcome = DONE if known is not None else applied.change(tables)
            answer = self._answer(outcome)
            tag = answer_tag(keys, job_id, answer)
            place = _place(envelope.epoch, envelope.first_slot)
            if known is None:
                # A pending answer needs its key later, and the slots are wiped.
                pending = _PENDING + place + keys[:KEY_PART_BYTES]
                result = pending if outcome.is_pending else place + tag + answer
                tables.jobs.put_inbound_result(source, job_id, envelope.job_number, result)
            tables.jobs.forget_inbound_below(source, envelope.lowest_open_job)
            if outcome.is_pending:
                return DepositResponse(is_pending=True)
            return DepositResponse(answer=answer, tag=tag)

        return await self._store.commit(change)

    def _answer(self, outcome: Outcome) -> bytes:
        return SealedAnswer(
            applied=outcome.reason is None,
            reason="" if outcome.reason is None else outcome.reason.value,
            incarnation=self._incarnation.incarnation,
            proven=self._incarnation.is_proven,
            lineage=self._reserves.lineage,
            failed_key_ids=outcome.failed,
        ).SerializeToString()

    def prepare_attachment(
        self, source: str, job_id: bytes, number: int, lowest: int, body: bytes
    ) -> Applied:
        """Checks an attachment; its change runs in the append's transaction, once by job id.

        Raises:
            PeerError: it may not be applied; then the whole transfer is refused.
        """
        applied = self._prepare(source, job_id, body)

        def change(tables: Tables) -> Outcome:
            if tables.jobs.inbound_result(source, job_id) is not None:
                return DONE
            outcome = applied.change(tables)
            if outcome.reason is not None or outcome.is_pending:
                raise PeerError("attachment refused", reason=outcome.reason)
            result = _ATTACHED + bytes(_HEAD_BYTES - 2) + self._answer(DONE)
            tables.jobs.put_inbound_result(source, job_id, number, result)
            tables.jobs.forget_inbound_below(source, lowest)
            return DONE

        return Applied(change, applied.after, applied.opens, applied.settled)

    # what a message may do

    def _prepare(self, source: str, job_id: bytes, body: bytes) -> Applied:
        try:
            message = SealedMessage.FromString(body)
        except Exception as exc:  # protobuf raises its own DecodeError, outside its typed surface
            raise PeerError("sealed message does not parse") from exc
        kind = message.WhichOneof("body")
        if kind == "retire":
            return self._prepare_retire(source, message.retire)
        foreign = self.foreign
        if kind == "keys":
            crossing = foreign.prepare_keys(source, job_id, message.keys) if foreign else None
            return crossing or self.prepare_keys(source, message.keys)
        if kind == "void_keys":
            crossing = foreign.prepare_void(source, job_id, message.void_keys) if foreign else None
            return crossing or self._prepare_void(source, message.void_keys)
        if kind == "open_epoch" and message.open_epoch.epoch <= MAX_EPOCH:
            return Applied(lambda tables: DONE, _nothing, opens=message.open_epoch.epoch)
        if kind == "export_keys" and foreign is not None:
            return foreign.prepare_export(source, job_id, message.export_keys)
        if kind == "recall_keys" and foreign is not None:
            return foreign.prepare_recall(source, job_id, message.recall_keys)
        raise PeerError("sealed message of an unknown kind")

    def _prepare_retire(self, source: str, retire: Retire) -> Applied:
        book = self._reserves.inbound(source, retire.epoch)
        if book is None:
            return Applied(lambda tables: DONE, _nothing)
        retiring = book.retiring(retire.below_slot)
        is_all = retire.below_slot > MAX_SLOT and retire.epoch != self._reserves.highest_inbound(source)
        files: list[str] = []

        def change(tables: Tables) -> Outcome:
            files.extend(retiring(tables))
            if is_all:
                files.extend(tables.reserves.delete(book.reserve_id))
            return DONE

        def after() -> None:
            held = book.slots.held_key_slots
            book.retired(retire.below_slot, files)
            unfetched = (held - book.slots.held_key_slots) * KEY_PART_BYTES
            self._around.metrics.unfetched_bytes.labels(source).inc(unfetched)
            if is_all:
                self._reserves.forget_inbound(book)

        return Applied(change, after)

    def prepare_keys(self, source: str, deposit: KeyDeposit) -> Applied:
        """Every master named must be homed at the source (4.8): else anybody deposits in anybody's name."""
        refusal = self.may_name(source, deposit.master_sae_id)
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

        def change(tables: Tables) -> Outcome:
            if refusal is not None:
                return Outcome(refusal)
            known = {row.key_id: tables.keystore.stored_key(row.master, row.key_id) for row in rows}
            if any(row is not None and row.state is not KeyState.VOID for row in known.values()):
                return Outcome(ErrorReason.INVALID_ARGUMENT)
            # A void may overtake the keys that it is about.
            voided = tuple(key_id for key_id, row in known.items() if row is not None)
            tables.keystore.put_stored_keys([row for row in rows if row.key_id not in voided])
            return Outcome(failed=voided)

        return Applied(change, _nothing)

    def _prepare_void(self, source: str, void: VoidKeys) -> Applied:
        refusal = self.may_name(source, void.master_sae_id)
        if len(void.key_ids) > _MAX_KEYS or any(len(key_id) != 16 for key_id in void.key_ids):
            refusal = ErrorReason.INVALID_ARGUMENT
        expires_at_s = int(self._around.now_s() + 2 * self._lifetime_s)

        def change(tables: Tables) -> Outcome:
            if refusal is not None:
                return Outcome(refusal)
            return Outcome(failed=tuple(void_stored(tables, void.master_sae_id, void.key_ids, expires_at_s)))

        return Applied(change, _nothing)

    def may_name(self, source: str, master: str) -> ErrorReason | None:
        """Why a source may not speak for a master; None when it may (4.8)."""
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


def void_stored(tables: Tables, master: str, key_ids: Iterable[bytes], expires_at_s: int) -> list[bytes]:
    """Voids stored keys that no slave has fetched, and buries what never came; returns those that stay."""
    kept = []
    for key_id in key_ids:
        row = tables.keystore.stored_key(master, key_id)
        if row is None:
            tombstone = StoredKeyRow(master, key_id, b"", expires_at_s, "", "", {}, KeyState.VOID)
            tables.keystore.bury_unknown(tombstone)
        elif row.state is KeyState.DELIVERED or any(row.slaves.values()):
            kept.append(key_id)
        else:
            tables.keystore.void(master, key_id)
    return kept


def _place(epoch: int, first_slot: int) -> bytes:
    return epoch.to_bytes(2, "big") + first_slot.to_bytes(8, "big")


def _refused() -> PeerError:
    return PeerError("sealed message refused", reason=ErrorReason.PEER_REFUSED)


def _nothing() -> None:
    """No memory to bring up to date."""
