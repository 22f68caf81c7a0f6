"""What the link plane needs, and what it offers to the key plane: small Protocols.

Owns names and contracts only. The key plane codes against :class:`LinkPort` and
:class:`LinkPlanePort`; ``mesh.node.links`` implements them; tests write their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from mesh.v1.admin_pb2 import LinkStatus
from mesh.v1.link_pb2 import ShareItem

Buffer: TypeAlias = bytes | bytearray | memoryview


class SharesHandler(Protocol):
    """Takes what arrives on links. All methods are called on the event loop and must not block."""

    def on_shares(self, came_from: str, shares: Sequence[tuple[ShareItem, bytes]]) -> None:
        """Take the shares of one frame, in arrival order.

        Called after the frame's tag verified and the reader's mark is on disk. ``came_from``
        is the KME id of the other end of the link: checked, never taken from the frame.
        """
        ...

    def on_link_open(self, peer: str) -> None:
        """Both hellos of a stream verified: frames flow."""
        ...

    def on_link_closed(self, peer: str) -> None:
        """The stream ended; frames not yet received are forfeited."""
        ...


@dataclass(slots=True, repr=False)
class Claim:
    """A range of the outbound lane that is burnt from now on, whatever becomes of it.

    Attributes:
        epoch: lane epoch.
        offset: first byte, the tag key's, as an absolute lane offset.
        raw: the raw share bytes, ``raw_bytes`` of them (shares 1..k of an establish).
        cipher_bytes: length of the plaintext that ``send`` must bring.
        pad: tag key (32), raw and cipher pad, as read from the lane; private to the link.
    """

    epoch: int
    offset: int
    raw: bytes
    cipher_bytes: int
    pad: bytes
    is_sent: bool = False

    def __repr__(self) -> str:
        return f"Claim(epoch={self.epoch}, offset={self.offset}, {len(self.pad)} bytes)"


class LinkPort(Protocol):
    """One link as the key plane sees it."""

    @property
    def peer(self) -> str:
        """KME id of the other end."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether both hellos of the present stream verified."""
        ...

    @property
    def max_frame_bytes(self) -> int:
        """Lane bytes that a frame may span: 32 + raw + cipher."""
        ...

    def claimable(self) -> int:
        """Return the largest raw + cipher that :meth:`claim` grants right now, in bytes.

        The 32 bytes of tag key are already taken off. 0 when the stream is closed, the
        outbound queue is full, or nothing below the mark, the window and the reserved
        tail of the lane is left.
        """
        ...

    async def ready(self, nbytes: int, *, timeout_s: float) -> None:
        """Wait until ``claimable() >= nbytes``, moving the mark (synced) as needed.

        Another task may claim first: call :meth:`claim` without an await in between.

        Raises:
            CallerError: no frame can ever be that large.
            ShortageError: ``OUT_OF_MATERIAL``, ``WINDOW_FULL`` or ``BUSY`` after ``timeout_s``.
            UnavailableError: ``PEER_UNREACHABLE``, the stream was not open within ``timeout_s``.
        """
        ...

    def claim(self, raw_bytes: int, cipher_bytes: int) -> Claim:
        """Burn 32 + raw + cipher contiguous lane bytes and return them.

        Raises:
            ShortageError: more than ``claimable()``; nothing is burnt.
        """
        ...

    def send(self, claim: Claim, shares: Sequence[ShareItem], plaintext: Buffer) -> None:
        """Seal and queue the frame of a claim, in the same sync section as the claim.

        Args:
            claim: not yet sent, and the newest of this link.
            shares: raw ones first; their lengths add up to the claim's.
            plaintext: the shares that are not raw, concatenated in order.

        Raises:
            CallerError: lengths or order do not fit the claim, which stays burnt.
        """
        ...

    def enqueue(self, share: ShareItem, value: Buffer) -> None:
        """Queue one encrypted share for the sender, which fills frames from the queue.

        Raises:
            ShortageError: ``BUSY``, the bounded queue is full or the link is closed.
        """
        ...

    def take_local(self, nbytes: int) -> bytes:
        """Burn lane bytes that never leave this node (keys of two SAEs at one KME, 4.9).

        Raises:
            ShortageError: more than ``claimable()``.
        """
        ...

    def status(self) -> LinkStatus:
        """Return levels and state for operators; no key facts."""
        ...


class LinkPlanePort(Protocol):
    """All links of a node."""

    handler: SharesHandler

    @property
    def links(self) -> Mapping[str, LinkPort]:
        """Links by peer KME id."""
        ...

    def link(self, peer: str) -> LinkPort | None:
        """Return the link to a neighbour, None when there is none."""
        ...

    async def reset_link(self, peer: str) -> tuple[int, int]:
        """Throw a link's material away and open new lane epochs, at the operator's word.

        Returns:
            The new epochs, (transmit, receive).

        Raises:
            CallerError: there is no such link.
        """
        ...


class DocumentPort(Protocol):
    """The signed network document as the link plane sees it (protocol 5.1)."""

    def serial(self) -> int:
        """Return the serial of the document held, 0 for none."""
        ...

    def signed_bytes(self) -> bytes:
        """Return the document as signed, empty for none."""
        ...

    def offer(self, document: bytes) -> None:
        """Take a document that a peer handed over; verifies it and keeps the newer one."""
        ...


class LinkAlarms(Protocol):
    """``mesh.ops.alarms.Alarms`` as the link plane uses it."""

    def raise_alarm(
        self, alarm_id: str, severity: str, message: str, next_step: str, needs_operator: bool = False
    ) -> object:
        """Open an alarm or count it again."""
        ...

    def clear(self, alarm_id: str) -> bool:
        """Close an alarm whose condition is over."""
        ...


class PadRecorder(Protocol):
    """Keeps a line per used pad range, for audits; never bytes."""

    def record(
        self, link: str, *, is_outbound: bool, epoch: int, start: int, stop: int, purpose: str
    ) -> None:
        """Write the range down before anything made with it leaves the process."""
        ...
