"""Transfers: header codec, checks at hops and target (protocol 3.1 to 3.4)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.network import Grade
from mesh.core.transfer import (
    ConfirmMessage,
    SlotKind,
    TransferHeader,
    TransferId,
    check_hop,
    split_secret,
)
from mesh.errors import PeerError

ROUTES = (("a", "h1", "z"), ("a", "h2", "z"), ("a", "h3", "z"))
HEADER = TransferHeader(
    transfer=TransferId("a", "z", 5, 1000),
    slot_count=3,
    kind=SlotKind.KEYS,
    grade=Grade.parse("dske(2,3)"),
    routes=ROUTES,
    expires_at_s=1_700_000_060,
    attachment=b"attached",
)


def test_header_comes_back_as_it_was() -> None:
    assert TransferHeader.decode(HEADER.encode()) == HEADER
    assert HEADER.length_bytes == 48 + 32 + 8 + 3 * 48


def test_routes_left_out_are_told_in_one_way_and_take_no_share() -> None:
    told = replace(HEADER, left_out=(1,))
    assert told.encode() == HEADER.encode() + b"\0\x02"
    assert TransferHeader.decode(told.encode()) == told
    with pytest.raises(PeerError):
        check_hop(told, route=1, hop=0, came_from="a", own_id="h2", length_bytes=HEADER.length_bytes)
    for bits in (b"\0\0", b"\0\x03", b"\0\x08", b"\x80\x02", b"\0\x02\0"):
        with pytest.raises(PeerError):
            TransferHeader.decode(HEADER.encode() + bits)


@pytest.mark.parametrize("cut", range(0, len(HEADER.encode()), 3))
def test_a_cut_header_is_refused(cut: int) -> None:
    with pytest.raises(PeerError):
        TransferHeader.decode(HEADER.encode()[:cut])


def test_bytes_left_over_are_refused() -> None:
    with pytest.raises(PeerError):
        TransferHeader.decode(HEADER.encode() + b"\0")


@pytest.mark.parametrize(
    "changes",
    [
        {"routes": (("a", "h1", "z"), ("a", "h2", "z"), ("b", "h3", "z"))},
        {"routes": (("a", "h1", "z"), ("a", "h2", "z"), ("a", "h3", "h3", "z"))},
        {"transfer": TransferId("a", "a", 0, 0)},
        {"transfer": TransferId("a", "z", 4096, 0)},
        {"transfer": TransferId("a", "z", 0, (1 << 36) - 1)},
        {"slot_count": 0},
        {"transfer": TransferId("A", "z", 0, 0)},
    ],
)
def test_malformed_headers_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PeerError):
        TransferHeader.decode(replace(HEADER, **changes).encode())


@given(st.binary(max_size=300))
def test_junk_is_refused_in_words(junk: bytes) -> None:
    with pytest.raises(PeerError):
        TransferHeader.decode(b"KMT\x01" + junk)


@given(st.integers(0, len(HEADER.encode()) - 1), st.integers(1, 255))
def test_a_changed_header_never_decodes_to_the_same(at: int, change: int) -> None:
    encoded = bytearray(HEADER.encode())
    encoded[at] ^= change
    try:
        decoded = TransferHeader.decode(bytes(encoded))
    except PeerError:
        return
    assert decoded != HEADER
    assert decoded.encode() == bytes(encoded)


def test_secret_is_cut_in_order() -> None:
    secret = bytes(range(200))
    parts = split_secret(secret, 8)
    assert (parts.tag_key, parts.confirm_key) == (secret[:48], secret[48:80])
    assert (parts.attachment_pad, parts.payload) == (secret[80:88], secret[88:])
    assert "b'" not in repr(parts)


def test_hops_in_order_and_nothing_else() -> None:
    size = HEADER.length_bytes

    def hop(route: int, at: int, came_from: str, own_id: str, length: int = size) -> str | None:
        return check_hop(HEADER, route=route, hop=at, came_from=came_from, own_id=own_id, length_bytes=length)

    assert hop(0, 0, "a", "h1") == "z"
    assert hop(0, 1, "h1", "z") is None
    for route, at, came_from, own_id in (
        (0, 0, "h2", "h1"),
        (0, 0, "a", "h2"),
        (0, 1, "h2", "z"),
        (1, 1, "h1", "z"),
        (3, 0, "a", "h1"),
        (0, 2, "h1", "z"),
        (0, -1, "a", "h1"),
    ):
        with pytest.raises(PeerError):
            hop(route, at, came_from, own_id)
    with pytest.raises(PeerError):
        hop(0, 0, "a", "h1", size - 1)


def test_confirm_comes_back_and_is_strict() -> None:
    confirm = ConfirmMessage(HEADER.transfer, 3, bytes(16), b"i" * 16, b"l" * 16, is_proven=True)
    assert ConfirmMessage.decode(confirm.encode()) == confirm
    for bad in (confirm.encode()[:-1], confirm.encode() + b"\0", confirm.encode()[:-1] + b"\2", b""):
        with pytest.raises(PeerError):
            ConfirmMessage.decode(bad)
