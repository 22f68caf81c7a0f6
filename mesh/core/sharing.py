"""(k,n) threshold sharing over GF(2^8), byte by byte; share i sits at x = i.

Owns the share scheme of DSKE (design "Share scheme"; protocol 3.7): the first k
shares are raw pad bytes, the secret is the value at x = 0 of the polynomial of
degree < k through them, shares k+1..n are further values. Trusted relay is (1,1).
Any k-1 shares say nothing about the secret. Must not draw randomness, and must not
decide which shares are honest: that is ``accept``, the tag of ``mesh.core.gf128``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

from mesh.core.gf256 import inv, mul, scale
from mesh.core.otp import xor
from mesh.core.secret import Buffer

MAX_SHARES = 16
_PIECE_BYTES = 1 << 15
#: Shares longer than this are first compared by random combinations of this many columns.
_DIGEST_BYTES = 4096


class Found(NamedTuple):
    """A secret that was accepted, and who agreed with it.

    Attributes:
        secret: the reconstructed Y_0.
        used: the k share indices it was computed from, ascending.
        disagreeing: the indices of the other shares that are not on its polynomial.
    """

    secret: bytes
    used: tuple[int, ...]
    disagreeing: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Found({len(self.secret)} bytes, used={self.used}, disagreeing={self.disagreeing})"


def derive(k: int, n: int, first: Sequence[Buffer]) -> tuple[bytes, list[bytes]]:
    """The secret Y_0 and the shares k+1..n that follow from shares 1..k.

    Args:
        k: threshold, 1..n.
        n: number of shares, at most 16.
        first: the k raw shares, in order, of one length.

    Raises:
        ValueError: k, n, the number of shares or their lengths do not fit.
    """
    if not 1 <= k <= n <= MAX_SHARES or len(first) != k:
        raise ValueError(f"no ({k},{n}) sharing of {len(first)} shares")
    secret, *derived = _values(dict(enumerate(first, 1)), (0, *range(k + 1, n + 1)))
    return secret, derived


def combine(shares: Mapping[int, Buffer]) -> bytes:
    """The secret Y_0 from exactly k shares by index.

    Raises:
        ValueError: as ``evaluate``.
    """
    return evaluate(shares, 0)


def evaluate(shares: Mapping[int, Buffer], x: int) -> bytes:
    """The value at ``x`` of the polynomial of degree < len(shares) through all ``shares``.

    Args:
        shares: index (1..16) to share, all of one length.
        x: 0 for the secret, i for share i.

    Raises:
        ValueError: no shares, an index outside 1..16, or lengths that differ.
    """
    return _values(shares, (x,))[0]


def _values(shares: Mapping[int, Buffer], points: Sequence[int]) -> list[bytes]:
    """The values at several points, in pieces that keep all temporaries in the cache."""
    factors = [_lagrange(tuple(shares), x) for x in points]
    views = [memoryview(share) for share in shares.values()]
    if not views or any(len(view) != len(views[0]) for view in views):
        raise ValueError("no shares, or shares that differ in length")
    if len(views) == 1:
        return [bytes(share) for share in shares.values()] * len(points)
    if len(views[0]) <= _PIECE_BYTES:
        return _piece(views, factors)
    pieces = [
        _piece([view[at : at + _PIECE_BYTES] for view in views], factors)
        for at in range(0, len(views[0]), _PIECE_BYTES)
    ]
    return [b"".join(column) for column in zip(*pieces, strict=True)]


def _piece(views: Sequence[memoryview], factors: Sequence[tuple[int, ...]]) -> list[bytes]:
    """Lagrange sums; the factors of a point add up to 1, so the first share needs no product."""
    base = bytes(views[0])
    differences = [xor(base, view) for view in views[1:]]
    values = []
    for row in factors:
        total = base
        for factor, difference in zip(row[1:], differences, strict=True):
            total = xor(total, scale(difference, factor))
        values.append(total)
    return values


def find_secret(
    shares: Mapping[int, Buffer],
    k: int,
    accept: Callable[[bytes], bool],
    order: Sequence[int] | None = None,
    *,
    randomness: Callable[[int], bytes] | None = None,
) -> Found | None:
    """Search the k-subsets of ``shares`` for one whose secret is accepted.

    With ``randomness`` and long shares, subsets are first judged on random linear
    combinations of the shares, drawn after the shares are fixed; then ``accept`` is
    called once per distinct polynomial, the one with most shares on it first. A
    combination that misses a lie costs time, never correctness: ``accept`` decides,
    and subsets it skipped are tried in the end.

    Args:
        shares: index (1..16) to share, all of one length; at least k or None is returned.
        k: the threshold by the target's own configuration.
        accept: whether a candidate Y_0 verifies.
        order: the indices, most trusted (earliest) first; default ascending.
        randomness: n -> n random bytes.

    Raises:
        ValueError: k < 1, an index outside 1..16, ``order`` is not a permutation of
            the indices, or lengths that differ.
    """
    ranked = tuple(order) if order is not None else tuple(sorted(shares))
    if k < 1 or len(ranked) != len(shares) or set(ranked) != set(shares):
        raise ValueError("threshold or order does not fit the shares")
    if len({len(share) for share in shares.values()}) > 1:
        raise ValueError("shares differ in length")
    for subset in _candidates(shares, k, ranked, randomness):
        chosen = {index: shares[index] for index in sorted(subset)}
        secret = combine(chosen)
        if accept(secret):
            wrong = (i for i in sorted(shares) if i not in chosen and evaluate(chosen, i) != shares[i])
            return Found(secret, tuple(chosen), tuple(wrong))
    return None


def _candidates(
    shares: Mapping[int, Buffer], k: int, ranked: tuple[int, ...], randomness: Callable[[int], bytes] | None
) -> Iterator[tuple[int, ...]]:
    size = len(next(iter(shares.values()), b""))
    if randomness is None or size <= _DIGEST_BYTES or len(ranked) <= k:
        yield from combinations(ranked, k)
        return
    coefficients = randomness(-(-size // _DIGEST_BYTES))
    digests = {index: _digest(share, coefficients) for index, share in shares.items()}
    first: dict[frozenset[int], tuple[int, ...]] = {}
    for subset in combinations(ranked, k):
        chosen = {index: digests[index] for index in subset}
        group = {i for i in ranked if i in chosen or evaluate(chosen, i) == digests[i]}
        first.setdefault(frozenset(group), subset)
    tried = [first[group] for group in sorted(first, key=len, reverse=True)]
    yield from tried
    judged = set(tried)
    yield from (subset for subset in combinations(ranked, k) if subset not in judged)


def _digest(share: Buffer, coefficients: bytes) -> bytes:
    """Sum of the 4096-byte pieces of a share, each times its coefficient; the last is zero-padded."""
    view = memoryview(share)
    total = bytes(_DIGEST_BYTES)
    for at, coefficient in enumerate(coefficients):
        piece = bytes(view[at * _DIGEST_BYTES : (at + 1) * _DIGEST_BYTES])
        total = xor(total, scale(piece.ljust(_DIGEST_BYTES, b"\0"), coefficient))
    return total


@lru_cache(maxsize=65536)
def _lagrange(indices: tuple[int, ...], x: int) -> tuple[int, ...]:
    """Factors of the shares at ``indices`` in the value at ``x`` (differences are XORs)."""
    if not all(1 <= i <= MAX_SHARES for i in indices) or not 0 <= x <= MAX_SHARES:
        raise ValueError(f"share indices are 1 to {MAX_SHARES}")
    factors = []
    for i in indices:
        factor = 1
        for j in indices:
            if j != i:
                factor = mul(factor, mul(x ^ j, inv(i ^ j)))
        factors.append(factor)
    return tuple(factors)
