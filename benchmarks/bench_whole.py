"""Whole commands: the demo from start to end, and the paper's experiment beside its goals."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.labs import KEYMESH
from benchmarks.rows import Meter, Row, row

PAPER_SECONDS = 30
_GOALS_MS = {
    "enc_on_demand": "<= round trip + 20 ms",
    "enc_reserve": "<= round trip + 12 ms",
    "enc_buffered": "",
    "dec": "",
}


def _run(*arguments: str) -> None:
    finished = subprocess.run([KEYMESH, "lab", *arguments], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"keymesh lab {arguments[0]}: {finished.stdout[-2000:]}{finished.stderr[-2000:]}")


def run() -> Iterator[Row]:
    """Run both; the rows of the paper have the round trip over the emulated ocean as their floor."""
    with tempfile.TemporaryDirectory(prefix="keymesh-bench-") as folder:
        begun, meter = time.perf_counter(), Meter()
        _run("demo", "--dir", f"{folder}/demo")
        taken_s = time.perf_counter() - begun
        yield row("make demo, once installed", taken_s, "s", goal="<= 60 s", cpu=meter.used())
        meter = Meter()
        _run("paper", "--dir", f"{folder}/paper", "--duration", str(PAPER_SECONDS))
        result = json.loads((Path(folder) / "paper" / "result.json").read_text())
    used = meter.used()  # of the whole command: the modes take turns
    for mode, goal in _GOALS_MS.items():
        one = result[mode]
        yield row(
            f"paper's network, {mode}, round trip {one['round_trip_ms']:g} ms, p50",
            one["p50_ms"],
            "ms",
            floor=one["floor_ms"],
            goal=goal,
            cpu=used,
        )
