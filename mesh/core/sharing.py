"""(k,n) threshold sharing over GF(2^8), byte by byte; share i sits at x = i.

Owns the share scheme of DSKE (design "Share scheme"; protocol 3.7): the first k
shares are raw pad bytes, the secret is the value at x = 0 of the polynomial of
degree < k through them, shares k+1..n are further values. Trusted relay is (1,1).
Any k-1 shares say nothing about the secret. Must not draw randomness, and must not
decide which shares are honest: that is the tag of ``mesh.core.gf128``, and the search
of ``mesh.core.search``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations, pairwise
from math import comb
from typing import NamedTuple

from mesh.core.gf256 import inv, mul, scale
from mesh.core.otp import xor
from mesh.core.secret import Buffer

MAX_SHARES = 16
_PIECE_BYTES = 1 << 15
#: Shares longer than this are first compared by a short random combination of their bytes,
#: formed in steps: pieces of 4096 bytes are summed, then those of 256 bytes, then of 16.
BULK_BYTES = 4096
_DIGEST_STEPS = (4096, 256, 16)
#: Polynomials tried, at most, to tell liars from those they framed; beyond, all are suspects.
_MAX_EXPLANATIONS = 2048


class Blame(NamedTuple):
    """Who does not agree with an accepted secret.

    Attributes:
        named: share indices, ascending.
        is_certain: they are the liars, given fewer than k of them; else they are suspects, the
            honest ones that liars may have framed included.
    """

    named: tuple[int, ...] = ()
    is_certain: bool = True


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


def _select(shares: Mapping[int, Buffer], subset: Sequence[int]) -> dict[int, Buffer]:
    return {index: shares[index] for index in subset}


def support(shares: Mapping[int, Buffer], subset: Sequence[int]) -> frozenset[int]:
    """The indices of all shares on the polynomial through those of ``subset``."""
    chosen = _select(shares, subset)
    others = [index for index in shares if index not in chosen]
    values = zip(others, _values(chosen, others), strict=True)
    return frozenset(subset).union(index for index, value in values if value == shares[index])


def blame(
    shares: Mapping[int, Buffer],
    k: int,
    used: Sequence[int],
    *,
    randomness: Callable[[int], bytes] | None = None,
) -> Blame:
    """Who of ``shares`` does not fit the secret of ``used``, which was accepted; fewer than k may lie.

    An *explanation* is a polynomial with that secret on which all but fewer than k shares lie.
    The honest shares lie on one. If it is the only one, the shares off it are liars, certainly.
    Else colluding liars may have framed others by a polynomial of their own that has the right
    value at 0, and whoever is off any explanation is a suspect; without one, everybody is.

    Args:
        shares: index to share; all that arrived.
        k: the threshold.
        used: k indices whose secret was accepted.
        randomness: n -> n random bytes: long shares are then compared by digests where many
            polynomials are tried. A digest can only hide a difference: certainty stays certain.
    """
    everyone = frozenset(shares)
    on_it = support(shares, used)
    off = everyone - on_it
    if not off or k == 1:
        return Blame(tuple(sorted(off)), True)
    enough = len(everyone) - (k - 1)
    # Two explanations share at most k-2 shares, so 2k-2 on one leave too few for another.
    if len(on_it) >= max(enough, 2 * k - 2):
        return Blame(tuple(sorted(off)), True)
    if comb(len(everyone), k - 1) > _MAX_EXPLANATIONS:
        return Blame(tuple(sorted(everyone)), False)
    columns = shares
    if randomness is not None and len(shares[used[0]]) > BULK_BYTES:
        combination = Combination(len(shares[used[0]]), randomness)
        columns = {index: combination.of(share) for index, share in shares.items()}
    explained = _explanations(columns, k, combine(_select(columns, used)), enough)
    suspects = off.union(*(everyone - one for one in explained)) if explained else everyone
    if len(explained) == 1:
        (only,) = explained
        subset = sorted(only)[:k]
        # On digests it may have lost a difference: only the shares themselves prove it.
        if (
            combine(_select(shares, subset)) == combine(_select(shares, used))
            and support(shares, subset) == only
        ):
            return Blame(tuple(sorted(everyone - only)), True)
    return Blame(tuple(sorted(suspects)), False)


def _explanations(columns: Mapping[int, Buffer], k: int, secret: bytes, enough: int) -> set[frozenset[int]]:
    """The shares on each polynomial with that secret that has enough of them on it."""
    found: set[frozenset[int]] = set()
    for chosen in combinations(sorted(columns), k - 1):
        if any(one.issuperset(chosen) for one in found):
            continue
        others = [i for i in columns if i not in chosen]
        on_it = [i for i in others if combine(_select(columns, (*chosen, i))) == secret]
        if len(on_it) + k - 1 >= enough:
            found.add(frozenset((*chosen, *on_it)))
    return found


class Combination:
    """A random GF(2^8)-linear combination, 16 bytes, of shares of one length: lies differ, agreement stays.

    Args:
        size: of the shares.
        randomness: n -> n random bytes, for the coefficients; unknown to whoever chooses shares.
    """

    def __init__(self, size: int, randomness: Callable[[int], bytes]) -> None:
        sizes = (size, *_DIGEST_STEPS)
        self._steps = [(step, randomness(-(-size // step))) for size, step in pairwise(sizes)]

    def of(self, share: Buffer) -> bytes:
        """The combination of one share."""
        digest = share
        for step, coefficients in self._steps:
            digest = _sum_pieces(digest, step, coefficients)
        return bytes(digest)


def _sum_pieces(share: Buffer, piece_bytes: int, coefficients: bytes) -> bytes:
    """Sum of the pieces of a share, each times its coefficient; the last is zero-padded."""
    view = memoryview(share)
    total = bytes(piece_bytes)
    for number, coefficient in enumerate(coefficients):
        piece = bytes(view[number * piece_bytes : (number + 1) * piece_bytes])
        total = xor(total, scale(piece.ljust(piece_bytes, b"\0"), coefficient))
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
