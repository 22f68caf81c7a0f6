"""Every pattern of honest, silent, lying, colluding and relabelling routes for n <= 5, all k.

The secret is right or there is none, and who is named is exactly who an independent search over all
explanations finds (protocol 3.8, ADR 5): a set of shares on one polynomial with the verified secret
that leaves fewer than k out. Field arithmetic here is this file's own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import pytest

from mesh.core import sharing
from mesh.core.collector import Collector, Failed, Named, Verdict, Verified
from mesh.core.network import Grade
from mesh.core.transfer import SlotKind, TransferHeader, TransferId, transfer_tag

HONEST, SILENT, LIES, COLLUDES, RELABELS = "HSLCR"
Errors = Mapping[int, tuple[int, ...]]


@cache
def times(a: int, b: int) -> int:
    """Product in GF(2^8), 0x11B, by shifting and adding."""
    total = 0
    while b:
        total ^= a if b & 1 else 0
        a = a << 1 ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return total


@cache
def inverse(a: int) -> int:
    """By search."""
    return next(b for b in range(256) if times(a, b) == 1)


def at_zero(points: Mapping[int, int]) -> int:
    """The value at 0 of the polynomial through (x, y)."""
    total = 0
    for x, y in points.items():
        term = y
        for other in points:
            if other != x:
                term = times(term, times(other, inverse(other ^ x)))
        total ^= term
    return total


def explains(shares: Iterable[int], errors: Errors, k: int) -> bool:
    """Whether these shares lie on one polynomial of degree < k with the right secret.

    Everything is linear, so only what was added to the honest shares matters: a polynomial with
    value 0 at 0 has to run through the errors of each column.
    """
    chosen = sorted(shares)
    for column in zip(*(errors[x] for x in chosen), strict=True):
        values = dict(zip(chosen, column, strict=True))
        if len(chosen) < k:
            continue
        if any(at_zero({x: values[x] for x in subset}) for subset in combinations(chosen, k)):
            return False
    return True


def oracle(errors: Errors, k: int) -> tuple[Verdict, set[int]] | None:
    """Who is to be named once a secret has verified among these shares."""
    everyone = set(errors)
    liars = {x for x, error in errors.items() if any(error)}
    if explains(everyone, errors, k):
        return None  # all on one polynomial, if not the honest one: nobody disagrees
    if k == 1:
        return Verdict.LIED, liars
    explained: list[set[int]] = []
    for size in range(len(everyone), max(len(everyone) - k, 0), -1):
        for chosen in combinations(sorted(everyone), size):
            if not any(set(chosen) <= one for one in explained) and explains(chosen, errors, k):
                explained.append(set(chosen))
    if len(explained) == 1:
        return Verdict.LIED, everyone - explained[0]
    return Verdict.SUSPECTED, set().union(*(everyone - one for one in explained)) or everyone


@dataclass(frozen=True)
class Transfer:
    """One transfer, honest, and the same relabelled."""

    header: TransferHeader
    encoded: bytes
    tag: bytes
    secret: bytes
    shares: list[bytes]
    relabelled: TransferHeader


@cache
def transfer(k: int, n: int) -> Transfer:
    """Made once per grade."""
    header = TransferHeader(
        TransferId("a", "z", 0, 0),
        1,
        SlotKind.KEYS,
        Grade.parse(f"multipath({k},{n})"),
        tuple(("a", f"m{route}", "z") for route in range(n)),
        2_000_000_000,
    )
    first = [os.urandom(header.length_bytes) for _ in range(k)]
    secret, rest = sharing.derive(k, n, first)
    encoded = header.encode()
    relabelled = TransferHeader(
        header.transfer, 1, SlotKind.SEALED, header.grade, header.routes, header.expires_at_s
    )
    return Transfer(header, encoded, transfer_tag(encoded, secret), secret, [*first, *rest], relabelled)


def framing(k: int, honest: Iterable[int], x: int) -> int:
    """A polynomial of degree < k that is 0 at 0 and at up to k - 2 honest shares, at x."""
    value = x
    for other in sorted(honest)[: max(0, k - 2)]:
        value = times(value, x ^ other)
    return value


def added(k: int, pattern: str, rng: random.Random) -> dict[int, tuple[int, ...]]:
    """What is added to the first four bytes of the share of each route that delivers."""
    honest = [x for x, what in enumerate(pattern, 1) if what == HONEST]
    errors: dict[int, tuple[int, ...]] = {}
    for x, what in enumerate(pattern, 1):
        if what == HONEST:
            errors[x] = (0, 0, 0, 0)
        elif what == LIES:
            errors[x] = tuple(rng.randrange(1, 256) for _ in range(4))
        elif what == COLLUDES:
            errors[x] = (framing(k, honest, x) if k > 1 else x, 0, 0, 0)
    return errors


def play(k: int, pattern: str, order: Iterable[int], rng: random.Random) -> None:
    """One pattern in one order of arrival, against the oracle."""
    n = len(pattern)
    one = transfer(k, n)
    errors = added(k, pattern, rng)
    collector = Collector(
        max_pending=100,
        max_pending_bytes=1 << 20,
        max_checked_bytes=1 << 20,
        keep_s=1.0,
        randomness=os.urandom,
    )
    outcomes = []
    for route in order:
        what, share = pattern[route], one.shares[route]
        if what == SILENT:
            continue
        header = one.relabelled if what == RELABELS else one.header
        if what in (LIES, COLLUDES):
            head = bytes(a ^ b for a, b in zip(share, errors[route + 1], strict=False))
            share = head + share[4:]
        outcomes += collector.add(
            header, header.encode(), one.tag, route=route, came_from=f"m{route}", share=share, now_s=0.0
        )
    outcomes += collector.expire(1.0)
    assert len(collector) == sum(collector._bytes.values()) == 0

    # The secret is the right one or there is none, exactly when k shares give it.
    verified = [outcome for outcome in outcomes if isinstance(outcome, Verified)]
    can = any(explains(chosen, errors, k) for chosen in combinations(sorted(errors), k))
    assert [outcome.secret for outcome in verified] == [one.secret] * can
    assert all(outcome.header == one.header for outcome in verified)
    if pattern.count(HONEST) >= k:
        assert can

    # Who is named.
    last: dict[Verdict, set[int]] = {}
    named = [outcome for outcome in outcomes if isinstance(outcome, Named) and outcome.header == one.header]
    expected = oracle(errors, k) if can else None
    for outcome in named:
        if outcome.verdict in (Verdict.LIED, Verdict.SUSPECTED) and set(outcome.routes) <= {
            x - 1 for x in errors
        }:
            last = {outcome.verdict: {route + 1 for route in outcome.routes}}
    missing = {route for route, what in enumerate(pattern) if what == SILENT}
    relabelled = {route for route, what in enumerate(pattern) if what == RELABELS}
    silent = {route for outcome in named if outcome.verdict is Verdict.SILENT for route in outcome.routes}
    late = {
        route
        for outcome in named
        if outcome.verdict is Verdict.SUSPECTED and set(outcome.routes) <= relabelled
        for route in outcome.routes
    }
    if can:
        assert last == ({} if expected is None else {expected[0]: expected[1]})
        if expected is not None and expected[0] is Verdict.LIED:
            truth = {x for x, error in errors.items() if any(error)}
            assert expected[1] == truth or len(truth) >= k
    else:
        failed = [other for other in outcomes if isinstance(other, Failed) and other.header == one.header]
        assert len(failed) == (len(errors) >= k)
        assert last == ({Verdict.SUSPECTED: set(errors)} if failed else {})
    heard = len(errors) >= k
    assert silent == (missing if heard else set())
    assert late == (relabelled if heard else set())


def orders(n: int, rng: random.Random) -> list[list[int]]:
    """Forward, backward, and one at random."""
    forward = list(range(n))
    return [forward, forward[::-1], rng.sample(forward, n)]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_pattern(n: int) -> None:
    rng = random.Random(n)
    for k in range(1, n + 1):
        for pattern in product("HSLCR", repeat=n):
            for order in orders(n, rng):
                play(k, "".join(pattern), order, rng)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_every_pattern_of_five(k: int) -> None:
    rng = random.Random(k)
    for number, pattern in enumerate(product("HSLC", repeat=5)):
        play(k, "".join(pattern), orders(5, rng)[number % 3], rng)
