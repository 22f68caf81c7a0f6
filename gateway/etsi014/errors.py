"""What an SAE reads when a request fails (ETSI GS QKD 014 V1.1.1, Table 13 and clause 6).

Owns the one table from ``ErrorReason`` to HTTP status, and the message texts that the standard
fixes. A 401 has no body; every other error is an ``Error`` object: ``message`` and ``details``,
an array of objects. Nothing here tells which of several key_IDs failed, or that a key exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

import msgspec

from gateway.exchange import Details, HttpRefusal
from mesh.client import CallerError, ErrorReason, MeshError, ShortageError, UnavailableError

# Clause 6: texts that clients compare literally.
SIZE_NOT_BYTES: Final = "size shall be a multiple of 8"
MANDATORY_UNSUPPORTED: Final = "not all extension_mandatory parameters are supported"
MANDATORY_NOT_MET: Final = "not all extension_mandatory request options could be met"
KEY_NOT_FOUND: Final = "one or more keys specified are not found on KME"
KEY_ACCESS_ERROR: Final = "key data access error"

DEFAULT_RETRY_AFTER_S: Final = 1
MAX_RETRY_AFTER_S: Final = 3600

_STATUS_OF_REASON: Final[Mapping[ErrorReason, int]] = {
    ErrorReason.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    ErrorReason.LIMIT_EXCEEDED: HTTPStatus.BAD_REQUEST,
    ErrorReason.UNKNOWN_SAE: HTTPStatus.BAD_REQUEST,
    ErrorReason.UNKNOWN_KEY: HTTPStatus.BAD_REQUEST,
    ErrorReason.NOT_AUTHORIZED: HTTPStatus.UNAUTHORIZED,
}


# Reasons given only before anything is drawn or redeemed. Of all others nobody knows, unless the error
# says so: the node may have been cut off between its redeem and its answer.
_NOTHING_DONE: Final = frozenset(
    {
        ErrorReason.BUSY,
        ErrorReason.DIRECTORY_UNAVAILABLE,
        ErrorReason.EPOCHS_EXHAUSTED,
        ErrorReason.GRADE_UNAVAILABLE,
        ErrorReason.NO_ROUTE,
        ErrorReason.OUT_OF_MATERIAL,
        ErrorReason.QUOTA_EXCEEDED,
        ErrorReason.WINDOW_FULL,
    }
)


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """One error as it goes out: ``body`` is empty for 401, else a JSON Error object."""

    status: int
    body: bytes
    reason: str
    headers: Mapping[str, str] = field(default_factory=dict)
    close: bool = False


def refuse(message: str, **details: object) -> CallerError:
    """A 400 with a free text and one detail object per keyword."""
    return CallerError(message, facts=details)


def error_body(message: str, details: Details = ()) -> bytes:
    """The Error object of Table 13 as compact JSON."""
    document: dict[str, object] = {"message": message}
    if details:
        document["details"] = list(details)
    return msgspec.json.encode(document)


def answer_refusal(refusal: HttpRefusal) -> ErrorAnswer:
    """The answer for what HTTP itself refused."""
    headers: dict[str, str] = {}
    details: list[Mapping[str, object]] = [{"reason": refusal.reason}, *refusal.details]
    if refusal.allow:
        headers["Allow"] = refusal.allow
    if refusal.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(DEFAULT_RETRY_AFTER_S)
        is_known = refusal.reason in _NOTHING_DONE
        details += [{"retry_after_s": DEFAULT_RETRY_AFTER_S}, {"outcome": "none" if is_known else "unknown"}]
    body = b"" if refusal.status == HTTPStatus.UNAUTHORIZED else error_body(refusal.message, details)
    return ErrorAnswer(refusal.status, body, refusal.reason, headers, refusal.close)


def answer_error(error: MeshError, *, unknown_key_status: int = HTTPStatus.BAD_REQUEST) -> ErrorAnswer:
    """The answer for an error of the key plane.

    Args:
        error: what the node, its client or the decoder raised.
        unknown_key_status: 400 by the standard; 404 for the profile that some clients demand.

    Returns:
        400, 401 (empty), 404 or 503. Any reason without a row of its own is the server's side:
        503, with ``Retry-After`` and a detail ``outcome``: "none" where nothing happened, "unknown"
        where the request may have been carried out.
    """
    status = _STATUS_OF_REASON.get(error.reason, HTTPStatus.SERVICE_UNAVAILABLE)
    reason = str(error.reason)
    if status == HTTPStatus.UNAUTHORIZED:
        return ErrorAnswer(status, b"", reason)
    if error.reason is ErrorReason.UNKNOWN_KEY:
        return ErrorAnswer(unknown_key_status, error_body(KEY_NOT_FOUND, [{"reason": reason}]), reason)
    details: list[Mapping[str, object]] = [{"reason": reason}]
    if status == HTTPStatus.BAD_REQUEST:
        details += _as_details(error.facts)
        return ErrorAnswer(status, error_body(error.message, details), reason)
    retry_after_s = min(max(math.ceil(error.retry_after_s), DEFAULT_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
    message, facts = KEY_ACCESS_ERROR, dict(error.facts)
    is_known = facts.pop("outcome", "") == "none" or error.reason in _NOTHING_DONE
    if isinstance(error, ShortageError | UnavailableError):
        message = error.message
        details += _as_details(facts)
    details += [{"retry_after_s": retry_after_s}, {"outcome": "none" if is_known else "unknown"}]
    return ErrorAnswer(status, error_body(message, details), reason, {"Retry-After": str(retry_after_s)})


def _as_details(facts: Mapping[str, object]) -> list[Mapping[str, object]]:
    plain = (str, int, float, list, tuple)
    return [{name: value if isinstance(value, plain) else str(value)} for name, value in facts.items()]
