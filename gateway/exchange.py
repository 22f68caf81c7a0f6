"""What passes between the HTTPS listener and an interface behind it: requests, answers, refusals.

Knows no sockets, no TLS and no interface; ETSI 014 and 020 both stand behind the same listener.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class Request:
    """One HTTP request of an identified caller.

    Attributes:
        verb: the HTTP method.
        target: raw request target, query included, nothing decoded.
        caller: who calls, from the certificate.
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

    @property
    def unauthorized(self) -> Answer:
        """The answer to whom the certificate does not name."""
        ...

    async def answer(self, request: Request) -> Answer:
        """Answer one request; never raises what the request or the node caused."""
        ...

    def refused(self, refusal: HttpRefusal) -> Answer:
        """The answer for what HTTP itself refused."""
        ...
