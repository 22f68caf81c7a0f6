"""Latency samples and what is said about them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import TypeAlias, TypedDict

# Toshiba Europe and Quantum Bridge: mean and standard deviation, ms.
PAPER_ENC_MS, PAPER_DEC_MS = (365.0, 81.0), (18.0, 5.0)
Sample: TypeAlias = tuple[float, float]
"""When, in seconds of measuring before it, and how long it took, in milliseconds."""


class Summary(TypedDict):
    """Of one kind of call, in milliseconds."""

    n: int
    mean: float
    std: float
    p50: float
    p99: float


def summarise(samples_ms: Sequence[float]) -> Summary:
    """Mean, standard deviation, median and 99th percentile (nearest rank) of at least one sample."""
    ordered = sorted(samples_ms)
    return Summary(
        n=len(ordered),
        mean=round(statistics.fmean(ordered), 3),
        std=round(statistics.stdev(ordered), 3) if len(ordered) > 1 else 0.0,
        p50=round(statistics.median(ordered), 3),
        p99=round(ordered[math.ceil(0.99 * len(ordered)) - 1], 3),
    )


class Stopwatch:
    """Collects how long its ``with`` bodies took, in milliseconds; a body that raises does not count."""

    def __init__(self) -> None:
        self.samples_ms: list[float] = []
        self._began_s = 0.0

    def __enter__(self) -> None:
        self._began_s = time.perf_counter()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.samples_ms.append((time.perf_counter() - self._began_s) * 1000)
