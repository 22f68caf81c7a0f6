"""Establish, draw and redeem over three key planes: counts of lane bytes, coalescing, refills, restarts.

Covers protocol 3.1 to 3.6, 4.1, 4.4 and 4.5 as one machine; attacks stand in tests/fault.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.key_network import KeyNetwork

LINE: dict[str, Any] = {
    "format": "keymesh-network/1",
    "serial": 1,
    "domain": "metro",
    "nodes": {"kme-a": {}, "kme-b": {}, "kme-c": {}},
    "links": [{"between": ["kme-a", "kme-b"]}, {"between": ["kme-b", "kme-c"]}],
    "saes": {
        "sae-a": {"home": "kme-a"},
        "sae-a2": {"home": "kme-a"},
        "sae-b": {"home": "kme-b"},
        "sae-c": {"home": "kme-c"},
        "sae-c2": {"home": "kme-c"},
    },
}


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[KeyNetwork]:
    """a - b - c, started."""
    network = KeyNetwork(tmp_path, LINE)
    await network.start()
    yield network
    await network.stop()


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
