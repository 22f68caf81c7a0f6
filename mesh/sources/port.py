"""What the node's ingest needs of a source of shared randomness.

A source sits at one end of a link. The device pair behind it gives both ends the
same keys under the same IDs; which of them enter a lane, and where, is decided by
the node (``docs/protocol.md`` 2), never here. A source must not order, store or
repeat keys: what it handed out is gone at the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from mesh.core.secret import Secret


class SourceState(StrEnum):
    """How a source's last conversation with its device went."""

    STARTING = "starting"
    READY = "ready"
    EMPTY = "empty"
    UNAVAILABLE = "unavailable"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class DeviceKey:
    """One key as the device delivered it.

    Attributes:
        key_id: the device's own key_ID, a canonical lower-case UUID text.
        value: the key bytes; the repr shows the length only.
    """

    key_id: str
    value: Secret


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What a device says of itself; sizes in bytes.

    Attributes:
        stored_bytes: key that it holds ready.
        capacity_bytes: most that it can hold; what it makes beyond that is lost; 0 if it does not tell.
        secret_key_rate_bits_per_s, qber: None from devices that do not tell.
    """

    stored_bytes: int
    capacity_bytes: int
    secret_key_rate_bits_per_s: float | None = None
    qber: float | None = None


class KeySource(Protocol):
    """One end of a device pair."""

    @property
    def state(self) -> str:
        """A ``SourceState`` value, for status pages and metrics."""
        ...

    @property
    def report(self) -> DeviceReport | None:
        """What the device said of itself lately; None if it said nothing."""
        ...

    async def take(self, max_bytes: int) -> list[DeviceKey]:
        """Take fresh keys from the own device (the leader's side).

        Returns:
            Keys of at most ``max_bytes`` in total; empty when the device has none now.

        Raises:
            UnavailableError: ``DEVICE_UNAVAILABLE``, the device is down or stalled.
            PeerError: the device's answer is not what it should be.
        """
        ...

    async def fetch(self, key_ids: Sequence[str]) -> list[DeviceKey]:
        """Fetch just these keys, in the order asked (the follower's side).

        A fetch consumes at the device, so call it for authenticated offers only
        (``docs/protocol.md`` 2.3).

        Raises:
            CallerError: ``UNKNOWN_KEY``, at least one of them is lost at the device;
                what else was asked for must be taken as lost too.
            UnavailableError: ``DEVICE_UNAVAILABLE``, ask again later.
            PeerError: the device's answer is not what it should be.
        """
        ...

    async def level_bytes(self) -> int:
        """Return how many key bytes the device could hand out now."""
        ...

    async def close(self) -> None:
        """Close the connection to the device."""
        ...
