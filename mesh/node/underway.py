"""Transfers of this node, as source, that are under way or were a moment ago; what others say of them.

Owns what is believed of a report on routes (protocol 3.8 at the source): from a transfer's target,
and from a node on the very route that it speaks of. It can cost a transfer that could not succeed
anyway, and make the next ones take other routes; like the directory it only takes choices away.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from mesh.core.collector import Verdict
from mesh.core.transfer import SlotKind, TransferHeader, TransferId
from mesh.errors import ErrorReason, ShortageError
from mesh.node.keymetrics import KeyMetrics
from mesh.node.outbound import OutboundBook
from mesh.node.routewatch import Route, RouteWatch, via
from mesh.v1.peer_pb2 import RouteReport

BULK, ON_DEMAND = 0, 1
_MAX_RECENT = 4096
_MAX_PAUSE_S = 8.0


@dataclass(frozen=True, slots=True)
class Order:
    """What to establish.

    Attributes:
        target: the other KME.
        slots: slots asked for, at least one.
        kind: keys or sealed.
        priority: BULK or ON_DEMAND; relays may drop bulk when material is short.
        persists: keep a durable copy (refills, sealed slots); on-demand keys are drawn at once.
        attachment: plaintext of a deposit to apply with the append, empty for none.
        request_id: for logs along the way.
        on_refused: told when a relay drops a share of it, with the seconds to pause; also after
            the establish has succeeded without that share.
    """

    target: str
    slots: int
    kind: SlotKind = SlotKind.KEYS
    priority: int = ON_DEMAND
    persists: bool = False
    attachment: bytes = b""
    request_id: str = ""
    on_refused: Callable[[float], None] | None = None


class RouteError(ShortageError):
    """Too few shares can still reach the target; over other routes they might."""


@dataclass(slots=True, repr=False)
class Transfer:
    """A transfer that was sent and is neither confirmed nor forfeited.

    Attributes:
        sent: routes, by index, over which a share left.
        arrived: those whose shares the target had when it was last asked; None if it did not say.
        refused: those whose shares a relay dropped.
    """

    header: TransferHeader
    tag: bytes
    confirm_key: bytes
    book: OutboundBook
    order: Order
    sent: frozenset[int]
    arrived: frozenset[int] | None = None
    refused: set[int] = field(default_factory=set)
    is_confirmed: bool = False
    is_named: bool = False
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    wrong_confirms: int = 0

    @property
    def missing(self) -> frozenset[int]:
        """Routes whose shares the target said it lacks, and no relay said it dropped."""
        return frozenset() if self.arrived is None else self.sent - self.arrived - self.refused

    def routes(self, indices: frozenset[int]) -> list[Route]:
        """The routes of indices."""
        return [self.header.routes[i] for i in sorted(indices)]

    def __repr__(self) -> str:
        return f"Transfer({self.header.transfer})"


class Underway:
    """The transfers sent and not settled, and who their routes were.

    Args:
        watch: told of routes that a target names.
        metrics: counts refusals.
    """

    def __init__(self, watch: RouteWatch, metrics: KeyMetrics) -> None:
        self._watch = watch
        self._metrics = metrics
        self.in_flight: dict[TransferId, Transfer] = {}
        self._recent: OrderedDict[TransferId, tuple[TransferHeader, Order]] = OrderedDict()

    def add(self, transfer: Transfer) -> None:
        """A transfer is about to be sent."""
        self.in_flight[transfer.header.transfer] = transfer
        self._recent[transfer.header.transfer] = transfer.header, transfer.order
        while len(self._recent) > _MAX_RECENT:
            self._recent.popitem(last=False)

    def on_report(self, caller: str, report: RouteReport) -> None:
        """A target or a relay says what became of a transfer's routes.

        Believed from the target, and from a node on the route it speaks of. It can cost a transfer
        that could not succeed anyway, and make us leave routes out for a while.
        """
        wanted = report.transfer
        key = TransferId(wanted.source_kme_id, wanted.target_kme_id, wanted.epoch, wanted.first_slot)
        known = self._recent.get(key)
        if known is None:
            return
        header, order = known
        verdicts = (
            (Verdict.LIED, report.lied),
            (Verdict.SUSPECTED, report.suspected),
            (Verdict.SILENT, report.silent),
        )
        for verdict, indices in verdicts:
            routes = [header.routes[i] for i in set(indices) if i < len(header.routes)]
            if routes and caller == key.target:
                self._watch.name(routes, verdict, source=key.source, target=key.target, seen_by=caller)
        for index in set(report.refused):
            if index < len(header.routes) and caller in header.routes[index][1:-1]:
                self._on_refused(header, order, index, report)

    def _on_refused(self, header: TransferHeader, order: Order, index: int, report: RouteReport) -> None:
        route = header.routes[index]
        reason = _known_reason(report.reason)
        self._metrics.refusals_heard.labels(via(route), reason.value).inc()
        pause_s = min(_MAX_PAUSE_S, max(0.0, report.retry_after_s))
        if order.priority != BULK or reason not in (ErrorReason.OUT_OF_MATERIAL, ErrorReason.BUSY):
            self._watch.hold(route, Verdict.SILENT)
        if order.on_refused is not None:
            order.on_refused(pause_s)
        transfer = self.in_flight.get(header.transfer)
        if transfer is None or transfer.done.done():
            return
        transfer.refused.add(index)
        if len(transfer.sent - transfer.refused) < header.grade.k:
            transfer.done.set_exception(
                short_of_routes(transfer, transfer.refused, "relays dropped shares of the transfer", reason)
            )


def short_of_routes(
    transfer: Transfer,
    indices: Collection[int],
    message: str,
    reason: ErrorReason = ErrorReason.GRADE_UNAVAILABLE,
) -> RouteError:
    named = ", ".join("-".join(route) for route in transfer.routes(frozenset(indices)))
    return RouteError(
        message,
        reason=reason,
        retry_after_s=2.0,
        facts={"routes": named[:200], "needed": transfer.header.grade.k},
    )


def _known_reason(text: str) -> ErrorReason:
    """A reason that somebody else wrote: one of those that mean "not now", or that the grade is not there."""
    known = (ErrorReason.OUT_OF_MATERIAL, ErrorReason.BUSY, ErrorReason.NO_ROUTE, ErrorReason.QUOTA_EXCEEDED)
    return next((reason for reason in known if reason.value == text), ErrorReason.GRADE_UNAVAILABLE)
