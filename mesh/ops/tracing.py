"""Spans of requests, for OpenTelemetry; off unless configured, and then nothing of it is imported.

The id of a trace is made from the request id, and so is the id of its first span, the gateway's:
every process finds its place in the trace from the request id that it is told anyway, behind links
and hubs too. Work that serves no request has no spans. Like logging, tracing belongs to the
process: it is set up once, before anything that is to be traced is built. Attributes follow the
rule of metrics: ids of nodes, methods, counts and reasons, never key facts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Protocol

import msgspec

from mesh.errors import ConfigError
from mesh.ops.logging import request_id
from mesh.ops.spanlog import LogBackend

Attribute = str | int | float | bool


class TracingSection(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Where spans go: an OTLP collector's gRPC port, ``host:port``, or the process's own log.

    Without ``ca`` (PEM roots of the collector) they go in clear: inside the machine or pod only.
    """

    endpoint: (
        Annotated[str, msgspec.Meta(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$")] | None
    ) = None
    ca: str | None = None
    sample_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    # To the log, all of them, instead of a collector: for one look at a quiet network.
    log: bool = False


class Span(Protocol):
    """A span under way."""

    def name(self, name: str) -> None:
        """Call it something better than at its start."""
        ...

    def note(self, attributes: Mapping[str, Attribute]) -> None:
        """Add attributes."""
        ...


class Backend(Protocol):
    """What makes spans and sends them: ``mesh.ops.otel``."""

    def span(
        self, name: str, identifier: str, attributes: Mapping[str, Attribute], *, is_first: bool
    ) -> AbstractContextManager[Span]:
        """A span of the request ``identifier``, current inside."""
        ...

    def record(self, name: str, identifier: str, attributes: Mapping[str, Attribute], began_ns: int) -> None:
        """A span that ends now."""
        ...

    def close(self) -> None:
        """Sends what is left, within seconds."""
        ...


class Served(Protocol):
    """A message that names the request it belongs to."""

    @property
    def request_id(self) -> str:
        """Empty for none."""
        ...


class _Off:
    def name(self, name: str) -> None:
        """There is no span."""

    def note(self, attributes: Mapping[str, Attribute]) -> None:
        """There is no span."""


class _Process:
    backend: Backend | None = None


_OFF: AbstractContextManager[Span] = nullcontext(_Off())


def setup_tracing(settings: TracingSection | None, *, role: str, member: str, base: Path = Path()) -> None:
    """Sends the process's spans where ``settings`` say; None leaves tracing off.

    Args:
        role: ``node``, ``hub`` or ``gateway``.
        member: the process's own id.
        base: directory that a relative ``ca`` starts from.

    Raises:
        ConfigError: OpenTelemetry is not installed, or ``ca`` cannot be read.
    """
    if settings is None:
        return
    if settings.log:
        use_backend(LogBackend())
        return
    if settings.endpoint is None:
        raise ConfigError("tracing.endpoint: needed, unless spans go to the log (tracing.log: true)")
    try:
        from mesh.ops.otel import connect  # noqa: PLC0415 - an extra, imported only when wanted
    except ImportError as exc:
        raise ConfigError(
            "tracing needs OpenTelemetry: install keymesh[otel], or remove the section"
        ) from exc
    roots = None
    if settings.ca is not None:
        try:
            roots = (base / settings.ca).read_bytes()
        except OSError as exc:
            raise ConfigError(
                f"tracing.ca: cannot be read: {exc.strerror}", facts={"file": base / settings.ca}
            ) from exc
    use_backend(connect(settings.endpoint, roots, settings.sample_ratio, role=role, member=member))


def use_backend(backend: Backend | None) -> None:
    """Traces with ``backend`` from now on; what is built already stays untraced."""
    _Process.backend = backend


def close_tracing() -> None:
    """Sends what is left and switches tracing off; at the end of a process."""
    backend, _Process.backend = _Process.backend, None
    if backend is not None:
        backend.close()


def is_traced() -> bool:
    """Whether spans are made: asked when something is built, so that what is off costs nothing."""
    return _Process.backend is not None


def span(name: str, *, is_first: bool = False, **attributes: Attribute) -> AbstractContextManager[Span]:
    """A span of the request being served; nothing when there is none, or tracing is off.

    Args:
        is_first: the span that all others of the request belong to: the gateway's.
    """
    backend = _Process.backend
    if backend is None or not (identifier := request_id.get()):
        return _OFF
    return backend.span(name, identifier, attributes, is_first=is_first)


def batch(name: str, requests: Iterable[Served]) -> AbstractContextManager[None]:
    """Spans of equal length, one for each request of a batch that is served as one."""
    backend = _Process.backend
    return nullcontext() if backend is None else _batch(backend, name, requests)


@contextmanager
def _batch(backend: Backend, name: str, requests: Iterable[Served]) -> Iterator[None]:
    began_ns = time.time_ns()
    try:
        yield
    finally:
        for request in requests:
            if request.request_id:
                backend.record(name, request.request_id, {}, began_ns)
