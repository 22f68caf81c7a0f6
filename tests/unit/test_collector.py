"""The target's collector: k shares are enough, bounds per link, who is named (protocol 3.7, 3.8)."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from mesh.core import collector as collector_module
from mesh.core import sharing
from mesh.core.collector import Collector, Failed, Named, Outcome, Verdict, Verified
from mesh.core.gf256 import mul
from mesh.core.network import Grade
from mesh.core.transfer import SlotKind, TransferHeader, TransferId, transfer_tag

ROUTES = tuple(("a", f"h{number}", "z") for number in range(1, 10))
HEADER = TransferHeader(
    transfer=TransferId("a", "z", 5, 1000),
    slot_count=3,
    kind=SlotKind.KEYS,
    grade=Grade.parse("dske(2,3)"),
    routes=ROUTES[:3],
    expires_at_s=1_700_000_060,
    attachment=b"attached",
)
SIZE = HEADER.length_bytes


def graded(k: int, n: int, slot: int = 1000) -> TransferHeader:
    """A header of another grade."""
    transfer = replace(HEADER.transfer, first_slot=slot)
    return replace(HEADER, transfer=transfer, grade=Grade.parse(f"dske({k},{n})"), routes=ROUTES[:n])


def make(header: TransferHeader = HEADER) -> tuple[bytes, bytes, list[bytes], bytes]:
    """Encoded header, tag, shares and secret of one transfer."""
    encoded = header.encode()
    first = [os.urandom(header.length_bytes) for _ in range(header.grade.k)]
    secret, rest = sharing.derive(header.grade.k, header.grade.n, first)
    return encoded, transfer_tag(encoded, secret), [*first, *rest], secret


def collector(**changes: Any) -> Collector:
    """A collector with small bounds."""
    settings = {
        "max_pending": 4,
        "max_pending_bytes": 100_000,
        "max_checked_bytes": 100_000,
        "keep_s": 30.0,
        "randomness": os.urandom,
    }
    return Collector(**{**settings, **changes})


class Feed:
    """Feeds shares of one transfer."""

    def __init__(self, into: Collector, header: TransferHeader = HEADER) -> None:
        self.into = into
        self.header = header
        self.encoded, self.tag, self.shares, self.secret = make(header)

    def add(self, route: int, share: bytes | None = None, now_s: float = 0.0) -> list[Outcome]:
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

    def lie(self, route: int) -> list[Outcome]:
        """Adds random bytes."""
        return self.add(route, os.urandom(self.header.length_bytes))

    @property
    def verified(self) -> Verified:
        """What comes out of k honest shares."""
        return Verified(self.header, self.tag, self.secret)

    def named(self, verdict: Verdict, *routes: int) -> Named:
        """What is said of routes."""
        return Named(self.header, verdict, routes)


def test_k_shares_are_enough_and_late_ones_are_judged() -> None:
    feed = Feed(collector())
    assert feed.add(2) == []
    assert feed.add(0) == [feed.verified]
    assert feed.lie(1) == [feed.named(Verdict.LIED, 1)]
    assert len(feed.into) == 0


def test_honest_late_shares_are_not_mentioned() -> None:
    feed = Feed(collector(), graded(2, 5))
    assert [feed.add(route) for route in range(5)] == [[], [feed.verified], [], [], []]
    assert len(feed.into) == 0


def test_a_liar_among_more_than_k_is_a_culprit() -> None:
    feed = Feed(collector())
    assert feed.lie(0) == feed.add(1) == []
    assert feed.add(2) == [feed.verified, feed.named(Verdict.LIED, 0)]


def test_suspects_are_cleared_when_more_shares_tell() -> None:
    """(3,5), liars at 1 and 3 sum to nothing at 0 with route 0: first nobody can tell, then one can."""
    feed = Feed(collector(), graded(3, 5))
    shifts = {1: 1 ^ 2, 3: 1 ^ 4}  # e(x) = x * (x - 1): 0 at 0 and at x = 1 (route 0)
    factors = {route: mul(route + 1, shift) for route, shift in shifts.items()}
    lies = {
        route: bytes([feed.shares[route][0] ^ factor, *feed.shares[route][1:]])
        for route, factor in factors.items()
    }
    assert feed.add(1, lies[1]) == feed.add(0) == []
    assert feed.add(3, lies[3]) == [feed.verified]
    assert feed.add(2) == [feed.named(Verdict.SUSPECTED, 0, 1, 2, 3)]
    # Three honest shares agree, and so do the liars with route 0, which is on both polynomials.
    assert feed.add(4) == [feed.named(Verdict.SUSPECTED, 1, 2, 3, 4)]


def test_without_a_fit_all_are_suspects() -> None:
    feed = Feed(collector())
    assert [feed.lie(route) for route in range(3)] == [
        [],
        [],
        [Failed(HEADER, feed.tag), feed.named(Verdict.SUSPECTED, 0, 1, 2)],
    ]


def test_one_share_per_route_and_link() -> None:
    feed = Feed(collector())
    assert feed.add(0) == feed.lie(0) == []
    outcome = feed.into.add(
        HEADER, feed.encoded, feed.tag, route=1, came_from="h1", share=bytes(SIZE), now_s=0.0
    )
    assert outcome == []
    assert feed.add(1) == [feed.verified]


def test_a_liar_with_another_header_cannot_spoil_the_honest_group() -> None:
    into = collector()
    honest, liar = Feed(into), Feed(into)
    liar.add(0)
    assert honest.add(1) == []
    assert honest.add(2) == [honest.verified]
    # It has not been silent: it said something else.
    assert into.expire(30.0) == [honest.named(Verdict.SUSPECTED, 0)]


def test_the_oldest_share_of_the_same_link_goes_first() -> None:
    into = collector(max_pending=2)
    feeds = [Feed(into, graded(2, 3, slot)) for slot in range(3)]
    feeds[0].add(1)
    for feed in (feeds[1], feeds[2], feeds[0]):
        feed.add(0)
    # The third share over h1 pushed out the first one over h1, and nothing that came over h2.
    assert feeds[1].add(2) == []
    assert feeds[2].add(1) == [feeds[2].verified]


def test_bytes_are_bounded_per_link() -> None:
    into = collector(max_pending=100, max_pending_bytes=3 * SIZE)
    for slot in range(10):
        Feed(into, graded(2, 3, slot)).add(0)
    assert len(into) == 3


def test_bytes_that_only_wait_for_late_shares_are_bounded() -> None:
    """A silent hub leaves every transfer waiting: the bytes go, who was silent stays known."""
    into = collector(max_pending=100, max_checked_bytes=6 * SIZE)
    feeds = [Feed(into, graded(2, 3, slot)) for slot in range(10)]
    for feed in feeds:
        feed.add(0)
        assert feed.add(1) == [feed.verified]
    assert into._checked_bytes == sum(into._bytes.values()) == 6 * SIZE
    # Too late to be compared; nor is it called silent.
    assert feeds[0].lie(2) == []
    assert feeds[9].lie(2) == [feeds[9].named(Verdict.LIED, 2)]
    assert into.expire(30.0) == [feed.named(Verdict.SILENT, 2) for feed in feeds[1:9]]
    assert (len(into), into._checked_bytes, sum(into._bytes.values())) == (0, 0, 0)


def test_transfers_that_only_wait_for_late_shares_are_bounded() -> None:
    into = collector(max_pending=4, max_checked_bytes=2 * SIZE)
    feeds = [Feed(into, graded(2, 3, slot)) for slot in range(6)]
    named: list[Outcome] = []
    for feed in feeds:
        feed.add(0)
        named += feed.add(1)[1:]
    assert named == [feed.named(Verdict.SILENT, 2) for feed in feeds[:2]]
    assert len(into) == 4


def test_waiting_ends_and_names_only_with_k_shares() -> None:
    into = collector(keep_s=10)
    one, two, three = (Feed(into, graded(2, 3, slot)) for slot in range(3))
    one.add(0)
    two.lie(0)
    two.add(1)
    three.add(0)
    three.add(1)
    assert into.expire(9.0) == []
    # One share alone may be an invention of its hub's: nobody else was silent then.
    assert into.expire(10.0) == [
        Failed(two.header, two.tag),
        two.named(Verdict.SUSPECTED, 0, 1),
        two.named(Verdict.SILENT, 2),
        three.named(Verdict.SILENT, 2),
    ]
    assert len(into) == 0


def test_a_route_that_the_source_left_out_is_not_silent() -> None:
    header = replace(graded(2, 5), left_out=(3,))
    early, all_came = Feed(collector(), header), Feed(collector(), header)
    assert [early.add(0), early.add(1)] == [[], [early.verified]]
    assert early.into.expire(30.0) == [early.named(Verdict.SILENT, 2, 4)]
    for route in (0, 1, 2, 4):
        all_came.add(route)
    assert len(all_came.into) == 0


def test_a_query_learns_which_routes_came() -> None:
    feed = Feed(collector(), graded(3, 3))
    transfer = feed.header.transfer
    assert feed.into.pending(transfer, feed.tag) is None
    feed.add(2)
    feed.add(0)
    assert feed.into.pending(transfer, feed.tag) == (0, 2)
    assert feed.into.pending(transfer, bytes(16)) is None
    feed.add(1)
    assert feed.into.pending(transfer, feed.tag) is None


def test_many_subsets_are_searched_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """(5,9), four liars first, then exactly k honest shares: 126 subsets, and the loop is not held up."""
    feed = Feed(collector(), graded(5, 9))
    tags: list[bytes] = []

    def counted(encoded: bytes, secret: bytes) -> bytes:
        tags.append(secret)
        return transfer_tag(encoded, secret)

    monkeypatch.setattr(collector_module, "transfer_tag", counted)
    monkeypatch.setattr(collector_module, "_SLICE_BYTES", 1)
    outcomes = [feed.lie(route) for route in range(4)] + [feed.add(route) for route in range(4, 9)]
    assert outcomes == [[]] * 9
    assert len(tags) == 5
    assert feed.into.pending(feed.header.transfer, feed.tag) == tuple(range(9))
    steps = []
    while feed.into.is_searching:
        before = len(tags)
        steps.append(feed.into.work())
        assert len(tags) - before <= 1
    assert steps[:-1] == [[]] * (len(steps) - 1)
    assert steps[-1] == [feed.verified, feed.named(Verdict.LIED, *range(4))]
    assert len(feed.into) == 0
    assert feed.into.work() == []


def test_an_unfinished_search_ends_with_its_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector_module, "_SLICE_BYTES", 1)
    into = collector(max_pending=2)
    waits, gone = Feed(into, graded(2, 5)), Feed(into, graded(2, 5, 2000))
    for feed in (gone, waits):
        for route in range(4):
            assert feed.lie(route) == []
    assert into.is_searching
    for slot in range(3000, 3002):  # pushes the lies of both out, on one link
        Feed(into, graded(2, 5, slot)).add(0)
    assert [outcome for outcome in into.expire(30.0) if isinstance(outcome, Failed)] == [
        Failed(gone.header, gone.tag),
        Failed(waits.header, waits.tag),
    ]
    assert into.work() == []
    assert sum(into._bytes.values()) == 0


def test_single_route_needs_no_waiting() -> None:
    header = replace(HEADER, grade=Grade(), routes=ROUTES[:1], attachment=b"")
    feed = Feed(collector(), header)
    assert feed.add(0) == [feed.verified]
    assert feed.lie(0) == [Failed(header, feed.tag), feed.named(Verdict.SUSPECTED, 0)]
