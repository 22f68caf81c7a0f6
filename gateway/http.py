"""The HTTPS listener: connections, bounds, bytes in and bytes out.

Owns aiohttp's low-level server, and what it would do differently from the standards: every error leaves
as the interface's own error object, without HTML or traceback. The caller's identity is taken once from the
certificate that the handshake verified and kept with the connection; it is taken again when the
mapping changes. An answer is one write: header and body in one TLS record, so that no timer of
TCP can come between them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Final, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from gateway.config import Limits
from gateway.exchange import Answer, Api, HttpRefusal, Identified, Request
from gateway.telemetry import Telemetry
from mesh.client import NotAuthorizedError
from mesh.ops.logging import adopted_request_id

_LOG = logging.getLogger("keymesh.gateway")

Identify = Callable[[bytes], Identified]

_STATUS_LINES: Final[Mapping[int, str]] = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus
}
_JSON: Final = "Content-Type: application/json\r\nCache-Control: no-store\r\nContent-Length: "
_EMPTY: Final = "Cache-Control: no-store\r\nContent-Length: "
# What hangs beyond the drain is cancelled within twice as long.
_CUT_S: Final = 0.1
_INTERNAL: Final = HttpRefusal(HTTPStatus.SERVICE_UNAVAILABLE, "key data access error", reason="internal")


class Reply(web.StreamResponse):
    """An answer whose bytes are ready: one write, no header objects.

    Leaves out ``StreamResponse.__init__`` on purpose: it builds header maps that nobody reads, and
    costs more than all of the answer.
    """

    def __init__(self, data: bytes, protocol: Connection, *, keep_alive: bool, timeout_s: float) -> None:
        self._data = data
        self._protocol = protocol
        self._keep_alive = keep_alive
        self._timeout_s = timeout_s

    async def prepare(self, request: web.BaseRequest) -> None:
        """Hand the bytes to the transport; wait only if the client does not read.

        Raises:
            ConnectionError: the client is gone, or reads nothing for ``timeout_s``.
        """
        transport = self._protocol.transport
        if transport is None:
            raise ConnectionResetError("connection lost")
        transport.write(self._data)
        if self._protocol.writing_paused:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._protocol.drained()
            except TimeoutError as error:
                transport.abort()
                raise ConnectionResetError("the client does not read") from error

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write."""


