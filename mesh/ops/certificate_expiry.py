"""When certificates end, as a metric: those that a process shows, and the roots that it trusts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from prometheus_client import Gauge

from mesh.ops.certificates import UNREADABLE
from mesh.ops.metrics import Metrics
from mesh.ops.watch import FileWatch


def expiry_gauge(metrics: Metrics) -> Gauge:
    """``keymesh_certificate_expiry_timestamp_seconds`` of a process, by use."""
    return metrics.gauge(
        "certificate_expiry_timestamp_seconds", "When the certificate ends, seconds since 1970.", ["use"]
    )


def certificate_expiry_s(path: Path) -> float:
    """When the first certificate of a PEM file ends, seconds since 1970; 0 if it cannot be read."""
    return next(iter(_ends(path)), 0.0)


class CertificateExpiry:
    """Follows certificate files.

    Args:
        shown: by use, the files with the process's own certificates; the first of each counts.
        roots: by use, the files with roots; the last to end counts, for old and new stand side by side
            while a root is being replaced.
    """

    def __init__(self, metrics: Metrics, shown: Mapping[str, Path], roots: Mapping[str, Path]) -> None:
        self._gauge = expiry_gauge(metrics)
        self._shown = dict(shown)
        self._roots = dict(roots)
        self._watch = FileWatch([*shown.values(), *roots.values()], interval_s=1.0)
        self._read()

    def sample(self) -> None:
        """Read the files again if they changed."""
        if self._watch.changed():
            self._read()

    def _read(self) -> None:
        for use, path in self._shown.items():
            self._gauge.labels(use).set(certificate_expiry_s(path))
        for use, path in self._roots.items():
            self._gauge.labels(use).set(max(_ends(path), default=0.0))


def _ends(path: Path) -> list[float]:
    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
        return [one.not_valid_after_utc.timestamp() for one in certificates]
    except (OSError, *UNREADABLE):
        return []
