"""MeshClient: what gateways and internal tools use; the only door of the gateway into the mesh."""

from mesh.client.client import DEFAULT_TIMEOUT_S, MeshClient
from mesh.client.results import DeliveredKey, DeliveredKeys, KeyStatus, ReserveLevel
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
    TagMismatchError,
    UnavailableError,
)

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "CallerError",
    "ConfigError",
    "DeliveredKey",
    "DeliveredKeys",
    "ErrorReason",
    "IntegrityError",
    "KeyStatus",
    "MeshClient",
    "MeshError",
    "NotAuthorizedError",
    "PeerError",
    "ReserveLevel",
    "RolledBackError",
    "ShortageError",
    "TagMismatchError",
    "UnavailableError",
]
