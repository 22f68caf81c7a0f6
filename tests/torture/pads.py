"""Reads the nodes' pad audits: no byte of a lane epoch may serve twice.

The audit file of a node (``pad_audit_file``) holds one JSON line per used range, its own
outbound lanes and its neighbours'. Lines survive kills, so all starts of a node are judged
together. A reader may only have accepted what the writer recorded as used.
"""

from __future__ import annotations

import bisect
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mesh.core.ranges import Range

Lane = tuple[str, str, int]
"""Link id, KME id of the writing end, epoch."""


class Overlaps:
    """Ranges that must not overlap, added one by one, kept merged."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, new: Range) -> int:
        """Add a range; returns how many of its bytes were there before."""
        first = bisect.bisect_left(self._stops, new.start)
        last = first
        doubled = 0
        start, stop = new.start, new.stop
        while last < len(self._starts) and self._starts[last] <= new.stop:
            doubled += max(0, min(self._stops[last], new.stop) - max(self._starts[last], new.start))
            start, stop = min(start, self._starts[last]), max(stop, self._stops[last])
            last += 1
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]
        return doubled

    def covers(self, wanted: Range) -> bool:
        """Whether every byte of a range was added."""
        at = bisect.bisect_right(self._starts, wanted.start) - 1
        return at >= 0 and self._stops[at] >= wanted.stop

    @property
    def total(self) -> int:
        """Bytes added, each counted once."""
        return sum(self._stops) - sum(self._starts)


@dataclass(slots=True)
class PadAudit:
    """What the audit files say.

    Attributes:
        lines: ranges read.
        reused_bytes: lane bytes that a writer used, or a reader accepted, twice.
        invented_bytes: bytes of frames that a reader accepted and nobody wrote.
        spent: bytes used by purpose, writers only.
        notes: the first findings in words.
    """

    lines: int = 0
    reused_bytes: int = 0
    invented_bytes: int = 0
    spent: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    notes: list[str] = field(default_factory=list)


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The lines of one audit file.

    Raises:
        ValueError: a line is not whole.
    """
    with path.open(encoding="ascii") as stream:
        for number, text in enumerate(stream, 1):
            try:
                yield json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path.name}:{number} is no whole line") from error


def audit_pads(files: Iterable[Path]) -> PadAudit:
    """Judge the audit files of all nodes together."""
    result = PadAudit()
    written: dict[Lane, Overlaps] = defaultdict(Overlaps)
    accepted: dict[Lane, list[tuple[Range, str]]] = defaultdict(list)
    for path in files:
        for line in read_lines(path):
            result.lines += 1
            used = Range(line["start"], line["stop"])
            lane = line["link"], _writer(line), line["epoch"]
            if line["outbound"]:
                result.spent[line["purpose"]] += len(used)
                _note_twice(result, written[lane].add(used), "used", lane, used, line["purpose"])
            else:
                accepted[lane].append((used, line["purpose"]))
    for lane, ranges in accepted.items():
        seen = Overlaps()
        for used, purpose in ranges:
            _note_twice(result, seen.add(used), "accepted", lane, used, purpose)
            if not written[lane].covers(used):
                result.invented_bytes += len(used)
                result.notes.append(f"accepted but never written: {_words(lane, used, purpose)}")
    return result


def _writer(line: Mapping[str, Any]) -> str:
    if line["outbound"]:
        return str(line["kme"])
    a, _, b = str(line["link"]).partition("--")
    return b if line["kme"] == a else a


def _note_twice(result: PadAudit, doubled: int, verb: str, lane: Lane, used: Range, purpose: str) -> None:
    if doubled:
        result.reused_bytes += doubled
        result.notes.append(f"{verb} twice: {doubled} bytes of {_words(lane, used, purpose)}")


def _words(lane: Lane, used: Range, purpose: str) -> str:
    return f"{lane[0]} from {lane[1]}, epoch {lane[2]}, {used.start} to {used.stop} ({purpose})"
