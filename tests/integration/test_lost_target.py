"""A target that lost its disk: its sources must not go on drawing keys that it no longer holds (4.6)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.core.keyid import parse
from tests.fakes.key_network import LINE, NO_PREFILL, KeyNetwork, until

FILLED = replace(
    NO_PREFILL, prefill=True, high_water_bytes=64 * 1024, low_water_bytes=48 * 1024, lane_floor_bytes=4096
)


@pytest.fixture
async def filled(tmp_path: Path) -> AsyncIterator[KeyNetwork]:
    """a - b - c with the reserves between a and c filled."""
    network = KeyNetwork(tmp_path, LINE, config=FILLED)
    await network.start()
    await until(lambda: is_full(network, "kme-a", "kme-c") and is_full(network, "kme-c", "kme-a"))
    yield network
    await network.stop()


def is_full(network: KeyNetwork, source: str, target: str) -> bool:
    """Whether the source can draw what the water marks aim at."""
    book = network.plane(source).reserves.outbound.get(target)
    return book is not None and book.level_bytes >= 64 * 1024


async def lose_disk(network: KeyNetwork, kme: str, fresh: Path) -> None:
    """The node comes back with an empty directory."""
    await network.stop(kme)
    network.sites[kme].path = fresh
    await network.start(kme)


@pytest.mark.parametrize("restarts", [False, True])
async def test_a_full_reserve_is_given_up_when_its_target_starts_anew(
    filled: KeyNetwork, tmp_path: Path, restarts: bool
) -> None:
    if restarts:
        await filled.restart("kme-a")
    await lose_disk(filled, "kme-c", tmp_path / "fresh")
    await until(lambda: filled.plane("kme-a").reserves.next_outbound_epoch("kme-c") > 1)
    await until(lambda: is_full(filled, "kme-a", "kme-c"))
    drawn = await filled.get("sae-a", "sae-c")
    address = parse(drawn.keys[0][0])
    assert address is not None and address.epoch == 1
    assert (await filled.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys


async def test_a_source_that_only_renewed_its_epoch_costs_one_slot(filled: KeyNetwork) -> None:
    """c forfeits its own reserve after a reboot, but holds what a gave it: nothing of that is lost."""
    before = await filled.get("sae-a", "sae-c")
    book = filled.plane("kme-c").reserves.outbound["kme-a"]
    filled.plane("kme-c").establisher.forget_epoch(book)
    await until(lambda: filled.plane("kme-c").reserves.next_outbound_epoch("kme-a") > 1)
    await until(lambda: is_full(filled, "kme-c", "kme-a"))
    after = await filled.get("sae-a", "sae-c")
    for keys in (before.keys, after.keys):
        address = parse(keys[0][0])
        assert address is not None and address.epoch == 0
        assert (await filled.redeem("sae-c", "sae-a", [keys[0][0]])).keys == keys
