"""Telling a source what became of the routes of its transfers: dropped here, or named here.

So that it need not wait for a time-out, and knows which routes to leave alone (protocol 3.8). Best
effort and bounded: a source that is not told learns by a query or a time-out, as without it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from mesh.core.collector import Verdict
from mesh.core.transfer import TransferId
from mesh.errors import MeshError
from mesh.node.keyports import RouteReporter, Surroundings
from mesh.v1.peer_pb2 import RouteReport
from mesh.v1.peer_pb2 import TransferId as TransferIdProto

_PER_SECOND = 20.0
_BURST = 20.0
_MAX_SOURCES = 1024
_MAX_UNDER_WAY = 64
_TIMEOUT_S = 1.0

_LOG = logging.getLogger("keymesh.relay")


def transfer_proto(transfer: TransferId) -> TransferIdProto:
    """A transfer id on the wire."""
    return TransferIdProto(
        source_kme_id=transfer.source,
        target_kme_id=transfer.target,
        epoch=transfer.epoch,
        first_slot=transfer.first_slot,
    )


class Reports:
    """Tells sources of dropped shares and named routes, each at most twenty times a second.

    Args:
        reporter: calls them.
        spawn: starts background work.
    """

    def __init__(
        self,
        around: Surroundings,
        reporter: RouteReporter,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._around = around
        self._reporter = reporter
        self._spawn = spawn
        self._tokens: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._under_way = 0

    def refused(self, transfer: TransferId, route: int, error: MeshError) -> None:
        """Its share on ``route`` goes no further than here."""
        report = RouteReport(refused=[route], reason=error.reason.value, retry_after_s=error.retry_after_s)
        self._tell(transfer, report)

    def named(self, transfer: TransferId, verdict: Verdict, routes: Sequence[int]) -> None:
        """We, its target, named these routes."""
        report = RouteReport()
        {
            Verdict.LIED: report.lied,
            Verdict.SUSPECTED: report.suspected,
            Verdict.SILENT: report.silent,
        }[verdict].extend(routes)
        self._tell(transfer, report)

    def _tell(self, transfer: TransferId, report: RouteReport) -> None:
        if self._under_way >= _MAX_UNDER_WAY or not self._take(transfer.source):
            return
        report.transfer.CopyFrom(transfer_proto(transfer))
        self._under_way += 1
        self._spawn(self._send(transfer.source, report))

    def _take(self, source: str) -> bool:
        now_s = self._around.monotonic_s()
        tokens, since_s = self._tokens.pop(source, (_BURST, now_s))
        tokens = min(_BURST, tokens + (now_s - since_s) * _PER_SECOND)
        self._tokens[source] = (max(0.0, tokens - 1.0), now_s)
        while len(self._tokens) > _MAX_SOURCES:
            self._tokens.popitem(last=False)
        return tokens >= 1.0

    async def _send(self, source: str, report: RouteReport) -> None:
        try:
            await self._reporter.report(source, report, timeout_s=_TIMEOUT_S)
        except MeshError as exc:
            _LOG.info("a source could not be told of its routes", extra={"peer": source, "cause": str(exc)})
        finally:
            self._under_way -= 1
