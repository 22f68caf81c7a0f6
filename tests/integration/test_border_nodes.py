"""Keys from one domain to another through both borders, at the nodes: no HTTP, real stores and seals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.core.border_rules import AckStatus, Association, BufferSpec
from mesh.errors import CallerError, ErrorReason, MeshError
from mesh.node.border import board
from mesh.node.border.ports import Ack, Arrival
from mesh.node.border.routing import Refused
from mesh.node.keyplane import DeliveredKeys
from mesh.v1.border_pb2 import LeasedJob
from mesh.v1.keys_pb2 import KeyRequest
from tests.fakes.border_network import Courier, TwoDomains
from tests.fakes.key_network import until


@pytest.fixture
async def domains(tmp_path: Path) -> AsyncIterator[TwoDomains]:
    both = TwoDomains(tmp_path)
    await both.start()
    yield both
    await both.stop()


async def test_a_key_crosses_and_is_the_same_at_both_ends(domains: TwoDomains) -> None:
    drawn = await domains.can.get("can-a", "uk-b", 3)
    fetched = await domains.uk.redeem("uk-b", "can-a", [key_id for key_id, _ in drawn.keys])
    assert fetched.keys == drawn.keys
    assert domains.states("can-z") == {"out:relayed": 3}
    assert domains.states("uk-x") == {"in:relayed": 3}
    with pytest.raises(CallerError) as again:
        await domains.uk.redeem("uk-b", "can-a", [drawn.keys[0][0]])
    assert again.value.reason is ErrorReason.UNKNOWN_KEY


async def test_operators_see_acks_and_how_long_they_took(domains: TwoDomains) -> None:
    await domains.can.get("can-a", "uk-b", 3)
    border = domains.can.plane("can-z").border
    with pytest.raises(Refused):
        await border.ack_keys("uk-x", [Ack(AckStatus.RELAYED, (bytes(16),), Association("can-a", ("uk-b",)))])
    metrics = border._around.metrics
    assert metrics.border_acks.labels("uk-x", "relayed")._value.get() == 3
    assert metrics.border_acks.labels("uk-x", "unknown")._value.get() == 1
    assert 0 < metrics.border_ack_s.labels("uk-x")._sum.get() < 10


async def test_what_gateways_post_carries_the_id_of_the_request_behind_it(domains: TwoDomains) -> None:
    posted: list[tuple[str, str]] = []

    def listen(kme: str, job: LeasedJob) -> None:
        posted.append((kme, job.request_id))

    domains.meddle = listen
    request = KeyRequest(master_sae_id="can-a", slave_sae_id="uk-b", number=1, request_id="gw-7")
    (result,) = await domains.can.plane("can-x").get_keys([request])
    assert isinstance(result, DeliveredKeys)
    assert ("can-z", "gw-7") in posted


async def test_another_sae_learns_nothing(domains: TwoDomains) -> None:
    drawn = await domains.can.get("can-a", "uk-b")
    with pytest.raises(MeshError) as refused:
        await domains.uk.redeem("uk-b2", "can-a", [drawn.keys[0][0]])
    assert refused.value.reason is ErrorReason.NOT_AUTHORIZED


async def test_several_slaves_near_and_far(domains: TwoDomains) -> None:
    drawn = await domains.can.get("can-a", "uk-b", 2, more=["uk-b2", "can-b", "uk-x1"])
    ids = [key_id for key_id, _ in drawn.keys]
    for slave in ("uk-b", "uk-b2", "uk-x1"):
        assert (await domains.uk.redeem(slave, "can-a", ids)).keys == drawn.keys
    assert (await domains.can.redeem("can-b", "can-a", ids)).keys == drawn.keys


async def test_the_border_is_the_masters_home(domains: TwoDomains) -> None:
    drawn = await domains.can.get("can-z1", "uk-x1", 2)
    ids = [key_id for key_id, _ in drawn.keys]
    assert (await domains.uk.redeem("uk-x1", "can-z1", ids)).keys == drawn.keys


async def test_nothing_is_released_without_an_ack(domains: TwoDomains) -> None:
    """The far end holds the keys, its ack never comes: the master gets none, both ends void them."""

    async def lost(job: LeasedJob) -> int | None:
        return 503

    domains.meddle = lambda kme, job: lost(job) if kme == "uk-x" and job.HasField("post_acks") else None
    with pytest.raises(MeshError):
        await domains.can.get("can-a", "uk-b")
    await until(lambda: set(domains.states("uk-x")) == {"in:voided"}, timeout_s=10)
    domains.meddle = lambda *_: None
    await until(lambda: set(domains.states("can-z")) == {"out:voided"}, timeout_s=10)


async def test_buffered_keys_need_no_ocean(tmp_path: Path) -> None:
    both = TwoDomains(tmp_path, buffers=[BufferSpec("can-a", "uk-b", 8, 32)])
    await both.start()
    try:
        buffers = both.can.plane("can-x").foreign.buffers
        await until(lambda: buffers.level("can-a", "uk-b") == 8)
        await both.disconnect("can-z")
        drawn = await both.can.get("can-a", "uk-b", 5)
        ids = [key_id for key_id, _ in drawn.keys]
        assert (await both.uk.redeem("uk-b", "can-a", ids)).keys == drawn.keys
        both.connect("can-z")
        await until(lambda: buffers.level("can-a", "uk-b") == 8)
        await both.restart("can-x")
        again = await both.can.get("can-a", "uk-b", 8)
        assert not set(again.keys) & set(drawn.keys)
        ids = [key_id for key_id, _ in again.keys]
        assert (await both.uk.redeem("uk-b", "can-a", ids)).keys == again.keys
    finally:
        await both.stop()


async def test_a_caller_that_leaves_leaves_no_key_behind(domains: TwoDomains) -> None:
    held = asyncio.Event()

    async def hold(job: LeasedJob) -> int | None:
        await held.wait()
        return 503

    domains.meddle = lambda kme, job: hold(job) if kme == "uk-x" else None
    asking = asyncio.create_task(domains.can.get("can-a", "uk-b"))
    await until(lambda: domains.states("uk-x") == {"in:relayed": 1})
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    domains.meddle = lambda *_: None
    held.set()
    await until(lambda: domains.states("can-z") == {"out:voided": 1}, timeout_s=10)
    await until(lambda: domains.states("uk-x") == {"in:voided": 1}, timeout_s=10)


async def test_messages_do_not_wait_for_sealed_slots_once_they_flow(domains: TwoDomains) -> None:
    """The next slots are established while the last ones are still enough."""
    book = None
    for _ in range(12):
        await domains.can.get("can-a", "uk-b")
        book = domains.can.plane("can-x").reserves.outbound["can-z"]
        await until(lambda book=book: book.slots.sealed_messages(8) > 0)  # type: ignore[misc]  # bound now
    assert book is not None
    assert book.slots.sealed_slots < 3 * 32


async def test_a_synchronous_request_is_answered_with_what_became_of_each_key(domains: TwoDomains) -> None:
    border, pair = domains.border("uk-x"), Association("can-a", ("uk-b",))
    await domains.disconnect("uk-x")  # nothing needs to be posted
    keys = [Arrival(bytes([number]) * 16, bytes([number]) * 32, b"") for number in (1, 2)]
    ids = [key.key_id for key in keys]

    async def take(wait_s: float, *taken: Arrival) -> dict[bytes, AckStatus]:
        return await border.import_keys("can-z", pair, taken, callback="", extension=b"", wait_s=wait_s)

    assert await take(1e-6, keys[0]) == {}  # left out: the sender tries again, or voids
    assert await take(5.0, *keys) == dict.fromkeys(ids, AckStatus.RELAYED)
    assert (await domains.uk.redeem("uk-b", "can-a", ids[:1])).keys == [(ids[0], keys[0].value)]
    voided = await border.void_keys("can-z", pair, ids, is_all=False, callback="", wait_s=5.0)
    assert voided == {ids[0]: AckStatus.FAILED_TO_VOID, ids[1]: AckStatus.VOIDED}


async def test_a_request_that_comes_again_says_where_its_results_go(domains: TwoDomains) -> None:
    border, pair = domains.border("uk-x"), Association("can-a", ("uk-b",))
    key = Arrival(bytes(16), bytes(32), b"")
    posted: list[str] = []

    async def note(job: LeasedJob) -> int | None:
        posted.append(job.url.rpartition("/")[2])
        return 200

    domains.meddle = lambda kme, job: note(job) if kme == "uk-x" else None
    for path in ("first", "second"):
        await border.import_keys("can-z", pair, [key], callback=f"https://can-z.test/{path}", extension=b"")
        await until(lambda path=path: posted[-1:] == [path])  # type: ignore[misc]  # bound now


async def test_several_gateways_perform_each_request_once_and_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = TwoDomains(tmp_path, can_changes={"gateways": frozenset({"gw", "gw2"})})
    both.can.configs["can-x"] = replace(both.can.configs["can-x"], request_timeout_s=60.0)
    await both.start()
    try:
        first = both.couriers["can-z"]
        first.capacity = 1
        second = Courier(both.border("can-z"), first.perform, gateway="gw2", capacity=1)
        await both.disconnect("can-z")
        both.connect("can-z")
        both.couriers["can-z"].capacity = 1
        second.start()
        await until(lambda: both.border("can-z").connected_gateways == 2)
        await asyncio.gather(*(both.can.get("can-a", "uk-b") for _ in range(12)))
        assert len(both.couriers["can-z"].log) + len(second.log) == 12
        # One dies with a request in its hands; its lease ends, and the other performs it.
        monkeypatch.setattr(board, "LEASE_S", 1.0)
        hung = asyncio.Event()

        async def hang(job: LeasedJob) -> int | None:
            hung.set()
            await asyncio.Event().wait()
            return None

        both.couriers["can-z"].perform = second.perform = hang
        asking = asyncio.create_task(both.can.get("can-a", "uk-b"))
        await hung.wait()
        victim = next(one for one in (both.couriers["can-z"], second) if one.running)
        other = second if victim is both.couriers["can-z"] else both.couriers["can-z"]
        other.perform = first.perform
        await victim.stop()
        drawn = await asking
        ids = [key_id for key_id, _ in drawn.keys]
        assert (await both.uk.redeem("uk-b", "can-a", ids)).keys == drawn.keys
        await second.stop()
    finally:
        await both.stop()


async def test_keys_taken_in_are_sealed_onwards_in_the_very_commit(domains: TwoDomains) -> None:
    """No commit stands between 202 and the deposit, once slots for sealed messages are there."""
    await domains.can.get("can-a", "uk-b")
    border, pair = domains.border("uk-x"), Association("can-a", ("uk-b",))
    key = Arrival(bytes(16), bytes(32), b"")
    await border.import_keys("can-z", pair, [key], callback="https://can-z.test/ack", extension=b"")
    assert [call.job_id for call in border.read(lambda tables: tables.border.calls())] != [None]
    # can-z never sent this key: when it hears that the key was relayed, it voids it.
    await until(lambda: domains.states("uk-x") == {"in:relayed": 1, "in:voided": 1}, timeout_s=15)
