"""Background work: what breaks begins again, what must be done is done, also while the node stops."""

from __future__ import annotations

import asyncio
import logging

import pytest

from mesh.errors import UnavailableError
from mesh.node import tasks
from mesh.node.tasks import Background


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "pause_s", lambda attempts: 0.001 * attempts)


async def test_a_loop_that_breaks_begins_again_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    runs, is_well = 0, asyncio.Event()

    async def loop() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise ZeroDivisionError("nobody expected that")
        is_well.set()
        await asyncio.Event().wait()

    background = Background()
    with caplog.at_level(logging.ERROR):
        background.keep("demo", loop)
        await is_well.wait()
    await background.close()
    assert runs == 3
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError] * 2


async def test_what_must_be_done_is_tried_again_and_the_stop_waits_for_it() -> None:
    tries = 0

    async def work() -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise UnavailableError("not yet")

    background = Background()
    background.insist("something", work)
    await background.close()
    assert tries == 3
    assert len(background) == 0


async def test_the_stop_waits_for_a_commit_and_for_what_follows_from_it() -> None:
    background, is_done = Background(), asyncio.Event()

    async def follow() -> None:
        await asyncio.sleep(0)
        is_done.set()

    async def commit() -> None:
        await asyncio.sleep(0.001)
        background.insist("what follows", follow)

    caller = asyncio.create_task(background.unbroken(commit()))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.sleep(0)
    await background.close()
    assert caller.cancelled()
    assert is_done.is_set()


async def test_the_stop_waits_only_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_LAST_WORDS_S", 0.01)
    tries = 0

    async def work() -> None:
        nonlocal tries
        tries += 1
        raise UnavailableError("never")

    background = Background()
    background.insist("something", work)
    async with asyncio.timeout(5.0):
        await background.close()
    assert len(background) == 0
