"""Errors over gRPC: one table from reason to status, and the way back.

Owns the mapping of ``ErrorReason`` to ``grpc.StatusCode`` and to the family of
``mesh.errors`` that a client raises. A reason travels in trailing metadata (whole
RPC) or in a ``Failure`` message (one element of a batch). Text is never parsed to
decide anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import grpc

from mesh.errors import (
    CallerError,
    ConfigError,
    ErrorReason,
    IntegrityError,
    MeshError,
    NotAuthorizedError,
    PeerError,
    RolledBackError,
    ShortageError,
    UnavailableError,
)
from mesh.v1 import keys_pb2

REASON_KEY = "keymesh-reason"
RETRY_AFTER_KEY = "keymesh-retry-after-s"
REQUEST_ID_KEY = "keymesh-request-id"
_MESSAGE_LIMIT = 1024
_DETAIL_LIMIT = 16

_R = ErrorReason
_S = grpc.StatusCode

STATUS: Mapping[ErrorReason, grpc.StatusCode] = {
    _R.INVALID_ARGUMENT: _S.INVALID_ARGUMENT,
    _R.UNKNOWN_SAE: _S.NOT_FOUND,
    _R.UNKNOWN_KEY: _S.NOT_FOUND,
    _R.NOT_AUTHORIZED: _S.PERMISSION_DENIED,
    _R.LIMIT_EXCEEDED: _S.OUT_OF_RANGE,
    _R.CONFIGURATION: _S.FAILED_PRECONDITION,
    _R.CERTIFICATE: _S.UNAUTHENTICATED,
    _R.PROTOCOL_VIOLATION: _S.FAILED_PRECONDITION,
    _R.PEER_REFUSED: _S.FAILED_PRECONDITION,
    _R.OUT_OF_MATERIAL: _S.RESOURCE_EXHAUSTED,
    _R.QUOTA_EXCEEDED: _S.RESOURCE_EXHAUSTED,
    _R.BUSY: _S.RESOURCE_EXHAUSTED,
    _R.WINDOW_FULL: _S.RESOURCE_EXHAUSTED,
    _R.NO_ROUTE: _S.UNAVAILABLE,
    _R.GRADE_UNAVAILABLE: _S.UNAVAILABLE,
    _R.DISK_FULL: _S.UNAVAILABLE,
    _R.EPOCHS_EXHAUSTED: _S.FAILED_PRECONDITION,
    _R.TAG_MISMATCH: _S.DATA_LOSS,
    _R.ROLLED_BACK: _S.FAILED_PRECONDITION,
    _R.POOL_MISMATCH: _S.DATA_LOSS,
    _R.DOCUMENT_INVALID: _S.FAILED_PRECONDITION,
    _R.STATE_CORRUPT: _S.DATA_LOSS,
    _R.ALREADY_RUNNING: _S.FAILED_PRECONDITION,
    _R.CRYPTO_UNAVAILABLE: _S.FAILED_PRECONDITION,
    _R.PEER_UNREACHABLE: _S.UNAVAILABLE,
    _R.DIRECTORY_UNAVAILABLE: _S.UNAVAILABLE,
    _R.DEVICE_UNAVAILABLE: _S.UNAVAILABLE,
    _R.DEADLINE_EXCEEDED: _S.DEADLINE_EXCEEDED,
    _R.SHUTTING_DOWN: _S.UNAVAILABLE,
    _R.INTERNAL: _S.INTERNAL,
}

FAMILY: Mapping[ErrorReason, type[MeshError]] = {
    _R.INVALID_ARGUMENT: CallerError,
    _R.UNKNOWN_SAE: CallerError,
    _R.UNKNOWN_KEY: CallerError,
    _R.NOT_AUTHORIZED: NotAuthorizedError,
    _R.LIMIT_EXCEEDED: CallerError,
    _R.CONFIGURATION: ConfigError,
    _R.CERTIFICATE: NotAuthorizedError,
    _R.PROTOCOL_VIOLATION: PeerError,
    _R.PEER_REFUSED: PeerError,
    _R.OUT_OF_MATERIAL: ShortageError,
    _R.QUOTA_EXCEEDED: ShortageError,
    _R.BUSY: ShortageError,
    _R.WINDOW_FULL: ShortageError,
    _R.NO_ROUTE: ShortageError,
    _R.GRADE_UNAVAILABLE: ShortageError,
    _R.DISK_FULL: UnavailableError,
    _R.EPOCHS_EXHAUSTED: ShortageError,
    _R.TAG_MISMATCH: IntegrityError,
    _R.ROLLED_BACK: RolledBackError,
    _R.POOL_MISMATCH: IntegrityError,
    _R.DOCUMENT_INVALID: IntegrityError,
    _R.STATE_CORRUPT: IntegrityError,
    _R.ALREADY_RUNNING: IntegrityError,
    _R.CRYPTO_UNAVAILABLE: IntegrityError,
    _R.PEER_UNREACHABLE: UnavailableError,
    _R.DIRECTORY_UNAVAILABLE: UnavailableError,
    _R.DEVICE_UNAVAILABLE: UnavailableError,
    _R.DEADLINE_EXCEEDED: UnavailableError,
    _R.SHUTTING_DOWN: UnavailableError,
    _R.INTERNAL: UnavailableError,
}

# For an RPC that failed without a reason of ours: the transport, or a stranger.
_REASON_BY_STATUS: Mapping[grpc.StatusCode, ErrorReason] = {
    _S.CANCELLED: _R.SHUTTING_DOWN,
    _S.INVALID_ARGUMENT: _R.INVALID_ARGUMENT,
    _S.DEADLINE_EXCEEDED: _R.DEADLINE_EXCEEDED,
    _S.NOT_FOUND: _R.PROTOCOL_VIOLATION,
    _S.PERMISSION_DENIED: _R.NOT_AUTHORIZED,
    _S.RESOURCE_EXHAUSTED: _R.BUSY,
    _S.FAILED_PRECONDITION: _R.PEER_REFUSED,
    _S.UNIMPLEMENTED: _R.PROTOCOL_VIOLATION,
    _S.UNAVAILABLE: _R.PEER_UNREACHABLE,
    # Our own faults carry their reason: this is gRPC's word for some connections that broke.
    _S.INTERNAL: _R.PEER_UNREACHABLE,
    _S.UNAUTHENTICATED: _R.CERTIFICATE,
}


def status_of(reason: ErrorReason) -> grpc.StatusCode:
    """The status code under which a failure with this reason travels."""
    return STATUS[reason]


def trailing_metadata(error: MeshError) -> tuple[tuple[str, str], ...]:
    """What rides behind a failed RPC: the reason, and when a retry may succeed."""
    if error.retry_after_s > 0:
        return (REASON_KEY, error.reason.value), (RETRY_AFTER_KEY, f"{error.retry_after_s:.3f}")
    return ((REASON_KEY, error.reason.value),)


def make_error(
    reason: ErrorReason,
    message: str,
    *,
    retry_after_s: float = 0.0,
    facts: Mapping[str, object] | None = None,
) -> MeshError:
    """Builds the error of the family that belongs to a reason."""
    return FAMILY[reason](message, reason=reason, retry_after_s=retry_after_s, facts=facts)


def error_from_rpc(exc: grpc.RpcError) -> MeshError:
    """Turns what grpc raised at a client into one of our errors; raise it ``from`` exc.

    Args:
        exc: an ``AioRpcError``, or a synchronous ``RpcError`` that is also a ``Call``.
    """
    code = exc.code() if hasattr(exc, "code") else _S.UNKNOWN
    details = (exc.details() if hasattr(exc, "details") else None) or code.name.lower().replace("_", " ")
    metadata = _text_items(exc.trailing_metadata() if hasattr(exc, "trailing_metadata") else None)
    reason = _reason(metadata.get(REASON_KEY, "")) or _REASON_BY_STATUS.get(code, _R.INTERNAL)
    message = details[:_MESSAGE_LIMIT]
    if REASON_KEY not in metadata and code is _S.UNAVAILABLE:
        message = _words_for_unreachable(message)
    return make_error(reason, message, retry_after_s=_seconds(metadata.get(RETRY_AFTER_KEY, "")))


def failure_from(error: MeshError) -> keys_pb2.Failure:
    """Encodes an error as the failure of one element of a batch."""
    return keys_pb2.Failure(
        reason=error.reason.value,
        message=error.message[:_MESSAGE_LIMIT],
        retry_after_s=error.retry_after_s,
        details={name: str(value)[:200] for name, value in list(error.facts.items())[:_DETAIL_LIMIT]},
    )


def error_from_failure(failure: keys_pb2.Failure) -> MeshError:
    """Decodes the failure of one element; an unknown reason reads as INTERNAL."""
    return make_error(
        _reason(failure.reason) or _R.INTERNAL,
        failure.message or "failed without a message",
        retry_after_s=max(0.0, failure.retry_after_s),
        facts=dict(failure.details),
    )


def _reason(text: str) -> ErrorReason | None:
    try:
        return ErrorReason(text)
    except ValueError:
        return None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0.0 < value < 86_400.0 else 0.0


def _text_items(metadata: Iterable[object] | None) -> dict[str, str]:
    return {
        item[0]: item[1] for item in metadata or () if isinstance(item, tuple) and isinstance(item[1], str)
    }


def _words_for_unreachable(details: str) -> str:
    """Says in words what the transport says in its own; the reason stays the same."""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return f"the other end's certificate was not accepted, see 'keymesh pki explain': {details}"
    if "Hostname Verification" in details or "Peer name" in details:
        return f"the other end's certificate belongs to someone else: {details}"
    return details
