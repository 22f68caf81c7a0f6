"""The search in slices: the same secret as at one go, whatever liars send first, and a bound on the work."""

from __future__ import annotations

import random
from itertools import combinations
from math import comb

import pytest

from mesh.core.search import Found, Search
from mesh.core.sharing import derive

BULK_BYTES = 5000


def make(k: int, n: int, size: int, liars: int) -> tuple[bytes, dict[int, bytes]]:
    """A secret, and shares of which the first so many are garbage."""
    rng = random.Random(k * n + liars)
    first = [rng.randbytes(size) for _ in range(k)]
    secret, rest = derive(k, n, first)
    shares = dict(enumerate([*first, *rest], 1))
    return secret, shares | {index: rng.randbytes(size) for index in range(1, liars + 1)}


class Tries:
    """A search, and how many secrets it asked about."""

    def __init__(self, k: int, secret: bytes, *, is_compared: bool = True, **bounds: int) -> None:
        self.made = 0
        self._secret = secret
        randomness = random.Random(1).randbytes if is_compared else None
        self.search = Search(k, self._accept, randomness=randomness, **bounds)

    def _accept(self, candidate: bytes) -> bool:
        self.made += 1
        return candidate == self._secret

    def feed(self, shares: dict[int, bytes], most_bytes: float) -> Found | None:
        """One slice for each share."""
        for index, share in shares.items():
            self.search.add(index, share)
            found = self.search.run(most_bytes)
            if found is not None:
                return found
        return None


@pytest.mark.parametrize("size", [128, BULK_BYTES])
def test_one_honest_share_more_than_k_makes_liars_cheap(size: int) -> None:
    """(8,16), seven liars first: with nine honest shares the first subset tried is right."""
    secret, shares = make(8, 16, size, liars=7)
    tries = Tries(8, secret)
    assert tries.feed(shares, 1) == Found(secret, tuple(range(8, 16)))
    assert tries.made == 9  # one for each share since the eighth


@pytest.mark.parametrize("is_compared", [False, True])
@pytest.mark.parametrize(("k", "n", "liars"), [(2, 3, 1), (3, 5, 2), (4, 7, 3), (5, 9, 4)])
def test_slices_find_what_the_whole_finds_and_try_nothing_twice(
    k: int, n: int, liars: int, is_compared: bool
) -> None:
    secret, shares = make(k, n, 128, liars)
    tries = Tries(k, secret, is_compared=is_compared)
    found = tries.feed(shares, 1)
    while found is None and not tries.search.is_over:
        found = tries.search.run(1)
    assert found is not None
    assert (found.secret, set(found.used) & set(range(1, liars + 1))) == (secret, set())
    assert tries.made <= comb(n, k)


def test_a_slice_is_bounded_and_what_is_over_is_over() -> None:
    secret, shares = make(4, 8, 128, liars=8)
    tries = Tries(4, secret)
    for index, share in shares.items():
        before = tries.made
        tries.search.add(index, share)
        assert tries.search.run(1 << 18) is None
        assert tries.made - before <= 4
    while not tries.search.is_over:
        assert tries.search.run(1 << 18) is None
    assert tries.made == comb(8, 4)


def test_a_share_that_went_is_not_used_and_its_successor_is() -> None:
    secret, shares = make(2, 4, 128, liars=2)
    tries = Tries(2, secret)
    for index in (1, 2, 3):
        tries.search.add(index, shares[index])
    assert tries.search.run() is None
    tries.search.remove(3)
    assert tries.search.run() is None
    assert tries.made == 3
    tries.search.add(3, shares[3])
    tries.search.add(4, shares[4])
    assert tries.search.run() == Found(secret, (3, 4))


def test_without_agreement_the_bytes_combined_are_bounded() -> None:
    """Liars and exactly k honest shares; then one more comes, and what agrees is tried all the same."""
    secret, shares = make(3, 6, BULK_BYTES, liars=2)
    last = shares.pop(6)
    tries = Tries(3, secret, max_blind_bytes=3 * 3 * BULK_BYTES)
    assert tries.feed(shares, float("inf")) is None
    assert (tries.made, tries.search.is_over) == (3, True)
    tries.search.add(6, last)
    assert tries.search.run() == Found(secret, (3, 4, 5))


def test_every_pair_of_polynomials_is_told_apart() -> None:
    """Two groups of one transfer that agree among themselves, the larger first, for every choice."""
    secret, shares = make(3, 9, BULK_BYTES, liars=0)
    others = make(3, 10, BULK_BYTES, liars=0)[1]
    for group in combinations(range(1, 10), 4):
        mixed = {i: others[i] if i in group else share for i, share in shares.items()}
        tries = Tries(3, secret)
        for index, share in mixed.items():
            tries.search.add(index, share)
        assert tries.search.run() is not None
        assert tries.made == 1
