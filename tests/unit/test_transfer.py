"""Transfers: header codec, checks at hops and target, and the collector (protocol 3.1 to 3.4, 3.7, 3.8)."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core import sharing
from mesh.core.network import Grade
from mesh.core.transfer import (
    Collector,
    ConfirmMessage,
    Disagreed,
    Failed,
    SlotKind,
    TransferHeader,
    TransferId,
    Verified,
    check_hop,
    split_secret,
    transfer_tag,
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


def make(header: TransferHeader = HEADER) -> tuple[bytes, bytes, list[bytes], bytes]:
    """Encoded header, tag, shares and secret of one transfer."""
    encoded = header.encode()
    first = [os.urandom(header.length_bytes) for _ in range(header.grade.k)]
    secret, rest = sharing.derive(header.grade.k, header.grade.n, first)
    return encoded, transfer_tag(encoded, secret), [*first, *rest], secret


def collector(**changes: Any) -> Collector:
    """A collector with small bounds."""
    settings = {"max_pending": 4, "max_pending_bytes": 100_000, "keep_s": 30.0, "randomness": os.urandom}
    return Collector(**{**settings, **changes})


class Feed:
    """Feeds shares of one transfer."""

    def __init__(self, into: Collector, header: TransferHeader = HEADER) -> None:
        self.into = into
        self.header = header
        self.encoded, self.tag, self.shares, self.secret = make(header)

    def add(self, route: int, share: bytes | None = None, now_s: float = 0.0) -> Any:
        """Adds the share of a route, or another one in its place."""
        return self.into.add(
            self.header,
            self.encoded,
            self.tag,
            route=route,
            came_from=self.header.routes[route][-2],
            share=self.shares[route] if share is None else share,
            now_s=now_s,
        )


def test_header_comes_back_as_it_was() -> None:
    assert TransferHeader.decode(HEADER.encode()) == HEADER
    assert HEADER.length_bytes == 48 + 32 + 8 + 3 * 48


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


def test_k_shares_are_enough_and_late_ones_are_judged() -> None:
    feed = Feed(collector())
    assert feed.add(2) is None
    verified = feed.add(0)
    assert isinstance(verified, Verified)
    assert (verified.secret, verified.culprits) == (feed.secret, ())
    late = feed.add(1, bytes(HEADER.length_bytes))
    assert isinstance(late, Disagreed)
    assert late.culprits == (1,)
    assert len(feed.into) == 0


def test_a_liar_among_more_than_k_is_a_culprit() -> None:
    feed = Feed(collector())
    assert feed.add(0, bytes(HEADER.length_bytes)) is None
    assert feed.add(1) is None
    verified = feed.add(2)
    assert isinstance(verified, Verified)
    assert (verified.secret, verified.culprits) == (feed.secret, (0,))


def test_without_a_fit_all_are_suspects() -> None:
    feed = Feed(collector())
    outcomes = [feed.add(route, os.urandom(HEADER.length_bytes)) for route in range(3)]
    assert outcomes[:2] == [None, None]
    assert outcomes[2] == Failed(HEADER, (0, 1, 2))


def test_one_share_per_route() -> None:
    feed = Feed(collector())
    feed.add(0)
    assert feed.add(0, bytes(HEADER.length_bytes)) is None
    assert isinstance(feed.add(1), Verified)


def test_a_liar_with_another_header_cannot_spoil_the_honest_group() -> None:
    into = collector()
    honest, liar = Feed(into), Feed(into)
    liar.add(0)
    assert honest.add(1) is None
    assert isinstance(honest.add(2), Verified)


def test_the_oldest_share_of_the_same_link_goes_first() -> None:
    into = collector(max_pending=2)
    feeds = [
        Feed(into, replace(HEADER, transfer=replace(HEADER.transfer, first_slot=slot))) for slot in range(3)
    ]
    feeds[0].add(1)
    for feed in (feeds[1], feeds[2], feeds[0]):
        feed.add(0)
    # The third share over h1 pushed out the first one over h1, and nothing that came over h2.
    assert feeds[1].add(2) is None
    assert isinstance(feeds[2].add(1), Verified)


def test_bytes_are_bounded_per_link() -> None:
    into = collector(max_pending=100, max_pending_bytes=3 * HEADER.length_bytes)
    for slot in range(10):
        Feed(into, replace(HEADER, transfer=replace(HEADER.transfer, first_slot=slot))).add(0)
    assert len(into) == 3


def test_waiting_ends_and_names_suspects_only_with_k_shares() -> None:
    into = collector(keep_s=10)
    one, two = Feed(into), Feed(into, replace(HEADER, expires_at_s=7))
    one.add(0)
    two.add(0, bytes(HEADER.length_bytes))
    two.add(1)
    assert into.expire(9.0) == []
    assert into.expire(10.0) == [Failed(two.header, (0, 1))]
    assert len(into) == 0


def test_single_route_needs_no_waiting() -> None:
    header = replace(HEADER, grade=Grade(), routes=ROUTES[:1], attachment=b"")
    feed = Feed(collector(), header)
    assert isinstance(feed.add(0), Verified)
    assert feed.add(0, bytes(header.length_bytes)) == Failed(header, (0,))
