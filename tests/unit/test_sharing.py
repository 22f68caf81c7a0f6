"""Sharing and reconstruction: small cases by hand, liars, losses, and the bulk filter."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from mesh.core.gf256 import inv, mul
from mesh.core.search import Found as CoreFound
from mesh.core.sharing import MAX_SHARES, Blame, blame, combine, derive, evaluate
from tests.fakes.searching import Found, find_secret

BULK_BYTES = 100_003


def make(k: int, n: int, size: int, seed: int = 1) -> tuple[bytes, dict[int, bytes]]:
    """A secret and its n shares."""
    rng = random.Random(seed)
    first = [rng.randbytes(size) for _ in range(k)]
    secret, rest = derive(k, n, first)
    return secret, dict(enumerate([*first, *rest], 1))


class Accept:
    """Accepts one secret; counts how often it was asked."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self.calls = 0

    def __call__(self, candidate: bytes) -> bool:
        self.calls += 1
        return candidate == self.secret


def flip(share: bytes, at: int = 0) -> bytes:
    return share[:at] + bytes((share[at] ^ 0x5A,)) + share[at + 1 :]


def test_one_share_is_the_secret() -> None:
    """Trusted relay is (1,1); with (1,n) every share is the secret."""
    assert derive(1, 1, [b"pad bytes"]) == (b"pad bytes", [])
    assert derive(1, 3, [b"pad"]) == (b"pad", [b"pad", b"pad"])
    assert combine({2: b"pad"}) == b"pad"


def test_two_of_three_by_hand() -> None:
    """The line through (1, a) and (2, b): f(0) = a + (a+b)/3, f(3) = a + (a+b)*2/3, as 1+2 = 3."""
    a, b = 0x57, 0xC4
    slope = mul(a ^ b, inv(3))
    secret, derived = derive(2, 3, [bytes([a]), bytes([b])])
    assert secret == bytes([a ^ slope])
    assert derived == [bytes([a ^ mul(slope, 2)])]


@pytest.mark.parametrize(("k", "n"), [(1, 3), (2, 2), (2, 3), (3, 5), (4, 4), (8, 16)])
@pytest.mark.parametrize("size", [0, 1, 48, 700, 32_768, 32_769, 70_000])
def test_any_k_shares_give_the_secret_and_all_others(k: int, n: int, size: int) -> None:
    secret, shares = make(k, n, size)
    subsets = list(combinations(shares, k))
    for chosen in random.Random(2).sample(subsets, k=min(3, len(subsets))):
        some = {index: memoryview(shares[index]) for index in chosen}
        assert combine(some) == secret
        assert all(evaluate(some, x) == shares[x] for x in shares)


@pytest.mark.parametrize(
    ("k", "n", "count"), [(0, 1, 0), (2, 1, 2), (2, 3, 1), (2, 3, 3), (1, MAX_SHARES + 1, 1), (-1, 2, 1)]
)
def test_impossible_thresholds_are_refused(k: int, n: int, count: int) -> None:
    with pytest.raises(ValueError, match="sharing"):
        derive(k, n, [bytes(4)] * count)


def test_impossible_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="length"):
        derive(2, 3, [bytes(4), bytes(5)])
    with pytest.raises(ValueError, match="no shares"):
        combine({})
    for index in (-1, 0, MAX_SHARES + 1):
        with pytest.raises(ValueError, match="indices"):
            combine({1: b"a", index: b"b"})
        with pytest.raises(ValueError, match="indices"):
            find_secret({1: b"a", index: b"b"}, 1, lambda _: False)
    with pytest.raises(ValueError, match="length"):
        find_secret({1: b"a", 2: b"bc"}, 1, lambda _: True)
    with pytest.raises(ValueError, match="each once"):
        find_secret({1: b"a", 2: b"b"}, 1, lambda _: True, [1, 1])
    with pytest.raises(ValueError, match="threshold"):
        find_secret({1: b"a"}, 0, lambda _: True)


def test_found_shows_no_bytes() -> None:
    assert repr(CoreFound(b"\x11" * 32, (1, 2))) == "Found(32 bytes, used=(1, 2))"


def test_too_few_shares_find_nothing() -> None:
    secret, shares = make(3, 5, 48)
    accept = Accept(secret)
    assert find_secret({1: shares[1], 4: shares[4]}, 3, accept) is None
    assert find_secret({}, 3, accept) is None
    assert accept.calls == 0


def test_the_order_decides_who_is_tried_first() -> None:
    secret, shares = make(2, 4, 48)
    accept = Accept(secret)
    assert find_secret(shares, 2, accept, [4, 2, 1, 3]) == Found(secret, (2, 4))
    assert accept.calls == 1


