"""What operators see of a network of nodes and hubs while keys are drawn: metrics, and no key facts."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.errors import MeshError
from mesh.hub.hub import Hub
from tests.fakes.hub_network import NODES, HubNetwork
from tests.unit.test_metrics import shown

pytestmark = pytest.mark.slow
HUB = "hub-1"


@pytest.fixture
async def ocean(tmp_path: Path) -> AsyncIterator[HubNetwork]:
    """kme-a and kme-b, joined by one hub."""
    network = HubNetwork(tmp_path, hubs=(HUB,), grade="dske(1,1)")
    for kme in NODES:
        await network.supply(HUB, kme)
    await network.start()
    try:
        await network.until_open()
        yield network
    finally:
        await network.stop()


async def test_levels_rates_and_counts_of_a_node_its_reserve_and_its_hub(ocean: HubNetwork) -> None:
    source, target, hub = (ocean.node(one) for one in (*NODES, HUB))
    for node in (source, target, hub):
        node.telemetry.sample()
    drawn = await ocean.draw("sae-a", "sae-b", number=4)
    await ocean.redeem("sae-b", "sae-a", drawn)
    with pytest.raises(MeshError):
        await ocean.redeem("sae-b", "sae-a", drawn)
    for node in (source, target, hub):
        node.telemetry.sample()
    at_source, at_target, at_hub = (shown(node.metrics) for node in (source, target, hub))

    for page, peer in ((at_source, HUB), (at_hub, "kme-a"), (at_hub, "kme-b")):
        assert page["link_open", peer] == page["link_opened_total", peer] == page["ready",] == 1
        assert time.time() - 60 < page["link_changed_timestamp_seconds", peer] <= time.time()
        assert page["link_failed_tags_total", peer] == 0
        assert ("link_device_up", peer) not in page
        for direction in ("in", "out"):
            assert (
                0 < page["lane_usable_bytes", direction, peer] < page["lane_capacity_bytes", direction, peer]
            )
            assert page["psrd_low_water_bytes", direction, peer] == ocean.supply_bytes // 8
    # A key of 256 bits on demand costs its lanes the same at both ends of each hop.
    used = ocean.node("kme-a").links.links[HUB].status().transmit
    assert at_source["lane_position_bytes", "out", HUB] == used.position
    assert at_hub["lane_use_bytes_per_second", "in", "kme-a"] > 0
    assert 0 < at_hub["lane_seconds_to_empty", "in", "kme-a"] < float("inf")
    assert at_hub["lane_seconds_to_empty", "out", "kme-a"] >= at_hub["lane_seconds_to_empty", "in", "kme-a"]

    assert at_source["keys_drawn_total", "kme-b"] == at_target["keys_redeemed_total", "kme-a"] == 4
    assert at_source["key_bytes_drawn_total", "kme-b"] == 4 * 32
    assert at_source["reserve_use_bytes_per_second", "kme-b"] > 0
    assert at_source["reserve_seconds_to_empty", "kme-b"] >= 0
    assert at_target["keys_refused_total", "redeem", "unknown-key"] == 1
    # Asked for counts what was refused, too.
    assert at_source["keys_asked_total", "draw"] == 4
    assert at_target["keys_asked_total", "redeem"] == 4 + 4
    assert at_target["stored_keys_expired_total",] == 0
    assert at_source["establishes_total", "dske(1,1)", "ok"] == 1
    assert at_source["rpc_seconds_count", "/mesh.v1.Peer/Confirm"] == 1
    for page in (at_source, at_target, at_hub):
        assert page["certificate_expiry_timestamp_seconds", "node"] > time.time()
        assert page["certificate_expiry_timestamp_seconds", "node-root"] > time.time()
        assert page["disk_free_bytes",] > 0
        assert page["directory_staleness_seconds",] < 60
    assert not [name for name in at_hub if name[0].startswith(("reserve_", "border_", "keys_"))]


async def test_no_page_shows_an_sae_a_key_id_or_a_key(ocean: HubNetwork) -> None:
    drawn = await ocean.draw("sae-a", "sae-b")
    await ocean.redeem("sae-b", "sae-a", drawn)
    pages = b""
    for running in ocean.running.values():
        running.node.telemetry.sample()
        pages += running.node.metrics.render()
    assert isinstance(ocean.node(HUB), Hub)
    ((key_id, value),) = drawn.keys
    for fact in (b"sae-a", b"sae-b", key_id.hex().encode(), value.hex().encode()):
        assert fact not in pages
