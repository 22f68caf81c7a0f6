"""Lanes: where a byte may be used, decided by both ends alike.

Owns protocol 1.1 to 1.4: positions, marks, the window, the stride, the tail kept for
control, holes. A lane is (link, direction, epoch) with absolute byte offsets from 0 and
one writer. Must not touch disks, clocks or bytes: a caller syncs the mark that
``mark_for`` or ``accept`` asks for, and only then uses what lies below it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from mesh.core.ranges import Range, RangeSet
from mesh.errors import ErrorReason, IntegrityError, PeerError, RolledBackError, ShortageError

ROOT_BYTES = 32
TAG_KEY_BYTES = 32
#: Below this many usable bytes a lane counts as new (1.1, 2.3): a hello and a report.
NEW_BELOW_BYTES = 64
MAX_FRAME_BYTES = 1 << 20
#: What a receiver may be ahead of our mark before it is called a rollback (1.8).
SLACK_BYTES = 1 << 20


class Purpose(Enum):
    """What lane bytes are claimed for; decides how far past the last report (1.3)."""

    DATA = "data"
    CONTROL = "control"
    HELLO = "hello"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """Sizes that bound a lane, in bytes; both ends derive them from the pool's cap.

    Attributes:
        pool_bytes: most unused material held.
        window_bytes: W of protocol 1.2.
        stride_bytes: how far marks run ahead.
        frame_bytes: most lane bytes that one frame spans.
    """

    pool_bytes: int
    window_bytes: int
    stride_bytes: int
    frame_bytes: int

    @classmethod
    def of(cls, pool_bytes: int, window_bytes: int = 0) -> LaneLimits:
        """Derive the limits; ``window_bytes`` only widens W = min(4 MiB, pool / 16)."""
        window = max(window_bytes, min(4 << 20, pool_bytes // 16))
        return cls(
            pool_bytes=pool_bytes,
            window_bytes=window,
            stride_bytes=min(64 << 10, pool_bytes // 100),
            frame_bytes=min(MAX_FRAME_BYTES, window // 4),
        )

    def narrowed(self, window_bytes: int) -> LaneLimits:
        """These limits with W no wider than the other end's."""
        window = min(self.window_bytes, window_bytes)
        return replace(self, window_bytes=window, frame_bytes=min(MAX_FRAME_BYTES, window // 4))

    def allowance(self, purpose: Purpose) -> int:
        """How far past the last authenticated report a writer may go (1.3)."""
        if purpose is Purpose.HELLO:
            return self.window_bytes + self.stride_bytes
        if purpose is Purpose.CONTROL:
            return self.window_bytes * 3 // 4
        return self.window_bytes // 2


def stretch(holes: RangeSet, start: int, width: int) -> int:
    """The offset that lies ``width`` bytes past ``start``, holes not counted.

    Discarded blocks leave holes at both ends (2.3). Counted as bytes, a run of them
    longer than the window would stop the lane for ever.
    """
    stop = start + width
    if not holes.count:
        return stop
    for hole in holes:
        if hole.stop <= start:
            continue
        if hole.start >= stop:
            break
        stop += hole.stop - max(hole.start, start)
    return stop


@dataclass(slots=True)
class _Lane:
    """What both ends of a lane keep.

    Attributes:
        epoch: which life of the lane.
        limits: sizes.
        mark: on disk; nothing at or beyond it has been used here.
        position: in memory; everything below is used, skipped or forfeited.
        material: unused ranges that this end may use.
        holes: ranges of discarded blocks.
        filled: end of all blocks known here, offered and discarded ones included.
    """

    epoch: int
    limits: LaneLimits
    mark: int = 0
    position: int = ROOT_BYTES
    material: RangeSet = field(default_factory=RangeSet)
    holes: RangeSet = field(default_factory=RangeSet)
    filled: int = 0

    def __post_init__(self) -> None:
        self.position = max(self.position, self.mark, ROOT_BYTES)
        for one in (*self.material, *self.holes):
            self.filled = max(self.filled, one.stop)

    @property
    def end(self) -> int:
        """First offset past the material; the mark never passes it (1.1)."""
        last = 0
        for run in self.material:
            last = run.stop
        return max(last, self.position)

    @property
    def usable_bytes(self) -> int:
        """Bytes at or past the position that may still be used."""
        total = 0
        for run in self.material:
            if run.stop > self.position:
                total += run.stop - max(run.start, self.position)
        return total

    @property
    def is_new(self) -> bool:
        """Too little left for a hello and a report: only first contact passes (2.3)."""
        return self.usable_bytes < NEW_BELOW_BYTES

    @property
    def wipeable(self) -> int:
        """Everything below may be wiped: neither end will need it again, whichever restarts."""
        return min(self.position, self.mark)

    def add_material(self, new: Range) -> None:
        """A block became usable at this end (2.1)."""
        self.material.add(new)
        self.filled = max(self.filled, new.stop)

    def extend(self, stop: int) -> None:
        """A block was offered up to ``stop``; the next one starts there."""
        self.filled = max(self.filled, stop)

    def add_hole(self, hole: Range) -> None:
        """A block was discarded or quarantined: no frame spans it."""
        self.holes.add(hole)
        self.filled = max(self.filled, hole.stop)
        kept = RangeSet()
        for run in self.material:
            for part in RangeSet([hole]).missing_in(run):
                kept.add(part)
        self.material = kept

    def mark_moved(self, mark: int) -> None:
        """The mark is on disk.

        Raises:
            IntegrityError: it would fall.
        """
        if mark < self.mark:
            raise IntegrityError("a mark may not fall", facts={"from": self.mark, "to": mark})
        self.mark = mark

    @property
    def next_mark(self) -> int | None:
        """A mark worth syncing before anybody waits for it: less than half a stride is left."""
        if self.mark - self.position >= self.limits.stride_bytes // 2:
            return None
        mark = min(self.position + self.limits.stride_bytes, self.end)
        return mark if mark > self.mark else None

    def _ahead(self, stop: int) -> int:
        """The mark to sync before bytes up to ``stop`` are used."""
        return max(stop, min(stop + self.limits.stride_bytes, self.end))


@dataclass(slots=True)
class WriterLane(_Lane):
    """The writing end. Only it chooses offsets.

    Attributes:
        reported: the receiver's last authenticated position.
        base: where an unproven restart put the writer; the window counts from there until the
            receiver reports from beyond, else not even the hello could go (1.10).
    """

    reported: int = 0
    base: int = 0

    @property
    def tail_bytes(self) -> int:
        """The last 1 % of the lane, for hellos, reports and offers (1.1)."""
        return max(2 * NEW_BELOW_BYTES, min(self.limits.pool_bytes, self.end) // 100)

    def find(self, total_bytes: int, purpose: Purpose) -> int:
        """The offset at which ``total_bytes`` contiguous bytes may be used, the mark aside.

        Raises:
            ShortageError: ``OUT_OF_MATERIAL`` or ``WINDOW_FULL``.
        """
        keep = self.tail_bytes if purpose in (Purpose.DATA, Purpose.LOCAL) else 0
        left = self.usable_bytes
        for run in self.material:
            start = max(run.start, self.position)
            if run.stop - start >= total_bytes:
                if left - total_bytes < keep:
                    break
                if start + total_bytes > self._limit(purpose):
                    raise ShortageError("the receiver's window is full", reason=ErrorReason.WINDOW_FULL)
                return start
            left -= max(0, run.stop - start)
        raise ShortageError(
            "not enough material on the lane",
            facts={"usable_bytes": self.usable_bytes, "wanted_bytes": total_bytes},
        )

    def mark_for(self, total_bytes: int, purpose: Purpose) -> int | None:
        """The mark to sync before :meth:`claim`; None when it is far enough.

        A hello before the peer's hello has verified asks for exactly its own bytes: call
        :meth:`bare_mark_for` there.
        """
        stop = self.find(total_bytes, purpose) + total_bytes
        return self._ahead(stop) if stop > self.mark else None

    def bare_mark_for(self, total_bytes: int) -> int | None:
        """Like :meth:`mark_for`, for a first hello: no stride (1.1)."""
        stop = self.find(total_bytes, Purpose.HELLO) + total_bytes
        return stop if stop > self.mark else None

    def claim(self, total_bytes: int, purpose: Purpose) -> Range:
        """Burn the next ``total_bytes``; there is no give-back.

        Raises:
            ShortageError: nothing fits below mark and window; nothing is burnt.
        """
        start = self.find(total_bytes, purpose)
        stop = start + total_bytes
        if stop > self.mark:
            raise ShortageError("the mark is not far enough", facts={"mark": self.mark, "stop": stop})
        self.position = stop
        self.material.discard_below(stop)
        return Range(start, stop)

    def claimable_bytes(self, purpose: Purpose = Purpose.DATA) -> int:
        """The largest contiguous claim that :meth:`claim` grants now, at most a frame."""
        keep = self.tail_bytes if purpose in (Purpose.DATA, Purpose.LOCAL) else 0
        ceiling = min(self.mark, self._limit(purpose))
        left = self.usable_bytes
        best = 0
        for run in self.material:
            start = max(run.start, self.position)
            if start >= ceiling:
                break
            best = max(best, min(run.stop, ceiling, start + left - keep) - start)
            left -= max(0, run.stop - start)
        return min(best, self.limits.frame_bytes)

    def take_report(self, position: int) -> None:
        """Take the receiver's position from a verified frame.

        Raises:
            RolledBackError: it lies past our own position: someone else writes this lane.
        """
        if position > self.position:
            raise RolledBackError(
                "the receiver is past everything that was written here",
                facts={"position": self.position, "reported": position},
            )
        self.reported = max(self.reported, position)

    def jump(self, position: int) -> None:
        """Forfeit everything below ``position``; never goes back."""
        if position > self.position:
            self.position = self.base = position
            self.material.discard_below(position)

    def past_peer(self, position: int, window_bytes: int) -> int:
        """Where an unproven writer resumes: beyond all that its peer may have seen (1.10).

        W and a stride past the peer's position, in bytes that were usable here; but not past
        the end of all blocks known here. What is ingested later is fresh: the other end
        refuses an offer for offsets it already has, and a gap in offers becomes a hole.

        Args:
            position: the peer's authenticated position.
            window_bytes: the wider W of the two ends.
        """
        gaps = RangeSet(self.holes)
        start = max(position, self.position)
        if start < self.filled:
            for gap in self.material.missing_in(Range(start, self.filled)):
                gaps.add(gap)
        beyond = stretch(gaps, position, window_bytes + self.limits.stride_bytes)
        return max(self.mark, position, min(beyond, self.filled))

    def _limit(self, purpose: Purpose) -> int:
        return stretch(self.holes, max(self.reported, self.base), self.limits.allowance(purpose))


@dataclass(slots=True)
class ReaderLane(_Lane):
    """The reading end.

    Attributes:
        told: the position last reported to the writer.
        seen: end of the furthest frame that verified in this life of the process, hellos included.
        report_bytes: unreported bytes after which a report goes alone; W/8 of the narrower W.
    """

    told: int = 0
    seen: int = 0
    report_bytes: int = 0

    def __post_init__(self) -> None:
        _Lane.__post_init__(self)
        self.report_bytes = self.report_bytes or self.limits.window_bytes // 8

    def check_frame(self, frame: Range) -> None:
        """Whether the frame may be verified at all; moves nothing (1.2).

        Raises:
            PeerError: below the position, past the window, or not material here.
        """
        if frame.start < self.position:
            raise PeerError("a frame below the position", facts={"offset": frame.start})
        if frame.stop > stretch(self.holes, self.position, self.limits.window_bytes):
            raise PeerError("a frame past the window", facts={"offset": frame.start})
        if len(frame) > self.limits.frame_bytes:
            raise PeerError("a frame larger than agreed", facts={"bytes": len(frame)})
        self.check_held(frame)

    def check_held(self, frame: Range) -> None:
        """Whether the bytes are still here; all that a hello needs (1.2).

        Raises:
            PeerError: they are not.
        """
        if frame.start < ROOT_BYTES or not self.material.contains(frame):
            raise PeerError("a frame on bytes that are not held", facts={"offset": frame.start})

    def mark_for(self, stop: int) -> int | None:
        """The mark to sync before what a verified frame carried is used; None if far enough."""
        return self._ahead(stop) if stop > self.mark else None

    def accept(self, stop: int) -> None:
        """A verified frame ended at ``stop``: nothing below it is accepted any more."""
        self.position = max(self.position, stop)
        self.seen = max(self.seen, stop)

    @property
    def wipeable(self) -> int:
        """As at the writer, but not past what was seen of it.

        A restart puts our position on our mark, beyond where the writer may be. Until it has
        followed, any number of restarts resume it there, and its hello needs those bytes (1.2).
        """
        return min(self.position, self.mark, self.seen)

    def wiped(self, below: int) -> None:
        """The bytes below are gone."""
        self.material.discard_below(min(below, self.wipeable))

    @property
    def hello_limit(self) -> int:
        """A verified hello beyond this shows that one end lost state (1.8)."""
        width = 2 * self.limits.window_bytes + 2 * self.limits.stride_bytes
        return stretch(self.holes, self.position, width)

    def may_be_emptied(self, unaccepted_bytes: int = 0) -> bool:
        """Whether the writer may have too little left for a hello, as far as we can know.

        The writer can be ahead of us by what it sent and by what a restart forfeits. Only
        then are block messages in clear believed (2.3).

        Args:
            unaccepted_bytes: of blocks that we can read and the writer has not accepted: it lacks them.
        """
        known = self.usable_bytes - unaccepted_bytes
        return known < NEW_BELOW_BYTES + 2 * (self.limits.window_bytes + self.limits.stride_bytes)

    @property
    def reportable(self) -> int:
        """The position to report: never past the mark, which a restart would resume at."""
        return max(self.told, min(self.position, self.mark))

    @property
    def is_report_due(self) -> bool:
        """W/8 or more is unreported: a report goes alone (1.3)."""
        return self.reportable - self.told >= self.report_bytes