@pytest.mark.parametrize("size", [48, BULK_BYTES])
@pytest.mark.parametrize(
    ("k", "n", "liars"),
    [
        (2, 3, (1,)),
        (2, 3, (3,)),
        (1, 3, (1, 2)),
        (3, 5, (2,)),
        (3, 5, (1, 4)),
        (3, 6, (1, 4)),
        (4, 7, (2, 3)),
    ],
)
def test_liars_are_outvoted_and_named(k: int, n: int, liars: tuple[int, ...], size: int) -> None:
    secret, shares = make(k, n, size)
    lied = {i: flip(share, i + size // 2) if i in liars else share for i, share in shares.items()}
    found = find_secret(lied, k, Accept(secret), randomness=random.Random(3).randbytes)
    assert found is not None
    assert found.secret == secret
    assert found.blame == Blame(liars)


@pytest.mark.parametrize("size", [48, BULK_BYTES])
def test_k_liars_or_more_make_everybody_a_suspect(size: int) -> None:
    """Fewer than k may lie: with more, who agreed is no better than who did not."""
    secret, shares = make(2, 6, size)
    lied = {i: flip(share, i) if i in (2, 3, 5, 6) else share for i, share in shares.items()}
    found = find_secret(lied, 2, Accept(secret), randomness=random.Random(3).randbytes)
    assert found is not None
    assert (found.secret, found.blame) == (secret, Blame((1, 2, 3, 4, 5, 6), False))


@pytest.mark.parametrize("size", [48, BULK_BYTES])
def test_liars_who_frame_others_do_not_get_away_with_it(size: int) -> None:
    """Shares 1 and 4 lie by one amount: with 5 they make another polynomial with the right secret.

    Any polynomial of degree 2 sums to 0 over the points {0, 1, 4, 5}, so the lies cancel at 0.
    """
    secret, shares = make(3, 6, size)
    framed = shares | {1: flip(shares[1]), 4: flip(shares[4])}
    for order in ([1, 4, 5, 2, 3, 6], [2, 3, 6, 1, 4, 5]):
        found = find_secret(framed, 3, Accept(secret), order, randomness=random.Random(3).randbytes)
        assert found is not None
        assert (found.secret, found.blame) == (secret, Blame((1, 4)))
    del framed[6]
    found = find_secret(framed, 3, Accept(secret), [1, 4, 5, 2, 3], randomness=random.Random(3).randbytes)
    assert found is not None
    # Three against three: nobody can tell, but 5 is on both sides.
    assert (found.secret, found.blame) == (secret, Blame((1, 2, 3, 4), False))


@pytest.mark.parametrize("size", [48, BULK_BYTES])
def test_liars_and_losses_together(size: int) -> None:
    """n - c - g >= k: one liar and one lost share of (2,4)."""
    secret, shares = make(2, 4, size)
    arrived = {1: flip(shares[1]), 2: shares[2], 4: shares[4]}
    found = find_secret(arrived, 2, Accept(secret), randomness=random.Random(3).randbytes)
    assert found == Found(secret, (2, 4), Blame((1,)))


@pytest.mark.parametrize("size", [48, BULK_BYTES])
def test_too_many_liars_find_nothing(size: int) -> None:
    secret, shares = make(2, 3, size)
    lied = {1: flip(shares[1]), 2: flip(shares[2], 5), 3: shares[3]}
    assert find_secret(lied, 2, Accept(secret), randomness=random.Random(3).randbytes) is None


def test_bulk_asks_once_where_plain_search_asks_often() -> None:
    secret, shares = make(3, 7, BULK_BYTES)
    lied = shares | {1: flip(shares[1], 9), 2: flip(shares[2], 70_000)}
    plain, filtered = Accept(secret), Accept(secret)
    assert find_secret(lied, 3, plain) is not None
    found = find_secret(lied, 3, filtered, randomness=random.Random(4).randbytes)
    assert found is not None
    assert found.blame == Blame((1, 2))
    assert filtered.calls == 1
    assert plain.calls > 10


@pytest.mark.parametrize("coefficient", [0, 1])
def test_a_filter_that_sees_nothing_costs_time_only(coefficient: int) -> None:
    """Coefficients under which the lie cancels: every subset looks consistent, the tag still decides."""
    secret, shares = make(2, 4, 3 * 4096)
    lie = flip(flip(shares[1], 7), 7 + 4096)
    accept = Accept(secret)
    found = find_secret(shares | {1: lie}, 2, accept, randomness=lambda size: bytes([coefficient]) * size)
    assert found == Found(secret, (2, 3), Blame((1,)))
    assert accept.calls == 4  # the first of the one group, then (1,3), (1,4), (2,3)


def test_randomness_is_drawn_only_where_it_helps() -> None:
    asked: list[int] = []

    def randomness(size: int) -> bytes:
        asked.append(size)
        return random.Random(5).randbytes(size)

    secret, shares = make(2, 3, BULK_BYTES)
    two = {1: shares[1], 3: shares[3]}
    assert find_secret(two, 2, Accept(secret), randomness=randomness) is not None
    small_secret, small = make(2, 3, 48)
    assert find_secret(small, 2, Accept(small_secret), randomness=randomness) is not None
    assert asked == []
    assert find_secret(shares, 2, Accept(secret), randomness=randomness) is not None
    assert asked == [25, 16, 16]  # one byte per piece of a share
    assert blame(shares, 2, (1, 3), randomness=randomness) == Blame()


def test_work_is_bounded() -> None:
    """The most subsets there can be, C(16,8), all tried and none accepted."""
    _, shares = make(8, 16, 1)
    accept = Accept(b"never")
    assert find_secret(shares, 8, accept) is None
    assert accept.calls == 12_870