class Connection(RequestHandler):
    """One TLS connection and who is at its other end."""

    __slots__ = ("_generation", "_identity", "_is_refused", "_resumed", "_server")

    def __init__(self, server: RestServer, **options: Any) -> None:
        super().__init__(server.low_level, **options)
        self._server = server
        self._identity: Identified | None = None
        self._generation = -1
        self._is_refused = False
        self._resumed: asyncio.Event | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Bound the number of connections and of those that never ask anything."""
        super().connection_made(transport)
        raw: socket.socket | None = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self._server.admit(self):
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Wake a writer that waits in vain."""
        super().connection_lost(exc)
        self._server.forget(self)
        if self._resumed is not None:
            self._resumed.set()

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._resumed is not None:
            self._resumed.set()

    async def drained(self) -> None:
        """Wait until the client has read, or is gone."""
        self._resumed = asyncio.Event()
        try:
            await self._resumed.wait()
        finally:
            self._resumed = None
        if self.transport is None:
            raise ConnectionResetError("connection lost")

    def first_refusal(self) -> bool:
        """True the first time it is asked."""
        is_first, self._is_refused = not self._is_refused, True
        return is_first

    def caller(self, identify: Identify, generation: int) -> Identified:
        """Who is at the other end, read once per mapping.

        Raises:
            NotAuthorizedError: the certificate stands for nobody.
        """
        if self._generation == generation and self._identity is not None:
            return self._identity
        self._identity = None
        der = None
        if self.transport is not None:
            tls = self.transport.get_extra_info("ssl_object")
            der = tls.getpeercert(True) if tls is not None else None
        if der is None:
            raise NotAuthorizedError("the connection has no client certificate")
        self._identity = identify(der)
        self._generation = generation
        return self._identity

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP gets a 400 with an error body, a fault of ours a 503; then the end."""
        if status == HTTPStatus.BAD_REQUEST:
            refusal = HttpRefusal(status, "the request is not valid HTTP/1.1", reason="malformed-http")
        else:
            _LOG.error("request failed", exc_info=exc)
            refusal = _INTERNAL
        answer = replace(self._server.api.refused(refusal), close=True)
        return self._server.reply(answer, self, "", keep_alive=False, is_old=False, is_head=False)


class RestServer:
    """Serves one interface over HTTPS.

    Args:
        api: what answers.
        identify: from a verified certificate (DER) to a caller; raises ``NotAuthorizedError``.
        is_denied: whether a certificate was withdrawn since.
        limits: bounds of connections, requests, bodies and waits.
        telemetry: counts.
        adopts_request_ids: callers name their requests (``X-Request-Id``), and their word goes on, with
            their own id in front.
        now_s: seconds since the epoch.
    """

    def __init__(
        self,
        api: Api,
        *,
        identify: Identify,
        is_denied: Callable[[Identified], bool],
        limits: Limits,
        telemetry: Telemetry,
        adopts_request_ids: bool = False,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self.api = api
        self._adopts_request_ids = adopts_request_ids
        self._identify = identify
        self._is_denied = is_denied
        self._limits = limits
        self._telemetry = telemetry
        self._now_s = now_s
        self._generation = 0
        self._connections: set[Connection] = set()
        self._in_flight = 0
        self._body_bytes = 0
        self._is_draining = False
        self._date = (0, "")
        self._request_prefix = secrets.token_hex(4)
        self._request_numbers = itertools.count(1)
        self.low_level = web.Server(cast(Any, self._handle))

    def __call__(self) -> Connection:
        """A protocol for one more connection."""
        limits = self._limits
        return Connection(
            self,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=limits.keepalive_s,
            access_log=None,
            max_line_size=limits.max_header_bytes,
            max_field_size=limits.max_header_bytes,
            max_headers=64,
            lingering_time=2.0,
            auto_decompress=False,
        )

    def identities_changed(self) -> None:
        """Identify every connection anew at its next request."""
        self._generation += 1

    def admit(self, connection: Connection) -> bool:
        """Whether one more connection fits."""
        self._connections.add(connection)
        self._telemetry.connections.inc()
        if len(self._connections) > self._limits.max_connections or self._is_draining:
            self._telemetry.failed("other", "too-many-connections")
            return False
        return True

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        self._connections.discard(connection)
        self._telemetry.connections.dec()

    async def drain(self, timeout_s: float) -> None:
        """Answer what is being asked, close what is idle, and end within ``timeout_s``: cut off the rest."""
        self._is_draining = True
        self.low_level.pre_shutdown()  # wakes idle connections, which would wait for the timeout otherwise
        try:
            async with asyncio.timeout(timeout_s):  # aiohttp takes its own twice for a call that hangs
                await self.low_level.shutdown(timeout_s)
        except TimeoutError:
            _LOG.warning("requests cut off", extra={"count": self._in_flight})
            await self.low_level.shutdown(_CUT_S)

    async def _handle(self, http: web.BaseRequest) -> web.StreamResponse:
        started = time.perf_counter()
        connection = cast(Connection, http.protocol)
        request_id = f"{self._request_prefix}-{next(self._request_numbers):08x}"
        self._in_flight += 1
        try:
            answer = await self._answer(http, connection, request_id)
        except Exception:  # noqa: BLE001 - the last line of defence: a caller gets a 503, the log the story
            _LOG.exception("request failed", extra={"request_id": request_id})
            answer = self.api.refused(_INTERNAL)
        finally:
            self._in_flight -= 1
        self._telemetry.answered(answer.method, answer.status, answer.reason, time.perf_counter() - started)
        return self.reply(
            answer,
            connection,
            request_id,
            keep_alive=http.keep_alive and not answer.close and not self._is_draining,
            is_old=http.version < (1, 1),
            is_head=http.method == "HEAD",
        )

    async def _answer(self, http: web.BaseRequest, connection: Connection, request_id: str) -> Answer:
        caller_id = ""
        try:
            caller_id = self._authenticate(connection).caller_id
        except NotAuthorizedError as error:
            if connection.first_refusal():  # once per connection: a stranger must not fill the log
                _LOG.warning("caller refused", extra={"cause": error.message, "request_id": request_id})
        if self._in_flight > self._limits.max_requests_in_flight:
            refusal = HttpRefusal(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many requests in flight", reason="busy", close=True
            )
            return self.api.refused(refusal)
        headers = http.headers
        if self._adopts_request_ids and caller_id:
            request_id = adopted_request_id(caller_id, headers.get("X-Request-Id", ""), request_id)
        request = Request(
            http.method,
            http.raw_path,
            caller_id,
            request_id,
            headers.get("Content-Type", ""),
            headers.get("Content-Encoding", ""),
            lambda: self._read_body(http),
        )
        if not caller_id:
            return await self.api.refuse_stranger(request)
        return await self.api.answer(request)

    def _authenticate(self, connection: Connection) -> Identified:
        caller = connection.caller(self._identify, self._generation)
        if caller.not_after_s < self._now_s():
            raise NotAuthorizedError("the client certificate has expired")
        if self._is_denied(caller):
            raise NotAuthorizedError("the client certificate is on the deny list")
        return caller

    async def _read_body(self, http: web.BaseRequest) -> bytes:
        """The whole body, within the bounds of size, of all bodies together, and of time.

        Raises:
            HttpRefusal: 413, 503 or 400.
        """
        if not http.body_exists:
            return b""
        limit = self._limits.max_body_bytes
        length = http.content_length
        if length is not None and length > limit:
            raise _too_large(limit)
        reserved = limit if length is None else length
        if self._body_bytes + reserved > self._limits.max_body_bytes_in_flight:
            raise HttpRefusal(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many bodies in flight", reason="busy", close=True
            )
        if http.headers.get("Expect", "").lower() == "100-continue" and http.transport is not None:
            http.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._body_bytes += reserved
        try:
            body = bytearray()
            async with asyncio.timeout(self._limits.body_timeout_s):
                while chunk := await http.content.readany():
                    body += chunk
                    if len(body) > limit:
                        raise _too_large(limit)
            return bytes(body)
        except TimeoutError as error:
            raise HttpRefusal(
                HTTPStatus.BAD_REQUEST, "the body did not arrive in time", reason="slow-body", close=True
            ) from error
        except web.RequestPayloadError as error:
            raise HttpRefusal(
                HTTPStatus.BAD_REQUEST,
                "the body is not as its header says",
                reason="malformed-http",
                close=True,
            ) from error
        finally:
            self._body_bytes -= reserved

    def reply(
        self,
        answer: Answer,
        connection: Connection,
        request_id: str,
        *,
        keep_alive: bool,
        is_old: bool,
        is_head: bool,
    ) -> Reply:
        """The bytes of an answer. ``is_old``: HTTP/1.0, where keep-alive must be said."""
        second = int(self._now_s())
        if self._date[0] != second:
            self._date = (second, f"\r\nDate: {formatdate(second, usegmt=True)}\r\nX-Request-Id: ")
        head = f"{_STATUS_LINES[answer.status]}{_JSON if answer.body else _EMPTY}{len(answer.body)}"
        head += f"{self._date[1]}{request_id}\r\n"
        if answer.headers:
            head += "".join([f"{name}: {value}\r\n" for name, value in answer.headers.items()])
        if not keep_alive:
            head += "Connection: close\r\n"
        elif is_old:
            head += "Connection: keep-alive\r\n"
        data = (head + "\r\n").encode("latin-1")
        if not is_head:
            data += answer.body
        return Reply(data, connection, keep_alive=keep_alive, timeout_s=self._limits.write_timeout_s)


def _too_large(limit: int) -> HttpRefusal:
    return HttpRefusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the body is larger than {limit} bytes",
        reason="body-too-large",
        details=({"max_body_bytes": limit},),
        close=True,
    )
