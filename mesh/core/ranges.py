"""Half-open ranges of absolute offsets or slots, and sets of them.

Owns house rule 12: offsets only grow and their arithmetic lives here. A set is
kept sorted, disjoint and merged, so what was used stays small on disk
(protocol 4.4: no more ranges than slots held plus holes).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """The offsets ``start`` .. ``stop`` - 1; never empty, never negative.

    Raises:
        ValueError: not 0 <= start < stop.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"not a range: {self.start} to {self.stop}")

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, offset: int) -> bool:
        return self.start <= offset < self.stop

    def overlaps(self, other: Range) -> bool:
        """Whether the two share an offset."""
        return self.start < other.stop and other.start < self.stop


class RangeSet:
    """A set of offsets as sorted, disjoint ranges that do not touch.

    Args:
        ranges: what it starts with, in any order; overlaps merge.
    """

    __slots__ = ("_starts", "_stops")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for one in ranges:
            self.add(one)

    def __iter__(self) -> Iterator[Range]:
        return (Range(start, stop) for start, stop in zip(self._starts, self._stops, strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"RangeSet({', '.join(f'{one.start}..{one.stop}' for one in self)})"

    @property
    def count(self) -> int:
        """How many disjoint ranges it takes."""
        return len(self._starts)

    @property
    def total(self) -> int:
        """How many offsets are in the set."""
        return sum(self._stops) - sum(self._starts)

    def add(self, new: Range) -> None:
        """Add a range, merging it with all it overlaps or touches."""
        first = bisect_left(self._stops, new.start)
        last = bisect_right(self._starts, new.stop)
        start, stop = new.start, new.stop
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def discard_below(self, offset: int) -> None:
        """Remove every offset smaller than ``offset``."""
        gone = bisect_right(self._stops, offset)
        del self._starts[:gone], self._stops[:gone]
        if self._starts and self._starts[0] < offset:
            self._starts[0] = offset

    def overlaps(self, one: Range) -> bool:
        """Whether any offset of ``one`` is in the set."""
        at = bisect_right(self._stops, one.start)
        return at < len(self._starts) and self._starts[at] < one.stop

    def contains(self, one: Range) -> bool:
        """Whether every offset of ``one`` is in the set."""
        at = bisect_right(self._stops, one.start)
        return at < len(self._starts) and self._starts[at] <= one.start and one.stop <= self._stops[at]

    def missing_in(self, one: Range) -> list[Range]:
        """The parts of ``one`` that are not in the set, in order."""
        missing: list[Range] = []
        start = one.start
        for at in range(bisect_right(self._stops, one.start), len(self._starts)):
            if self._starts[at] >= one.stop:
                break
            if start < self._starts[at]:
                missing.append(Range(start, self._starts[at]))
            start = self._stops[at]
        if start < one.stop:
            missing.append(Range(start, one.stop))
        return missing
