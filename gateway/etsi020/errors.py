"""What a peer reads when a request fails (ETSI GS QKD 020 V1.1.1, ``problem_details``).

Owns the one table from problems to status, ``type`` and the name in ``details``. The body is RFC 9457's
with the standard's differences: ``details`` is an object of strings, and the media type is plain JSON.
400 and 401 promise that no association is held; where one is, the same problem travels as 503.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Final

import msgspec

from gateway.exchange import Answer, HttpRefusal
from mesh.client import CallerError, ErrorReason, MeshError
from mesh.client.border import Problem, problem_of

TYPE_BASE: Final = "https://qkd.etsi.org/gs020-interop-kms/"
MAX_TITLE_CHARS: Final = 1024
MAX_RETRY_AFTER_S: Final = 3600


class Kind(StrEnum):
    """The suffixes of ``type`` that the standard lists."""

    MISSING_PARAMETERS = "missing-parameters"
    KEY_ROUTING_ERROR = "key-routing-error"
    VOID_NOT_UNDERSTOOD = "void-request-not-understood"
    NO_IDS_OR_CONFIRMATION = "no-key-ids-or-confirmation"
    ACK_NOT_UNDERSTOOD = "ack-not-understood"
    KEY_NOT_PRESENT = "key-not-present"
    INVALID_PARAMETER = "invalid-parameter"
    UNAUTHORIZED = "unauthorized"
    TIMEOUT = "timeout"
    GENERAL_ERROR = "server-side-general-error"
    INSUFFICIENT_MATERIAL = "insufficient-key-material"
    UNSUPPORTED_EXTENSION = "unsupported-mandatory-extension"


class Refusal(Exception):  # noqa: N818 - it is a refusal, not a fault of ours
    """A request that is refused with a problem of the standard.

    Args:
        status: HTTP status.
        kind: suffix of ``type``.
        title: for a person; no key bytes.
        details: names of the standard to texts.
    """

    def __init__(
        self,
        status: int,
        kind: Kind,
        title: str,
        *,
        retry_after_s: float = 0.0,
        **details: str,
    ) -> None:
        super().__init__(title)
        self.status = status
        self.kind = kind
        self.title = title
        self.details = details
        self.retry_after_s = retry_after_s

    @property
    def promises_nothing_held(self) -> bool:
        """400 and 401 say that no association exists for any key of the request."""
        return self.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED)

    def as_held(self) -> Refusal:
        """The same, where something is held from an earlier request: retry or void."""
        return Refusal(
            HTTPStatus.SERVICE_UNAVAILABLE,
            Kind.GENERAL_ERROR,
            f"keys of this request are held from an earlier one: {self.title}",
            server_side_general_error=self.title,
        )


@dataclass(frozen=True, slots=True)
class _Row:
    status: int
    kind: Kind
    detail: str


_B, _U = HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED
_S = HTTPStatus.SERVICE_UNAVAILABLE

PROBLEMS: Final[Mapping[Problem, _Row]] = {
    Problem.FOREIGN_INITIATOR: _Row(_U, Kind.UNAUTHORIZED, "unauthorized"),
    Problem.UNKNOWN_TARGET: _Row(_B, Kind.KEY_ROUTING_ERROR, "target_sae_id_not_recognized"),
    Problem.BOUNCE: _Row(_B, Kind.KEY_ROUTING_ERROR, "invalid_routing"),
    Problem.TOO_MANY_TARGETS: _Row(_S, Kind.KEY_ROUTING_ERROR, "no_route_multiple_targets"),
    Problem.NO_ROUTE: _Row(_S, Kind.KEY_ROUTING_ERROR, "no_known_route"),
    Problem.LOOP: _Row(_S, Kind.KEY_ROUTING_ERROR, "no_known_route"),
    Problem.HELD: _Row(_S, Kind.GENERAL_ERROR, "server_side_general_error"),
    Problem.VOIDED: _Row(_B, Kind.INVALID_PARAMETER, "malformed_property"),
    Problem.CALLBACK: _Row(_B, Kind.INVALID_PARAMETER, "malformed_property"),
    Problem.NOT_PRESENT: _Row(_B, Kind.KEY_NOT_PRESENT, "key_not_present"),
    Problem.MALFORMED: _Row(_B, Kind.INVALID_PARAMETER, "malformed_property"),
}
"""What the node refuses, in the standard's words."""

