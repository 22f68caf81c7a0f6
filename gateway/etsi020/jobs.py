"""Performs the requests that the node leases to this gateway; nothing is kept here.

Owns one rule: when the stream of leases is lost, what is being performed stops at once, because the node
will lease it again, perhaps to another gateway. Which jobs there are, in which order and how often they are
tried, the node decides and remembers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final

from gateway.telemetry import PeerTelemetry
from mesh.client import MeshError, UnavailableError
from mesh.client.border import BorderClient, Job, Outcome
from mesh.ops.logging import clean_request_id, log_soon, serving
from mesh.ops.tracing import span

_LOG = logging.getLogger("keymesh.gateway")

COMPLETE_TIMEOUT_S: Final = 2.0
FIRST_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 2.0


class JobRunner:
    """One gateway's jobs.

    Args:
        border: the node.
        perform: does one request within its lease; never raises what a peer caused.
        max_jobs: at once.
        telemetry: counts what peers answer.
    """

    def __init__(
        self,
        border: BorderClient,
        perform: Callable[[Job], Awaitable[Outcome]],
        *,
        max_jobs: int,
        telemetry: PeerTelemetry,
    ) -> None:
        self._telemetry = telemetry
        self._border = border
        self._perform = perform
        self._max_jobs = max_jobs

    async def run(self) -> None:
        """Lease and perform until cancelled."""
        pause_s = FIRST_PAUSE_S
        is_told = False
        while True:
            seen = 0
            try:
                async with asyncio.TaskGroup() as performing:
                    async for job in self._border.lease_jobs(
                        session_id=os.urandom(16), max_in_flight=self._max_jobs
                    ):
                        seen += 1
                        performing.create_task(self._one(job))
                    raise UnavailableError("the node ended the stream")  # noqa: TRY301 - ends the group
            except* MeshError as group:
                if not is_told or seen:
                    _LOG.warning(
                        "the node gives no requests to post", extra={"cause": str(group.exceptions[0])}
                    )
                is_told = True
            except* Exception as group:  # noqa: BLE001 - a fault of ours must not end it in silence
                _LOG.error("performing requests broke and begins again", exc_info=group)
            pause_s = FIRST_PAUSE_S if seen else min(2 * pause_s, MAX_PAUSE_S)
            await asyncio.sleep(pause_s)

    async def _one(self, job: Job) -> None:
        with serving(clean_request_id(job.request_id)), span("post", peer=job.peer, kind=job.kind) as own:
            began_s = time.perf_counter()
            outcome = await self._performed(job)
            self._telemetry.performed(job.peer, job.kind, outcome.http_status, time.perf_counter() - began_s)
            own.note({"http.response.status_code": outcome.http_status or 0})
            facts = {"peer": job.peer, "kind": job.kind, "http_status": outcome.http_status}
            log_soon(_LOG, "posted to a key manager", **facts)
            await self._complete(job, outcome)

    async def _performed(self, job: Job) -> Outcome:
        try:
            return await self._perform(job)
        except Exception as error:  # noqa: BLE001 - the node must hear of a fault of ours, too
            _LOG.exception("request to a peer failed", extra={"peer": job.peer})
            return Outcome(problem=type(error).__name__, was_sent=True)

    async def _complete(self, job: Job, outcome: Outcome) -> None:
        try:
            if not await self._border.complete_job(job.lease_id, outcome, timeout_s=COMPLETE_TIMEOUT_S):
                _LOG.warning("a lease ended before its request", extra={"peer": job.peer})
        except MeshError as error:
            # The lease ends by itself, and the request is performed again.
            _LOG.warning("the node did not hear of a request", extra={"peer": job.peer, "cause": str(error)})
