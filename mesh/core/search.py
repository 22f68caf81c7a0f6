"""The search for k honest shares of one transfer, in slices (protocol 3.7).

Owns the order and the bounds of that work: a caller with other things to do runs a slice at a time,
and what liars can cost it is bounded. Must not judge a secret: that is ``accept``, the tag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np

from mesh.core.gf256 import EXP, LOG
from mesh.core.secret import Buffer
from mesh.core.sharing import BULK_BYTES, MAX_SHARES, Combination, combine, support

#: Few subsets of short shares are tried faster than compared.
_FEW_SUBSETS = 32
#: What a try costs besides its bytes, in bytes.
_TRY_BYTES = 1 << 16
#: Shares combined at most, in all, where no share beyond k agrees: all C(16,8) subsets of keys on
#: demand, or of 1 MiB about a hundred with k = 8.
MAX_BLIND_BYTES = 1 << 30
#: Columns of a digest that are compared at once; the others only where these agree.
_COLUMNS = 3

_EXP = np.frombuffer(EXP, np.uint8)
_LOG = np.frombuffer(LOG, np.uint8).astype(np.int16)


class Found(NamedTuple):
    """A secret that was accepted.

    Attributes:
        secret: the reconstructed Y_0.
        used: the k share indices it was computed from, ascending.
    """

    secret: bytes
    used: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Found({len(self.secret)} bytes, used={self.used})"


class Search:
    """Looks among shares, which may come one by one, for k whose secret is accepted; no subset twice.

    With ``randomness``, subsets with which further shares agree go first, those with most shares on
    their polynomial foremost, judged on a 16-byte random combination of each share. Its coefficients
    are drawn once, here: no share is chosen with knowledge of them. A combination may hide a lie
    (about once in 100 for a lie in one byte); that costs time, never correctness: ``accept`` decides,
    and the subsets passed over are tried in the end.

    Args:
        k: the threshold by the target's own configuration.
        accept: whether a candidate Y_0 verifies.
        randomness: n -> n random bytes; None for no comparison.
        max_blind_bytes: share bytes combined at most for subsets with which no further share agrees.

    Raises:
        ValueError: k < 1.
    """

    def __init__(
        self,
        k: int,
        accept: Callable[[bytes], bool],
        *,
        randomness: Callable[[int], bytes] | None = None,
        max_blind_bytes: int = MAX_BLIND_BYTES,
    ) -> None:
        if k < 1:
            raise ValueError("no threshold below 1")
        self._k = k
        self._accept = accept
        self._randomness = randomness
        self._blind_bytes = max_blind_bytes
        self._size = 0
        self._shares: dict[int, Buffer] = {}
        self._combination: Combination | None = None
        self._digests: dict[int, bytes] = {}
        self._tried: set[int] = set()
        self._todo: Iterator[tuple[int, ...]] = iter(())
        self.is_over = True

    def add(self, index: int, share: Buffer) -> None:
        """One share more.

        Raises:
            ValueError: an index outside 1..16, or twice, or a length that differs.
        """
        if not 1 <= index <= MAX_SHARES or index in self._shares:
            raise ValueError(f"share indices are 1 to {MAX_SHARES}, each once")
        if self._shares and len(share) != self._size:
            raise ValueError("shares differ in length")
        self._size = len(share)
        self._shares[index] = share
        self._start()

    def remove(self, index: int) -> None:
        """That share is gone; another may come in its place."""
        del self._shares[index]
        self._digests.pop(index, None)
        self._tried = {bits for bits in self._tried if not bits >> index & 1}
        self._start()

    def run(self, most_bytes: float = float("inf")) -> Found | None:
        """Tries subsets, one at least if there is one, until about so many share bytes were combined."""
        while most_bytes > 0 and not self.is_over:
            subset = next(self._todo, None)
            if subset is None:
                self.is_over = True
                break
            self._tried.add(_bits(subset))
            chosen = {index: self._shares[index] for index in subset}
            most_bytes -= self._k * self._size + _TRY_BYTES
            secret = combine(chosen)
            if self._accept(secret):
                return Found(secret, tuple(sorted(subset)))
        return None

    def _start(self) -> None:
        self.is_over = len(self._shares) < self._k
        self._todo = self._untried()

    def _untried(self) -> Iterator[tuple[int, ...]]:
        """Those that others agree with, then those on polynomials of their own, then all the rest."""
        polynomials = self._polynomials()
        for chosen in polynomials.values():
            if _bits(chosen) not in self._tried:
                yield chosen
        passed_over = []
        for subset in combinations(self._shares, self._k):
            if _bits(subset) in self._tried:
                continue
            if any(on_it.issuperset(subset) for on_it in polynomials):
                passed_over.append(subset)
            elif self._spend_blindly():
                yield subset
        for subset in passed_over:
            if self._spend_blindly():
                yield subset

    def _spend_blindly(self) -> bool:
        self._blind_bytes -= self._k * self._size
        return self._blind_bytes >= 0

    def _polynomials(self) -> dict[frozenset[int], tuple[int, ...]]:
        """By their shares, more than k of them: k to try; the polynomials with most shares first."""
        count = len(self._shares)
        if self._randomness is None or count <= self._k:
            return {}
        if self._size <= BULK_BYTES and comb(count, self._k) <= _FEW_SUBSETS:
            return {}
        if self._combination is None:
            self._combination = Combination(self._size, self._randomness)
        for index, share in self._shares.items():
            if index not in self._digests:
                self._digests[index] = self._combination.of(share)
        found: dict[frozenset[int], tuple[int, ...]] = {}
        for agreeing in _agreeing(self._digests, tuple(self._shares), self._k + 1):
            if not any(on_it.issuperset(agreeing) for on_it in found):
                chosen = agreeing[: self._k]
                on_it = support(self._digests, chosen)
                if len(on_it) > self._k:
                    found[on_it] = chosen
        return {on_it: found[on_it] for on_it in sorted(found, key=len, reverse=True)}


def _bits(subset: Sequence[int]) -> int:
    return sum(1 << index for index in subset)


def _agreeing(digests: Mapping[int, bytes], ranked: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """The sets of so many indices that seem to lie on one polynomial of degree < size - 1.

    On it the sum of y_j / product of (x_j - x_m), over the set, is 0 (the highest divided difference).
    """
    indices = np.array(ranked)
    sets = np.array(list(combinations(range(len(ranked)), size)))
    points = indices[sets]
    factors = -_LOG[points[:, :, None] ^ points[:, None, :]].sum(axis=2)
    values = np.array([list(digests[index][:_COLUMNS]) for index in ranked], np.uint8)
    agree = np.ones(len(sets), bool)
    for column in values.T:
        chosen = column[sets]
        products = np.where(chosen == 0, 0, _EXP[(factors + _LOG[chosen]) % 255])
        agree &= np.bitwise_xor.reduce(products, axis=1) == 0
    return (tuple(row) for row in points[agree].tolist())
