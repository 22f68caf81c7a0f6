"""Why the tag has form B: the whole attack, played out over small fields.

The attacker may add fixed shifts (dc, dd, de, D), D != 0, to the tag key and to the b
blocks, and dt to the tag, because sharing is linear. d is uniform and masks t, so all
that counts is whether tag(shifted) - tag(original) is the constant it bet on, over
uniform (c, e). ``worst`` walks every strategy and every constant:

    form A   d + sum of c^j * y_j                 b/q if the blocks are uniform to it,
                                                  1 if it knows or chooses them
    form B   d + c*e + sum of c^(j+1) * y_j       (b+1)/q in both cases
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache, reduce

import numpy as np
import pytest
from numpy.typing import NDArray

Table = NDArray[np.uint8]
pytestmark = pytest.mark.exhaustive


class SmallField:
    """GF(q) for q = 4, 5, 7, 8, as addition, subtraction and multiplication tables."""

    def __init__(self, q: int) -> None:
        modulus = {4: 0b111, 8: 0b1011}.get(q)
        a, b = np.indices((q, q))
        if modulus is None:
            self.add, self.sub, self.mul = ((table % q).astype(np.uint8) for table in (a + b, a - b, a * b))
        else:
            self.add = self.sub = (a ^ b).astype(np.uint8)
            self.mul = np.array([[_carryless(x, y, modulus) for y in range(q)] for x in range(q)], np.uint8)
        self.q = q
        self.elements = np.arange(q)

    def power(self, base: NDArray[np.intp] | Table, exponent: int) -> Table:
        return reduce(lambda x, _: self.mul[x, base], range(exponent), np.ones(len(base), np.uint8))


def _carryless(x: int, y: int, modulus: int) -> int:
    total = 0
    for bit in range(3):
        total ^= (x << bit) * (y >> bit & 1)
    for bit in reversed(range(modulus.bit_length() - 1, 6)):
        total ^= (modulus << (bit - modulus.bit_length() + 1)) * (total >> bit & 1)
    return total


@cache
def worst(q: int, b: int, form: str, *, knows_blocks: bool) -> Fraction:
    """The best probability of any strategy, exactly."""
    field = SmallField(q)
    best = Fraction(0)
    for dc in range(q):
        change = _change_of_sum(field, b, dc, first_exponent=1 if form == "A" else 2)
        for de in range(q if form == "B" else 1):
            # Axes: c, e, then y_1..y_b, then D_1..D_b; D = 0 is no attack.
            linear = _change_of_ce(field, dc, de) if form == "B" else np.zeros((q, 1), np.uint8)
            shape = linear.shape + (1,) * (2 * b)
            total = field.add[change[:, None], linear.reshape(shape)]
            for constant in range(q):
                passed = np.count_nonzero(total == constant, axis=(0, 1))
                tries = linear.size
                if not knows_blocks:
                    passed = passed.sum(axis=tuple(range(b)))
                    tries *= q**b
                passed[(..., *[0] * b)] = 0
                best = max(best, Fraction(int(passed.max()), tries))
    return best


def _change_of_ce(field: SmallField, dc: int, de: int) -> Table:
    c, e = field.elements[:, None], field.elements[None, :]
    shifted: Table = field.sub[field.mul[field.add[c, dc], field.add[e, de]], field.mul[c, e]]
    return shifted


def _change_of_sum(field: SmallField, b: int, dc: int, first_exponent: int) -> Table:
    """Axes c, y_1..y_b, D_1..D_b: sum of (c+dc)^i * (y+D) - c^i * y."""
    q = field.q
    total = np.zeros((q,) + (1,) * (2 * b), np.uint8)
    y, shift = field.elements[:, None], field.elements[None, :]
    for j in range(b):
        exponent = first_exponent + j
        moved = field.power(field.add[field.elements, dc], exponent)[:, None, None]
        still = field.power(field.elements, exponent)[:, None, None]
        term = field.sub[field.mul[moved, field.add[y, shift]], field.mul[still, y]]
        shape = [q] + [1] * (2 * b)
        shape[1 + j] = shape[1 + b + j] = q
        total = field.add[total, term.reshape(shape)]
    return total


SIZES = [(4, 1), (4, 2), (4, 3), (5, 1), (5, 2), (5, 3), (7, 1), (7, 2), (8, 1), (8, 2)]


@pytest.mark.parametrize(("q", "b"), SIZES)
@pytest.mark.parametrize("knows_blocks", [False, True])
def test_form_b_never_passes_more_often_than_its_bound(q: int, b: int, knows_blocks: bool) -> None:
    assert worst(q, b, "B", knows_blocks=knows_blocks) == Fraction(b + 1, q)


@pytest.mark.parametrize(("q", "b"), SIZES)
def test_form_a_holds_while_the_blocks_are_uniform(q: int, b: int) -> None:
    assert worst(q, b, "A", knows_blocks=False) == Fraction(b, q)


@pytest.mark.parametrize(("q", "b"), [(5, 2), (5, 3), (7, 2), (7, 3), (4, 3), (8, 3)])
def test_form_a_is_broken_once_the_blocks_are_known(q: int, b: int) -> None:
    assert worst(q, b, "A", knows_blocks=True) == 1
