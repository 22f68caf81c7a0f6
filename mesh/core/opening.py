"""Opening a link: who speaks first, and what a verified hello means.

Owns protocol 1.8 to 1.10: pure decisions over two greetings, one verified hello and our
own two lanes. Must not move anything: the node makes durable what :func:`judge` returns.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from mesh.core.lane import SLACK_BYTES, ReaderLane, WriterLane
from mesh.errors import ErrorReason, PeerError, RolledBackError

NONCE_BYTES = 32
INCARNATION_BYTES = 16
NEXT_STEP = (
    "this node's data directory is older than what its neighbours have seen, or a copy of it runs "
    "elsewhere: stop the copy, or reset the link at both ends (keymesh links reset) and let it refill"
)


@dataclass(frozen=True, slots=True)
class Hello:
    """What a verified hello says, besides the bytes that its tag covers.

    Attributes:
        is_dialler: the sender's role.
        offset: lane offset of the hello itself, from the frame's header.
        receive_position: the sender's position as reader of our outbound lane.
        receive_mark: its mark there.
        transmit_mark: its mark as writer of our inbound lane.
        known_incarnation: the latest of ours that it had on record before this opening.
        document_serial: of its network document.
        window_bytes: its W.
        incarnation: its own, from its greeting (covered by the tag).
    """

    is_dialler: bool
    offset: int
    receive_position: int
    receive_mark: int
    transmit_mark: int
    known_incarnation: bytes
    document_serial: int
    window_bytes: int
    incarnation: bytes


@dataclass(frozen=True, slots=True)
class OurSide:
    """What we know when a hello has verified.

    Attributes:
        is_dialler: our role.
        writer: our outbound lane.
        reader: our inbound lane.
        is_unproven: we restarted without proof and no hello has verified on this link since.
        was_open: the link opened before in this life of the process: we did not restart.
        peer_incarnation: the one on record before this opening, None for none.
        incarnations: our own, the last 1 000.
    """

    is_dialler: bool
    writer: WriterLane
    reader: ReaderLane
    is_unproven: bool
    was_open: bool
    peer_incarnation: bytes | None
    incarnations: Container[bytes]


def speaks_first(*, is_dialler: bool, is_proven: bool, peer_is_proven: bool) -> bool:
    """Whether our hello goes first: an unproven end second; otherwise the dialler first (1.8)."""
    if is_proven != peer_is_proven:
        return is_proven
    return is_dialler


def judge(hello: Hello, ours: OurSide) -> int:
    """Decide what a verified hello means for us; moves nothing.

    Returns:
        The position from which our writer goes on: at or past its own.

    Raises:
        RolledBackError: we are the clone or the rollback: stop, alarm, wait for the operator.
        PeerError: ``PEER_REFUSED``, the peer is; refuse it, alarm.
    """
    if hello.is_dialler == ours.is_dialler:
        raise PeerError("both ends claim the same role")
    _check_incarnation(hello, ours)
    _check_ours(hello, ours)
    _check_theirs(hello, ours)
    writer = ours.writer
    if ours.is_unproven:
        window = max(writer.limits.window_bytes, hello.window_bytes)
        return max(writer.position, writer.past_peer(hello.receive_position, window))
    return max(writer.position, hello.receive_position)


def _check_incarnation(hello: Hello, ours: OurSide) -> None:
    """1.9: a life of ours that we do not know of was lived elsewhere."""
    if hello.known_incarnation and hello.known_incarnation not in ours.incarnations:
        raise RolledBackError("the peer knows a start of this node that is not on this disk")


def _check_ours(hello: Hello, ours: OurSide) -> None:
    """1.8: signs that our own state is older than what the peer has seen."""
    writer, reader = ours.writer, ours.reader
    if hello.receive_position > writer.mark + writer.limits.stride_bytes + SLACK_BYTES:
        raise RolledBackError(
            "the peer has received bytes beyond our mark",
            facts={"mark": writer.mark, "peer_position": hello.receive_position},
        )
    if hello.offset > reader.hello_limit:
        raise RolledBackError(
            "the peer writes far beyond what was received here",
            facts={"position": reader.position, "peer_offset": hello.offset},
        )
    if ours.was_open and not _peer_restarted(hello, ours) and writer.position < hello.receive_position:
        raise RolledBackError(
            "neither end restarted, and the peer has received more than was sent",
            facts={"position": writer.position, "peer_position": hello.receive_position},
        )


def _check_theirs(hello: Hello, ours: OurSide) -> None:
    """The same signs the other way round: the peer's state is older than ours."""
    writer, reader = ours.writer, ours.reader
    slack = SLACK_BYTES + reader.limits.stride_bytes
    is_behind = reader.position > hello.transmit_mark + slack or writer.reported > (
        hello.receive_position + slack
    )
    if ours.was_open and not _peer_restarted(hello, ours):
        is_behind |= hello.offset < reader.position or hello.receive_position < writer.reported
    if is_behind:
        raise PeerError(
            "the peer's state is older than what was seen of it: a restored snapshot or a clone",
            reason=ErrorReason.PEER_REFUSED,
            facts={"position": reader.position, "peer_mark": hello.transmit_mark},
        )


def _peer_restarted(hello: Hello, ours: OurSide) -> bool:
    return hello.incarnation != ours.peer_incarnation
