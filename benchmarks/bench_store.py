"""The durable store next to a bare ``fdatasync`` and a bare file write of the same run."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.rows import Meter, Row, percentile, row
from mesh.store.pads import PadFiles
from mesh.store.store import Store
from mesh.store.tables import ExtentRow, Tables

COMMITS = 300
GROUPED = 20_000
PAD_BYTES = 4 << 20
PADS = 16
MIB = 1 << 20


def _median_s(step: Callable[[int], object], times: int) -> float:
    taken = []
    for number in range(times):
        started = time.perf_counter()
        step(number)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _floor_sync_s(path: Path) -> float:
    """One page over an existing one, then ``fdatasync``: what a durable commit costs at least."""
    fd = os.open(path / "floor", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        page = os.urandom(4096)
        os.pwrite(fd, page * 64, 0)
        os.fsync(fd)

        def step(number: int) -> None:
            os.pwrite(fd, page, number % 64 * 4096)
            os.fdatasync(fd)

        return _median_s(step, COMMITS)
    finally:
        os.close(fd)


def _floor_write_s(path: Path, data: bytes) -> float:
    """A new file of ``data``, synced: what a durable pad costs at least."""

    def step(number: int) -> None:
        fd = os.open(path / f"floor-{number}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.pwrite(fd, data, 0)
        os.fdatasync(fd)
        os.close(fd)

    return _median_s(step, PADS)


def _marked(lane_id: int, mark: int) -> Callable[[Tables], None]:
    return lambda tables: tables.lanes.set_mark(lane_id, mark)


def _used(slot: int) -> Callable[[Tables], None]:
    return lambda tables: tables.slots.add_used(1, slot, slot + 1)


async def _grouped_per_s(store: Store, make: Callable[[int], Callable[[Tables], None]]) -> float:
    started = time.perf_counter()
    await asyncio.gather(*(store.commit_soon(make(number)) for number in range(GROUPED)))
    return GROUPED / (time.perf_counter() - started)


async def _commit_s(store: Store, lane_id: int) -> tuple[float, float]:
    """(median, 99th percentile) of one mark moved alone, proof copy included."""
    taken = []
    for number in range(COMMITS):
        started = time.perf_counter()
        await store.commit(_marked(lane_id, number))
        taken.append(time.perf_counter() - started)
    return statistics.median(taken), percentile(taken, 99)


def _pads(pads: PadFiles, path: Path) -> Iterator[Row]:
    data = os.urandom(PAD_BYTES)
    floor = PAD_BYTES / 1e6 / _floor_write_s(path, data)

    def rated(what: str, nbytes: int, step: Callable[[int], object], **more: Any) -> Row:
        meter = Meter()
        taken_s = _median_s(step, PADS)
        return row(f"store: {what}", nbytes / 1e6 / taken_s, "MB/s", cpu=meter.used(), **more)

    def create(number: int) -> None:
        pads.create_now(f"pad-{number}", data)

    yield rated("durable pad file of 4 MiB", PAD_BYTES, create, floor=floor, goal=">= 250")
    yield rated("pad read, 1 MiB", MIB, lambda number: pads.read(f"pad-{number}", 0, MIB))
    yield rated(
        "pad wipe, 1 MiB, not synced", MIB, lambda number: pads.wipe(f"pad-{number}", 0, MIB), goal=">= 250"
    )
    yield rated(
        "pad removal, wiped and synced",
        PAD_BYTES,
        lambda number: pads.remove_now(f"pad-{number}"),
        floor=floor,
    )


async def _measured(path: Path) -> list[Row]:
    store = Store.open(path / "data", kme_id="kme-a")
    proof = store.proof_path
    try:
        store.begin_incarnation(os.urandom(16))
        lane = store.commit_now(lambda tables: tables.lanes.put_lane("kme-b", True))
        floor_s = _floor_sync_s(path)
        meter = Meter()
        median_s, p99_s = await _commit_s(store, lane.lane_id)
        used = meter.used()
        floor = floor_s * 1e3
        name = "store: one commit alone"
        rows = [
            row(f"{name}, median", median_s * 1e3, "ms", floor=floor, goal="<= 0.6", cpu=used),
            row(f"{name}, p99", p99_s * 1e3, "ms", floor=floor, cpu=used),
        ]
        for what, make in (
            ("mark moves", lambda number: _marked(lane.lane_id, COMMITS + number)),
            ("redeems (slots used)", lambda number: _used(number * 2)),
        ):
            meter = Meter()
            rate, name = await _grouped_per_s(store, make), f"store: grouped {what}"
            rows.append(row(name, rate, "1/s", floor=1 / floor_s, goal=">= 20,000", cpu=meter.used()))
        rows += _pads(store.pads, path)
    finally:
        store.close()
        if proof is not None:
            proof.unlink(missing_ok=True)
    return rows


_MEMORY_PROGRAM = """
import resource, sys
from pathlib import Path
from mesh.store.pads import PadFiles
from mesh.store.store import Store
store = Store.open(Path(sys.argv[1]), kme_id="kme-a", proof_dir=Path("/nowhere"))
rows = store.read(lambda t: t.extents.list())
total = 0
for extent in rows:
    total += len(store.pads.read(extent.file, extent.file_offset, 65536))
store.close()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def _fill(path: Path, files: int, file_bytes: int) -> None:
    """A data directory with ``files`` pad files of ``file_bytes`` (sparse: only their rows matter here)."""
    store = Store.open(path, kme_id="kme-a", proof_dir=Path("/nowhere"))

    def rows(tables: Tables) -> None:
        for number in range(files):
            tables.extents.put(ExtentRow(1, number * file_bytes, (number + 1) * file_bytes, f"pad-{number}"))

    for number in range(files):
        with (path / "pads" / f"pad-{number}").open("wb") as file:
            file.truncate(file_bytes)
    store.commit_now(rows)
    store.close()


def _memory_mib(path: Path) -> float:
    """Peak resident memory of a process that opens 1 GiB of pools and reads from every file."""
    _fill(path, 4096, 256 << 10)
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY_PROGRAM, str(path)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def run() -> list[Row]:
    """Measure in a temporary directory on the disk of the working directory."""
    with TemporaryDirectory(dir=".") as name:
        path = Path(name).resolve()
        rows = asyncio.run(_measured(path))
        meter = Meter()
        peak_mib = _memory_mib(path / "big")
        what = "store: memory with 1 GiB of pools, peak"
        rows.append(row(what, peak_mib, "MiB", goal="<= 150", cpu=meter.used()))
    return rows
