"""Metrics of a process: one registry, one prefix, names that may be asked for twice.

Owns the prefix ``keymesh_`` and the text exposition. Labels name roles, peers and
reasons; never key_IDs or anything derived from key bytes, and never values that a
stranger can multiply without bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics import MetricWrapperBase

from mesh import __version__

LATENCY_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_M = TypeVar("_M", bound=MetricWrapperBase)


class Metrics:
    """The metrics of one process.

    Args:
        with_process: adds memory, CPU, descriptors and Python version.
    """

    def __init__(self, *, with_process: bool = True) -> None:
        # A series more for each counter, and nobody asks for it.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no hints here
        self.registry = CollectorRegistry()
        self._known: dict[str, MetricWrapperBase] = {}
        self.gauge("build_info", "1; the label says which release runs.", ["version"]).labels(
            __version__
        ).set(1)
        if with_process:
            ProcessCollector(registry=self.registry)
            PlatformCollector(registry=self.registry)

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """A counter named ``keymesh_<name>_total``."""
        return self._get(Counter, name, lambda full: Counter(full, text, labels, registry=self.registry))

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        """A gauge named ``keymesh_<name>``."""
        return self._get(Gauge, name, lambda full: Gauge(full, text, labels, registry=self.registry))

    def histogram(
        self,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] = LATENCY_BUCKETS_S,
    ) -> Histogram:
        """A histogram named ``keymesh_<name>``; buckets in seconds unless given."""
        return self._get(
            Histogram,
            name,
            lambda full: Histogram(full, text, labels, registry=self.registry, buckets=buckets),
        )

    def alarm_gauge(self, severity: str, count: int) -> None:
        """Publishes the open alarms of one severity; pass it to ``mesh.ops.alarms.Alarms``."""
        self.gauge("alarms_open", "Open alarms.", ["severity"]).labels(severity).set(count)

    def render(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)

    def _get(self, kind: type[_M], name: str, make: Callable[[str], _M]) -> _M:
        full = f"keymesh_{name}"
        known = self._known.get(full)
        if known is None:
            known = self._known[full] = make(full)
        if not isinstance(known, kind):
            raise TypeError(f"{full} is already a {type(known).__name__.lower()}")
        return known


class Levels:
    """Gauges whose label values come and go: what a round does not name is taken off.

    Args:
        gauges: with the same labels, in the order of a round's values.
    """

    def __init__(self, *gauges: Gauge) -> None:
        self._gauges = gauges
        self._shown: set[tuple[str, ...]] = set()

    def show(self, values: Mapping[tuple[str, ...], Sequence[float]]) -> None:
        """One round: label values to a value for each gauge."""
        for labels in self._shown - values.keys():
            for gauge in self._gauges:
                gauge.remove(*labels)
        for labels, row in values.items():
            for gauge, value in zip(self._gauges, row, strict=True):
                gauge.labels(*labels).set(value)
        self._shown = set(values)


class Followed:
    """A counter that follows a count kept elsewhere; one that fell began anew."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._before: dict[tuple[str, ...], int] = {}

    def follow(self, count: int, *labels: str) -> None:
        """The count is now so high."""
        before = self._before.get(labels, 0)
        self._counter.labels(*labels).inc(count - before if count >= before else count)
        self._before[labels] = count
