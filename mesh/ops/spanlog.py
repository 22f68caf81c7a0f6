"""Spans as lines of the process's log, to the microsecond: behind ``mesh.ops.tracing`` without a collector.

Each line says what was done, when it began and how long it took, with the request id of whoever was
served; ``keymesh lab trace`` lays the lines of all processes side by side.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mesh.ops.logging import serving

LOGGER = "keymesh.span"
_LOG = logging.getLogger(LOGGER)


class _Span:
    def __init__(self, name: str, attributes: Mapping[str, object]) -> None:
        self.title = name
        self.facts = dict(attributes)

    def name(self, name: str) -> None:
        """See ``mesh.ops.tracing.Span``."""
        self.title = name

    def note(self, attributes: Mapping[str, object]) -> None:
        """See ``mesh.ops.tracing.Span``."""
        self.facts |= attributes


class LogBackend:
    """Writes a line for each span when it ends."""

    @contextmanager
    def span(
        self, name: str, identifier: str, attributes: Mapping[str, object], *, is_first: bool
    ) -> Iterator[_Span]:
        """See ``mesh.ops.tracing.Backend``."""
        began_ns = time.time_ns()
        own = _Span(name, attributes)
        try:
            yield own
        finally:
            self.record(own.title, identifier, own.facts, began_ns)

    def record(self, name: str, identifier: str, attributes: Mapping[str, object], began_ns: int) -> None:
        """See ``mesh.ops.tracing.Backend``."""
        took_us = (time.time_ns() - began_ns) // 1000
        extra = {"began_us": began_ns // 1000, "took_us": took_us, "attributes": dict(attributes)}
        with serving(identifier):
            _LOG.info(name, extra=extra)

    def close(self) -> None:
        """Nothing is held back."""
