"""OpenTelemetry behind ``mesh.ops.tracing``: ids made from request ids, spans sent by OTLP over gRPC.

The only module that imports OpenTelemetry. Texts of exceptions are never sent: a foreign one may quote
its input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from mesh import __version__
from mesh.errors import MeshError
from mesh.ops.logging import origin
from mesh.ops.tracing import Attribute, Span

_EXPORT_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_MS = 3000


def trace_ids(identifier: str) -> tuple[int, int]:
    """Trace id and first span's id of a request; neither is ever 0."""
    digest = hashlib.sha256(b"keymesh request " + origin(identifier).encode()).digest()
    return int.from_bytes(digest[:16], "big") or 1, int.from_bytes(digest[16:24], "big") or 1


class _Ids(RandomIdGenerator):
    """Random span ids, except for the next first span."""

    def __init__(self) -> None:
        self.first: tuple[int, int] | None = None

    def generate_trace_id(self) -> int:
        return super().generate_trace_id() if self.first is None else self.first[0]

    def generate_span_id(self) -> int:
        return super().generate_span_id() if self.first is None else self.first[1]


class _Span:
    def __init__(self, inner: trace.Span) -> None:
        self._inner = inner

    def name(self, name: str) -> None:
        """See ``mesh.ops.tracing.Span``."""
        self._inner.update_name(name)

    def note(self, attributes: Mapping[str, Attribute]) -> None:
        """See ``mesh.ops.tracing.Span``."""
        self._inner.set_attributes(attributes)


class OtelBackend:
    """Makes spans of one process.

    Args:
        exporter: takes what is finished, from a thread of its own; when it is slow, spans are dropped.
        sample_ratio: part of the requests that is traced; all processes choose the same ones.
        role, member: who this process is.
    """

    def __init__(self, exporter: SpanExporter, sample_ratio: float, *, role: str, member: str) -> None:
        self._ids = _Ids()
        self._provider = TracerProvider(
            sampler=TraceIdRatioBased(sample_ratio),
            resource=Resource(
                {
                    "service.name": f"keymesh-{role}",
                    "service.instance.id": member,
                    "service.version": __version__,
                }
            ),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("keymesh", __version__)

    @contextmanager
    def span(
        self, name: str, identifier: str, attributes: Mapping[str, Attribute], *, is_first: bool
    ) -> Iterator[Span]:
        """See ``mesh.ops.tracing.Backend``."""
        inner = self._start(name, identifier, attributes, is_first=is_first)
        with trace.use_span(inner, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield _Span(inner)
            except BaseException as exc:
                reason = exc.reason.value if isinstance(exc, MeshError) else type(exc).__name__
                inner.set_status(trace.StatusCode.ERROR, reason)
                raise

    def record(self, name: str, identifier: str, attributes: Mapping[str, Attribute], began_ns: int) -> None:
        """See ``mesh.ops.tracing.Backend``."""
        self._start(name, identifier, attributes, is_first=False, began_ns=began_ns).end()

    def close(self) -> None:
        """See ``mesh.ops.tracing.Backend``."""
        self._provider.force_flush(_CLOSE_TIMEOUT_MS)
        self._provider.shutdown()

    def _start(
        self,
        name: str,
        identifier: str,
        attributes: Mapping[str, Attribute],
        *,
        is_first: bool,
        began_ns: int | None = None,
    ) -> trace.Span:
        trace_id, first_id = trace_ids(identifier)
        context = None
        if is_first:
            self._ids.first = (trace_id, first_id)
            context = Context()
        elif trace.get_current_span().get_span_context().trace_id != trace_id:
            first = trace.SpanContext(
                trace_id, first_id, is_remote=True, trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED)
            )
            context = trace.set_span_in_context(trace.NonRecordingSpan(first), Context())
        try:
            return self._tracer.start_span(
                name,
                context,
                attributes={"keymesh.request_id": identifier, **attributes},
                start_time=began_ns,
            )
        finally:
            self._ids.first = None


def connect(
    endpoint: str, roots: bytes | None, sample_ratio: float, *, role: str, member: str
) -> OtelBackend:
    """A backend that sends to an OTLP collector; see ``mesh.ops.tracing.TracingSection``."""
    exporter = OTLPSpanExporter(
        endpoint=endpoint,
        insecure=roots is None,
        credentials=None if roots is None else grpc.ssl_channel_credentials(roots),
        timeout=_EXPORT_TIMEOUT_S,
    )
    return OtelBackend(exporter, sample_ratio, role=role, member=member)
