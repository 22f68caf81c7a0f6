"""A slow second hop must not waste the first one's material, nor cost anybody a time-out (3.9).

Lane bytes are counted at both hops: what the first burns beyond the second is waste.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import ErrorReason, MeshError
from tests.fakes.key_network import LINE, NO_PREFILL, KeyNetwork, until
from tests.fakes.level_network import LevelNetwork

HUNGRY = replace(
    NO_PREFILL,
    prefill=True,
    high_water_bytes=4 << 20,
    low_water_bytes=4 << 20,
    transfer_max_bytes=64 * 1024,
    lane_floor_bytes=16 * 1024,
)
ENDS: dict[str, Any] = {**LINE, "saes": {"sae-a": {"home": "kme-a"}, "sae-c": {"home": "kme-c"}}}


@contextlib.asynccontextmanager
async def dripping(network: KeyNetwork, own: str, peer: str, *, per_s: int) -> AsyncIterator[None]:
    """A lane that gets so much material a second."""
    lane = network.wire.planes[own].ends[peer].lane

    async def drip() -> None:
        while True:
            await asyncio.sleep(0.02)
            lane.filled += per_s // 50

    task = asyncio.get_running_loop().create_task(drip())
    try:
        yield
    finally:
        task.cancel()


def set_lane(network: KeyNetwork, own: str, peer: str, filled: int) -> None:
    """What a lane holds at first."""
    network.wire.planes[own].ends[peer].lane.filled = filled


def burnt(network: KeyNetwork) -> tuple[int, int]:
    """Bytes burnt on the first hop and on the second."""
    return network.wire.burnt("kme-a", "kme-b"), network.wire.burnt("kme-b", "kme-c")


async def until_settled(network: KeyNetwork) -> None:
    """Nothing of a is under way: what a burnt has arrived, or was refused."""
    await until(lambda: network.plane("kme-a").establisher.in_flight == 0)


@pytest.mark.slow
async def test_levels_further_on_pace_refills(tmp_path: Path) -> None:
    """Told whenever nothing is under way, a level costs nothing at all: every byte goes on."""
    network = LevelNetwork(tmp_path, ENDS, config=HUNGRY, told_every_s=0)
    set_lane(network, "kme-b", "kme-c", 256 * 1024)
    lane = network.wire.planes["kme-b"].ends["kme-c"].lane
    await network.start()
    try:
        async with asyncio.timeout(120):
            used = 0
            while burnt(network)[1] <= 400 * 1024:
                await until(lambda used=used: burnt(network)[0] > used)  # type: ignore[misc]
                await until_settled(network)
                used = burnt(network)[0]
                lane.filled += 64 * 1024
                network.tell()
            await until_settled(network)
        first, second = burnt(network)
    finally:
        await network.stop()
    assert first == second
    assert not any(kind == "report" for kind, *_ in network.calls)


@pytest.mark.slow
async def test_refusals_pace_refills_where_no_levels_are_known(tmp_path: Path) -> None:
    network = KeyNetwork(tmp_path, ENDS, config=HUNGRY)
    set_lane(network, "kme-b", "kme-c", 256 * 1024)
    await network.start()
    try:
        async with dripping(network, "kme-b", "kme-c", per_s=128 * 1024):
            await until(lambda: any(kind == "report" for kind, *_ in network.calls))
            await asyncio.sleep(1.0)
        await until_settled(network)
        before = burnt(network)
        async with dripping(network, "kme-b", "kme-c", per_s=128 * 1024):
            await until(lambda: burnt(network)[1] - before[1] > 256 * 1024)
        await until_settled(network)
        after = burnt(network)
        reports = [message for kind, *_, message in network.calls if kind == "report"]
    finally:
        await network.stop()
    assert reports
    assert all(list(one.refused) == [0] for one in reports)
    # Running into the wall costs what was under way, here 4 transfers; probing it then costs little.
    assert before[0] <= before[1] + 5 * HUNGRY.transfer_max_bytes
    first, second = after[0] - before[0], after[1] - before[1]
    assert first <= 1.1 * second + HUNGRY.transfer_max_bytes


async def test_a_refused_key_on_demand_fails_at_once_with_the_relays_reason(tmp_path: Path) -> None:
    network = KeyNetwork(tmp_path, ENDS, config=replace(NO_PREFILL, request_timeout_s=30.0))
    await network.start()
    try:
        await network.get("sae-a", "sae-c")
        network.wire.cut("kme-b", "kme-c")
        before = asyncio.get_running_loop().time()
        with pytest.raises(MeshError) as caught:
            await network.get("sae-a", "sae-c")
        assert caught.value.reason == ErrorReason.NO_ROUTE
        assert caught.value.retry_after_s > 0
        assert asyncio.get_running_loop().time() - before < 15
        network.wire.cut("kme-b", "kme-c", is_open=True)
        drawn = await network.get("sae-a", "sae-c")
        assert (await network.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys
    finally:
        await network.stop()


async def test_bulk_leaves_a_relays_floor_to_keys_on_demand(tmp_path: Path) -> None:
    network = KeyNetwork(tmp_path, ENDS, config=HUNGRY)
    set_lane(network, "kme-b", "kme-c", 200 * 1024)
    await network.start()
    try:
        await until(lambda: any(kind == "report" for kind, *_ in network.calls))
        lane = network.wire.planes["kme-b"].ends["kme-c"].lane
        left = lane.filled - lane.position
        assert left >= HUNGRY.lane_floor_bytes
        drawn = await network.get("sae-a", "sae-c", 128, 32)
        assert len(drawn.keys) == 128
    finally:
        await network.stop()


async def test_a_heavy_source_leaves_a_lane_to_light_ones(tmp_path: Path) -> None:
    """Of b's lane to c: b's own bulk and a's; a third source, light so far, still gets its key."""
    document = {
        **LINE,
        "nodes": {**LINE["nodes"], "kme-d": {}},
        "links": [*LINE["links"], {"between": ["kme-b", "kme-d"]}],
        "saes": {**ENDS["saes"], "sae-d": {"home": "kme-d"}},
    }
    config = replace(
        HUNGRY, prefill=False, transfer_max_bytes=256 * 1024, high_water_bytes=0, low_water_bytes=0
    )
    network = KeyNetwork(tmp_path, document, config=config)
    set_lane(network, "kme-b", "kme-c", 400 * 1024)
    await network.start()
    try:
        with pytest.raises(MeshError) as caught:
            for _ in range(100):
                await network.get("sae-a", "sae-c", 128, 32)
        assert caught.value.reason == ErrorReason.BUSY
        drawn = await network.get("sae-d", "sae-c", 100, 32)
        assert (
            await network.redeem("sae-c", "sae-d", [key_id for key_id, _ in drawn.keys])
        ).keys == drawn.keys
    finally:
        await network.stop()
