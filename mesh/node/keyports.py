"""What the key plane needs from the rest of the node: small Protocols and plain values.

``Directory`` and ``LinkPlanePort`` are the real ports; what stands here is what only the key plane
asks for. Tests implement them by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mesh.core.border_rules import BorderConfig, BufferSpec
from mesh.core.network import NetworkDocument
from mesh.core.policy import AccessTable, Limits, Rate, WaterMarks
from mesh.node.keymetrics import KeyMetrics
from mesh.v1.peer_pb2 import (
    ConfirmRequest,
    ConfirmResponse,
    DepositRequest,
    DepositResponse,
    RouteReport,
    TransferAnswer,
    TransferQuery,
)


class PeerCaller(Protocol):
    """Calls the peer service of another KME. Every failure is a MeshError."""

    async def report(self, kme_id: str, request: RouteReport, *, timeout_s: float) -> None:
        """Tells the source of a transfer what became of its routes."""
        ...

    async def confirm(self, kme_id: str, request: ConfirmRequest, *, timeout_s: float) -> ConfirmResponse:
        """Tells the source that its transfer is appended."""
        ...

    async def query(self, kme_id: str, request: TransferQuery, *, timeout_s: float) -> TransferAnswer:
        """Asks the target what became of a transfer."""
        ...

    async def deposit(self, kme_id: str, request: DepositRequest, *, timeout_s: float) -> DepositResponse:
        """Delivers a sealed message."""
        ...


class RouteReporter(Protocol):
    """Tells the sources of transfers about their routes; all that a hub may call."""

    async def report(self, kme_id: str, request: RouteReport, *, timeout_s: float) -> None:
        """Tells the source what became of its routes. Every failure is a MeshError."""
        ...


class AlarmPort(Protocol):
    """``mesh.ops.alarms.Alarms`` as the key plane uses it."""

    def raise_alarm(
        self, alarm_id: str, severity: str, message: str, next_step: str, needs_operator: bool = False
    ) -> object:
        """Opens an alarm or counts it again."""
        ...

    def clear(self, alarm_id: str) -> bool:
        """Closes an alarm whose condition is over."""
        ...


class DocumentView(Protocol):
    """The network document in force, from the directory or pinned."""

    @property
    def document(self) -> NetworkDocument | None:
        """None before there is one: then nothing may be established."""
        ...


class RoutePort(Protocol):
    """Finds the routes that a pair's grade asks for."""

    def routes(self, target: str, *, avoid: Collection[str] = ()) -> tuple[tuple[str, ...], ...]:
        """n disjoint whole paths to ``target``, cheapest first, without the nodes to avoid.

        Raises:
            ShortageError: NO_ROUTE or GRADE_UNAVAILABLE.
        """
        ...

    def spare_bytes(self, route: tuple[str, ...]) -> int | None:
        """Lane bytes that bulk may still use on the scarcest hop beyond the first; None if unknown."""
        ...

    def spend(self, route: tuple[str, ...], nbytes: int) -> None:
        """Bulk is about to use that much on every hop: until the levels are told anew it is not spare."""
        ...


@dataclass(frozen=True, slots=True)
class Incarnation:
    """This start of the process (protocol 1.9, 1.10)."""

    incarnation: bytes
    is_proven: bool


@dataclass(frozen=True, slots=True)
class KeyPlaneConfig:
    """Settings of the key plane; sizes in bytes, times in seconds.

    Attributes:
        high_water_bytes, low_water_bytes: key bytes per reserve; refill runs from below low to high.
        transfer_max_bytes: most payload of one transfer.
        key_lifetime_s: after it drawn keys are retired at the target.
        request_timeout_s: a caller gets its answer or a shortage within this time.
        lane_floor_bytes: lane bytes that refills leave for keys on demand.
        inbound_max_bytes: key bytes that one source may have lying here, unused.
        quota: per SAE pair where the access rule names none; None for no limit.
        border: foreign key managers met at this node; None for none.
        buffers: pairs with a foreign slave whose keys are kept ready.
    """

    limits: Limits = field(default_factory=Limits)
    access: AccessTable = field(default_factory=AccessTable)
    quota: Rate | None = None
    high_water_bytes: int = 4 * 1024 * 1024
    low_water_bytes: int = 3 * 1024 * 1024
    transfer_max_bytes: int = 256 * 1024
    key_lifetime_s: float = 86_400.0
    request_timeout_s: float = 8.0
    lane_floor_bytes: int = 64 * 1024
    inbound_max_bytes: int = 64 * 1024 * 1024
    prefill: bool = True
    border: BorderConfig | None = None
    buffers: tuple[BufferSpec, ...] = ()

    def water_marks(self) -> WaterMarks:
        """Fresh hysteresis for one reserve."""
        return WaterMarks(high_bytes=self.high_water_bytes, low_bytes=self.low_water_bytes)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every part of the key plane is given: clock, randomness, alarms, metrics.

    ``has_random_device``: a hardware source goes into ``randomness``, good enough for keys by itself (4.9).
    """

    own_id: str
    now_s: Callable[[], float]
    monotonic_s: Callable[[], float]
    randomness: Callable[[int], bytes]
    alarms: AlarmPort
    audit: Callable[[str, Sequence[dict[str, object]]], None] | None = None
    metrics: KeyMetrics = field(default_factory=KeyMetrics)
    has_random_device: bool = False
