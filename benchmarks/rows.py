"""One measured line: a value, the floor measured in the same run, and the goal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NotRequired, TypedDict


class Row(TypedDict):
    """``ratio`` is value over floor; ``goal`` is in words, from the project's goals."""

    name: str
    value: float
    unit: str
    floor: float | None
    ratio: float | None
    goal: str
    cpu: NotRequired[dict[str, float]]


def row(
    name: str, value: float, unit: str, *, floor: float | None = None, goal: str = "", digits: int = 4
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
