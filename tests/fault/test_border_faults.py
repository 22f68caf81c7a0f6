"""Hand-overs that break in the middle: a key is at both ends, or at none (protocol 4.9, 6.2).

One of several slaves cannot have it, the caller leaves, the node stops, the disk fails, or a peer or a
KME of ours says what it should not.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from mesh.core.border_rules import AckStatus, Association, BufferSpec
from mesh.errors import MeshError, UnavailableError
from mesh.node.border.ports import Ack
from mesh.node.buffers import _Stock
from mesh.v1.border_pb2 import LeasedJob
from mesh.v1.peer_pb2 import RecallKeys, SealedMessage
from tests.fakes.border_network import TwoDomains
from tests.fakes.key_network import until
from tests.fault.test_key_cancelled import cancel_in_commit

PAIR = ("can-a", "uk-b")


@pytest.fixture
async def domains(tmp_path: Path) -> AsyncIterator[TwoDomains]:
    both = TwoDomains(tmp_path)
    await both.start()
    yield both
    await both.stop()


@pytest.fixture
async def buffered(tmp_path: Path) -> AsyncIterator[TwoDomains]:
    """Four keys of the pair are ready."""
    both = TwoDomains(tmp_path, buffers=[BufferSpec(*PAIR, 4, 32)])
    await both.start()
    await until(lambda: level(both) == 4)
    yield both
    await both.stop()


def level(domains: TwoDomains) -> int:
    return domains.can.plane("can-x").foreign.buffers.level(*PAIR)


def held(domains: TwoDomains) -> dict[str, int]:
    """Keys in the key stores, at the nodes that have any."""
    stores = {kme: network.store(kme) for network in (domains.can, domains.uk) for kme in network.sites}
    counts = {kme: store.read(lambda tables: tables.keystore.count_held()) for kme, store in stores.items()}
    return {kme: count for kme, count in counts.items() if count}


def acked(domains: TwoDomains) -> list[bytes]:
    """Keys in the acks that uk-x has to post."""
    posts = domains.border("uk-x").read(lambda tables: tables.border.posts())
    return [key_id for post in posts for key_id in post.key_ids]


async def answer(status: int) -> int:
    return status


async def nobody_has_it(domains: TwoDomains) -> None:
    """One key was handed over, at uk-x; it ends up nowhere, and nothing is remembered as under way."""
    await until(lambda: domains.states("uk-x") == {"in:voided": 1})
    await until(lambda: domains.states("can-z").get("out:voided") == 1)
    await until(lambda: held(domains) == {})
    for kme in domains.can.sites:
        assert not domains.can.plane(kme).handovers._groups


class Acks:
    """The acks of uk-x, held back until ``then`` is set; the first answer is ``status``."""

    def __init__(self, domains: TwoDomains, status: int = 503) -> None:
        self.then = asyncio.Event()
        self._status = status
        domains.meddle = self._meddle

    def _meddle(self, kme: str, job: LeasedJob) -> Awaitable[int] | None:
        is_held = kme == "uk-x" and job.HasField("post_acks") and not self.then.is_set()
        return self._late() if is_held else None

    async def _late(self) -> int:
        await self.then.wait()
        return self._status


# several slaves, of which one cannot have it


async def test_what_one_peer_refuses_is_voided_at_the_others(domains: TwoDomains) -> None:
    domains.meddle = lambda kme, job: answer(400) if job.peer_kme_id == "third-p" else None
    with pytest.raises(MeshError):
        await domains.can.get(*PAIR, more=["third-b"])
    await nobody_has_it(domains)
    assert domains.states("can-z") == {"out:dropped": 1, "out:voided": 1}


async def test_what_the_peer_refuses_no_slave_homed_at_the_border_keeps(domains: TwoDomains) -> None:
    domains.meddle = lambda kme, job: answer(400) if kme == "can-z" else None
    with pytest.raises(MeshError):
        await domains.can.get(*PAIR, more=["can-z1"])
    assert domains.states("can-z") == {"out:dropped": 1}
    assert held(domains) == {}


# callers that leave


async def test_a_caller_that_leaves_while_several_slaves_are_served_leaves_no_key_behind(
    domains: TwoDomains,
) -> None:
    acks = Acks(domains)
    asking = asyncio.create_task(domains.can.get(*PAIR, more=["can-b", "can-z1"]))
    await until(lambda: set(held(domains)) == {"uk-z", "can-y", "can-z"})
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    acks.then.set()
    await nobody_has_it(domains)


async def test_ready_keys_of_a_caller_that_left_are_voided_although_the_node_stops(
    buffered: TwoDomains,
) -> None:
    await cancel_in_commit(buffered.can.store("can-x"), buffered.can.get(*PAIR))
    await buffered.restart("can-x")
    await until(lambda: buffered.states("uk-x") == {"in:relayed": 4, "in:voided": 1})
    await until(lambda: level(buffered) == 4)


async def test_keys_released_to_a_caller_that_left_are_voided_although_the_node_stops(
    domains: TwoDomains,
) -> None:
    handovers = domains.can.plane("can-x").handovers
    asking = asyncio.create_task(domains.can.get(*PAIR))
    while not any(group.deciding for group in handovers._groups.values()):  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await domains.restart("can-x")
    await nobody_has_it(domains)


async def test_a_fill_that_is_cancelled_as_its_keys_are_kept_voids_none(domains: TwoDomains) -> None:
    plane = domains.can.plane("can-x")
    kept: list[Any] = []

    def keep(rows: Any) -> None:
        kept.extend(rows)
        filling.cancel()

    filling = asyncio.create_task(
        plane.foreign._fresh(*PAIR, "can-z", 2, 32, timeout_s=3.0, request_id="", on_kept=keep)
    )
    with pytest.raises(asyncio.CancelledError):
        await filling
    await asyncio.sleep(0.2)
    await until(lambda: plane.jobs.open_jobs("can-z") == 0)
    assert len(plane._store.read(lambda tables: tables.border.buffered())) == len(kept) == 2
    assert domains.states("uk-x") == {"in:relayed": 2}


# the disk, the stop


async def test_a_node_that_dies_before_it_decides_takes_back_what_crossed_its_own_border(
    domains: TwoDomains,
) -> None:
    domains.can.on_call = lambda kind, own, peer, _: (kind, own, peer) != ("deposit", "can-z", "can-x")
    asking = asyncio.create_task(domains.can.get("can-z1", "uk-b", more=["can-a"]))
    await until(lambda: domains.states("can-z") == {"out:relayed": 1})
    await domains.restart("can-z")  # its tasks end at once: nobody who waits is told
    domains.can.on_call = lambda *_: True
    await nobody_has_it(domains)
    await asyncio.gather(asking, return_exceptions=True)


async def test_a_decision_that_the_disk_refused_as_the_caller_left_is_forgotten(
    domains: TwoDomains, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane, store = domains.can.plane("can-x"), domains.can.store("can-x")
    asking = asyncio.create_task(domains.can.get(*PAIR))
    commit = store.commit

    async def refuse(change: Callable[[Any], Any]) -> Any:
        if any(group.deciding for group in plane.handovers._groups.values()) and not asking.done():
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            raise UnavailableError("no space left on device")
        return await commit(change)

    monkeypatch.setattr(store, "commit", refuse)
    with pytest.raises(asyncio.CancelledError):
        await asking
    await nobody_has_it(domains)


@pytest.mark.parametrize("more", [[], ["can-a"]])
async def test_an_ack_that_the_disk_refused_releases_nothing(
    domains: TwoDomains, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    acks, border = Acks(domains, status=400), domains.border("can-z")
    domains.can.on_call = lambda kind, own, *_: kind != "deposit" or own != "can-z"
    asking = asyncio.create_task(domains.can.get("can-z1", "uk-b", more=more))
    await until(lambda: domains.states("uk-x") == {"in:relayed": 1})

    def fail(_where: str) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mesh.store.store.fail_at", fail)
        with pytest.raises(UnavailableError):
            relayed = Ack(AckStatus.RELAYED, tuple(acked(domains)), Association("can-z1", ("uk-b",)))
            await border.ack_keys("uk-x", [relayed])
    domains.can.on_call = lambda *_: True
    await until(
        lambda: sum(call[:2] == ("deposit-answer", "can-x") for call in domains.can.calls) == len(more)
    )
    acks.then.set()
    (result,) = await asyncio.gather(asking, return_exceptions=True)
    assert isinstance(result, MeshError)
    await nobody_has_it(domains)


async def test_a_fill_that_breaks_unexpectedly_does_not_end_the_filling(
    domains: TwoDomains, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = domains.can.plane("can-x")
    buffers, breaks = plane.foreign.buffers, 0
    fill = buffers._fill

    async def break_once(*args: Any) -> None:
        nonlocal breaks
        breaks += 1
        if breaks == 1:
            raise ZeroDivisionError("nobody expected that")
        await fill(*args)

    monkeypatch.setattr(buffers, "_fill", break_once)
    buffers._stocks[PAIR] = _Stock(BufferSpec(*PAIR, 2, 32), deque())
    await until(lambda: level(domains) == 2)
    assert breaks == 2


# who may take a key back


async def test_only_the_border_that_a_key_went_to_takes_it_back(domains: TwoDomains) -> None:
    acks = Acks(domains, status=503)
    asking = asyncio.create_task(domains.can.get(*PAIR))
    await until(lambda: domains.states("uk-x") == {"in:relayed": 1})
    ids = acked(domains)
    recall = SealedMessage(recall_keys=RecallKeys(master_sae_id="can-a", key_ids=ids))
    answered = await domains.can.plane("can-y").jobs.send("can-x", recall, timeout_s=3.0)
    assert list(answered.failed_key_ids) == ids
    acks.then.set()
    assert [key_id for key_id, _ in (await asking).keys] == ids


async def test_ready_keys_that_get_old_are_voided_once_that_is_possible(
    buffered: TwoDomains, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = buffered.can.plane("can-x")
    void, refusals = plane.handovers.void, 0

    async def refuse(*args: Any, **options: Any) -> None:
        nonlocal refusals
        refusals += 1
        if refusals <= 2:
            raise UnavailableError("no sealed slots")
        await void(*args, **options)

    monkeypatch.setattr(plane.handovers, "void", refuse)
    plane.foreign.buffers._stocks[PAIR].spec = BufferSpec(*PAIR, 0, 32)
    buffered.can.clock.offset_s += plane._config.key_lifetime_s
    await until(lambda: buffered.states("uk-x") == {"in:voided": 4})
    assert refusals == 3
    await until(lambda: not plane._store.read(lambda tables: tables.border.buffered()))
