"""Courier files under arbitrary damage: never accepted, always in our own words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.psrd import LaneSpan, PsrdHeader
from mesh.errors import MeshError
from tests.fakes.courier import PASSPHRASE, courier_of, header_of, read_all

_CLEAR, _TABLE = courier_of(header_of())
_SEALED, _ = courier_of(header_of(), passphrase=PASSPHRASE)

_offsets = st.integers(0, 1 << 40)
_spans = st.builds(
    lambda epoch, end, gap, length: LaneSpan(epoch, end, end + gap, length),
    st.integers(0, (1 << 32) - 1),
    _offsets,
    _offsets,
    st.integers(4096, 1 << 30),
)
_names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)


@pytest.mark.exhaustive
def test_every_bit_before_the_table_and_of_the_tag() -> None:
    """All bits outside the table, one by one; the table's own are sampled below."""
    front = 10 + len(header_of().encode()) + 32
    for bit in [*range(front * 8), *range((len(_CLEAR) - 16) * 8, len(_CLEAR) * 8)]:
        damaged = bytearray(_CLEAR)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MeshError):
            read_all(bytes(damaged), piece=9000)


@given(st.integers(0, len(_CLEAR) * 8 - 1))
def test_any_bit_flip_is_refused(bit: int) -> None:
    damaged = bytearray(_CLEAR)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MeshError):
        read_all(bytes(damaged))


@settings(max_examples=60)
@given(st.integers(0, len(_SEALED) * 8 - 1))
def test_any_bit_flip_of_a_sealed_file_is_refused(bit: int) -> None:
    damaged = bytearray(_SEALED)
    damaged[bit // 8] ^= 1 << bit % 8
    if damaged[8] in range(15, 19):
        damaged[8] = 14  # the same refusal without the work of a costly scrypt
    with pytest.raises(MeshError):
        read_all(bytes(damaged), passphrase=PASSPHRASE)


@given(st.integers(0, len(_CLEAR) - 1))
def test_any_truncation_is_refused(length: int) -> None:
    with pytest.raises(MeshError):
        read_all(_CLEAR[:length])


@given(st.lists(st.tuples(st.integers(0, len(_CLEAR) - 1), st.binary(min_size=1, max_size=40)), min_size=1))
def test_overwrites_are_refused_or_change_nothing(edits: list[tuple[int, bytes]]) -> None:
    damaged = bytearray(_CLEAR)
    for at, data in edits:
        damaged[at : at + len(data)] = data
    if bytes(damaged) == _CLEAR:
        return
    with pytest.raises(MeshError):
        read_all(bytes(damaged))


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(MeshError):
        read_all(b"KMPSRD\x01\x00" + data)


@given(st.binary(min_size=16, max_size=16), _names, _names, _names, _spans, _spans, st.integers(0, 1 << 40))
def test_headers_round_trip(
    table_id: bytes, domain: str, hub: str, client: str, down: LaneSpan, up: LaneSpan, made_at_s: int
) -> None:
    if hub == client:
        return
    header = PsrdHeader(table_id, domain, hub, client, down, up, made_at_s)
    assert PsrdHeader.decode(header.encode()) == header


@given(st.integers(1, 5000), st.integers(4096, 9000), st.integers(4096, 9000), st.booleans())
@settings(max_examples=40)
def test_any_piece_size_reads_the_same(piece: int, down: int, up: int, is_sealed: bool) -> None:
    passphrase = PASSPHRASE if is_sealed else None
    header = header_of(from_hub=down, to_hub=up)
    data, table = courier_of(header, passphrase=passphrase, chunk_log2=9)
    assert read_all(data, passphrase=passphrase, piece=piece) == (header, table)