_OUT_OF_MATERIAL: Final = frozenset({ErrorReason.OUT_OF_MATERIAL, ErrorReason.GRADE_UNAVAILABLE})


def refusal_of(error: MeshError) -> Refusal:
    """The problem for what the node or its client raised."""
    if isinstance(error, CallerError):
        if error.reason is ErrorReason.NOT_AUTHORIZED and "problem" not in error.facts:
            # The node does not admit this gateway or peer: nothing is held, and nobody is told why.
            return unauthorized()
        problem = problem_of(error)
        row = PROBLEMS[problem]
        text = str(error.facts.get("key_ids") or error.facts.get("field") or error.message)
        refusal = Refusal(row.status, row.kind, error.message, retry_after_s=0.0, **{row.detail: text})
        if error.facts.get("is_held") == "true" and refusal.promises_nothing_held:
            return refusal.as_held()
        return refusal
    if error.reason in _OUT_OF_MATERIAL:
        return Refusal(
            _S,
            Kind.INSUFFICIENT_MATERIAL,
            error.message,
            retry_after_s=error.retry_after_s or 1.0,
            insufficient_key_material=error.reason.value,
        )
    if error.reason is ErrorReason.NO_ROUTE:
        return Refusal(_S, Kind.KEY_ROUTING_ERROR, error.message, no_known_route=error.reason.value)
    return Refusal(
        _S,
        Kind.GENERAL_ERROR,
        "the key manager cannot do this now",
        retry_after_s=error.retry_after_s or 1.0,
        server_side_general_error=error.reason.value,
    )


def unauthorized() -> Refusal:
    """401, the same for everybody."""
    return Refusal(_U, Kind.UNAUTHORIZED, "not authorized", unauthorized="not authorized")


def missing(*names: str) -> Refusal:
    """400 for members that are not there."""
    listed = ", ".join(names)
    return Refusal(_B, Kind.MISSING_PARAMETERS, f"missing: {listed}", missing_parameters=listed)


def malformed(where: str, problem: str) -> Refusal:
    """400 for a member that is not as the schema says."""
    return Refusal(_B, Kind.INVALID_PARAMETER, f"{where}: {problem}", malformed_property=where)


def from_http(refusal: HttpRefusal) -> Refusal:
    """What HTTP itself refused, in the standard's words; a body that was not read promises nothing."""
    if refusal.reason in ("slow-body", "malformed-http"):
        title = "the complete request did not arrive"
        return Refusal(HTTPStatus.REQUEST_TIMEOUT, Kind.TIMEOUT, title, timeout=title)
    if refusal.status == HTTPStatus.SERVICE_UNAVAILABLE:
        return Refusal(
            _S,
            Kind.GENERAL_ERROR,
            refusal.message,
            retry_after_s=1.0,
            server_side_general_error=refusal.reason,
        )
    return Refusal(refusal.status, Kind.INVALID_PARAMETER, refusal.message, malformed_property=refusal.reason)


def encode_problem(refusal: Refusal) -> bytes:
    """The ``problem_details`` object."""
    return msgspec.json.encode(
        {
            "type": TYPE_BASE + refusal.kind,
            "status": int(refusal.status),
            "title": refusal.title[:MAX_TITLE_CHARS],
            "details": {name: text[:MAX_TITLE_CHARS] for name, text in refusal.details.items()},
        }
    )


def answer_of(refusal: Refusal, method: str, *, allow: str = "", close: bool = False) -> Answer:
    """The whole answer of a refusal."""
    headers: dict[str, str] = {}
    if refusal.status == HTTPStatus.SERVICE_UNAVAILABLE and refusal.retry_after_s:
        headers["Retry-After"] = str(min(max(math.ceil(refusal.retry_after_s), 1), MAX_RETRY_AFTER_S))
    if allow:
        headers["Allow"] = allow
    return Answer(refusal.status, encode_problem(refusal), method, refusal.kind.value, headers, close)
