"""The one error tree, split by what the caller should do.

Every error carries an ``ErrorReason``; translation to gRPC status codes and HTTP
codes is keyed by that reason (``mesh.rpc.status``, ``gateway.etsi014.errors``),
never by text. Messages are lower case, have no full stop, name the field and the
remedy, and never contain key, pad or share bytes, or anything derived from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class ErrorReason(StrEnum):
    """Why something failed, stable across versions: part of the wire protocol."""

    # The caller's fault: change the request.
    INVALID_ARGUMENT = "invalid-argument"
    UNKNOWN_SAE = "unknown-sae"
    UNKNOWN_KEY = "unknown-key"
    NOT_AUTHORIZED = "not-authorized"
    LIMIT_EXCEEDED = "limit-exceeded"
    CONFIGURATION = "configuration"
    CERTIFICATE = "certificate"
    # The peer's fault.
    PROTOCOL_VIOLATION = "protocol-violation"
    PEER_REFUSED = "peer-refused"
    # Retry later.
    OUT_OF_MATERIAL = "out-of-material"
    QUOTA_EXCEEDED = "quota-exceeded"
    BUSY = "busy"
    WINDOW_FULL = "window-full"
    NO_ROUTE = "no-route"
    GRADE_UNAVAILABLE = "grade-unavailable"
    DISK_FULL = "disk-full"
    EPOCHS_EXHAUSTED = "epochs-exhausted"
    # Stop and alarm.
    TAG_MISMATCH = "tag-mismatch"
    ROLLED_BACK = "rolled-back"
    POOL_MISMATCH = "pool-mismatch"
    DOCUMENT_INVALID = "document-invalid"
    STATE_CORRUPT = "state-corrupt"
    ALREADY_RUNNING = "already-running"
    CRYPTO_UNAVAILABLE = "crypto-unavailable"
    # Not there now.
    PEER_UNREACHABLE = "peer-unreachable"
    DIRECTORY_UNAVAILABLE = "directory-unavailable"
    DEVICE_UNAVAILABLE = "device-unavailable"
    DEADLINE_EXCEEDED = "deadline-exceeded"
    SHUTTING_DOWN = "shutting-down"
    INTERNAL = "internal"


# A fact of an error whose reason alone leaves it open: the request certainly changed nothing.
NOTHING_HAPPENED: Mapping[str, object] = MappingProxyType({"outcome": "none"})


class MeshError(Exception):
    """Base of all errors of ours; raise one of the families below.

    Args:
        message: for a person; lower case, no full stop, no secret.
        reason: the stable reason; defaults to that of the class.
        retry_after_s: seconds after which a retry may succeed, 0 if unknown.
        facts: name/value pairs for logs and for the caller; never secret.
    """

    default_reason = ErrorReason.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        reason: ErrorReason | None = None,
        retry_after_s: float = 0.0,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason if reason is not None else self.default_reason
        self.retry_after_s = retry_after_s
        self.facts = dict(facts or {})

    def __str__(self) -> str:
        if not self.facts:
            return self.message
        return f"{self.message} ({', '.join(f'{name}={value}' for name, value in self.facts.items())})"


class CallerError(MeshError):
    """The request is wrong: change it before trying again."""

    default_reason = ErrorReason.INVALID_ARGUMENT


class ConfigError(CallerError):
    """A file, option or document of the operator's is wrong; names the field and the remedy."""

    default_reason = ErrorReason.CONFIGURATION


class NotAuthorizedError(CallerError):
    """The caller may not do this; says nothing about what exists."""

    default_reason = ErrorReason.NOT_AUTHORIZED


class PeerError(MeshError):
    """The other end broke the protocol or refused."""

    default_reason = ErrorReason.PROTOCOL_VIOLATION


class ShortageError(MeshError):
    """Not enough of something now: retry later."""

    default_reason = ErrorReason.OUT_OF_MATERIAL


class IntegrityError(MeshError):
    """Something that must fit does not: stop using it and raise an alarm."""

    default_reason = ErrorReason.STATE_CORRUPT


class TagMismatchError(IntegrityError):
    """A one-time tag did not verify. All authentication failures look alike."""

    default_reason = ErrorReason.TAG_MISMATCH

    def __init__(self, message: str = "authentication failed") -> None:
        super().__init__(message)


class RolledBackError(IntegrityError):
    """This state is older than what an authenticated peer has seen: a restored snapshot or a clone."""

    default_reason = ErrorReason.ROLLED_BACK


class UnavailableError(MeshError):
    """A peer, device, directory or disk cannot be reached or used right now."""

    default_reason = ErrorReason.PEER_UNREACHABLE
