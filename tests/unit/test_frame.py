"""Frames: the layout byte by byte, and what the tag covers (protocol 1.5, 1.6)."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives.poly1305 import Poly1305

from mesh.core import frame as frames
from mesh.core.frame import FrameKind
from mesh.errors import CallerError, PeerError, TagMismatchError

ROOT = bytes(range(100, 132))
PAD = bytes(range(32)) + b"R" * 10 + b"P" * 5


def sealed(kind: FrameKind = FrameKind.DATA, **changes: object) -> bytes:
    facts: dict[str, object] = {
        "pad": PAD,
        "root": ROOT,
        "raw_bytes": 10,
        "plaintext": b"plain",
        "meta": b"meta!",
        **changes,
    }
    return b"".join(frames.seal(kind, 7, 4096, **facts))  # type: ignore[arg-type]


def test_layout_as_documented() -> None:
    """The table in docs/formats.md, checked against struct and a Poly1305 of its own."""
    data = sealed()
    assert data[:28] == struct.pack(">BBHIQIII", 1, 2, 0, 7, 4096, 10, 5, 5)
    assert data[28:33] == b"meta!"
    cipher = bytes(a ^ b for a, b in zip(b"plain", b"PPPPP", strict=True))
    assert data[33:38] == cipher
    key = bytes(a ^ b for a, b in zip(PAD[:32], ROOT, strict=True))
    assert data[38:] == Poly1305.generate_tag(key, data[:33] + b"R" * 10 + cipher)
    assert len(data) == 54


def test_round_trip() -> None:
    frame = frames.parse(sealed())
    assert (frame.kind, frame.epoch, frame.offset) == (FrameKind.DATA, 7, 4096)
    assert (frame.span.start, frame.span.stop) == (4096, 4096 + 47)
    raw, plaintext = frames.open_frame(frame, pad=PAD, root=ROOT)
    assert (bytes(raw), plaintext, bytes(frame.meta)) == (b"R" * 10, b"plain", b"meta!")


def test_hello_binds_both_greetings_in_order() -> None:
    """1.8: the tag covers the greetings' bytes, not a digest; their boundary too."""
    data = sealed(
        FrameKind.HELLO, pad=PAD[:32], raw_bytes=0, plaintext=b"", greetings=(b"dialler", b"acceptor")
    )
    frame = frames.parse(data)
    frames.open_frame(frame, pad=PAD[:32], root=ROOT, greetings=(b"dialler", b"acceptor"))
    for wrong in ((b"acceptor", b"dialler"), (b"diallera", b"cceptor"), (b"", b"dialleracceptor"), None):
        with pytest.raises(TagMismatchError):
            frames.open_frame(frame, pad=PAD[:32], root=ROOT, greetings=wrong)


@pytest.mark.parametrize("at", range(54))
def test_every_byte_counts(at: int) -> None:
    junk = bytearray(sealed())
    junk[at] ^= 0x80
    with pytest.raises((PeerError, TagMismatchError)):
        frames.open_frame(frames.parse(junk), pad=PAD, root=ROOT)


def test_wrong_root_or_pad_fails() -> None:
    frame = frames.parse(sealed())
    with pytest.raises(TagMismatchError):
        frames.open_frame(frame, pad=PAD, root=bytes(32))
    with pytest.raises(TagMismatchError):
        frames.open_frame(frame, pad=PAD[:35] + b"x" + PAD[36:], root=ROOT)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(43),
        b"\x02" + sealed()[1:],
        sealed()[:1] + b"\x04" + sealed()[2:],
        sealed()[:3] + b"\x01" + sealed()[4:],
        sealed() + b"x",
        sealed()[:-1],
        struct.pack(">BBHIQIII", 1, 2, 0, 1, 0, 1 << 20, 0, 0) + bytes(16),
        struct.pack(">BBHIQIII", 1, 1, 0, 1, 0, 8, 0, 0) + bytes(16),
        struct.pack(">BBHIQIII", 1, 2, 0, 1, 1 << 63, 8, 0, 0) + bytes(16),
    ],
    ids=["empty", "short", "version", "kind", "zero", "long", "cut", "huge", "hello-with-raw", "offset"],
)
def test_malformed_frames_are_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        frames.parse(data)


def test_seal_refuses_lengths_that_do_not_fit() -> None:
    for changes in ({"raw_bytes": 9}, {"root": b""}, {"plaintext": b"plains"}):
        with pytest.raises(CallerError):
            sealed(**changes)
