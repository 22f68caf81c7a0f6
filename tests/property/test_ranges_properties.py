"""RangeSet against a plain set of integers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mesh.core.ranges import Range, RangeSet

TOP = 60
RANGES = st.tuples(st.integers(0, TOP), st.integers(1, 12)).map(lambda pair: Range(pair[0], sum(pair)))


def members(one: Range) -> set[int]:
    return set(range(one.start, one.stop))


class RangeSetMachine(RuleBasedStateMachine):
    """Every operation on both models; every question answered alike after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = RangeSet()
        self.model: set[int] = set()

    @rule(one=RANGES)
    def add(self, one: Range) -> None:
        self.ranges.add(one)
        self.model |= members(one)

    @rule(offset=st.integers(0, TOP + 20))
    def discard_below(self, offset: int) -> None:
        self.ranges.discard_below(offset)
        self.model = {member for member in self.model if member >= offset}

    @rule(one=RANGES)
    def ask(self, one: Range) -> None:
        assert self.ranges.overlaps(one) == bool(members(one) & self.model)
        assert self.ranges.contains(one) == (members(one) <= self.model)
        missing = self.ranges.missing_in(one)
        assert sorted(missing) == missing
        assert set().union(*map(members, missing)) == members(one) - self.model

    @invariant()
    def is_the_same_set(self) -> None:
        parts = list(self.ranges)
        assert set().union(*map(members, parts)) == self.model
        assert self.ranges.total == len(self.model)
        assert self.ranges.count == len(parts)
        # Disjoint, sorted, and merged wherever they touch: the smallest possible count.
        assert all(a.stop < b.start for a, b in pairwise(parts))


TestRangeSet = RangeSetMachine.TestCase


@given(st.lists(RANGES, max_size=12))
def test_order_of_adding_does_not_matter(parts: list[Range]) -> None:
    assert RangeSet(parts) == RangeSet(reversed(parts))
