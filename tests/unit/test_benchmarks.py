"""The result file of the benchmarks has the shape that its readers rely on; no figure is looked at."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import bench_core
from benchmarks.rows import Meter

FIELDS = {"name", "value", "unit", "floor", "ratio", "goal", "cpu"}


def test_the_result_is_a_list_of_rows_that_say_what_they_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    monkeypatch.setattr(benchmarks, "MODULES", ("core",))
    monkeypatch.setattr(benchmarks, "tune_process", lambda: None)
    monkeypatch.setattr(bench_core, "_ROUNDS", 3)
    monkeypatch.setattr(bench_core, "_CALLS_PER_ROUND", 2)
    assert benchmarks.main() == 0
    rows = json.loads((tmp_path / "build/bench/result.json").read_text())
    assert isinstance(rows, list)
    assert len(rows) > 10
    assert all(row.keys() == FIELDS for row in rows)
    assert sum(row["cpu"].get("benchmark", 0) > 0 for row in rows) > 5
    machine = json.loads((tmp_path / "build/bench/machine.json").read_text())
    assert machine.keys() == {"cpu", "cores", "python", "commit"}


def test_processor_seconds_are_counted_from_now_on_and_idle_processes_left_out() -> None:
    seconds = {"node": 1.0, "idle": 5.0}
    meter = Meter(lambda: dict(seconds))
    seconds |= {"node": 1.5, "new": 0.25}
    assert meter.used() == {"node": 0.5, "new": 0.25}
