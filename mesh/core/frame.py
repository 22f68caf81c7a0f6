"""Frames: one-time pad and one-time tag from the bytes of one lane.

Owns the frame's byte layout (``docs/formats.md``) and protocol 1.5 and 1.6. A frame
uses the lane bytes ``[offset, offset + 32 + raw + cipher)``: tag key, raw share bytes,
pad. Must not choose offsets or judge windows: ``mesh.core.lane`` does.

====== ===== =========================================================
offset bytes version 1
====== ===== =========================================================
0      1     version, 1
1      1     kind: 1 hello, 2 data, 3 control
2      2     zero
4      4     lane epoch, big-endian
8      8     lane offset of the tag key
16     4     r: raw share bytes (not sent)
20     4     c: ciphertext bytes
24     4     m: metadata bytes
28     m     metadata, in clear
28+m   c     ciphertext
28+m+c 16    tag
====== ===== =========================================================

The tag is Poly1305 under (32 lane bytes XOR root) of header, metadata, the raw bytes as
if they had been sent, ciphertext; in a hello then both greetings as sent, the
dialler's first, each after its length (4 bytes). All lengths stand in the fixed header or
before what they count, so no two frames feed the tag the same bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from mesh.core.lane import MAX_FRAME_BYTES, ROOT_BYTES, TAG_KEY_BYTES
from mesh.core.mac import TAG_BYTES, one_time_tag, verify_one_time_tag
from mesh.core.otp import xor
from mesh.core.ranges import Range
from mesh.core.secret import Buffer
from mesh.errors import CallerError, PeerError

VERSION = 1
HEADER_BYTES = 28
MAX_META_BYTES = 64 << 10
MAX_DOCUMENT_BYTES = 1 << 20
_HEADER = struct.Struct(">BBHIQIII")
_LENGTH = struct.Struct(">I")
_MAX_OFFSET = 1 << 62


class FrameKind(IntEnum):
    """What a frame is for; decides which offsets are acceptable, so it stands in the header."""

    HELLO = 1
    DATA = 2
    CONTROL = 3


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame taken apart; nothing in it is believed before :func:`open_frame`.

    ``meta``, ``ciphertext`` and ``header`` are views into what arrived.
    """

    kind: FrameKind
    epoch: int
    offset: int
    raw_bytes: int
    header: memoryview
    meta: memoryview
    ciphertext: memoryview
    tag: bytes

    @property
    def span(self) -> Range:
        """The lane bytes that the frame uses."""
        return Range(self.offset, self.offset + TAG_KEY_BYTES + self.raw_bytes + len(self.ciphertext))


def seal(
    kind: FrameKind,
    epoch: int,
    offset: int,
    *,
    pad: Buffer,
    root: Buffer,
    raw_bytes: int,
    plaintext: Buffer,
    meta: bytes,
    greetings: tuple[bytes, bytes] | None = None,
) -> list[Buffer]:
    """Encrypt and tag; the frame is the concatenation of what is returned.

    Args:
        kind: hello, data or control.
        epoch: the lane's epoch.
        offset: lane offset of ``pad``.
        pad: 32 + raw_bytes + len(plaintext) lane bytes, used for nothing else, ever.
        root: the lane epoch's first 32 bytes.
        raw_bytes: how many pad bytes are shares themselves.
        plaintext: what is sent encrypted.
        meta: metadata, at most 64 KiB (and a network document).
        greetings: for a hello, both greetings as sent, the dialler's first.

    Raises:
        CallerError: lengths do not fit.
    """
    if len(pad) != TAG_KEY_BYTES + raw_bytes + len(plaintext) or len(root) != ROOT_BYTES:
        raise CallerError("pad, root and shares do not fit in length")
    view = memoryview(pad)
    raw = view[TAG_KEY_BYTES : TAG_KEY_BYTES + raw_bytes]
    ciphertext = xor(view[TAG_KEY_BYTES + raw_bytes :], plaintext) if len(plaintext) else b""
    header = _HEADER.pack(VERSION, kind, 0, epoch, offset, raw_bytes, len(plaintext), len(meta))
    key = xor(view[:TAG_KEY_BYTES], root)
    tag = one_time_tag(key, header, meta, raw, ciphertext, *_bound(greetings))
    return [header, meta, ciphertext, tag]


def parse(data: Buffer) -> Frame:
    """Take a frame apart by its fixed header, without believing it.

    Raises:
        PeerError: not a frame of this version, or lengths that do not fit.
    """
    view = memoryview(data)
    if len(view) < HEADER_BYTES + TAG_BYTES:
        raise PeerError("frame shorter than its header", facts={"bytes": len(view)})
    version, kind, zero, epoch, offset, raw, cipher, meta = _HEADER.unpack_from(view)
    if version != VERSION or zero != 0 or kind not in (1, 2, 3):
        raise PeerError("frame of unknown version or kind", facts={"version": version, "kind": kind})
    if (
        TAG_KEY_BYTES + raw + cipher > MAX_FRAME_BYTES
        or meta > MAX_META_BYTES + MAX_DOCUMENT_BYTES
        or offset > _MAX_OFFSET
        or len(view) != HEADER_BYTES + meta + cipher + TAG_BYTES
        or (kind == FrameKind.HELLO and raw + cipher > 0)
    ):
        raise PeerError("frame with lengths that do not fit", facts={"bytes": len(view)})
    end = HEADER_BYTES + meta
    return Frame(
        FrameKind(kind),
        epoch,
        offset,
        raw,
        view[:HEADER_BYTES],
        view[HEADER_BYTES:end],
        view[end : end + cipher],
        bytes(view[end + cipher :]),
    )


def open_frame(
    frame: Frame, *, pad: Buffer, root: Buffer, greetings: tuple[bytes, bytes] | None = None
) -> tuple[memoryview, bytes]:
    """Verify a frame, then decrypt it; nothing leaves before the tag fits.

    Args:
        frame: from :func:`parse`.
        pad: the lane bytes of ``frame.span``.
        root: the lane epoch's first 32 bytes.
        greetings: for a hello, both greetings as sent, the dialler's first.

    Returns:
        (raw share bytes, plaintext).

    Raises:
        TagMismatchError: the tag does not fit.
    """
    view = memoryview(pad)
    raw = view[TAG_KEY_BYTES : TAG_KEY_BYTES + frame.raw_bytes]
    key = xor(view[:TAG_KEY_BYTES], root)
    verify_one_time_tag(key, frame.tag, frame.header, frame.meta, raw, frame.ciphertext, *_bound(greetings))
    if not len(frame.ciphertext):
        return raw, b""
    return raw, xor(view[TAG_KEY_BYTES + frame.raw_bytes :], frame.ciphertext)


def _bound(greetings: tuple[bytes, bytes] | None) -> tuple[bytes, ...]:
    """What a hello's tag covers besides the frame: the greetings, with their lengths.

    The bytes themselves, not a digest: a hash would make freshness computational.
    """
    if greetings is None:
        return ()
    return tuple(part for one in greetings for part in (_LENGTH.pack(len(one)), one))
