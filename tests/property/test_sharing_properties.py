"""Sharing against linear algebra over ``galois``; liars; and what k-1 shares say: nothing."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import galois
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.sharing import combine, derive, evaluate
from tests.fakes.searching import find_secret


@pytest.fixture(scope="module")
def field() -> Any:
    """GF(2^8) modulo 0x11B, by an implementation that is not ours."""
    return galois.GF(2**8, irreducible_poly=0x11B, primitive_element=3, compile="python-calculate")


@st.composite
def sharings(draw: st.DrawFn) -> tuple[int, int, list[bytes]]:
    n = draw(st.integers(1, 7))
    k = draw(st.integers(1, n))
    size = draw(st.integers(0, 6))
    return k, n, [draw(st.binary(min_size=size, max_size=size)) for _ in range(k)]


@given(sharings())
def test_shares_are_values_of_one_polynomial(field: Any, sharing: tuple[int, int, list[bytes]]) -> None:
    """Solve the Vandermonde system for the coefficients; row 0 is the secret, the rest shares."""
    k, n, first = sharing
    secret, derived = derive(k, n, first)
    powers = field([[int(field(x) ** j) for j in range(k)] for x in range(1, n + 1)])
    values = field(np.array([list(share) for share in first], np.uint8).reshape(k, -1))
    coefficients = np.linalg.inv(powers[:k]) @ values
    assert secret == bytes(coefficients[0].tolist())
    every = powers @ coefficients
    assert [*first, *derived] == [bytes(row.tolist()) for row in every]


@given(sharings(), st.randoms(use_true_random=False))
def test_any_k_shares_reconstruct(sharing: tuple[int, int, list[bytes]], rng: Any) -> None:
    k, n, first = sharing
    secret, derived = derive(k, n, first)
    shares = dict(enumerate([*first, *derived], 1))
    chosen = {index: shares[index] for index in rng.sample(sorted(shares), k)}
    assert combine(chosen) == secret
    assert all(evaluate(chosen, x) == share for x, share in shares.items())


@given(sharings(), st.data())
def test_liars_up_to_n_minus_k_are_named(sharing: tuple[int, int, list[bytes]], data: st.DataObject) -> None:
    k, n, first = sharing
    secret, derived = derive(k, n, first)
    shares = dict(enumerate([*first, *derived], 1))
    lied = dict(shares)
    for index in data.draw(st.sets(st.sampled_from(sorted(shares)), max_size=n - k)):
        size = len(secret)
        lied[index] = data.draw(st.binary(min_size=size, max_size=size))
    order = data.draw(st.permutations(sorted(shares)))
    found = find_secret(lied, k, lambda candidate: candidate == secret, order)
    assert found is not None
    assert found.secret == secret
    liars = {index for index in lied if lied[index] != shares[index]}
    if len(liars) < k:
        assert liars <= set(found.blame.named)
        if found.blame.is_certain:
            assert set(found.blame.named) == liars
        if len(shares) - len(liars) >= 2 * k - 2:
            assert found.blame.is_certain


@pytest.mark.exhaustive
def test_one_share_of_two_says_nothing() -> None:
    """All 2^16 pairs of first shares: every (share i, secret) pair occurs exactly once, i = 1..16."""
    every = np.arange(1 << 16, dtype=np.uint32)
    first = [(every >> 8 * i).astype(np.uint8).tobytes() for i in range(2)]
    secret, derived = derive(2, 16, first)
    for share in [*first, *derived]:
        assert _occurs_once([share, secret], 1 << 16)


@pytest.mark.exhaustive
def test_two_shares_of_three_say_nothing() -> None:
    """All 2^24 triples: every (share i, share j, secret) triple occurs exactly once, i < j <= 4."""
    every = np.arange(1 << 24, dtype=np.uint32)
    first = [(every >> 8 * i).astype(np.uint8).tobytes() for i in range(3)]
    secret, derived = derive(3, 4, first)
    for pair in combinations([*first, *derived], 2):
        assert _occurs_once([*pair, secret], 1 << 24)


def _occurs_once(columns: list[bytes], total: int) -> bool:
    code = np.zeros(total, np.uint32)
    for column in columns:
        code = (code << 8 | np.frombuffer(column, np.uint8)).astype(np.uint32)
    seen = np.zeros(total, bool)
    seen[code] = True
    return bool(seen.all())
