"""One suite for sources of key: the adapter before a simulated device over mTLS, and the pair in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest

from mesh.errors import CallerError, ErrorReason, UnavailableError
from mesh.sources.port import DeviceKey, KeySource, SourceState
from tests.fakes.link_sites import DevicePair
from tests.integration.test_device_source import running_pair

BUDGET = 64 << 10


@dataclass
class Ends:
    """Both ends of a device pair, and its fault switches."""

    leader: KeySource
    follower: KeySource
    lose_one: Callable[[], Awaitable[None]]
    stop: Callable[[], Awaitable[None]]


@pytest.fixture(params=["memory", pytest.param("device", marks=pytest.mark.slow)])
async def ends(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Ends]:
    if request.param == "memory":
        memory = DevicePair(BUDGET)

        async def put(**faults: object) -> None:
            for name, value in faults.items():
                setattr(memory, name, value)

        yield Ends(memory.leader, memory.follower, partial(put, lose_next=1), partial(put, is_down=True))
        return
    async with running_pair(tmp_path, initial_bytes=BUDGET) as pair:
        leader, follower = pair.source(0), pair.source(1)

        async def hang() -> None:
            follower._timeout = aiohttp.ClientTimeout(total=1.0)
            await pair.faults(hang=True)

        yield Ends(leader, follower, partial(pair.faults, lose_keys=1), hang)
        await leader.close()
        await follower.close()


def size_of(keys: list[DeviceKey]) -> int:
    return sum(len(key.value) for key in keys)


async def test_the_follower_gets_just_what_the_leader_took_in_the_order_asked(ends: Ends) -> None:
    taken = await ends.leader.take(8 << 10)
    assert 0 < size_of(taken) <= 8 << 10
    assert len({key.key_id for key in taken}) == len(taken)
    ids = [key.key_id for key in taken][::-1]
    assert await ends.follower.fetch(ids) == taken[::-1]
    assert ends.leader.state == ends.follower.state == SourceState.READY


async def test_a_take_never_exceeds_what_was_asked_for_and_ends_with_the_device(ends: Ends) -> None:
    got = 0
    while size := size_of(await ends.leader.take(24 << 10)):
        assert size <= 24 << 10
        got += size
    assert got == BUDGET
    assert await ends.leader.level_bytes() == 0


async def test_a_fetch_consumes(ends: Ends) -> None:
    ids = [key.key_id for key in await ends.leader.take(1 << 10)]
    await ends.follower.fetch(ids)
    with pytest.raises(CallerError) as caught:
        await ends.follower.fetch(ids)
    assert caught.value.reason is ErrorReason.UNKNOWN_KEY


async def test_what_is_lost_or_was_never_made_is_unknown(ends: Ends) -> None:
    strange = [str(uuid4())]
    for lose in (False, True):
        if lose:
            await ends.lose_one()
        ids = [key.key_id for key in await ends.leader.take(4 << 10)] if lose else strange
        with pytest.raises(CallerError) as caught:
            await ends.follower.fetch(ids)
        assert caught.value.reason is ErrorReason.UNKNOWN_KEY


async def test_a_device_that_does_not_answer_is_unavailable_and_says_so(ends: Ends) -> None:
    ids = [key.key_id for key in await ends.leader.take(1 << 10)]
    await ends.stop()
    with pytest.raises(UnavailableError) as caught:
        await ends.follower.fetch(ids)
    assert caught.value.reason is ErrorReason.DEVICE_UNAVAILABLE
    assert ends.follower.state == SourceState.UNAVAILABLE
