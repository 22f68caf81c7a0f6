"""Sealed messages between KMEs at the source: sealed once, durable, sent until answered.

Owns protocol 4.8 on the sending side: bytes and use of slots are durable before the first send, every
later send is identical, the job goes with its authenticated answer. Results older than the lowest open
job may be forgotten by the target.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mesh.core.ranges import Range
from mesh.core.sealed import Envelope, encode_attachment, seal, slots_needed, verify_answer
from mesh.core.transfer import KEY_PART_BYTES, SlotKind
from mesh.errors import ErrorReason, MeshError, PeerError, TagMismatchError, UnavailableError
from mesh.node.establish import Establisher
from mesh.node.keyports import PeerCaller, Surroundings
from mesh.node.outbound import OutboundBook
from mesh.node.reserves import Reserves
from mesh.node.tasks import Background, unbroken
from mesh.node.underway import Order
from mesh.store.store import Store
from mesh.store.tables import JobRow, Tables
from mesh.v1.peer_pb2 import DepositRequest, DepositResponse, OpenEpoch, SealedAnswer, SealedMessage

SEALED_SLOTS = 32
_MAX_SEALED_SLOTS = 1024
_TOP_UP_TIMEOUT_S = 8.0
# Slots that last for less than this are topped up with twice as many.
_LASTING_S = 10.0
_SEND_TIMEOUT_S = 3.0
_FIRST_PAUSE_S = 0.2
_PENDING_PAUSE_S = 0.02
_MAX_PAUSE_S = 30.0
_MAX_REFUSALS = 8
_JOB_KIND = "sealed"

_LOG = logging.getLogger("keymesh.jobs")


@dataclass(frozen=True, slots=True)
class Answered:
    """The end of a sealed message that has an owner.

    Attributes:
        context: what the owner stored with it.
        answer: None when it was given up: the target lost its state, and so all that it held.
    """

    job_id: bytes
    peer: str
    context: bytes
    answer: SealedAnswer | None


Handler = Callable[[Answered], Awaitable[None]]
"""Takes an answer over durably, and deletes the job in that very commit."""


@dataclass(slots=True, repr=False)
class _Job:
    """A sealed message that is not answered yet."""

    job_id: bytes
    peer: str
    kind: str
    context: bytes
    request: DepositRequest
    answer_key: bytes
    answered: asyncio.Future[SealedAnswer]


class Jobs:
    """Sends sealed messages; survives restarts."""

    def __init__(
        self,
        around: Surroundings,
        *,
        store: Store,
        reserves: Reserves,
        establisher: Establisher,
        peers: PeerCaller,
        tasks: Background,
    ) -> None:
        self._around = around
        self._store = store
        self._reserves = reserves
        self._establisher = establisher
        self._peers = peers
        self._tasks = tasks
        self._open: dict[bytes, _Job] = {}
        self._filling: dict[str, asyncio.Lock] = {}
        self._batch: dict[str, int] = {}
        self._topping_up: set[str] = set()
        self._topped_up_s: dict[str, float] = {}
        self._handlers: dict[str, Handler] = {}

    def own(self, kind: str, handler: Handler) -> None:
        """Names the owner of a kind of jobs; before ``resume``."""
        self._handlers[kind] = handler

    def resume(self) -> None:
        """Goes on with the jobs that a restart interrupted."""
        for kind in (_JOB_KIND, *self._handlers):
            for row in self._store.read(lambda tables, kind=kind: tables.jobs.list(kind=kind)):  # type: ignore[misc]  # bound now
                self._start(row)

    def open_jobs(self, peer: str) -> int:
        """Messages to a peer that are not answered."""
        return sum(job.peer == peer for job in self._open.values())

    def lowest_unanswered(self, peer: str, epoch: int) -> int | None:
        """The lowest sealed slot of an unanswered message: no retire passes it (4.7)."""
        slots = [
            job.request.first_slot
            for job in self._open.values()
            if job.peer == peer and job.request.epoch == epoch
        ]
        return min(slots, default=None)

    async def send(self, peer: str, message: SealedMessage, *, timeout_s: float) -> SealedAnswer:
        """Seals, stores and sends a message, and waits for its answer.

        After a timeout the message goes on being sent; its effect is then unknown to the caller.

        Raises:
            ShortageError, UnavailableError: no sealed slots could be had, or no answer came in time.
            PeerError: the target does not know the slots (it lost its state).
        """
        deadline = self._around.monotonic_s() + timeout_s
        job = await self.submit(peer, message, timeout_s=timeout_s)
        try:
            async with asyncio.timeout(max(0.0, deadline - self._around.monotonic_s())):
                return await asyncio.shield(job.answered)
        except TimeoutError as exc:
            raise UnavailableError(
                "a sealed message was not answered in time",
                reason=ErrorReason.DEADLINE_EXCEEDED,
                retry_after_s=1.0,
            ) from exc

    async def submit(
        self,
        peer: str,
        message: SealedMessage,
        *,
        timeout_s: float,
        kind: str = _JOB_KIND,
        context: bytes = b"",
        also: Callable[[Tables, bytes], object] | None = None,
    ) -> _Job:
        """Makes a message durable and starts sending it; does not wait for the answer.

        Args:
            kind: whose handler takes the answer (see ``own``).
            context: what that handler needs then; never a secret.
            also: done in the same commit, with the job's id; what it raises undoes the message.
        """
        body = message.SerializeToString()
        book, span = await self._slots(peer, slots_needed(len(body)), timeout_s)
        sealed = self._sealed(peer, body, book, span, kind=kind, context=context)

        def change(tables: Tables) -> JobRow:
            row = sealed(tables)
            if also is not None:
                also(tables, row.job_id)
            return row

        # Once queued the job may become durable: then it is sent, whoever still waits.
        return await unbroken(self._send_once_durable(change, book, span))

    def seal_now(
        self, tables: Tables, peer: str, message: SealedMessage, *, kind: str
    ) -> tuple[bytes, Callable[[], None]] | None:
        """Seals a message within a change that runs, so that it costs no commit of its own.

        A change that fails forfeits the slots.

        Returns:
            The job's id, and what to call once the change is durable; None where slots are not at hand,
            for which ``submit`` can wait.
        """
        body = message.SerializeToString()
        taken = self._take(peer, slots_needed(len(body)))
        if taken is None:
            return None
        book, span = taken
        row = self._sealed(peer, body, book, span, kind=kind, context=b"")(tables)

        def durable() -> None:
            book.wipe_sealed(span)
            self._start(row)

        return row.job_id, durable

    async def _send_once_durable(
        self, change: Callable[[Tables], JobRow], book: OutboundBook, span: Range
    ) -> _Job:
        row = await self._store.commit(change)
        book.wipe_sealed(span)
        return self._start(row)

    def _sealed(
        self, peer: str, body: bytes, book: OutboundBook, span: Range, *, kind: str, context: bytes
    ) -> Callable[[Tables], JobRow]:
        """A change that seals a message and makes its job durable, with the use of its slots."""
        tags, keys = book.sealed_parts(span)
        using = book.using_sealed(span)
        job_id = self._around.randomness(16)

        def change(tables: Tables) -> JobRow:
            number = tables.jobs.next_number(peer)
            lowest = tables.jobs.lowest_open(peer)
            envelope = Envelope(
                source=self._around.own_id,
                target=peer,
                epoch=book.epoch,
                first_slot=span.start,
                slot_count=len(span),
                job_id=job_id,
                job_number=number,
                lowest_open_job=number if lowest is None else lowest,
            )
            ciphertext, tag = seal(envelope, body, tag_parts=tags, key_parts=keys)
            request = DepositRequest(
                source_kme_id=envelope.source,
                target_kme_id=peer,
                epoch=envelope.epoch,
                first_slot=envelope.first_slot,
                slot_count=envelope.slot_count,
                ciphertext=ciphertext,
                tag=tag,
                job_id=job_id,
                job_number=number,
                lowest_open_job=envelope.lowest_open_job,
            )
            payload = keys[:KEY_PART_BYTES] + request.SerializeToString()
            using(tables)
            row = JobRow(job_id, number, kind, peer, "open", payload, context=context)
            tables.jobs.put(row)
            return row

        return change

    def _take(self, peer: str, count: int) -> tuple[OutboundBook, Range] | None:
        """Sealed slots that are at hand; sees to it that there will be more."""
        book = self._establisher.current(peer)
        span = book.slots.take_sealed(count) if book is not None and book.is_open else None
        if book is None or span is None:
            return None
        if book.slots.sealed_messages(count) < 2 and peer not in self._topping_up:
            self._topping_up.add(peer)
            self._tasks.spawn(self._top_up(peer, count))
        return book, span

    async def _slots(self, peer: str, count: int, timeout_s: float) -> tuple[OutboundBook, Range]:
        """Sealed slots for one message; establishes more when there are too few.

        So that messages seldom wait for that, the next slots are established as soon as no two
        messages like this one are left, and twice as many whenever one had to wait or they soon were
        used up.
        """
        deadline = self._around.monotonic_s() + timeout_s
        async with self._filling.setdefault(peer, asyncio.Lock()):
            while True:
                taken = self._take(peer, count)
                if taken is not None:
                    return taken
                left_s = max(0.1, deadline - self._around.monotonic_s())
                await self._establish_sealed(peer, count, left_s)
                self._enlarge(peer)

    async def _top_up(self, peer: str, count: int) -> None:
        now_s = self._around.monotonic_s()
        if now_s - self._topped_up_s.get(peer, -_LASTING_S) < _LASTING_S:
            self._enlarge(peer)
        self._topped_up_s[peer] = now_s
        try:
            await self._establish_sealed(peer, 2 * count, _TOP_UP_TIMEOUT_S)
        except MeshError as exc:
            # Whoever needs them next asks again, and is told.
            _LOG.info("no slots for sealed messages yet", extra={"peer": peer, "cause": str(exc)})
        finally:
            self._topping_up.discard(peer)

    async def _establish_sealed(self, peer: str, count: int, timeout_s: float) -> None:
        slots = max(count, self._batch.get(peer, SEALED_SLOTS))
        order = Order(peer, slots, SlotKind.SEALED, persists=True)
        try:
            await self._establisher.establish(order, timeout_s=timeout_s)
        except MeshError:
            # On a scarce route less may still pass: next time only what is needed.
            self._batch[peer] = count
            raise

    def _enlarge(self, peer: str) -> None:
        self._batch[peer] = min(2 * self._batch.get(peer, SEALED_SLOTS), _MAX_SEALED_SLOTS)

    def _start(self, row: JobRow) -> _Job:
        request = DepositRequest.FromString(row.payload[KEY_PART_BYTES:])
        answered: asyncio.Future[SealedAnswer] = asyncio.get_running_loop().create_future()
        answered.add_done_callback(_retrieve)
        answer_key = row.payload[:KEY_PART_BYTES]
        job = _Job(row.job_id, row.peer, row.kind, row.context, request, answer_key, answered)
        self._open[row.job_id] = job
        self._tasks.spawn(self._deliver(job))
        return job

    async def _deliver(self, job: _Job) -> None:
        """Sends until answered; gives up only when the target has refused again and again."""
        pause_s = _FIRST_PAUSE_S
        refusals = 0
        while True:
            try:
                response = await self._peers.deposit(job.peer, job.request, timeout_s=_SEND_TIMEOUT_S)
                if response.is_pending:
                    # Applied; the target held this call as long as it could, and the answer is to come.
                    pause_s = _FIRST_PAUSE_S
                    await asyncio.sleep(_PENDING_PAUSE_S)
                    continue
                answer = self._verified(job, response)
            except PeerError as exc:
                refusals += 1
                _LOG.warning("sealed message refused", extra={"peer": job.peer, "cause": str(exc)})
                if refusals >= _MAX_REFUSALS and await self._give_up(job):
                    return
            except MeshError as exc:
                _LOG.info("sealed message not delivered", extra={"peer": job.peer, "cause": str(exc)})
            else:
                if await self._finish(job, answer):
                    return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _verified(self, job: _Job, response: DepositResponse) -> SealedAnswer:
        request = job.request
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
        try:
            verify_answer(job.answer_key, envelope, response.answer, response.tag)
        except TagMismatchError as exc:
            raise PeerError("the answer to a sealed message is not authentic") from exc
        return SealedAnswer.FromString(response.answer)

    async def _finish(self, job: _Job, answer: SealedAnswer) -> bool:
        if not await self._close(job, answer):
            return False
        book = self._reserves.outbound.get(job.peer)
        if self._reserves.note_lineage(job.peer, answer.lineage) and book is not None:
            self._establisher.forget_epoch(book)
        if not job.answered.done():
            job.answered.set_result(answer)
        return True

    async def _give_up(self, job: _Job) -> bool:
        """The target does not hold these slots: it lost its state, or somebody answers in its name."""
        if not await self._close(job, None):
            return False
        self._around.alarms.raise_alarm(
            f"deposit/{job.peer}/refused",
            "warning",
            "a sealed message was refused again and again; it was given up",
            "check whether the other node lost its data directory",
        )
        if not job.answered.done():
            job.answered.set_exception(
                PeerError("the target refused a sealed message", reason=ErrorReason.PEER_REFUSED)
            )
        return True

    async def _close(self, job: _Job, answer: SealedAnswer | None) -> bool:
        """The job goes with its answer, in one commit; False: the disk did not take it, ask again later."""
        handler = self._handlers.get(job.kind)
        try:
            if handler is None:
                await self._store.commit(lambda tables: tables.jobs.delete(job.job_id))
            else:
                await handler(Answered(job.job_id, job.peer, job.context, answer))
        except MeshError as exc:
            _LOG.warning("an answer could not be taken over", extra={"peer": job.peer, "cause": str(exc)})
            return False
        self._open.pop(job.job_id, None)
        return True


def open_epoch_attachment(job_id: bytes, epoch: int) -> bytes:
    """The attachment (plaintext) that opens an epoch at its target; job number 0, never resent."""
    message = SealedMessage(open_epoch=OpenEpoch(epoch=epoch))
    return encode_attachment(job_id, 0, 0, message.SerializeToString())


def _retrieve(future: asyncio.Future[SealedAnswer]) -> None:
    """Marks an error as seen: a job nobody waits for reports through its alarm."""
    if not future.cancelled():
        future.exception()
