"""The source's end of an establish: claim on n links, share, tag, send, wait for the confirm.

Owns protocol 3.1, 3.2, 3.5, 3.6 and 4.6 at the source, for any (k,n) over n disjoint routes; trusted
relay is (1,1). The order is the pad rule's: slots assigned under a durable mark, lanes claimed, and
only then anything sent, with no await between claim and send. What fails forfeits its slots.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from mesh.core import mac, otp, sharing
from mesh.core.collector import Verdict
from mesh.core.transfer import (
    CONFIRM_KEY_BYTES,
    KEY_PART_BYTES,
    PREFIX_BYTES,
    SLOT_BYTES,
    ConfirmMessage,
    SlotKind,
    TransferHeader,
    TransferId,
    split_secret,
    transfer_tag,
)
from mesh.errors import ErrorReason, MeshError, PeerError, ShortageError, TagMismatchError, UnavailableError
from mesh.node.keyports import DocumentView, PeerCaller, Surroundings
from mesh.node.outbound import OutboundBook
from mesh.node.paths import Path, Paths
from mesh.node.ports import Claim
from mesh.node.reports import transfer_proto
from mesh.node.reserves import Reserves
from mesh.node.routewatch import RouteWatch
from mesh.node.tasks import Background
from mesh.node.underway import BULK, Order, RouteError, Transfer, Underway, short_of_routes
from mesh.ops.logging import log_soon, request_id
from mesh.ops.tracing import span
from mesh.v1.link_pb2 import ShareItem
from mesh.v1.peer_pb2 import ConfirmRequest, RouteReport, TransferAnswer, TransferQuery

_EXPIRES_AFTER_S = 60
_FIRST_QUERY_S = 0.5
_MAX_QUERY_PAUSE_S = 4.0
_MAX_IN_FLIGHT = 1024
_MAX_WRONG_CONFIRMS = 1 << 10
_OPEN_TRIES = 4
#: Refusals within an hour that may cost an epoch each: 4 096 epochs last for weeks of forged ones.
_MAX_EPOCHS_REFUSED = 4
_REFUSED_WITHIN_S = 3600.0
#: A target that has heard nothing over a route for so long will not hear it in time.
_ROUTE_LATE_S = 1.2

_LOG = logging.getLogger("keymesh.establish")


class _EpochRefusedError(PeerError):
    """The target does not take appends in this epoch: it must be given up."""


class Establisher:
    """Runs establishes and takes their confirms.

    Args:
        open_epoch: gives the attachment (plaintext) that opens an epoch at a target; it is called
            only when an earlier epoch has to be closed there.
    """

    def __init__(
        self,
        around: Surroundings,
        *,
        paths: Paths,
        directory: DocumentView,
        reserves: Reserves,
        peers: PeerCaller,
        tasks: Background,
        watch: RouteWatch,
        open_epoch: Callable[[str, int], bytes],
    ) -> None:
        self._around = around
        self._paths = paths
        self._directory = directory
        self._reserves = reserves
        self._watch = watch
        self._peers = peers
        self._tasks = tasks
        self._open_epoch = open_epoch
        self._underway = Underway(watch, around.metrics)
        self._opening: dict[str, asyncio.Lock] = {}
        self._refused_at_s: dict[str, list[float]] = {}

    @property
    def in_flight(self) -> int:
        """Transfers sent and not settled."""
        return len(self._underway.in_flight)

    def current(self, target: str) -> OutboundBook | None:
        """The reserve towards a target, if it has the grade that the document in force asks for (3.4).

        One of another grade is given up: what was drawn from it stays redeemable, nothing more is drawn
        or sealed with it, and the next establish opens an epoch. On the path of every draw.
        """
        book = self._reserves.outbound.get(target)
        document = self._directory.document
        if book is None or document is None:
            return None
        if book.granted_by is not document:
            if book.grade != str(self._paths.grade(target)):
                self.forget_epoch(book)
                return None
            book.granted_by = document
        return book

    async def establish(self, order: Order, *, timeout_s: float) -> OutboundBook:
        """Establishes fresh slots with the target; returns the reserve that holds them, confirmed.

        A target that forgot (an unproven restart) makes the source forfeit and open a new epoch;
        that happens inside this call.

        Raises:
            ShortageError: no route, no material, too much in flight, or the grade cannot be met.
            UnavailableError: a neighbour or the target cannot be reached in time.
            PeerError: the target refused.
        """
        began_s = self._around.monotonic_s()
        metrics, result = self._around.metrics, ErrorReason.INTERNAL.value
        try:
            with span("establish", target=order.target, slots=order.slots):
                book = await self._establish(order, began_s + timeout_s)
        except MeshError as exc:
            result = exc.reason.value
            raise
        else:
            result = "ok"
            priority = "bulk" if order.priority == BULK else "on-demand"
            metrics.establish_s.labels(book.grade, priority).observe(self._around.monotonic_s() - began_s)
            if order.priority != BULK:
                log_soon(_LOG, "established", target=order.target, slots=order.slots, grade=book.grade)
            if order.kind is SlotKind.KEYS:
                metrics.established_bytes.labels(book.grade).inc(order.slots * KEY_PART_BYTES)
            return book
        finally:
            metrics.establishes.labels(self._grade_text(order.target), result).inc()

    def _grade_text(self, target: str) -> str:
        try:
            return str(self._paths.grade(target))
        except ShortageError:
            return "none"

    async def _establish(self, order: Order, deadline: float) -> OutboundBook:
        for _ in range(_OPEN_TRIES):
            book = await self._current(order.target)
            if book.is_opened:
                if await self._run(order, book, deadline):
                    return book
                continue
            async with self._opening.setdefault(order.target, asyncio.Lock()):
                if book.is_opened or not book.is_open:
                    continue
                opens = book.epoch > 0
                if opens and order.attachment:
                    # A transfer has one attachment: open the epoch with a transfer of its own.
                    await self._run(Order(order.target, 1), book, deadline, opens=True)
                elif await self._run(order, book, deadline, opens=opens):
                    return book
        raise UnavailableError(
            "the other node takes no transfer now", reason=ErrorReason.PEER_UNREACHABLE, retry_after_s=2.0
        )

    async def _current(self, target: str) -> OutboundBook:
        """The current epoch towards a target, of the pair's grade; made when there is none."""
        book = self.current(target)
        if book is None:
            async with self._opening.setdefault(target, asyncio.Lock()):
                book = self.current(target)
                if book is None:
                    grade = str(self._paths.grade(target))
                    epoch = self._reserves.next_outbound_epoch(target)
                    book = await self._reserves.open_outbound(target, epoch, grade)
        return book

    async def _run(self, order: Order, book: OutboundBook, deadline: float, *, opens: bool = False) -> bool:
        """One transfer in one epoch. True: confirmed and usable; False: try again, the deadline allows."""
        if len(self._underway.in_flight) >= _MAX_IN_FLIGHT:
            raise ShortageError("too many transfers in flight", reason=ErrorReason.BUSY, retry_after_s=1.0)
        if self._around.monotonic_s() >= deadline:
            raise UnavailableError(
                "there was no time left for a transfer",
                reason=ErrorReason.DEADLINE_EXCEEDED,
                retry_after_s=1.0,
            )
        attachment = self._open_epoch(book.peer, book.epoch) if opens else order.attachment
        draws = order.kind is SlotKind.KEYS and not order.persists
        first = await book.assign(order.slots, order.kind, draws=draws)
        is_confirmed = False
        transfer: Transfer | None = None
        try:
            length = PREFIX_BYTES + len(attachment) + SLOT_BYTES * order.slots
            paths = await self._paths.ready(book.peer, length, deadline, is_bulk=order.priority == BULK)
            transfer = self._send(order, book, first=first, attachment=attachment, paths=paths)
            if order.persists:
                self._tasks.spawn(book.persist(first, int(self._around.now_s())))
            await self._await_confirm(transfer, deadline)
            is_confirmed = True
        except _EpochRefusedError:
            is_confirmed = False
        except RouteError:
            if transfer is None or not self._has_others(transfer):
                raise
        finally:
            if transfer is not None:
                self._underway.in_flight.pop(transfer.header.transfer, None)
                is_confirmed = is_confirmed or transfer.is_confirmed
            if not is_confirmed:
                book.forfeit(first)
        return is_confirmed and book.is_open

    def _has_others(self, transfer: Transfer) -> bool:
        """Whether someone waits for the transfer and the policy has routes that differ from its own."""
        if transfer.order.priority == BULK:
            return False
        return set(self._paths.routes(transfer.header.transfer.target)) != set(transfer.header.routes)

    def _send(
        self, order: Order, book: OutboundBook, *, first: int, attachment: bytes, paths: Sequence[Path]
    ) -> Transfer:
        """Claims on every link, derives shares and tag, sends: one sync section (pad rule 8).

        Raises:
            ShortageError: GRADE_UNAVAILABLE, and nothing claimed: the grade changed, or no header takes it.
        """
        grade = self._paths.grade(book.peer)
        if str(grade) != book.grade or len(paths) != grade.n:
            raise ShortageError(
                "the pair's grade changed", reason=ErrorReason.GRADE_UNAVAILABLE, retry_after_s=0.1
            )
        header = TransferHeader(
            transfer=TransferId(self._around.own_id, book.peer, book.epoch, first),
            slot_count=order.slots,
            kind=order.kind,
            grade=grade,
            routes=tuple(path.route for path in paths),
            left_out=tuple(index for index, path in enumerate(paths) if path.link is None),
            expires_at_s=int(self._around.now_s()) + _EXPIRES_AFTER_S,
            attachment=bytes(len(attachment)),
        )
        encoded = header.encode()
        length = header.length_bytes
        live = [(index, path.link) for index, path in enumerate(paths) if path.link is not None]
        claims: list[Claim] = [
            link.claim(length, 0) if index < grade.k else link.claim(0, length) for index, link in live
        ]
        secret, derived = sharing.derive(grade.k, grade.n, [claim.raw for claim in claims[: grade.k]])
        parts = split_secret(secret, len(attachment))
        if attachment:
            header = replace(header, attachment=otp.xor(attachment, parts.attachment_pad))
            encoded = header.encode()
        tag = transfer_tag(encoded, secret)
        book.hold(first, order.slots, order.kind, parts.payload, persists=order.persists)
        sent = frozenset(index for index, _ in live)
        identifier = "" if order.priority == BULK else (order.request_id or request_id.get())[:64]
        transfer = Transfer(header, tag, parts.confirm_key, book, order, sent)
        # Confirms may come as soon as the last share is out.
        self._underway.add(transfer)
        try:
            for (index, link), claim in zip(live, claims, strict=True):
                item = ShareItem(
                    header=encoded,
                    tag=tag,
                    route=index,
                    hop=0,
                    length_bytes=length,
                    is_raw=index < grade.k,
                    request_id=identifier,
                    priority=order.priority,
                )
                link.send(claim, [item], b"" if index < grade.k else derived[index - grade.k])
                if order.priority == BULK:
                    self._paths.spent(paths[index], length)
        except BaseException:
            del self._underway.in_flight[header.transfer]
            raise
        return transfer

    async def _await_confirm(self, transfer: Transfer, deadline: float) -> None:
        """Waits for the confirm; asks the target when it is late (its own message may be lost)."""
        pause = _FIRST_QUERY_S
        began_s = self._around.monotonic_s()
        while True:
            left = deadline - self._around.monotonic_s()
            if left <= 0:
                raise self._late(transfer)
            try:
                async with asyncio.timeout(min(pause, left)):
                    await asyncio.shield(transfer.done)
            except TimeoutError:
                left = deadline - self._around.monotonic_s()
                await self._query(transfer, timeout_s=min(2.0, max(0.1, left)))
                pause = min(pause * 2, _MAX_QUERY_PAUSE_S)
                is_late = self._around.monotonic_s() - began_s >= _ROUTE_LATE_S
                if is_late and not transfer.done.done() and self._is_hopeless(transfer):
                    self._name_missing(transfer)
                    if self._has_others(transfer):
                        raise RouteError("shares did not arrive over all routes") from None
            else:
                return

    @staticmethod
    def _is_hopeless(transfer: Transfer) -> bool:
        """Fewer than k shares have arrived, as far as the target said."""
        return transfer.arrived is not None and len(transfer.arrived) < transfer.header.grade.k

    def _name_missing(self, transfer: Transfer) -> None:
        """Names routes whose shares left here and did not arrive, by the target's word."""
        if transfer.missing and not transfer.is_named:
            transfer.is_named = True
            t = transfer.header.transfer
            self._watch.name(
                transfer.routes(transfer.missing),
                Verdict.SILENT,
                source=t.source,
                target=t.target,
                seen_by=t.source,
            )

    def _late(self, transfer: Transfer) -> MeshError:
        """Why the transfer was not confirmed in time, as far as anybody knows."""
        if transfer.header.grade.n > 1 and self._is_hopeless(transfer):
            self._name_missing(transfer)
            return short_of_routes(transfer, transfer.missing, "shares did not arrive over these routes")
        if self._is_hopeless(transfer):
            self._name_missing(transfer)
        return UnavailableError(
            "the transfer was not confirmed in time",
            reason=ErrorReason.DEADLINE_EXCEEDED,
            retry_after_s=1.0,
        )

    async def _query(self, transfer: Transfer, *, timeout_s: float) -> None:
        t = transfer.header.transfer
        query = TransferQuery(transfer=transfer_proto(t), tag=transfer.tag)
        try:
            answer = await self._peers.query(t.target, query, timeout_s=timeout_s)
        except MeshError as exc:
            _LOG.info("transfer query failed", extra={"peer": t.target, "cause": str(exc)})
            return
        if answer.state == TransferAnswer.APPENDED:
            try:
                self.on_confirm(answer.confirm)
            except (PeerError, TagMismatchError) as exc:
                _LOG.warning("transfer query answered wrongly", extra={"peer": t.target, "cause": str(exc)})
        elif (
            answer.state == TransferAnswer.REFUSED
            or len(transfer.sent) - answer.refused_links < transfer.header.grade.k
        ):
            self._refused(transfer, answer)
        elif answer.state == TransferAnswer.UNKNOWN:
            transfer.arrived = frozenset()
        elif answer.arrived_routes:
            transfer.arrived = frozenset(answer.arrived_routes)

    def _refused(self, transfer: Transfer, answer: TransferAnswer) -> None:
        """Nobody authenticates a refusal: it costs the transfer, and an hour of them a few epoch numbers."""
        target = transfer.header.transfer.target
        if transfer.done.done():
            return
        if answer.reason == ErrorReason.PEER_REFUSED and self._gives_up(transfer.book, answer.highest_epoch):
            transfer.done.set_exception(_EpochRefusedError("the target refused the reserve epoch"))
            return
        transfer.done.set_exception(
            PeerError(
                "the target refused the transfer",
                reason=ErrorReason.PEER_REFUSED,
                retry_after_s=1.0,
                facts={"target": target, "cause": answer.reason[:64]},
            )
        )

    def _gives_up(self, book: OutboundBook, highest_epoch: int) -> bool:
        """Gives an epoch up that its target is said to refuse; not when that was said too often."""
        if not book.is_open:
            return True
        now_s = self._around.monotonic_s()
        recent = self._recently_refused(book.peer)
        if len(recent) >= _MAX_EPOCHS_REFUSED:
            self._around.alarms.raise_alarm(
                f"establish/{book.peer}/epochs",
                "critical",
                f"{_MAX_EPOCHS_REFUSED} reserve epochs refused within an hour; no more are given up",
                "was a data directory put back to an older state? If not, somebody answers in between",
            )
            return False
        self._refused_at_s[book.peer] = [*recent, now_s]
        self._reserves.skip_epochs(book.peer, highest_epoch)
        self.forget_epoch(book)
        return True

    def _recently_refused(self, peer: str) -> list[float]:
        since_s = self._around.monotonic_s() - _REFUSED_WITHIN_S
        return [at_s for at_s in self._refused_at_s.get(peer, ()) if at_s > since_s]

    def on_confirm(self, request: ConfirmRequest) -> bool:
        """Takes a confirm; False when the transfer is unknown or forfeited here (3.6).

        Raises:
            PeerError: malformed, or of another transfer than its key.
            TagMismatchError: not made with the transfer's confirm key.
        """
        message = ConfirmMessage.decode(request.message)
        transfer = self._underway.in_flight.get(message.transfer)
        if transfer is None:
            return False
        try:
            mac.verify_one_time_tag(transfer.confirm_key[:CONFIRM_KEY_BYTES], request.tag, request.message)
        except TagMismatchError:
            self._count_wrong(transfer)
            raise
        if (message.slot_count, message.tag) != (transfer.header.slot_count, transfer.tag):
            raise PeerError("confirm does not fit its transfer", facts={"target": message.transfer.target})
        del self._underway.in_flight[message.transfer]
        self._settle(transfer, message)
        return True

    def _settle(self, transfer: Transfer, message: ConfirmMessage) -> None:
        now_s = int(self._around.now_s())
        book = transfer.book
        transfer.is_confirmed = True
        is_reborn = self._reserves.note_lineage(book.peer, message.lineage)
        if is_reborn and (book.is_opened or book.slots.held_slots):
            # The target may have lost what it confirmed before: forfeit, open a new epoch (4.6).
            self.forget_epoch(book)
        book.is_opened = True
        if book.is_open:
            book.confirm(message.transfer.first_slot, now_s)
        if book.peer in self._refused_at_s and not self._recently_refused(book.peer):
            del self._refused_at_s[book.peer]
            self._around.alarms.clear(f"establish/{book.peer}/epochs")
        if not transfer.done.done():
            transfer.done.set_result(None)

    def on_report(self, caller: str, report: RouteReport) -> None:
        """A target or a relay says what became of a transfer's routes."""
        self._underway.on_report(caller, report)

    def forget_epoch(self, book: OutboundBook) -> None:
        """Forfeits the undrawn rest of an epoch; the next establish opens another."""
        _LOG.warning("reserve epoch forfeited", extra={"peer": book.peer, "epoch": book.epoch})
        self._reserves.retire_outbound(book, int(self._around.now_s()))

    def _count_wrong(self, transfer: Transfer) -> None:
        transfer.wrong_confirms += 1
        if transfer.wrong_confirms < _MAX_WRONG_CONFIRMS or transfer.done.done():
            return
        t = transfer.header.transfer
        self._around.alarms.raise_alarm(
            f"establish/{t.target}/confirm-tags",
            "critical",
            f"{_MAX_WRONG_CONFIRMS} wrong confirm tags for one transfer",
            "look for someone between the nodes who holds a node certificate",
        )
        transfer.done.set_exception(TagMismatchError())
