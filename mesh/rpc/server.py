"""The gRPC server of a node or hub: who gets in, and what callers see of errors.

Owns admission (certificate, deny list, role per method), the request id of each
call, and the translation of errors; services register unchanged and never see a
stranger. Certificates and deny list are followed without a restart. A caller sees a
reason and a message of ours, never a traceback nor the text of a foreign exception.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, NoReturn, TypeAlias, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from mesh.core.identity import Identity
from mesh.errors import CallerError, ConfigError, ErrorReason, MeshError, NotAuthorizedError, UnavailableError
from mesh.ops.denylist import DenyList
from mesh.ops.logging import clean_request_id, request_id
from mesh.ops.metrics import Metrics
from mesh.ops.tls import TlsFiles
from mesh.ops.tracing import is_traced, span
from mesh.ops.watch import FileWatch
from mesh.rpc.credentials import MAX_MESSAGE_BYTES, server_configuration
from mesh.rpc.identity import PeerReader
from mesh.rpc.roles import require_admitted
from mesh.rpc.status import REQUEST_ID_KEY, status_of, trailing_metadata

_LOG = logging.getLogger("keymesh.rpc")
_CALLER: ContextVar[Identity] = ContextVar("keymesh_caller")

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 4),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Two processes on one port would each get half of the connections, silently.
    ("grpc.so_reuseport", 0),
)

_Handlers: TypeAlias = "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"
_Context = grpc.aio.ServicerContext[Any, Any]
_Admit = Callable[[_Context], None]
_Refuse = Callable[[_Context, BaseException], Awaitable[NoReturn]]


def caller() -> Identity:
    """Who made the call that is being served; only inside a service's method.

    Raises:
        LookupError: outside of a call.
    """
    return _CALLER.get()


class RpcServer:
    """A gRPC server on one port of the node plane.

    Args:
        identity: who this server is; its certificate must say the same.
        files: roots of the node plane, own certificate and key, deny list.
        metrics: counts calls and refusals.
        max_concurrent: calls served at a time, streams included; more are refused.
        now_s: seconds since the epoch.
        interval_s: least time between two looks at files.

    Raises:
        ConfigError: an unusable file or certificate, in words.
    """

    def __init__(
        self,
        identity: Identity,
        files: TlsFiles,
        *,
        metrics: Metrics | None = None,
        max_concurrent: int = 2048,
        now_s: Callable[[], float] = time.time,
        interval_s: float = 1.0,
    ) -> None:
        self._identity = identity
        self._files = files
        self._now_s = now_s
        self._peers = PeerReader(identity.domain, DenyList(files.deny_list, interval_s=interval_s))
        self._watch = FileWatch([files.ca, files.cert, files.key], interval_s=interval_s)
        self._configuration = server_configuration(files, identity)
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=max_concurrent)
        self._services: list[str] = []
        self._health = HealthServicer()
        metrics = metrics or Metrics(with_process=False)
        self._refused = metrics.counter("rpc_refused", "Calls refused before a service.", ["method"])
        self._failed = metrics.counter("rpc_failed", "Calls that failed.", ["method", "reason"])
        self._seconds = metrics.histogram("rpc_seconds", "Calls of one answer, served.", ["method"])
        self.add(health_pb2_grpc.add_HealthServicer_to_server, self._health)

    def add(self, register: Callable[[Any, Any], None], servicer: object) -> None:
        """Adds a service through its generated ``add_XServicer_to_server`` function.

        Its methods must be coroutine functions or asynchronous generators.
        """
        register(servicer, _Registrar(self._add))

    async def start(self, address: str) -> int:
        """Starts serving.

        Args:
            address: ``host:port``; port 0 takes a free one.

        Returns:
            The port.

        Raises:
            ConfigError: the address cannot be bound.
        """
        names = [*self._services, reflection.SERVICE_NAME]
        self.add(
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server,
            reflection.aio.ReflectionServicer(names),
        )
        credentials = grpc.dynamic_ssl_server_credentials(
            self._configuration,
            # The stubs do not know that None keeps what is in force.
            cast("Callable[[], grpc.ServerCertificateConfiguration]", self._renewed),
            require_client_authentication=True,
        )
        try:
            port = self._server.add_secure_port(address, credentials)
        except RuntimeError as exc:
            raise ConfigError("listen.grpc cannot be bound", facts={"address": address}) from exc
        if port == 0:
            raise ConfigError("listen.grpc cannot be bound", facts={"address": address})
        await self._server.start()
        for name in self._services:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def set_serving(self, is_serving: bool) -> None:
        """Publishes through the health service whether the node can do its work."""
        state = (
            health_pb2.HealthCheckResponse.SERVING
            if is_serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *self._services):
            await self._health.set(name, state)

    async def stop(self, grace_s: float = 5.0) -> None:
        """Says NOT_SERVING, takes no more calls, and lets those in flight end within the grace."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC at each handshake, from a thread of its own; None keeps what is in force."""
        if not self._watch.changed():
            return None
        try:
            configuration = server_configuration(self._files, self._identity)
        except ConfigError as exc:
            _LOG.error("certificate not renewed, the last one stays in force", extra={"cause": str(exc)})
            return None
        _LOG.info("certificate renewed", extra={"cert": str(self._files.cert)})
        return configuration

    def _add(self, service: str, handlers: _Handlers) -> None:
        self._services.append(service)
        guarded = {name: self._guard(handler, f"/{service}/{name}") for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, guarded),))
        self._server.add_registered_method_handlers(service, guarded)

    def _guard(
        self, handler: grpc.RpcMethodHandler[Any, Any], method: str
    ) -> grpc.RpcMethodHandler[Any, Any]:
        observe = None if handler.response_streaming else partial(self._observe, method)
        if is_traced() and handler.unary_unary:
            handler = grpc.unary_unary_rpc_method_handler(
                _traced(cast("Callable[[Any, _Context], Awaitable[Any]]", handler.unary_unary), method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return _guard(handler, self.admission(method), self._refusal(method), observe)

    def _observe(self, method: str, seconds: float) -> None:
        # Looked up at each call: most methods of a node are never called.
        self._seconds.labels(method).observe(seconds)

    def admission(self, method: str) -> _Admit:
        """The check of who calls ``method``; long streams ask it again for each message.

        The check raises NotAuthorizedError: the certificate expired, is denied, or has no such role.
        """

        def admit(context: _Context) -> None:
            request_id.set(clean_request_id(_sent_request_id(context)))
            try:
                identity = self._peers.read(context.auth_context(), self._now_s())
                require_admitted(method, identity.role)
            except NotAuthorizedError as exc:
                self._refused.labels(method).inc()
                _LOG.warning(
                    "call refused", extra={"method": method, "peer": context.peer(), "cause": str(exc)}
                )
                raise
            _CALLER.set(identity)

        return admit

    def _refusal(self, method: str) -> _Refuse:
        async def refuse(context: _Context, exc: BaseException) -> NoReturn:
            error = _ours(exc)
            if error is None:
                _LOG.error("call failed for an internal reason", extra={"method": method}, exc_info=exc)
                error = UnavailableError("internal error", reason=ErrorReason.INTERNAL)
            self._failed.labels(method, error.reason.value).inc()
            metadata = (*trailing_metadata(error), (REQUEST_ID_KEY, request_id.get()))
            await context.abort(status_of(error.reason), _details(error), metadata)

        return refuse


class _Registrar:
    """Stands in for a server while generated code registers a service's methods."""

    def __init__(self, add: Callable[[str, _Handlers], None]) -> None:
        self._add = add

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Ignored: the same methods come named by ``add_registered_method_handlers``."""

    def add_registered_method_handlers(self, service: str, handlers: _Handlers) -> None:
        """Takes a service's methods by name."""
        self._add(service, handlers)


def _guard(
    handler: grpc.RpcMethodHandler[Any, Any],
    admit: _Admit,
    refuse: _Refuse,
    observe: Callable[[float], None] | None,
) -> grpc.RpcMethodHandler[Any, Any]:
    """Wraps a method once, at registration, so that a call pays for no chain of interceptors.

    ``observe`` takes the seconds of a call; None for methods whose calls last as long as a stream does.
    """
    behaviour = cast(
        "Callable[[Any, _Context], Any]",
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream,
    )
    guarded: Callable[[Any, _Context], Any]
    if inspect.isasyncgenfunction(behaviour):
        guarded = _guarded_stream(behaviour, admit, refuse)
    else:
        guarded = _guarded_call(behaviour, admit, refuse)
        if observe is not None:
            guarded = _timed(guarded, observe)
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(guarded, handler.request_deserializer, handler.response_serializer)


def _guarded_call(
    behaviour: Callable[[Any, _Context], Awaitable[Any]], admit: _Admit, refuse: _Refuse
) -> Callable[[Any, _Context], Awaitable[Any]]:
    async def guarded(request: Any, context: _Context) -> Any:
        try:
            admit(context)
            return await behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as exc:  # noqa: BLE001 - turned into a status; nothing foreign reaches the caller
            await refuse(context, exc)

    return guarded


def _traced(
    behaviour: Callable[[Any, _Context], Awaitable[Any]], method: str
) -> Callable[[Any, _Context], Awaitable[Any]]:
    """A span for calls that are made for a request: their caller sent its id."""

    async def traced(request: Any, context: _Context) -> Any:
        if _sent_request_id(context) is None:
            return await behaviour(request, context)
        with span(method.removeprefix("/mesh.v1.")):
            return await behaviour(request, context)

    return traced


def _timed(
    guarded: Callable[[Any, _Context], Awaitable[Any]], observe: Callable[[float], None]
) -> Callable[[Any, _Context], Awaitable[Any]]:
    async def timed(request: Any, context: _Context) -> Any:
        began_s = time.perf_counter()
        try:
            return await guarded(request, context)
        finally:
            observe(time.perf_counter() - began_s)

    return timed


def _guarded_stream(
    behaviour: Callable[[Any, _Context], AsyncIterator[Any]], admit: _Admit, refuse: _Refuse
) -> Callable[[Any, _Context], AsyncIterator[Any]]:
    async def guarded(request: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            admit(context)
            async for response in behaviour(request, context):
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception as exc:  # noqa: BLE001 - turned into a status; nothing foreign reaches the caller
            await refuse(context, exc)

    return guarded


def _sent_request_id(context: _Context) -> object:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY:
            return value
    return None


def _ours(exc: BaseException) -> MeshError | None:
    """The first of our errors, also inside what a TaskGroup raised."""
    if isinstance(exc, MeshError):
        return exc
    if isinstance(exc, BaseExceptionGroup):
        return next((found for inner in exc.exceptions if (found := _ours(inner)) is not None), None)
    return None


def _details(error: MeshError) -> str:
    """What the caller reads: facts about its own request, not about this node's files and peers.

    Authentication failures all look alike from outside.
    """
    if isinstance(error, NotAuthorizedError):
        return "not authorized"
    return (str(error) if isinstance(error, CallerError) else error.message)[:1024]
