"""A stream of link messages in bytes, whichever end dialled.

Owns the envelope: ``LinkMessage`` in protobuf encoding, with the frame field written and
read by hand, because a frame may be a mebibyte and every copy counts. Implements only the
port that ``mesh.node.link_stream`` speaks through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from mesh.errors import ErrorReason, PeerError, UnavailableError
from mesh.node.ports import Buffer
from mesh.v1.link_pb2 import LinkMessage

METHOD = "/mesh.v1.Link/Exchange"
_FRAME_KEY = b"\x12"  # field 2, length-delimited

Call: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"


class Transport(Protocol):
    """One stream."""

    async def send(self, data: bytes) -> None:
        """Write one message; waits for flow control.

        Raises:
            UnavailableError: the stream is gone.
        """
        ...

    async def receive(self) -> bytes | None:
        """The next message, None at the end of the stream.

        Raises:
            UnavailableError: the stream is gone.
        """
        ...

    def close(self) -> None:
        """End the stream; idempotent."""
        ...


def wrap_frame(parts: Sequence[Buffer]) -> bytes:
    """A ``LinkMessage`` with this frame, in one copy."""
    size = sum(len(part) for part in parts)
    return b"".join((_FRAME_KEY, _varint(size), *parts))


def unwrap(data: bytes) -> memoryview | LinkMessage:
    """The frame of a message, or the whole message if it carries something else.

    Raises:
        PeerError: not a ``LinkMessage``.
    """
    if data[:1] == _FRAME_KEY:
        size, at = _read_varint(data)
        if at + size == len(data):
            return memoryview(data)[at:]
    try:
        message = LinkMessage.FromString(data)
    except DecodeError as error:
        raise PeerError("not a link message") from error
    if message.WhichOneof("body") == "frame":
        return memoryview(message.frame)
    return message


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes) -> tuple[int, int]:
    value = 0
    for at in range(1, min(len(data), 6)):
        value |= (data[at] & 0x7F) << 7 * (at - 1)
        if data[at] < 0x80:
            return value, at + 1
    return -1, 0


class DialledTransport:
    """The dialler's end of a stream.

    Raises:
        UnavailableError: the channel is closed.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        try:
            self._call: Call = channel.stream_stream(METHOD)()
        except (grpc.RpcError, grpc.aio.UsageError) as error:
            raise _gone(error) from error

    async def send(self, data: bytes) -> None:
        """Write one message."""
        try:
            await self._call.write(data)
        except (grpc.RpcError, grpc.aio.UsageError, OSError) as error:
            raise _gone(error) from error

    async def receive(self) -> bytes | None:
        """Read one message."""
        try:
            data: Any = await self._call.read()
        except (grpc.RpcError, OSError) as error:
            raise _gone(error) from error
        return None if data is grpc.aio.EOF else data

    def close(self) -> None:
        """Cancel the call."""
        self._call.cancel()


class AcceptedTransport:
    """The acceptor's end of a stream, inside a servicer's method."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def send(self, data: bytes) -> None:
        """Write one message."""
        try:
            await self._context.write(data)
        except (grpc.RpcError, grpc.aio.UsageError, OSError) as error:
            raise _gone(error) from error

    async def receive(self) -> bytes | None:
        """Read one message."""
        try:
            data: Any = await self._context.read()
        except (grpc.RpcError, grpc.aio.UsageError, OSError) as error:
            raise _gone(error) from error
        return None if data is grpc.aio.EOF else data

    def close(self) -> None:
        """The stream ends when the servicer's method returns."""


def _gone(error: Exception) -> UnavailableError:
    details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
    return UnavailableError(
        "the stream to the peer is gone",
        reason=ErrorReason.PEER_UNREACHABLE,
        facts={"cause": (details or type(error).__name__)[:200]},
    )
