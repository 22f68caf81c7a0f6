"""Frames for any lengths and bytes: round trip, and no change goes unseen."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core import frame as frames
from mesh.core.frame import FrameKind
from mesh.errors import PeerError, TagMismatchError
from mesh.node.transport import unwrap, wrap_frame
from mesh.v1.link_pb2 import LinkMessage

_BYTES = st.binary(max_size=300)


@st.composite
def sealings(draw: st.DrawFn) -> tuple[bytes, bytes, bytes, int, bytes, bytes]:
    raw = draw(st.integers(0, 200))
    plaintext = draw(_BYTES)
    # Pads are random in earnest: a shrunk all-zero key would authenticate anything, as it must.
    pads = draw(st.randoms(use_true_random=False))
    seeded = random.Random(pads.getrandbits(64))
    pad = seeded.randbytes(32 + raw + len(plaintext))
    root = seeded.randbytes(32)
    meta = draw(_BYTES)
    data = b"".join(
        frames.seal(
            FrameKind.DATA,
            draw(st.integers(0, (1 << 32) - 1)),
            draw(st.integers(0, 1 << 62)),
            pad=pad,
            root=root,
            raw_bytes=raw,
            plaintext=plaintext,
            meta=meta,
        )
    )
    return data, pad, root, raw, plaintext, meta


@given(sealings())
def test_round_trip(sealing: tuple[bytes, bytes, bytes, int, bytes, bytes]) -> None:
    data, pad, root, raw, plaintext, meta = sealing
    frame = frames.parse(data)
    got_raw, got_plaintext = frames.open_frame(frame, pad=pad, root=root)
    assert (bytes(got_raw), got_plaintext, bytes(frame.meta)) == (pad[32 : 32 + raw], plaintext, meta)
    assert len(frame.span) == len(pad)
    assert len(data) == 28 + len(meta) + len(plaintext) + 16


@given(sealings(), st.integers(0), st.integers(1, 255))
def test_any_changed_byte_is_caught(
    sealing: tuple[bytes, bytes, bytes, int, bytes, bytes], at: int, flip: int
) -> None:
    data, pad, root, *_ = sealing
    junk = bytearray(data)
    junk[at % len(junk)] ^= flip
    with pytest.raises((PeerError, TagMismatchError)):
        frames.open_frame(frames.parse(junk), pad=pad, root=root)


@given(st.binary(max_size=400))
def test_parse_never_fails_in_another_way(data: bytes) -> None:
    try:
        frame = frames.parse(data)
    except PeerError:
        return
    assert len(frame.span) >= 32


@given(st.binary(max_size=70_000))
def test_envelope_is_protobuf(frame: bytes) -> None:
    """The hand-written envelope is what protobuf writes and reads."""
    wrapped = wrap_frame([frame[:5], frame[5:]])
    assert wrapped == LinkMessage(frame=frame).SerializeToString()
    got = unwrap(wrapped)
    assert isinstance(got, memoryview)
    assert bytes(got) == frame


@given(st.binary(max_size=300))
def test_envelope_survives_junk(data: bytes) -> None:
    try:
        unwrap(data)
    except PeerError:
        return
