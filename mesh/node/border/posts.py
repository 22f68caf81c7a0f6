"""Requests that gateways perform: what is in them, and what their outcomes do to the keys.

Owns the retry rules of ETSI GS QKD 020: identical values every time; only 400 and 401 prove that a peer
holds nothing; what was taken and is not acked is asked again or voided; an ack that cannot be delivered
ends in a void the other way. Every retry has a bound in time.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from http import HTTPStatus

from mesh.core.border import INBOUND, OUTBOUND, Inbound, InboundEvent, Outbound, OutboundEvent
from mesh.core.border_rules import AckStatus, BorderConfig, PostKind, Verdict, judge
from mesh.errors import CallerError
from mesh.node.border.board import Board, Entry
from mesh.node.border.ledger import OPEN_OUTBOUND, Ledger, raise_void_alarm
from mesh.node.border.ports import ACK_PATH, Ack
from mesh.node.border.settlements import Settlements
from mesh.node.keyports import Surroundings
from mesh.ops.logging import log_soon
from mesh.store.store import Store
from mesh.store.tables import BorderKeyRow, PostRow, Tables
from mesh.v1.border_pb2 import AckContainer, Association, ForeignKey, LeasedJob, PostAcks, PostKeys, PostVoid
from mesh.v1.border_pb2 import AckStatus as AckStatusProto

MAX_REFUSALS = 5
_MAX_TIMED = 4096

_LOG = logging.getLogger("keymesh.border")

Run = Callable[[Callable[[Ledger], None]], Awaitable[None]]

STATUS_TO_PROTO = {
    AckStatus.RELAYED: AckStatusProto.RELAYED,
    AckStatus.FAILED: AckStatusProto.FAILED,
    AckStatus.VOIDED: AckStatusProto.VOIDED,
    AckStatus.FAILED_TO_VOID: AckStatusProto.FAILED_TO_VOID,
    AckStatus.KEY_NOT_PRESENT: AckStatusProto.KEY_NOT_PRESENT,
}


class Posts:
    """Prepares requests and takes their outcomes.

    Args:
        run: runs a change with a ledger, durably, and then what follows in memory.
    """

    def __init__(
        self,
        around: Surroundings,
        *,
        config: BorderConfig,
        store: Store,
        settlements: Settlements,
        run: Run,
    ) -> None:
        self._around = around
        self._config = config
        self._store = store
        self._settlements = settlements
        self._run = run
        self._posted_at_s: OrderedDict[bytes, float] = OrderedDict()
        self.board = Board(around, prepare=self._prepare)

    def resume(self) -> None:
        """Offers again what a restart interrupted; how far it got is not known."""
        for post in self._store.read(lambda tables: tables.border.posts()):
            self.board.add(post, is_doubtful=True)

    # before it leaves

    async def _prepare(self, entry: Entry) -> LeasedJob | None:
        identifier = entry.request_id or entry.post.job_id.hex()[:16]
        # One look at the store: each waits for a commit under way.
        post, is_hidden, job = self._store.read(lambda tables: self._look(tables, entry, identifier))
        if post is None:
            self.board.discard(entry.post.job_id)
            return None
        entry.post = post
        if post.kind == PostKind.KEYS and post.url:
            self._posted_at_s.setdefault(post.exchange_id, self._around.monotonic_s())
            while len(self._posted_at_s) > _MAX_TIMED:
                self._posted_at_s.popitem(last=False)
        if is_hidden:
            await self._expose(post)
            _, _, job = self._store.read(lambda tables: self._look(tables, entry, identifier))
        return job

    def _look(
        self, tables: Tables, entry: Entry, identifier: str
    ) -> tuple[PostRow | None, bool, LeasedJob | None]:
        """The request, whether its keys must be exposed first, and what is to be posted now."""
        post = tables.border.post(entry.post.job_id)
        if post is None or not post.url:
            return post, False, None
        is_hidden = post.kind == PostKind.KEYS and any(
            key.state == Outbound.QUEUED for key in tables.border.keys(post.exchange_id)
        )
        return post, is_hidden, None if is_hidden else self._job(tables, post, identifier)

    async def _expose(self, post: PostRow) -> None:
        """Durably noted before the first request leaves: from then on the peer may hold the keys."""

        def change(ledger: Ledger) -> None:
            for key in ledger.tables.border.keys(post.exchange_id):
                if key.state == Outbound.QUEUED:
                    ledger.outbound(key, OutboundEvent.LEASED)

        await self._run(change)

    def _job(self, tables: Tables, post: PostRow, identifier: str) -> LeasedJob | None:
        job = LeasedJob(peer_kme_id=post.peer, url=post.url, request_id=identifier)
        association = Association(initiator_sae_id=post.initiator, target_sae_ids=post.targets)
        callback = self._config.url + ACK_PATH
        if post.kind == PostKind.ACK:
            status = STATUS_TO_PROTO[AckStatus(post.status)]
            container = AckContainer(status=status, key_ids=post.key_ids, association=association)
            job.post_acks.CopyFrom(PostAcks(acks=[container]))
        elif post.kind == PostKind.VOID:
            body = PostVoid(association=association, key_ids=post.key_ids, ack_callback_url=callback)
            job.post_void.CopyFrom(body)
        else:
            keys = [
                ForeignKey(key_id=key.key_id, value=key.value, extension=key.extension)
                for key in tables.border.keys(post.exchange_id)
                if key.key_id in post.key_ids and key.state == Outbound.POSTED
            ]
            if not keys:
                return None
            extension = tables.border.exchange(post.exchange_id).extension
            job.post_keys.CopyFrom(
                PostKeys(
                    association=association,
                    keys=keys,
                    ack_callback_url=callback,
                    extension_optional=extension,
                )
            )
        return job

    def heard(self, peer: str, status: AckStatus, exchange_id: bytes) -> None:
        """A peer acked a key of an exchange."""
        metrics = self._around.metrics
        metrics.border_acks.labels(peer, status.name.lower()).inc()
        posted_at_s = self._posted_at_s.pop(exchange_id, None)
        if posted_at_s is not None and status is AckStatus.RELAYED:
            metrics.border_ack_s.labels(peer).observe(self._around.monotonic_s() - posted_at_s)

    # when it came back

    async def complete(
        self,
        gateway: str,
        lease_id: bytes,
        *,
        http_status: int | None,
        was_sent: bool,
        retry_after_s: float,
        acks: Sequence[Ack],
    ) -> bool:
        """Takes the outcome of a leased request; False when the lease had ended.

        Args:
            http_status: of a whole answer; None for none.
            was_sent: without an answer: whether anything of the request may have left.
            acks: results that the answer itself held.
        """
        entry = self.board.complete(gateway, lease_id)
        if entry is None:
            return False
        verdict = judge(http_status)
        log_soon(
            _LOG,
            "border request performed" if http_status else "border request not answered",
            peer=entry.post.peer,
            kind=entry.post.kind,
            keys=len(entry.post.key_ids),
            http_status=http_status,
            gateway=gateway,
            request_id=entry.request_id,
        )
        if (http_status is not None or was_sent) and verdict is Verdict.RETRY:
            entry.is_doubtful = True
        try:
            if entry.post.kind == PostKind.KEYS:
                await self._keys_done(entry, verdict, retry_after_s, acks)
            elif entry.post.kind == PostKind.ACK:
                await self._ack_done(entry, http_status, retry_after_s)
            else:
                await self._void_done(entry, http_status, retry_after_s, acks)
        except Exception:
            # The outcome could not be made durable, or is beyond us: as if it had not come.
            entry.is_doubtful = True
            self.board.retry(entry)
            raise
        return True

    async def _keys_done(
        self, entry: Entry, verdict: Verdict, retry_after_s: float, acks: Sequence[Ack]
    ) -> None:
        if verdict is Verdict.RETRY:
            self.board.retry(entry, retry_after_s=retry_after_s)
            return
        event = OutboundEvent.TAKEN
        if verdict is Verdict.REFUSED:
            event = OutboundEvent.REFUSED if entry.is_doubtful else OutboundEvent.REFUSED_CLEAN

        def change(ledger: Ledger) -> None:
            for key in ledger.tables.border.keys(entry.post.exchange_id):
                if key.key_id in entry.post.key_ids and OUTBOUND.allows(Outbound(key.state), event):
                    ledger.outbound(key, event)
            self._apply_acks(ledger, entry.post, acks)

        await self._run(change)
        # What is still to be posted after an answer leaves again later.
        self.board.retry(entry)

    def _apply_acks(self, ledger: Ledger, post: PostRow, acks: Sequence[Ack]) -> None:
        peer = self._config.peer(post.peer)
        if peer is not None and acks:
            self._settlements.apply_acks(ledger, peer, acks, skips_unknown=True)

    async def _ack_done(self, entry: Entry, http_status: int | None, retry_after_s: float) -> None:
        verdict = judge(http_status)
        post = entry.post
        if verdict is Verdict.TAKEN:
            await self._end(post, lost=False)
        elif http_status != HTTPStatus.BAD_REQUEST:
            self.board.retry(entry, retry_after_s=retry_after_s)
        elif len(post.key_ids) > 1:
            await self._split(post)
        else:
            # The peer does not know this key, or not this word: it will not hear the ack at all.
            await self._end(post, lost=True)

    async def _split(self, post: PostRow) -> None:
        """One key that the peer does not know must not keep the others from being acked."""

        def change(ledger: Ledger) -> None:
            ledger.tables.border.delete_post(post.job_id)
            ledger.after.steps.append(lambda: self.board.discard(post.job_id))
            for key_id in post.key_ids:
                row = replace(post, job_id=self._around.randomness(16), key_ids=(key_id,))
                ledger.tables.border.put_post(row)
                ledger.after.steps.append(lambda row=row: self.board.add(row, is_doubtful=True))  # type: ignore[misc]  # bound now

        await self._run(change)

    async def _end(self, post: PostRow, *, lost: bool) -> None:
        """An ack is delivered, or never will be: then a ``relayed`` ends in a void (rule 5)."""

        def change(ledger: Ledger) -> None:
            border = ledger.tables.border
            current = border.post(post.job_id)
            if current is None:
                return
            border.delete_post(post.job_id)
            ledger.after.steps.append(lambda: self.board.discard(post.job_id))
            if not lost or post.status != AckStatus.RELAYED:
                return
            for key_id in current.key_ids:
                key = border.key(key_id, post.peer, is_outbound=False)
                if key is not None and key.state == Inbound.RELAYED:
                    ledger.inbound(key, InboundEvent.ACK_LOST)

        await self._run(change)

    async def _void_done(
        self, entry: Entry, http_status: int | None, retry_after_s: float, acks: Sequence[Ack]
    ) -> None:
        verdict = judge(http_status)
        if verdict is Verdict.TAKEN:
            if acks:
                await self._run(lambda ledger: self._apply_acks(ledger, entry.post, acks))
            self.board.retry(entry, pause=self._config.void_repeat_s)
            return
        entry.refusals += verdict is Verdict.REFUSED
        if entry.refusals >= MAX_REFUSALS:
            await self._exhausted(entry.post)
        else:
            self.board.retry(entry, retry_after_s=retry_after_s)

    async def _exhausted(self, post: PostRow) -> None:
        """A void that the peer never confirmed: the key stays refused here, the operator is told."""

        def change(ledger: Ledger) -> None:
            border = ledger.tables.border
            current = border.post(post.job_id)
            if current is None:
                return
            for key_id in current.key_ids:
                for is_outbound in (True, False):
                    key = border.key(key_id, post.peer, is_outbound=is_outbound)
                    if key is not None and key.exchange_id == post.exchange_id:
                        _give_up_void(ledger, key)

        await self._run(change)
        raise_void_alarm(self._around.alarms, post.peer, len(post.key_ids))

    # time

    async def sweep(self) -> None:
        """Ends what is overdue; call about twice a second."""
        self.board.expire()
        now_ms = int(self._around.now_s() * 1000)
        overdue = self._store.read(
            lambda tables: tables.border.overdue(now_ms, is_outbound=True, states=OPEN_OUTBOUND)
        )
        if overdue:
            await self._run(lambda ledger: _give_up(ledger, [one.exchange_id for one in overdue]))
        for post in self._store.read(lambda tables: tables.border.overdue_posts(now_ms)):
            if post.kind == PostKind.ACK:
                await self._end(post, lost=True)
            elif post.kind == PostKind.VOID:
                await self._exhausted(post)


def _give_up(ledger: Ledger, exchange_ids: Sequence[bytes]) -> None:
    """Nobody waits any more for what is not acked: rule 4, void."""
    for exchange_id in exchange_ids:
        for key in ledger.tables.border.keys(exchange_id):
            if key.state in OPEN_OUTBOUND:
                ledger.outbound(key, OutboundEvent.GIVE_UP)


def _give_up_void(ledger: Ledger, key: BorderKeyRow) -> None:
    if key.is_outbound:
        if key.state == Outbound.VOIDING:
            ledger.outbound(key, OutboundEvent.EXHAUSTED)
        return
    # Nothing more is asked of the peer.
    key = replace(key, is_peer_void=True)
    if INBOUND.allows(Inbound(key.state), InboundEvent.EXHAUSTED):
        ledger.inbound(key, InboundEvent.EXHAUSTED)


def status_from_proto(status: int) -> AckStatus:
    """The word of an ack status on the wire.

    Raises:
        CallerError: none that is known.
    """
    for word, number in STATUS_TO_PROTO.items():
        if number == status:
            return word
    raise CallerError("unknown ack status", facts={"field": "ack_status"})
