"""Range and RangeSet: the edges that properties rarely hit."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from mesh.core.ranges import Range, RangeSet


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 4), (-1, 3)])
def test_ranges_are_not_empty_or_negative(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not a range"):
        Range(start, stop)


def test_a_range_is_half_open_and_frozen() -> None:
    one = Range(3, 7)
    assert len(one) == 4
    assert [offset for offset in range(10) if offset in one] == [3, 4, 5, 6]
    assert one.overlaps(Range(6, 9))
    assert not one.overlaps(Range(7, 9))
    assert not one.overlaps(Range(0, 3))
    with pytest.raises(FrozenInstanceError):
        one.start = 0  # type: ignore[misc]


def test_adding_merges_what_overlaps_or_touches() -> None:
    ranges = RangeSet([Range(10, 20), Range(30, 40), Range(50, 60)])
    assert ranges.count == 3
    ranges.add(Range(20, 30))
    assert list(ranges) == [Range(10, 40), Range(50, 60)]
    ranges.add(Range(0, 5))
    ranges.add(Range(12, 14))
    assert list(ranges) == [Range(0, 5), Range(10, 40), Range(50, 60)]
    ranges.add(Range(4, 100))
    assert list(ranges) == [Range(0, 100)]
    assert (ranges.count, ranges.total) == (1, 100)


def test_discard_below_cuts_the_first_that_remains() -> None:
    ranges = RangeSet([Range(0, 5), Range(10, 20), Range(30, 40)])
    ranges.discard_below(0)
    assert ranges.total == 25
    ranges.discard_below(12)
    assert list(ranges) == [Range(12, 20), Range(30, 40)]
    ranges.discard_below(20)
    assert list(ranges) == [Range(30, 40)]
    ranges.discard_below(1000)
    assert (list(ranges), ranges.count, ranges.total) == ([], 0, 0)


def test_missing_in_names_the_holes() -> None:
    ranges = RangeSet([Range(10, 20), Range(30, 40)])
    assert ranges.missing_in(Range(0, 50)) == [Range(0, 10), Range(20, 30), Range(40, 50)]
    assert ranges.missing_in(Range(12, 35)) == [Range(20, 30)]
    assert ranges.missing_in(Range(10, 20)) == []
    assert ranges.missing_in(Range(20, 30)) == [Range(20, 30)]
    assert RangeSet().missing_in(Range(1, 2)) == [Range(1, 2)]


def test_equality_and_repr() -> None:
    assert RangeSet([Range(0, 2), Range(2, 4)]) == RangeSet([Range(0, 4)])
    assert RangeSet() != RangeSet([Range(0, 4)])
    assert RangeSet() != []
    assert repr(RangeSet([Range(0, 2), Range(5, 6)])) == "RangeSet(0..2, 5..6)"
    with pytest.raises(TypeError):
        hash(RangeSet())
