"""Trouble inside one process: a clock that leaps, a provider without Poly1305, a disk that fills up.

Trouble around real processes is in test_troubles_lab.py. Empty pools, dead targets and closed
links are in tests/integration (establish_three_nodes, link_two_nodes); a full disk under the
store itself is in tests/unit/test_store.py.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.exceptions import UnsupportedAlgorithm

from mesh.core import mac
from mesh.errors import CallerError, ErrorReason, IntegrityError
from mesh.node import disk, expiry
from mesh.node.ingest import LOST_BLOCKS_ALARM
from mesh.node.node import Node
from mesh.store import store as store_module
from tests.fakes.hub_network import HubNetwork
from tests.fakes.key_network import LINE, KeyNetwork
from tests.fakes.link_sites import FAST_INGEST, Pair
from tests.power_cut_files import FullDiskFiles

DAY_S = 86_400.0


# --- a clock that leaps ---------------------------------------------------------------------


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[KeyNetwork]:
    """a - b - c with empty reserves and a key lifetime of a day."""
    network = KeyNetwork(tmp_path, LINE)
    assert network.config.key_lifetime_s == DAY_S
    await network.start()
    yield network
    await network.stop()


async def expire_everywhere(line: KeyNetwork) -> None:
    """What nodes do every now and then."""
    for kme in line.sites:
        plane = line.plane(kme)
        plane.expiry.look()
        await plane.retirer.run_once()
        await plane._expire_stored()


def has_clock_alarm(line: KeyNetwork, kme: str = "kme-a") -> bool:
    return line.sites[kme].alarms.is_open(expiry.ALARM)


@pytest.mark.parametrize("leap_s", [10 * DAY_S, -10 * DAY_S], ids=["forward", "back"])
async def test_a_clock_that_leaps_costs_no_key(line: KeyNetwork, leap_s: float) -> None:
    addressed = await line.get("sae-a", "sae-c")
    shared = await line.get("sae-a", "sae-c", more=["sae-c2", "sae-b"])
    line.clock.leap_s += leap_s
    await expire_everywhere(line)
    assert has_clock_alarm(line)
    for slave in ("sae-c", "sae-c2", "sae-b"):
        assert (await line.redeem(slave, "sae-a", [shared.keys[0][0]])).keys == shared.keys
    assert (await line.redeem("sae-c", "sae-a", [addressed.keys[0][0]])).keys == addressed.keys
    fresh = await line.get("sae-a", "sae-c")
    assert (await line.redeem("sae-c", "sae-a", [fresh.keys[0][0]])).keys == fresh.keys


async def test_after_a_leap_keys_expire_a_lifetime_later(line: KeyNetwork) -> None:
    keys = await line.get("sae-a", "sae-c")
    line.clock.leap_s += 10 * DAY_S
    await expire_everywhere(line)
    line.clock.offset_s += DAY_S - 1
    await expire_everywhere(line)
    assert line.plane("kme-a").expiry.is_held
    line.clock.offset_s += 2
    await expire_everywhere(line)
    assert not has_clock_alarm(line)
    with pytest.raises(CallerError):
        await line.redeem("sae-c", "sae-a", [keys.keys[0][0]])


async def test_expiry_stays_held_back_over_a_restart_and_ends_when_the_clock_is_set_back(
    line: KeyNetwork,
) -> None:
    keys = await line.get("sae-a", "sae-c", more=["sae-c2"])
    line.clock.leap_s += 10 * DAY_S
    await expire_everywhere(line)
    await line.store("kme-c").drain()
    await line.restart("kme-c")
    await expire_everywhere(line)
    assert line.plane("kme-c").expiry.is_held
    assert (await line.redeem("sae-c2", "sae-a", [keys.keys[0][0]])).keys == keys.keys
    line.clock.leap_s = 0
    await expire_everywhere(line)
    line.clock.offset_s += DAY_S + 1
    await expire_everywhere(line)
    assert not line.plane("kme-c").expiry.is_held
    with pytest.raises(CallerError):
        await line.redeem("sae-c", "sae-a", [keys.keys[0][0]])


async def test_small_corrections_of_the_clock_are_no_leap(line: KeyNetwork) -> None:
    for correction_s in (5.0, -20.0, 25.0):
        line.clock.leap_s += correction_s
        await expire_everywhere(line)
    assert not has_clock_alarm(line)


async def test_what_a_burst_drew_after_its_first_key_expires_too(line: KeyNetwork) -> None:
    burst = [(await line.get("sae-a", "sae-c")).keys[0][0] for _ in range(3)]
    line.clock.offset_s += DAY_S / 90
    await expire_everywhere(line)
    line.clock.offset_s += DAY_S
    await expire_everywhere(line)
    for key_id in burst:
        with pytest.raises(CallerError):
            await line.redeem("sae-c", "sae-a", [key_id])


async def test_what_was_drawn_and_closed_during_a_leap_forward_expires_after_its_correction(
    line: KeyNetwork,
) -> None:
    reserves = line.plane("kme-a").reserves
    line.clock.leap_s += 10 * DAY_S
    key = await line.get("sae-a", "sae-c")
    later = await line.get("sae-a", "sae-b")
    reserves.retire_outbound(reserves.outbound["kme-b"], int(line.clock.now_s()))
    line.clock.leap_s = 0
    await expire_everywhere(line)
    assert (await line.redeem("sae-b", "sae-a", [later.keys[0][0]])).keys == later.keys
    line.clock.offset_s += DAY_S + 1
    await expire_everywhere(line)
    assert not line.plane("kme-a").expiry.is_held
    assert reserves.old_peers() == []
    with pytest.raises(CallerError):
        await line.redeem("sae-c", "sae-a", [key.keys[0][0]])


# --- a provider without Poly1305 --------------------------------------------------------------


async def test_a_provider_without_poly1305_refuses_the_start_before_anything_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = HubNetwork(tmp_path, hubs=("hub-1",))

    class Missing:
        @staticmethod
        def generate_tag(key: object, data: object) -> bytes:
            raise UnsupportedAlgorithm("poly1305 is not supported by this version of OpenSSL.")

    monkeypatch.setattr(mac, "Poly1305", Missing)
    with pytest.raises(IntegrityError) as refused:
        async with Node.running(network.config("kme-a")):
            pass
    assert refused.value.reason is ErrorReason.CRYPTO_UNAVAILABLE
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_a_process_without_poly1305_says_so_in_one_line(tmp_path: Path) -> None:
    network = HubNetwork(tmp_path, hubs=("hub-1",))
    program = (
        "import sys, mesh.core.mac as mac\n"
        "class Missing:\n"
        "    @staticmethod\n"
        "    def generate_tag(key, data): raise mac.UnsupportedAlgorithm('not in fips mode')\n"
        "mac.Poly1305 = Missing\n"
        "from mesh.node.node import run\n"
        f"sys.exit(run({str(network.path('kme-a'))!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("keymesh: node kme-a: the cryptographic provider offers no poly1305")


# --- a disk that fills up under ingest --------------------------------------------------------


@pytest.fixture
async def pair_on_disks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Pair, dict[str, FullDiskFiles]]]:
    """Two sites whose disks can fill up; more device key than lanes hold."""
    made: list[FullDiskFiles] = []

    def make() -> FullDiskFiles:
        made.append(FullDiskFiles())
        return made[-1]

    monkeypatch.setattr(store_module, "OsFiles", make)
    pair = Pair(tmp_path)
    pair.devices.budget_bytes = 256 << 10
    await pair.start()
    # The follower is made first.
    yield pair, {"follower": made[0], "leader": made[1]}
    await pair.stop()


@pytest.mark.parametrize("who", ["follower", "leader"])
async def test_a_full_disk_takes_one_block_of_device_key_at_most_and_ingest_goes_on_later(
    pair_on_disks: tuple[Pair, dict[str, FullDiskFiles]], who: str
) -> None:
    pair, files = pair_on_disks
    site = pair.a if who == "leader" else pair.b
    await pair.a.until(lambda: pair.devices.budget_bytes < pair.devices.key_bytes)
    files[who].is_full = True
    fetched = len(pair.devices.follower.fetched)
    pair.devices.budget_bytes = more = 1 << 20
    await site.until(lambda: site.alarms.is_open(disk.ALARM))
    await asyncio.sleep(0.5)
    if who == "leader":
        assert pair.devices.budget_bytes >= more - FAST_INGEST.block_bytes
    assert (len(pair.devices.follower.fetched) - fetched) * 1024 <= FAST_INGEST.block_bytes
    assert not site.alarms.is_open(f"link/{site.peer}/device")
    files[who].is_full = False
    # What is left may be less than a key: the leader asks for the room that it has.
    await site.until(lambda: pair.devices.budget_bytes < pair.devices.key_bytes)
    lanes = pair.b.link.lanes
    least = (256 << 10) + more - FAST_INGEST.block_bytes - (32 << 10)
    await site.until(lambda: lanes.rx.lane.usable_bytes + lanes.tx.lane.usable_bytes >= least)
    assert not site.alarms.is_open(disk.ALARM)
    assert pair.a.link.is_open


# --- a device that knows none of its peer's keys ----------------------------------------------


async def test_blocks_lost_one_after_the_other_are_alarmed_until_one_is_found(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.devices.lose_next = LOST_BLOCKS_ALARM - 1
    await pair.start()
    await pair.until_open()
    alarm = f"link/{pair.b.peer}/lost"
    assert not pair.b.alarms.is_open(alarm)
    pair.devices.lose_next = 1 << 30
    pair.devices.budget_bytes = 4 << 20
    await pair.b.until(lambda: pair.b.alarms.is_open(alarm))
    pair.devices.lose_next = 0
    pair.devices.budget_bytes = 1 << 20
    await pair.b.until(lambda: not pair.b.alarms.is_open(alarm))
    assert not pair.a.alarms.is_open(f"link/{pair.a.peer}/lost")
    await pair.stop()
