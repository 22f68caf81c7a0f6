"""What passes between the HTTPS listener and an interface behind it: requests, answers, refusals.

Knows no sockets, no TLS and no interface; ETSI 014 and 020 both stand behind the same listener.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol

Details = Sequence[Mapping[str, object]]


class HttpRefusal(Exception):  # noqa: N818 - it is a refusal, not a fault of ours
    """A request that HTTP itself refuses, before any key rule is asked.

    Args:
        status: 400, 401, 404, 405, 413, 415 or 503.
        message: for a person; names the member, header or path at fault.
        reason: stable word for metrics and logs.
        allow: the methods of a 405, for its ``Allow`` header.
        details: name/value objects for the Error body.
        close: True if the connection cannot go on, for instance with a body left unread.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: str,
        allow: str = "",
        details: Details = (),
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason
        self.allow = allow
        self.details = details
        self.close = close


class Identified(Protocol):
    """Whom a certificate stands for, what a deny list knows it by, and when it ends."""

    @property
    def caller_id(self) -> str:
        """Under which id it calls."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, lower-case hex."""
        ...

    @property
    def serial(self) -> str:
        """Its serial number, lower-case hex."""
        ...

    @property
    def not_after_s(self) -> float:
        """Its end, seconds since the epoch."""
        ...


@dataclass(slots=True)
class Request:
    """One HTTP request.

    Attributes:
        verb: the HTTP method.
        target: raw request target, query included, nothing decoded.
        caller: who calls, from the certificate; empty for a stranger.
        request_id: goes into every log line and RPC.
        content_type: raw ``Content-Type`` header, empty if absent.
        content_encoding: raw ``Content-Encoding`` header, empty if absent.
        read_body: reads the bounded body; raises ``HttpRefusal`` 400, 413 or 503.
    """

    verb: str
    target: str
    caller: str
    request_id: str
    content_type: str
    content_encoding: str
    read_body: Callable[[], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes out: ``method`` and ``reason`` are for metrics and logs only."""

    status: int
    body: bytes
    method: str
    reason: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    close: bool = False


class Api(Protocol):
    """An interface behind the listener."""

    @property
    def methods(self) -> Sequence[str]:
        """The words for metrics, "other" excluded."""
        ...

    async def answer(self, request: Request) -> Answer:
        """Answer one request; never raises what the request or the node caused."""
        ...

    async def refuse_stranger(self, request: Request) -> Answer:
        """Answer somebody whose certificate stands for nobody here."""
        ...

    def refused(self, refusal: HttpRefusal) -> Answer:
        """The answer for what HTTP itself refused."""
        ...


async def read_json(request: Request) -> bytes:
    """The body of a request that must be JSON in UTF-8, without any content encoding.

    Raises:
        HttpRefusal: 415 for anything else; what ``read_body`` raises.
    """
    if request.content_encoding and request.content_encoding.strip().lower() != "identity":
        raise HttpRefusal(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "a body must be sent without Content-Encoding",
            reason="unsupported-media-type",
            close=True,
        )
    if request.content_type:
        media, _, parameters = request.content_type.partition(";")
        charset = parameters.strip().lower().replace('"', "").replace(" ", "")
        if media.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
            body = await request.read_body()
            if body:  # a type without a body says nothing
                raise HttpRefusal(
                    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                    "a body must be application/json in UTF-8",
                    reason="unsupported-media-type",
                )
            return body
    return await request.read_body()
