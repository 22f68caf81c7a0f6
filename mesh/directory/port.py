"""The directory's face: what nodes publish, and what they know of each other.

One directory per domain (architecture 2.7). It can take choices away, never add them
(protocol 5.1): who may learn a key is decided by the network document alone, whose
signature is checked before it gets here. Never key bytes, never digests of key bytes.
``EtcdDirectory`` and ``StaticDirectory`` implement ``Directory``; tests/contract holds
both to the same suite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from mesh.core.network import NetworkDocument
from mesh.errors import CallerError


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A live node, as it says itself; leased: gone soon after the node is."""

    kme_id: str
    address: str
    """host:port of the node's gRPC listener."""
    role: str = "node"
    software_version: str = ""
    protocol_version: int = 1
    started_at_s: float = 0.0


def check_address(value: object, field_name: str) -> str:
    """Returns ``value`` if it is ``host:port``.

    Raises:
        CallerError: it is not; names the field.
    """
    if isinstance(value, str) and len(value) <= 300 and value.isprintable():
        host, _, port = value.rpartition(":")
        if host and port.isascii() and port.isdigit() and 0 < int(port) < 65536:
            return value
    raise CallerError(f"{field_name} must be host:port", facts={"field": field_name})


@dataclass(frozen=True, slots=True)
class LinkLevel:
    """One link as its node sees it; bytes usable for sending, coarse (rounded to 64 KiB or so)."""

    usable_bytes: int
    capacity_bytes: int
    is_up: bool = True


@dataclass(frozen=True, slots=True)
class NodeLevels:
    """Levels of one node: per neighbour its link, per peer the reserve towards it in bytes."""

    kme_id: str
    links: Mapping[str, LinkLevel] = field(default_factory=dict)
    reserves: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MarksCopy:
    """The second copy of a node's marks: may make the node refuse, never moves a mark (1.9)."""

    incarnation: str
    """Hex, 32 characters."""
    marks: Mapping[str, int] = field(default_factory=dict)
    """Offset or slot per mark name."""


class Directory(Protocol):
    """What a node, hub or tool holds. Reads are from memory and never wait.

    Everything read is what was last known; ``staleness_s`` says how old that is.
    """

    async def start(self) -> None:
        """Loads what there is and begins to follow changes.

        Returns once the first load succeeded or the first attempt failed; a directory that is
        away is retried in the background and does not fail the start.
        """

    async def stop(self) -> None:
        """Withdraws what this end published under a lease and closes connections."""

    @property
    def document(self) -> NetworkDocument | None:
        """The newest valid network document, None before there is one."""

    def address(self, kme_id: str) -> str | None:
        """host:port of a node, also of one whose lease has run out while we knew it; None if never known."""

    def peers(self) -> Mapping[str, NodeRecord]:
        """Live nodes by KME id, this one included once it has published."""

    @property
    def levels(self) -> Mapping[str, NodeLevels]:
        """Last published levels by KME id."""

    def marks(self, kme_id: str) -> MarksCopy | None:
        """The copy of a node's marks, None if there is none."""

    async def publish_node(self, record: NodeRecord) -> None:
        """Publishes this node's record, and again by itself whenever the lease was lost.

        Publishing never fails because the directory is away: the newest value goes out when it is back.
        """

    async def publish_levels(self, levels: NodeLevels) -> None:
        """Publishes this node's levels, with the record's lease."""

    async def publish_marks(self, kme_id: str, marks: MarksCopy) -> None:
        """Publishes the second copy of the marks, without a lease."""

    async def withdraw(self) -> None:
        """Takes record and levels out until they are published again; the marks stay."""

    def staleness_s(self) -> float:
        """Seconds since the directory last answered; infinite if it never did. 0 for a static file."""

    def subscribe(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Calls ``changed`` in the event loop after any change; returns a function that ends it."""
