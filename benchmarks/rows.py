"""One measured line: a value, the floor measured in the same run, the goal, and what it cost."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypedDict

Cpu = dict[str, float]


class Row(TypedDict):
    """``ratio`` is value over floor; ``goal`` is in words, from the project's goals; ``cpu`` is processor
    seconds by process, of the measurement and its floor where both were taken in turns.
    """

    name: str
    value: float
    unit: str
    floor: float | None
    ratio: float | None
    goal: str
    cpu: Cpu


def own_cpu() -> Cpu:
    """Processor seconds so far of this process, and of the commands that it ran to their end."""
    times = os.times()
    return {"benchmark": time.process_time(), "commands": times.children_user + times.children_system}


class Meter:
    """Processor seconds by process since it was made.

    Args:
        read: seconds so far by process.
    """

    def __init__(self, read: Callable[[], Cpu] = own_cpu) -> None:
        self._read = read
        self._before = read()

    def used(self) -> Cpu:
        """What was used; a process that did nothing is left out."""
        used = {name: round(now - self._before.get(name, 0.0), 3) for name, now in self._read().items()}
        return {name: seconds for name, seconds in used.items() if seconds > 0}


def row(
    name: str,
    value: float,
    unit: str,
    *,
    cpu: Cpu,
    floor: float | None = None,
    goal: str = "",
    digits: int = 4,
) -> Row:
    """Build a row; ``digits`` are significant."""
    ratio = None if not floor else float(f"{value / floor:.3g}")
    return {
        "name": name,
        "value": float(f"{value:.{digits}g}"),
        "unit": unit,
        "floor": None if floor is None else float(f"{floor:.{digits}g}"),
        "ratio": ratio,
        "goal": goal,
        "cpu": cpu,
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value with at least ``percent`` of all values at or below it."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * percent // 100).__int__() - 1))]


def spread(values_s: Sequence[float]) -> dict[str, float]:
    """Count, mean, standard deviation, median and 99th percentile in milliseconds of times in seconds."""
    in_ms = [1e3 * value for value in values_s]
    return {
        "n": len(in_ms),
        "mean": statistics.fmean(in_ms),
        "std": statistics.pstdev(in_ms),
        "p50": statistics.median(in_ms),
        "p99": percentile(in_ms, 99),
    }
