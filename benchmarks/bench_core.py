"""The core's arithmetic, each line beside a memory copy of the same bytes, measured alternately.

Bulk lines are MB of payload per second (medians), small ones microseconds per call.
``python -m benchmarks.bench_core`` prints a table of its own.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

from benchmarks.rows import Meter, Row, row
from mesh.core import gf128, keyid, mac, otp, sharing

BULK_BYTES = 1 << 20
_ROUNDS = 41
_CALLS_PER_ROUND = 200
_HEADER = os.urandom(120)
_TAG_KEY = os.urandom(gf128.KEY_BYTES)

Call = Callable[[], object]


def run() -> list[Row]:
    """All rows, in about three seconds."""
    data, other, third = (os.urandom(BULK_BYTES) for _ in range(3))
    target = bytearray(data)
    mac_key = os.urandom(mac.KEY_BYTES)
    rows = [
        _bulk("one-time pad, new buffer, 1 MiB", lambda: otp.xor(data, other), "memory speed"),
        _bulk("one-time pad, in place, 1 MiB", lambda: otp.xor_into(target, other), "memory speed"),
        _bulk("one-time poly1305, 1 MiB", lambda: mac.one_time_tag(mac_key, data), "9 GB/s"),
        _bulk("secret tag, 1 MiB", lambda: gf128.secret_tag(_TAG_KEY, _HEADER, data), "500 MB/s"),
        _bulk(
            "secret tag, 64 KiB",
            lambda: gf128.secret_tag(_TAG_KEY, _HEADER, data[: 1 << 16]),
            "",
            size_bytes=1 << 16,
        ),
    ]
    for k, n in ((2, 2), (2, 3), (3, 5)):
        first = [data, other, third][:k]
        secret, derived = sharing.derive(k, n, first)
        last = dict(list(enumerate([*first, *derived], 1))[-k:])
        if sharing.combine(last) != secret:
            raise AssertionError("the shares do not combine")
        goal = "1 Gbit/s for the whole establish" if (k, n) == (2, 3) else ""
        rows.append(_bulk(f"sharing ({k},{n}), derive, 1 MiB", _derive(k, n, first), goal))
        rows.append(_bulk(f"sharing ({k},{n}), combine, 1 MiB", _combine(last), goal))
    return rows + _small(data, other, mac_key)


def _small(data: bytes, other: bytes, mac_key: bytes) -> list[Row]:
    """What one 256-bit key costs on demand: 128 bytes of secret, a header, a tag, a key_ID."""
    short, pad = data[:128], other[:128]
    secret = data[: 128 - gf128.KEY_BYTES]
    tagger = keyid.PairTagger("sae-alice-0001", "sae-bob-0001")
    address = keyid.KeyAddress(3, 123_456, 32)
    tag_part = os.urandom(keyid.TAG_PART_BYTES)
    key_id = tagger.issue(address, tag_part)
    return [
        _call("one-time pad, 128 bytes", lambda: otp.xor(short, pad), 128, "memory speed"),
        _call("one-time poly1305, 256 bytes", lambda: mac.one_time_tag(mac_key, data[:256]), 256, "2 µs"),
        _call(
            "secret tag, 80 bytes and header",
            lambda: gf128.secret_tag(_TAG_KEY, _HEADER, secret),
            len(secret) + len(_HEADER),
            "60 µs",
        ),
        _call("sharing (2,3), derive, 128 bytes", _derive(2, 3, [short, pad]), 128, ""),
        _call("key_ID, issue", lambda: tagger.issue(address, tag_part), 16, "6 µs a key in all"),
        _call("key_ID, parse and match", lambda: tagger.matches(key_id, tag_part), 16, "6 µs a key in all"),
    ]


def _derive(k: int, n: int, first: list[bytes]) -> Call:
    return lambda: sharing.derive(k, n, first)


def _combine(shares: dict[int, bytes]) -> Call:
    return lambda: sharing.combine(shares)


def _bulk(name: str, call: Call, goal: str, *, size_bytes: int = BULK_BYTES) -> Row:
    source = bytes(size_bytes)
    meter = Meter()
    taken, floor = _alternate(call, lambda: bytearray(source), calls=1)
    megabytes = size_bytes / 1e6
    return row(name, megabytes / taken, "MB/s", floor=megabytes / floor, goal=goal, cpu=meter.used())


def _call(name: str, call: Call, size_bytes: int, goal: str) -> Row:
    source = bytes(size_bytes)
    meter = Meter()
    taken, floor = _alternate(call, lambda: bytearray(source), calls=_CALLS_PER_ROUND)
    return row(name, taken * 1e6, "µs", floor=floor * 1e6, goal=goal, cpu=meter.used())


def _alternate(call: Call, floor: Call, *, calls: int) -> tuple[float, float]:
    """Median seconds per call of both, taken in turns so that a slow machine slows both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        marks = [time.perf_counter()]
        for one in (call, floor):
            for _ in range(calls):
                one()
            marks.append(time.perf_counter())
        for kept, (start, stop) in zip(times, pairwise(marks), strict=True):
            kept.append((stop - start) / calls)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    for measured in run():
        print(
            f"{measured['name']:<36} {measured['value']:>10,.4g} {measured['unit']:<5}"
            f" floor {measured['floor']:>10,.4g}  ratio {measured['ratio']:<8.3g} {measured['goal']}"
        )
