"""``python -m benchmarks [NAME ...]``: run, print a table, write ``build/bench/result.json``.

The file is a list of rows (``benchmarks.rows.Row``); ``machine.json`` beside it says where it was measured.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from benchmarks.rows import Row
from mesh.ops.runtime import tune_process

MODULES = ("core", "store", "routing", "links", "delivery", "whole")


def _machine() -> dict[str, str | int]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": model,
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def _line(measured: Row) -> str:
    floor = "" if measured["floor"] is None else f"{measured['floor']:>12,.4g}"
    ratio = "" if measured["ratio"] is None else f"{measured['ratio']:>8.3g}"
    value = f"{measured['value']:>12,.4g} {measured['unit']:<8}"
    return f"{measured['name']:<58} {value} {floor:>12} {ratio:>8}  {measured['goal']}"


def main() -> int:
    """Run the modules named, or all, tuned as every process is; write the files only when all ran."""
    tune_process()
    names = sys.argv[1:] or list(MODULES)
    rows: list[Row] = []
    print(f"{'what':<58} {'value':>12} {'unit':<8} {'floor':>12} {'ratio':>8}  goal")
    for name in names:
        for measured in importlib.import_module(f"benchmarks.bench_{name}").run():
            print(_line(measured), flush=True)
            rows.append(measured)
    if not sys.argv[1:]:
        target = Path("build/bench/result.json")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(rows, indent=2) + "\n")
        target.with_name("machine.json").write_text(json.dumps(_machine(), indent=2) + "\n")
        print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
