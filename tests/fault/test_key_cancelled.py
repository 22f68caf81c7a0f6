"""Callers that give up while the disk is at work: what became durable counts in memory, too.

A key whose answer was lost counts as handed out (protocol 4.4); a job that is on disk is sent (4.8); an
epoch that is on disk is the current one (4.6). Each test cancels its caller between the moment a change
is queued and the disk's answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from mesh.core.ranges import Range
from mesh.core.reserve import Held
from mesh.errors import CallerError, ErrorReason, UnavailableError
from mesh.store.store import Store
from mesh.v1.peer_pb2 import DepositRequest, SealedMessage, VoidKeys
from tests.fakes.key_network import HASTY, LINE, NO_PREFILL, KeyNetwork, until


@pytest.fixture
async def line(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[KeyNetwork]:
    """a - b - c with empty reserves."""
    network = KeyNetwork(tmp_path, LINE, config=getattr(request, "param", NO_PREFILL))
    await network.start()
    yield network
    await network.stop()


async def cancel_in_commit(store: Store, work: Coroutine[Any, Any, Any]) -> None:
    """Starts ``work``, cancels it once it has queued a change, and waits for the disk."""
    task = asyncio.get_running_loop().create_task(work)
    while not store._queue and not store._is_committing:  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.drain()
    await asyncio.sleep(0)


@pytest.mark.parametrize("number", [1, 100])
async def test_a_redeem_that_was_given_up_has_handed_its_keys_out(line: KeyNetwork, number: int) -> None:
    drawn = await line.get("sae-a", "sae-c", number)
    ids = [key_id for key_id, _ in drawn.keys]
    await cancel_in_commit(line.store("kme-c"), line.redeem("sae-c", "sae-a", ids))
    slots = next(line.plane("kme-c").reserves.inbound_books("kme-a")).slots
    assert slots.state(Range(0, number)) is Held.REDEEMED
    assert slots.held_slots == 0
    for key_id in ids[:2]:
        with pytest.raises(CallerError) as caught:
            await line.redeem("sae-c", "sae-a", [key_id])
        assert caught.value.reason == ErrorReason.UNKNOWN_KEY
    await line.restart("kme-c")
    with pytest.raises(CallerError):
        await line.redeem("sae-c", "sae-a", ids)


async def test_a_redeem_that_the_disk_refused_leaves_the_keys(
    line: KeyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given up and refused: nothing was handed out, the keys are still there."""
    drawn = await line.get("sae-a", "sae-c")
    store = line.store("kme-c")

    def fail(_batch: object) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mesh.store.store.fail_at", fail)
        await cancel_in_commit(store, line.redeem("sae-c", "sae-a", [drawn.keys[0][0]]))
    assert (await line.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys


async def test_a_commit_reported_as_failed_that_reached_the_disk(
    line: KeyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch's proof copy cannot be written: the redeem fails, and yet its use is on disk."""
    drawn = await line.get("sae-a", "sae-c", 2)
    ids = [key_id for key_id, _ in drawn.keys]
    store = line.store("kme-c")

    def unpublished(batch: Any) -> None:
        batch.error = UnavailableError("no room for the proof copy")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_publish", unpublished)
        with pytest.raises(UnavailableError):
            await line.redeem("sae-c", "sae-a", ids[:1])
    with pytest.raises(CallerError) as caught:
        await line.redeem("sae-c", "sae-a", ids[:1])
    assert caught.value.reason == ErrorReason.UNKNOWN_KEY
    slots = next(line.plane("kme-c").reserves.inbound_books("kme-a")).slots
    assert (slots.state(Range(0, 1)), slots.state(Range(1, 2))) == (Held.REDEEMED, Held.HELD)
    assert (await line.redeem("sae-c", "sae-a", ids[1:])).keys == drawn.keys[1:]


async def test_a_stored_key_is_delivered_once_although_its_slave_gave_up(line: KeyNetwork) -> None:
    drawn = await line.get("sae-c", "sae-c2")
    ids = [drawn.keys[0][0]]
    await cancel_in_commit(line.store("kme-c"), line.redeem("sae-c2", "sae-c", ids))
    with pytest.raises(CallerError) as caught:
        await line.redeem("sae-c2", "sae-c", ids)
    assert caught.value.reason == ErrorReason.UNKNOWN_KEY


async def test_a_sealed_message_is_answered_from_its_result_after_a_cut_call(line: KeyNetwork) -> None:
    await line.get("sae-a", "sae-c")
    line.on_call = lambda kind, *_: kind != "deposit"
    message = SealedMessage(void_keys=VoidKeys(master_sae_id="sae-a", key_ids=[bytes(16)]))
    await line.plane("kme-a").jobs.submit("kme-c", message, timeout_s=30.0)
    await until(lambda: any(kind == "deposit" for kind, *_ in line.calls))
    request = next(one for kind, _, _, one in line.calls if kind == "deposit")
    assert isinstance(request, DepositRequest)
    deposits = line.plane("kme-c").deposits
    await cancel_in_commit(line.store("kme-c"), deposits.on_deposit(request))
    book = next(line.plane("kme-c").reserves.inbound_books("kme-a"))
    assert book.slots.held_sealed_slots == 32 - request.slot_count
    first = await deposits.on_deposit(request)
    assert await deposits.on_deposit(request) == first
    line.on_call = lambda *_: True
    await until(lambda: line.plane("kme-a").jobs.open_jobs("kme-c") == 0)


async def test_a_job_on_disk_is_sent_although_its_caller_gave_up(line: KeyNetwork) -> None:
    await line.get("sae-a", "sae-c")
    jobs, store = line.plane("kme-a").jobs, line.store("kme-a")
    message = SealedMessage(void_keys=VoidKeys(master_sae_id="sae-a", key_ids=[bytes(16)]))
    await jobs.send("kme-c", message, timeout_s=30.0)
    await store.drain()
    await cancel_in_commit(store, jobs.submit("kme-c", message, timeout_s=30.0))
    await until(lambda: sum(kind == "deposit-answer" for kind, *_ in line.calls) == 2)
    await until(lambda: jobs.open_jobs("kme-c") == 0)
    assert store.read(lambda tables: tables.jobs.list()) == []


async def test_an_epoch_on_disk_is_taken_up_although_its_caller_gave_up(line: KeyNetwork) -> None:
    reserves, store = line.plane("kme-a").reserves, line.store("kme-a")
    await cancel_in_commit(store, reserves.open_outbound("kme-c", 0, "trusted-relay"))
    assert reserves.outbound["kme-c"].epoch == 0
    drawn = await line.get("sae-a", "sae-c")
    assert (await line.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys


async def test_marks_that_moved_for_a_caller_that_gave_up_do_not_stop_the_next(line: KeyNetwork) -> None:
    await line.get("sae-a", "sae-c")
    book, store = line.plane("kme-a").reserves.outbound["kme-c"], line.store("kme-a")
    mark = book.slots.assign_mark
    await store.drain()
    await cancel_in_commit(store, book._move(mark + 100, mark + 50))
    drawn = await line.get("sae-a", "sae-c", 128, 8192)
    assert len(drawn.keys) == 128
    row = store.read(lambda tables: tables.reserves.get(book.reserve_id))
    assert row.assign_mark >= book.slots.assign_mark


@pytest.mark.parametrize("line", [HASTY], indirect=True)
async def test_keys_for_several_slaves_are_voided_although_the_master_gave_up(line: KeyNetwork) -> None:
    """At those that have them, and at those that get them only afterwards; none waits at home."""

    def held(kme: str) -> int:
        return line.store(kme).read(lambda tables: tables.keystore.count_held())

    await line.get("sae-a", "sae-c")
    await line.get("sae-a", "sae-b")
    line.on_call = lambda kind, own, peer, _message: not (kind == "deposit" and peer == "kme-c")
    asking = asyncio.create_task(line.get("sae-a", "sae-b", more=["sae-c", "sae-a2"]))
    await until(lambda: any(kind == "deposit-answer" for kind, *_ in line.calls))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert held("kme-b") == 1
    line.on_call = lambda *_: True
    await until(lambda: line.plane("kme-a").jobs.open_jobs("kme-c") == 0)
    await until(lambda: held("kme-b") == 0)
    assert (held("kme-a"), held("kme-c")) == (0, 0)


async def test_keys_for_several_slaves_are_voided_although_the_masters_node_died(line: KeyNetwork) -> None:
    def held(kme: str) -> int:
        return line.store(kme).read(lambda tables: tables.keystore.count_held())

    line.on_call = lambda kind, own, peer, _message: not (kind == "deposit" and peer == "kme-c")
    asking = asyncio.create_task(line.get("sae-a", "sae-b", more=["sae-c"]))
    await until(lambda: held("kme-b") == 1)
    await line.restart("kme-a")  # its tasks end at once: nobody who waits is told
    line.on_call = lambda *_: True
    await until(lambda: line.plane("kme-a").jobs.open_jobs("kme-c") == 0)
    await until(lambda: held("kme-b") == 0)
    assert held("kme-c") == 0
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
