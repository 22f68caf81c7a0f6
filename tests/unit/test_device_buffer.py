"""The simulated device pair's buffer: bounded, the same keys at both ends, honest about losses."""

from __future__ import annotations

import itertools
from pathlib import Path
from uuid import UUID

import pytest

from mesh.devices.buffer import DevicePair
from mesh.devices.config import Faults, load_config
from mesh.errors import CallerError, ConfigError, ErrorReason, ShortageError


def make_pair(
    *,
    rate_bps: float = 8_000.0,
    buffer_bytes: int = 10_000,
    pending_bytes: int = 10_000,
    initial_bytes: int = 0,
    faults: Faults | None = None,
) -> DevicePair:
    counter = itertools.count()
    return DevicePair(
        rate_bps=rate_bps,
        buffer_bytes=buffer_bytes,
        pending_bytes=pending_bytes,
        initial_bytes=initial_bytes,
        now_s=100.0,
        randomness=lambda size: bytes(next(counter) % 251 for _ in range(size)),
        faults=faults or Faults(),
    )


def test_produces_at_the_secret_key_rate_up_to_the_buffer() -> None:
    pair = make_pair()
    assert pair.level_bytes(100.0) == 0
    assert pair.level_bytes(101.5) == 1_500
    assert pair.level_bytes(1_000.0) == 10_000


def test_a_clock_that_goes_back_makes_no_key() -> None:
    pair = make_pair()
    assert pair.level_bytes(101.0) == 1_000
    assert pair.level_bytes(50.0) == 1_000
    assert pair.level_bytes(101.0) == 1_000


def test_both_ends_get_the_same_bytes_by_id_exactly_once() -> None:
    pair = make_pair(initial_bytes=1_000)
    taken = pair.take(0, 3, 32, 100.0)
    ids = [key.key_id for key in taken]
    assert [str(UUID(key_id)) for key_id in ids] == ids
    assert len({key.value for key in taken}) == 3
    assert pair.level_bytes(100.0) == 1_000 - 96
    assert pair.pending_bytes(1) == 96
    assert pair.fetch(1, ids[::-1]) == taken[::-1]
    assert pair.pending_bytes(1) == 0
    with pytest.raises(CallerError) as caught:
        pair.fetch(1, ids[:1])
    assert caught.value.reason is ErrorReason.UNKNOWN_KEY


def test_a_shortage_consumes_nothing() -> None:
    pair = make_pair(initial_bytes=100)
    with pytest.raises(ShortageError):
        pair.take(1, 4, 32, 100.0)
    assert pair.level_bytes(100.0) == 100
    assert pair.pending_bytes(0) == 0


def test_a_fetch_is_all_or_nothing() -> None:
    pair = make_pair(initial_bytes=1_000)
    known = pair.take(0, 1, 32, 100.0)[0].key_id
    for bad in ([known, "no-such-key"], [known, known]):
        with pytest.raises(CallerError):
            pair.fetch(1, bad)
    assert len(pair.fetch(1, [known])) == 1


def test_an_end_cannot_fetch_what_it_took_itself() -> None:
    pair = make_pair(initial_bytes=1_000)
    key_id = pair.take(0, 1, 32, 100.0)[0].key_id
    with pytest.raises(CallerError):
        pair.fetch(0, [key_id])


def test_keys_that_nobody_fetches_are_bounded_and_the_oldest_is_lost() -> None:
    pair = make_pair(initial_bytes=10_000, pending_bytes=100)
    first, second, third, fourth = (pair.take(0, 1, 32, 100.0)[0].key_id for _ in range(4))
    assert pair.pending_bytes(1) == 96
    assert pair.lost_keys == 1
    with pytest.raises(CallerError):
        pair.fetch(1, [first])
    assert len(pair.fetch(1, [second, third, fourth])) == 3


def test_stall_stops_production_and_serves_what_is_buffered() -> None:
    faults = Faults(stall=True)
    pair = make_pair(initial_bytes=500, faults=faults)
    assert pair.level_bytes(200.0) == 500
    assert len(pair.take(0, 1, 500, 200.0)) == 1
    faults.stall = False
    assert pair.level_bytes(200.5) == 500


def test_mismatch_flips_one_bit_of_so_many_keys() -> None:
    faults = Faults(mismatch_keys=1)
    pair = make_pair(initial_bytes=500, faults=faults)
    bad, good = pair.take(0, 2, 32, 100.0)
    other_bad, other_good = pair.fetch(1, [bad.key_id, good.key_id])
    difference = int.from_bytes(bad.value) ^ int.from_bytes(other_bad.value)
    assert difference.bit_count() == 1
    assert good == other_good
    assert faults.mismatch_keys == 0


def test_lost_keys_never_arrive_and_restart_loses_all() -> None:
    faults = Faults(lose_keys=1)
    pair = make_pair(initial_bytes=500, faults=faults)
    lost, kept = pair.take(0, 2, 32, 100.0)
    with pytest.raises(CallerError):
        pair.fetch(1, [lost.key_id])
    pair.restart(100.0)
    with pytest.raises(CallerError):
        pair.fetch(1, [kept.key_id])
    assert pair.level_bytes(100.0) == 0
    assert pair.pending_bytes(1) == 0


CONFIG = """
device_id: dev-1
rate_bps: 3950000
control: 127.0.0.1:0
a: {kme_id: qkd-a, sae_id: node-a, listen: "127.0.0.1:0", tls: {ca: x, cert: y, key: z}}
b: {kme_id: qkd-b, sae_id: node-b, listen: "127.0.0.1:0", tls: {ca: x, cert: y, key: z}}
"""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("rate_bps: 3950000", "rate_bps: fast"), "rate_bps"),
        (("rate_bps: 3950000", "rate_bps: -1"), "rate_bps"),
        (("rate_bps: 3950000", "rate_bps: 1\nspeed: 2"), "speed"),
        (("sae_id: node-b", "sae_id: node-a"), "a.sae_id"),
        (("control: 127.0.0.1:0", "control: 0.0.0.0:0"), "control"),
        (('listen: "127.0.0.1:0", tls: {ca: x, cert: y, key: z}}\nb', "listen: nowhere}\nb"), "$.a"),
        (("device_id: dev-1", "device_id: [unclosed"), "YAML"),
    ],
)
def test_a_wrong_configuration_names_the_field(tmp_path: Path, change: tuple[str, str], named: str) -> None:
    file = tmp_path / "device.yaml"
    file.write_text(CONFIG)
    assert load_config(file).rate_bps == 3_950_000
    assert change[0] in CONFIG
    file.write_text(CONFIG.replace(*change))
    with pytest.raises(ConfigError, match=str(file)) as caught:
        load_config(file)
    assert named in str(caught.value)
