"""Establish, draw and redeem over three key planes: counts of lane bytes, coalescing, refills, restarts.

Covers protocol 3.1 to 3.6, 4.1, 4.4 to 4.7 as one machine; attacks stand in tests/fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.core.keyid import parse
from mesh.errors import (
    CallerError,
    ErrorReason,
    IntegrityError,
    MeshError,
    NotAuthorizedError,
    ShortageError,
    UnavailableError,
)
from mesh.node.underway import Order
from mesh.v1.keys_pb2 import KeyRequest, StatusRequest
from tests.fakes.key_network import HASTY, LINE, NO_PREFILL, KeyNetwork, until

FILLED = replace(
    NO_PREFILL, prefill=True, high_water_bytes=64 * 1024, low_water_bytes=48 * 1024, lane_floor_bytes=4096
)


@pytest.fixture
async def line(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[KeyNetwork]:
    """a - b - c with empty reserves."""
    network = KeyNetwork(tmp_path, LINE, config=getattr(request, "param", NO_PREFILL))
    await network.start()
    yield network
    await network.stop()


@pytest.fixture
async def filled(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[KeyNetwork]:
    """a - b - c with the reserve a to c filled."""
    network = KeyNetwork(tmp_path, LINE, config=getattr(request, "param", FILLED))
    await network.start()
    await until(lambda: level(network) >= 64 * 1024)
    yield network
    await network.stop()


def level(network: KeyNetwork) -> int:
    """Key bytes that a can draw towards c."""
    book = network.plane("kme-a").reserves.outbound.get("kme-c")
    return 0 if book is None else book.level_bytes


def isolate(network: KeyNetwork) -> None:
    """Cuts every link and every call."""
    network.wire.cut("kme-a", "kme-b")
    network.wire.cut("kme-b", "kme-c")
    network.on_call = lambda *_: False


async def test_both_ends_hold_the_same_key(line: KeyNetwork) -> None:
    drawn = await line.get("sae-a", "sae-c")
    redeemed = await line.redeem("sae-c", "sae-a", [drawn.keys[0][0]])
    assert drawn.keys == redeemed.keys
    assert len(drawn.keys[0][1]) == 32
    assert drawn.grade == redeemed.grade == "trusted-relay"


async def test_one_key_on_demand_costs_160_lane_bytes_per_hop(line: KeyNetwork) -> None:
    for count in (1, 2):
        await line.get("sae-a", "sae-c")
        assert line.wire.burnt("kme-a", "kme-b") == 160 * count
        assert line.wire.burnt("kme-b", "kme-c") == 160 * count
        assert line.wire.burnt("kme-b", "kme-a") == line.wire.burnt("kme-c", "kme-b") == 0


async def test_neighbours_use_their_own_link_only(line: KeyNetwork) -> None:
    drawn = await line.get("sae-a", "sae-b")
    assert (await line.redeem("sae-b", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys
    assert line.wire.burnt("kme-a", "kme-b") == 160
    assert line.wire.burnt("kme-b", "kme-c") == 0


async def test_misses_of_one_moment_share_one_transfer(line: KeyNetwork) -> None:
    await line.get("sae-a", "sae-c")
    before = line.wire.burnt("kme-a", "kme-b")
    got = await asyncio.gather(*(line.get("sae-a", "sae-c") for _ in range(16)))
    assert line.wire.burnt("kme-a", "kme-b") - before == 32 + 80 + 16 * 48
    assert len({one.keys[0][0] for one in got}) == len({one.keys[0][1] for one in got}) == 16


@pytest.mark.parametrize(("number", "size_bytes"), [(128, 32), (3, 1), (7, 33), (2, 8192), (128, 8192)])
async def test_numbers_and_sizes(line: KeyNetwork, number: int, size_bytes: int) -> None:
    drawn = await line.get("sae-a", "sae-c", number, size_bytes)
    assert [len(value) for _, value in drawn.keys] == [size_bytes] * number
    assert len({key_id for key_id, _ in drawn.keys}) == number
    redeemed = await line.redeem("sae-c", "sae-a", [key_id for key_id, _ in drawn.keys])
    assert redeemed.keys == drawn.keys


async def test_both_directions_are_separate_reserves(line: KeyNetwork) -> None:
    there, back = await asyncio.gather(line.get("sae-a", "sae-c"), line.get("sae-c", "sae-a"))
    assert (await line.redeem("sae-c", "sae-a", [there.keys[0][0]])).keys == there.keys
    assert (await line.redeem("sae-a", "sae-c", [back.keys[0][0]])).keys == back.keys


async def test_a_batch_keeps_its_order_and_its_failures_apart(line: KeyNetwork) -> None:
    requests = [
        KeyRequest(master_sae_id="sae-a", slave_sae_id="sae-c", number=1),
        KeyRequest(master_sae_id="sae-a", slave_sae_id="nobody", number=1),
        KeyRequest(master_sae_id="sae-c", slave_sae_id="sae-a", number=1),
        KeyRequest(master_sae_id="sae-a", slave_sae_id="sae-b", number=2),
        KeyRequest(master_sae_id="sae-a", slave_sae_id="sae-b", number=0),
    ]
    results = await line.plane("kme-a").get_keys(requests)
    reasons = [one.reason if isinstance(one, MeshError) else len(one.keys) for one in results]
    assert reasons == [
        1,
        ErrorReason.UNKNOWN_SAE,
        ErrorReason.NOT_AUTHORIZED,
        2,
        ErrorReason.INVALID_ARGUMENT,
    ]


async def test_a_filled_reserve_draws_without_network(filled: KeyNetwork) -> None:
    isolate(filled)
    drawn = await filled.get("sae-a", "sae-c", 100)
    redeemed = await filled.redeem("sae-c", "sae-a", [key_id for key_id, _ in drawn.keys])
    assert redeemed.keys == drawn.keys


@pytest.mark.parametrize("filled", [replace(FILLED, request_timeout_s=3.0)], indirect=True)
async def test_total_outage_serves_until_empty_then_says_so(filled: KeyNetwork) -> None:
    isolate(filled)
    served = 0
    with pytest.raises((ShortageError, UnavailableError)):
        for _ in range(3000):
            served += len((await filled.get("sae-a", "sae-c", 64)).keys)
    assert served == 64 * 1024 // 32
    filled.wire.cut("kme-a", "kme-b", is_open=True)
    filled.wire.cut("kme-b", "kme-c", is_open=True)
    filled.on_call = lambda *_: True
    drawn = await filled.get("sae-a", "sae-c")
    assert (await filled.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys


async def test_refill_cost_per_key_byte_is_near_one(filled: KeyNetwork) -> None:
    # Two reserves travel over this lane: from a, relayed, and from b itself.
    await until(lambda: filled.plane("kme-b").levels("kme-c")[0].outbound_bytes == 64 * 1024)
    payload = 2 * (64 * 1024 // 32) * 48
    assert payload < filled.wire.burnt("kme-b", "kme-c") <= 1.02 * payload


async def test_refills_leave_the_floor_for_keys_on_demand(tmp_path: Path) -> None:
    config = replace(FILLED, high_water_bytes=1 << 20, low_water_bytes=1 << 19, lane_floor_bytes=32 * 1024)
    ends_only = {**LINE, "saes": {"sae-a": {"home": "kme-a"}, "sae-c": {"home": "kme-c"}}}
    network = KeyNetwork(tmp_path, ends_only, filled=128 * 1024, config=config)
    await network.start()
    try:
        await until(lambda: level(network) > 0)
        await until(lambda: network.plane("kme-a").establisher.in_flight == 0)
        link = network.wire.planes["kme-a"].ends["kme-b"]
        assert link.status().transmit.usable >= 32 * 1024
    finally:
        await network.stop()


async def test_a_proven_restart_of_both_ends_goes_on_with_the_reserve(filled: KeyNetwork) -> None:
    before = await filled.get("sae-a", "sae-c", 10)
    held = level(filled)
    isolate(filled)
    await filled.restart("kme-a")
    await filled.restart("kme-c")
    # At most one stride is forfeited, and nothing that was drawn comes again.
    assert held - 2048 * 32 <= level(filled) <= held
    ids = [key_id for key_id, _ in before.keys]
    assert (await filled.redeem("sae-c", "sae-a", ids)).keys == before.keys


async def test_a_larger_reserve_survives_a_proven_restart(tmp_path: Path) -> None:
    config = replace(FILLED, high_water_bytes=512 * 1024, low_water_bytes=256 * 1024)
    network = KeyNetwork(tmp_path, LINE, config=config)
    await network.start()
    try:
        await until(lambda: level(network) >= 512 * 1024)
        drawn = await network.get("sae-a", "sae-c", 50)
        await until(lambda: network.plane("kme-a").establisher.in_flight == 0)
        await network.store("kme-a").drain()
        isolate(network)
        await network.restart("kme-a")
        await network.restart("kme-c")
        again = await network.get("sae-a", "sae-c", 100)
        slots = [address.slot for key_id, _ in again.keys if (address := parse(key_id))]
        assert min(slots) >= 50
        ids = [key_id for key_id, _ in (*again.keys, *drawn.keys)]
        assert (await network.redeem("sae-c", "sae-a", ids[:100])).keys == again.keys
        assert (await network.redeem("sae-c", "sae-a", ids[100:])).keys == drawn.keys
    finally:
        await network.stop()


async def test_an_unproven_restart_of_the_source_forfeits_the_rest(filled: KeyNetwork) -> None:
    before = await filled.get("sae-a", "sae-c", 10)
    await filled.restart("kme-a", is_proven=False)
    assert level(filled) == 0
    after = await filled.get("sae-a", "sae-c")
    first, second = parse(before.keys[0][0]), parse(after.keys[0][0])
    assert first and second and second.epoch == first.epoch + 1
    ids = [key_id for key_id, _ in before.keys]
    assert (await filled.redeem("sae-c", "sae-a", ids)).keys == before.keys
    assert (await filled.redeem("sae-c", "sae-a", [after.keys[0][0]])).keys == after.keys


async def test_an_unproven_restart_of_the_target_makes_the_source_open_an_epoch(line: KeyNetwork) -> None:
    before = await line.get("sae-a", "sae-c")
    await line.restart("kme-c", is_proven=False)
    after = await line.get("sae-a", "sae-c")
    first, second = parse(before.keys[0][0]), parse(after.keys[0][0])
    assert first and second and (first.epoch, second.epoch) == (0, 1)
    assert (await line.redeem("sae-c", "sae-a", [before.keys[0][0]])).keys == before.keys
    assert (await line.redeem("sae-c", "sae-a", [after.keys[0][0]])).keys == after.keys


async def test_a_proven_restart_after_an_unproven_one_still_shows(line: KeyNetwork) -> None:
    await line.get("sae-a", "sae-c")
    await line.restart("kme-c", is_proven=False)
    await line.restart("kme-c", is_proven=True)
    address = parse((await line.get("sae-a", "sae-c")).keys[0][0])
    assert address is not None and address.epoch == 1


async def test_a_source_that_lost_its_disk_skips_the_epochs_the_target_knows(
    line: KeyNetwork, tmp_path: Path
) -> None:
    await line.get("sae-a", "sae-c")
    await line.restart("kme-a", is_proven=False)
    await line.get("sae-a", "sae-c")
    await line.stop("kme-a")
    line.sites["kme-a"].path = tmp_path / "fresh"
    await line.start("kme-a")
    drawn = await line.get("sae-a", "sae-c")
    address = parse(drawn.keys[0][0])
    assert address is not None and address.epoch >= 2
    assert (await line.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys


async def test_a_header_that_is_too_long_burns_nothing_and_says_why(line: KeyNetwork) -> None:
    before = line.wire.burnt("kme-a", "kme-b")
    with pytest.raises(ShortageError) as caught:
        await line.plane("kme-a").establisher.establish(
            Order("kme-c", 1, attachment=bytes(16 * 1024)), timeout_s=3.0
        )
    assert caught.value.reason is ErrorReason.GRADE_UNAVAILABLE
    assert line.wire.burnt("kme-a", "kme-b") == before


async def test_a_transfer_that_cannot_be_sent_is_not_under_way(
    line: KeyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise IntegrityError("the pad file is gone", reason=ErrorReason.STATE_CORRUPT)

    link = line.wire.planes["kme-a"].link("kme-b")
    assert link is not None
    with monkeypatch.context() as broken:
        broken.setattr(link, "send", fail)
        with pytest.raises(IntegrityError):
            await line.get("sae-a", "sae-c")
    assert line.plane("kme-a").establisher.in_flight == 0
    await line.get("sae-a", "sae-c")


async def test_a_lost_confirm_is_asked_for(line: KeyNetwork) -> None:
    line.on_call = lambda kind, *_: kind != "confirm"
    drawn = await line.get("sae-a", "sae-c")
    assert (await line.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys
    assert any(kind == "query" for kind, *_ in line.calls)


@pytest.mark.parametrize("line", [HASTY], indirect=True)
async def test_a_dead_target_is_a_shortage_in_time_and_burns_once(line: KeyNetwork) -> None:
    await line.stop("kme-c")
    with pytest.raises(UnavailableError) as caught:
        await line.get("sae-a", "sae-c")
    assert caught.value.retry_after_s > 0
    assert line.wire.burnt("kme-a", "kme-b") == 160


async def test_no_material_is_a_shortage_and_no_slots_are_lost(tmp_path: Path) -> None:
    network = KeyNetwork(tmp_path, LINE, filled=100, config=HASTY)
    await network.start()
    try:
        asked, established = await asyncio.gather(
            network.get("sae-a", "sae-c"),
            network.plane("kme-a").establisher.establish(Order("kme-c", 1), timeout_s=3.0),
            return_exceptions=True,
        )
        assert isinstance(established, ShortageError)
        assert established.reason == ErrorReason.OUT_OF_MATERIAL
        # On a busy machine the caller's own time may run out before it learns why.
        assert isinstance(asked, ShortageError | UnavailableError)
        assert network.wire.burnt("kme-a", "kme-b") == 0
    finally:
        await network.stop()


async def test_a_second_redeem_finds_nothing(line: KeyNetwork) -> None:
    key_id = (await line.get("sae-a", "sae-c")).keys[0][0]
    await line.redeem("sae-c", "sae-a", [key_id])
    with pytest.raises(CallerError) as caught:
        await line.redeem("sae-c", "sae-a", [key_id])
    assert caught.value.reason == ErrorReason.UNKNOWN_KEY
    await line.restart("kme-c")
    with pytest.raises(CallerError) as caught:
        await line.redeem("sae-c", "sae-a", [key_id])
    assert caught.value.reason == ErrorReason.UNKNOWN_KEY


async def test_redeem_is_all_or_nothing(line: KeyNetwork) -> None:
    first = (await line.get("sae-a", "sae-c", 3)).keys
    await line.redeem("sae-c", "sae-a", [first[1][0]])
    with pytest.raises(CallerError):
        await line.redeem("sae-c", "sae-a", [key_id for key_id, _ in first])
    assert (await line.redeem("sae-c", "sae-a", [first[0][0], first[2][0]])).keys == [first[0], first[2]]


async def test_parallel_redeems_of_one_key_deliver_it_once(line: KeyNetwork) -> None:
    key_id = (await line.get("sae-a", "sae-c")).keys[0][0]
    outcomes = await asyncio.gather(
        *(line.redeem("sae-c", "sae-a", [key_id]) for _ in range(8)), return_exceptions=True
    )
    assert sum(not isinstance(one, BaseException) for one in outcomes) == 1
    assert all(one.reason == ErrorReason.UNKNOWN_KEY for one in outcomes if isinstance(one, MeshError))


async def test_retire_wipes_and_forgets_at_the_target(line: KeyNetwork) -> None:
    old = (await line.get("sae-a", "sae-c")).keys[0][0]
    line.clock.offset_s += line.config.key_lifetime_s / 2
    young = await line.get("sae-a", "sae-c")
    line.clock.offset_s += line.config.key_lifetime_s / 2 + 1
    await line.plane("kme-a").retirer.run_once()
    with pytest.raises(NotAuthorizedError):
        await line.redeem("sae-c", "sae-a", [old])
    assert (await line.redeem("sae-c", "sae-a", [young.keys[0][0]])).keys == young.keys
    again = await line.get("sae-a", "sae-c")
    assert (await line.redeem("sae-c", "sae-a", [again.keys[0][0]])).keys == again.keys


async def test_a_closed_epoch_is_retired_as_a_whole(line: KeyNetwork) -> None:
    old = (await line.get("sae-a", "sae-c")).keys[0][0]
    await line.restart("kme-a", is_proven=False)
    await line.get("sae-a", "sae-c")
    line.clock.offset_s += line.config.key_lifetime_s + 1
    await line.plane("kme-a").retirer.run_once()
    assert [book.epoch for book in line.plane("kme-c").reserves.inbound_books("kme-a")] == [1]
    with pytest.raises(NotAuthorizedError):
        await line.redeem("sae-c", "sae-a", [old])


async def test_same_kme_keys_burn_lane_bytes_that_never_leave(line: KeyNetwork) -> None:
    drawn = await line.get("sae-c", "sae-c2", 4)
    assert drawn.grade == "local"
    assert line.wire.burnt("kme-c", "kme-b") == line.wire.planes["kme-c"].ends["kme-b"].lane.local == 4 * 32
    ids = [key_id for key_id, _ in drawn.keys]
    assert all(parse(key_id) is None for key_id in ids)
    assert (await line.redeem("sae-c2", "sae-c", ids)).keys == drawn.keys
    with pytest.raises(CallerError):
        await line.redeem("sae-c2", "sae-c", ids)


async def test_same_kme_keys_need_lane_material(line: KeyNetwork) -> None:
    line.wire.cut("kme-b", "kme-c")
    with pytest.raises(ShortageError):
        await line.get("sae-c", "sae-c2")


async def test_several_slaves_at_several_kmes_get_the_same_key(line: KeyNetwork) -> None:
    drawn = await line.get("sae-a", "sae-c", 2, more=["sae-b", "sae-a2", "sae-c2", "sae-b"])
    ids = [key_id for key_id, _ in drawn.keys]
    for slave in ("sae-c", "sae-b", "sae-a2", "sae-c2"):
        assert (await line.redeem(slave, "sae-a", ids)).keys == drawn.keys
        with pytest.raises(CallerError):
            await line.redeem(slave, "sae-a", ids)


@pytest.mark.parametrize("line", [HASTY], indirect=True)
async def test_when_one_target_fails_all_void(line: KeyNetwork) -> None:
    await line.get("sae-a", "sae-c")
    await line.get("sae-a", "sae-b")
    line.on_call = lambda kind, own, peer, _message: not (kind.startswith("deposit") and peer == "kme-c")
    with pytest.raises(UnavailableError):
        await line.get("sae-a", "sae-b", more=["sae-c", "sae-a2"])
    line.on_call = lambda *_: True
    await until(lambda: line.plane("kme-a").jobs.open_jobs("kme-c") == 0)
    await until(lambda: line.plane("kme-a").jobs.open_jobs("kme-b") == 0)
    for kme in line.sites:
        assert line.store(kme).read(lambda tables: tables.keystore.count_held()) == 0


async def test_status_counts_what_can_be_drawn(filled: KeyNetwork) -> None:
    status = filled.plane("kme-a").status(StatusRequest(caller_sae_id="sae-a", peer_sae_id="sae-c"))
    assert (status.source_kme_id, status.target_kme_id) == ("kme-a", "kme-c")
    assert status.stored_key_count == 64 * 1024 // 32 <= status.max_key_count
    assert status.grade == "trusted-relay"
    levels = {one.peer_kme_id: one for one in filled.plane("kme-a").levels()}
    assert levels["kme-c"].outbound_bytes == 64 * 1024


async def test_limits_and_access_refuse_before_anything_is_burnt(line: KeyNetwork) -> None:
    for number, size_bytes, reason in (
        (129, 32, ErrorReason.LIMIT_EXCEEDED),
        (1, 8193, ErrorReason.LIMIT_EXCEEDED),
    ):
        with pytest.raises(CallerError) as caught:
            await line.get("sae-a", "sae-c", number, size_bytes)
        assert caught.value.reason == reason
    with pytest.raises(NotAuthorizedError):
        await line.get("sae-c", "sae-a", at="kme-a")
    assert line.wire.burnt("kme-a", "kme-b") == 0
