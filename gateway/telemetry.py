"""Counts of the gateway: by method, code and reason. No SAE, no key_ID, no size of any key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from mesh.ops.metrics import Metrics


class _Increment(Protocol):
    def inc(self, amount: float = 1) -> None: ...


class _Observe(Protocol):
    def observe(self, amount: float) -> None: ...


class Telemetry:
    """The metrics of one gateway; children are looked up once, for the hot path.

    Args:
        metrics: registry of the process.
        methods: the words for methods, of all interfaces together.
    """

    def __init__(self, metrics: Metrics, methods: Iterable[str]) -> None:
        self._requests = metrics.counter("gateway_requests", "Requests answered.", ["method", "code"])
        self._seconds = metrics.histogram(
            "gateway_request_seconds", "From a request's header to its answer.", ["method"]
        )
        self._errors = metrics.counter("gateway_errors", "Requests refused or failed.", ["method", "reason"])
        self.connections = metrics.gauge("gateway_connections", "Open TLS connections.")
        self._counters: dict[tuple[str, int], _Increment] = {}
        self._histograms: dict[str, _Observe] = {
            method: self._seconds.labels(method) for method in (*methods, "other")
        }

    def answered(self, method: str, code: int, reason: str, seconds: float) -> None:
        """One request was answered; ``reason`` is empty for a 200."""
        counter = self._counters.get((method, code))
        if counter is None:
            counter = self._counters[method, code] = self._requests.labels(method, str(code))
        counter.inc()
        self._histograms[method].observe(seconds)
        if reason:
            self._errors.labels(method, reason).inc()

    def failed(self, method: str, reason: str) -> None:
        """Something ended without an answer."""
        self._errors.labels(method, reason).inc()


class PeerTelemetry:
    """What other owners' key managers answer, by peer and kind of request (``keys``, ``acks``, ``void``)."""

    def __init__(self, metrics: Metrics) -> None:
        self._requests = metrics.counter(
            "gateway_peer_requests",
            "Requests posted to a key manager; code none for no answer.",
            ["peer", "kind", "code"],
        )
        self._seconds = metrics.histogram(
            "gateway_peer_request_seconds", "From posting to the answer, or to its lack.", ["peer", "kind"]
        )
        self._up = metrics.gauge("gateway_peer_up", "1 while a key manager answers.", ["peer"])

    def performed(self, peer: str, kind: str, code: int | None, seconds: float) -> None:
        """One request was posted, or could not be."""
        self._requests.labels(peer, kind, "none" if code is None else str(code)).inc()
        self._seconds.labels(peer, kind).observe(seconds)

    def answers(self, peer: str, is_up: bool) -> None:
        """Whether a peer answers."""
        self._up.labels(peer).set(is_up)
