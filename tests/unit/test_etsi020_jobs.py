"""A gateway's requests to its peers: whatever breaks, it goes on asking its node for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import cast

import pytest

from gateway.etsi020 import jobs
from gateway.etsi020.jobs import JobRunner
from gateway.telemetry import PeerTelemetry
from mesh.client.border import BorderClient, Job, Outcome
from mesh.ops.metrics import Metrics


class Node:
    """Breaks the first stream in a way that nobody expects."""

    def __init__(self) -> None:
        self.streams = 0
        self.is_asked_again = asyncio.Event()

    async def lease_jobs(self, *, session_id: bytes, max_in_flight: int) -> AsyncIterator[Job]:
        self.streams += 1
        if self.streams == 1:
            raise ZeroDivisionError("nobody expected that")
        self.is_asked_again.set()
        await asyncio.Event().wait()
        yield cast("Job", None)


async def nothing(_job: Job) -> Outcome:
    return Outcome(http_status=200, was_sent=True)


async def test_an_error_that_nobody_expects_does_not_end_the_requests(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jobs, "MAX_PAUSE_S", 0.01)
    node = Node()
    runner = JobRunner(cast("BorderClient", node), nothing, max_jobs=1, telemetry=PeerTelemetry(Metrics()))
    with caplog.at_level(logging.ERROR):
        running = asyncio.create_task(runner.run())
        async with asyncio.timeout(30):
            await node.is_asked_again.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert "performing requests broke" in caplog.text
    assert "ZeroDivisionError" in caplog.text
