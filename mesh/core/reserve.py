"""Reserves: which slot may be assigned, drawn, appended, redeemed or retired, and when.

Owns protocol 3.5, 4.1 and 4.3 to 4.7 as two machines over slot numbers, one for each end of a
reserve. They see numbers only: bytes live in ``mesh.node.reserves``, durability in ``mesh.store``.
A refused call raises and changes nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from mesh.core.ranges import Range, RangeSet
from mesh.core.transfer import KEY_PART_BYTES, MAX_EPOCH, MAX_SLOT, SlotKind
from mesh.errors import ErrorReason, PeerError, ShortageError

TAG_MEMORY_SLOTS = 1 << 20
_OVERLAP = "slots are present, redeemed or retired already"


def slots_per_key(size_bytes: int) -> int:
    """Consecutive slots that a key of that size takes."""
    return -(-size_bytes // KEY_PART_BYTES)


def next_epoch(*known: int) -> int:
    """The epoch after all that either end knows; epochs are never reused (4.6).

    Raises:
        ShortageError: EPOCHS_EXHAUSTED.
    """
    epoch = max(known, default=-1) + 1
    if epoch > MAX_EPOCH:
        raise ShortageError("the reserve's epochs are used up", reason=ErrorReason.EPOCHS_EXHAUSTED)
    return epoch


def check_append_epoch(epoch: int, highest: int | None, *, opens: int | None) -> bool:
    """Whether an append opens a new epoch at the target; refuses any but the current and a new one.

    The very first epoch of a source needs no attachment: it closes nothing.

    Args:
        highest: the highest epoch known of that source, None if there is none.
        opens: the epoch named by an open-epoch attachment, None without one.

    Raises:
        PeerError: PEER_REFUSED, with the highest epoch known as a fact.
    """
    if opens is not None and opens != epoch:
        raise PeerError("attachment opens another epoch than the transfer's", facts={"epoch": epoch})
    if highest is None:
        return True
    if epoch == highest:
        return False
    if epoch > highest and opens == epoch:
        return True
    raise PeerError(
        "reserve epoch is closed or was not opened",
        reason=ErrorReason.PEER_REFUSED,
        facts={"epoch": epoch, "highest_epoch": highest},
    )


# -- the source's end ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _InFlight:
    count: int
    kind: SlotKind


class OutboundReserve:
    """The source's end of one reserve epoch: assigns, confirms, draws and forfeits slots.

    Marks are the durable ones; positions never pass them. After a restart positions are the marks
    (so assigned and possibly drawn slots are never touched again), and ``restore`` brings back what
    the target had confirmed.
    """

    def __init__(self, epoch: int, *, assign_mark: int = 0, draw_mark: int = 0) -> None:
        if draw_mark > assign_mark:
            raise ValueError("draw mark beyond assign mark")
        self.epoch = epoch
        self.assign_mark = self.assign_position = assign_mark
        self.draw_mark = self.draw_position = draw_mark
        # What an earlier run left under way is forfeited like what this one gives up.
        self._forfeited_to = assign_mark
        self._in_flight: dict[int, _InFlight] = {}
        self._runs: list[tuple[int, int]] = []
        self._sealed: list[tuple[int, int]] = []
        self.held_slots = 0

    # assigning

    def assign_mark_wanted(self, count: int, stride: int) -> int | None:
        """The mark to make durable before ``assign(count)``; None if it is far enough already.

        Raises:
            ShortageError: EPOCHS_EXHAUSTED: the slot numbers of this epoch are used up.
        """
        end = self.assign_position + count
        if end > MAX_SLOT + 1:
            raise ShortageError("the epoch's slots are used up", reason=ErrorReason.EPOCHS_EXHAUSTED)
        return None if end <= self.assign_mark else min(end + stride, MAX_SLOT + 1)

    def raise_assign_mark(self, mark: int) -> None:
        """Records that ``mark`` is durable."""
        self.assign_mark = max(self.assign_mark, mark)

    def assign(self, count: int, kind: SlotKind) -> int:
        """Assigns ``count`` consecutive slots for ever; returns the first.

        Raises:
            ValueError: the durable mark was not moved first.
        """
        first = self.assign_position
        if count < 1 or first + count > self.assign_mark:
            raise ValueError("assigning beyond the durable mark")
        self.assign_position = first + count
        self._in_flight[first] = _InFlight(count, kind)
        return first

    @property
    def in_flight_slots(self) -> int:
        """Key slots assigned and neither confirmed nor forfeited."""
        return sum(entry.count for entry in self._in_flight.values() if entry.kind is SlotKind.KEYS)

    def confirm(self, first: int) -> bool:
        """The target holds the transfer: its slots become usable. False: unknown or forfeited, ignore it."""
        entry = self._in_flight.pop(first, None)
        if entry is None:
            return False
        if entry.kind is SlotKind.SEALED:
            insort(self._sealed, (first, first + entry.count))
            return True
        if first < self.draw_position:
            return False
        self._insert(first, first + entry.count)
        return True

    def forfeit(self, first: int) -> None:
        """Gives a transfer up; its slots stay holes (3.5), here: the target may hold them."""
        entry = self._in_flight.pop(first, None)
        if entry is not None:
            self._forfeited_to = max(self._forfeited_to, first + entry.count)

    def restore(self, first: int, count: int, kind: SlotKind, used: RangeSet | None = None) -> None:
        """Brings back a confirmed append after a proven restart: undrawn keys, unused sealed slots."""
        stop = first + count
        if kind is SlotKind.SEALED:
            gaps = [Range(first, stop)] if used is None else used.missing_in(Range(first, stop))
            for gap in gaps:
                insort(self._sealed, (gap.start, gap.stop))
        elif stop > self.draw_position:
            self._insert(max(first, self.draw_position), stop)

    def _insert(self, start: int, stop: int) -> None:
        at = bisect_left(self._runs, (start, stop))
        self.held_slots += stop - start
        if at and self._runs[at - 1][1] == start:
            at -= 1
            start = self._runs.pop(at)[0]
        if at < len(self._runs) and self._runs[at][0] == stop:
            stop = self._runs.pop(at)[1]
        self._runs.insert(at, (start, stop))

    # drawing

    def plan(self, number: int, per_key: int) -> list[Range] | None:
        """The slot ranges, each a multiple of ``per_key``, for ``number`` keys; None if too few."""
        pieces: list[Range] = []
        for start, stop in self._runs:
            take = min(number, (stop - start) // per_key)
            if take:
                pieces.append(Range(start, start + take * per_key))
                number -= take
                if not number:
                    return pieces
        return None

    def available(self, per_key: int) -> int:
        """Keys of ``per_key`` slots that could be drawn now."""
        return sum((stop - start) // per_key for start, stop in self._runs)

    def draw_mark_wanted(self, end: int, stride: int) -> int | None:
        """The mark to sync before drawing up to ``end``; None if far enough; never past the assign mark."""
        return None if end <= self.draw_mark else min(end + stride, self.assign_mark)

    def raise_draw_mark(self, mark: int) -> None:
        """Records that ``mark`` is durable."""
        self.draw_mark = max(self.draw_mark, mark)

    def draw(self, pieces: list[Range]) -> None:
        """Draws a plan: nothing below its end is ever drawn after this.

        Raises:
            ValueError: the durable mark was not moved first, or the plan is stale.
        """
        end = pieces[-1].stop
        if end > self.draw_mark:
            raise ValueError("drawing beyond the durable mark")
        if pieces[0].start < self.draw_position:
            raise ValueError("drawing below the position")
        self._pass(end)

    @property
    def spent_below(self) -> int:
        """Below it every key slot is drawn or forfeited, and so none will be drawn."""
        live = [first for first, entry in self._in_flight.items() if entry.kind is SlotKind.KEYS]
        live += [start for start, _ in self._runs[:1]]
        return max(self.draw_position, min([self._forfeited_to, *live]))

    def _pass(self, end: int) -> None:
        self.draw_position = max(self.draw_position, end)
        runs = self._runs
        while runs and runs[0][1] <= end:
            start, stop = runs.pop(0)
            self.held_slots -= stop - start
        if runs and runs[0][0] < end:
            self.held_slots -= end - runs[0][0]
            runs[0] = (end, runs[0][1])

    # sealed slots

    @property
    def sealed_slots(self) -> int:
        """Confirmed sealed slots not used yet."""
        return sum(stop - start for start, stop in self._sealed)

    def sealed_messages(self, count: int) -> int:
        """How many messages of ``count`` slots the confirmed unused ones are good for."""
        return sum((stop - start) // count for start, stop in self._sealed)

    @property
    def lowest_sealed_in_flight(self) -> int | None:
        """The lowest slot of a sealed transfer that may still be confirmed."""
        firsts = [first for first, entry in self._in_flight.items() if entry.kind is SlotKind.SEALED]
        return min(firsts, default=None)

    def take_sealed(self, count: int) -> Range | None:
        """Takes consecutive sealed slots for one message; None if no run is long enough."""
        for index, (start, stop) in enumerate(self._sealed):
            if stop - start >= count:
                taken = Range(start, start + count)
                if taken.stop == stop:
                    self._sealed.pop(index)
                else:
                    self._sealed[index] = (taken.stop, stop)
                return taken
        return None

    def forfeit_sealed_below(self, below: int) -> None:
        """Gives up unused sealed slots that a retire is about to destroy at the target."""
        kept = [(max(start, below), stop) for start, stop in self._sealed if stop > below]
        self._sealed = kept


class DrawClock:
    """When slots were drawn, in coarse steps: tells what a key lifetime allows to be retired (4.7).

    Holds pairs (slot, time): everything below the slot was drawn or forfeited by that time. Note the
    position at draws and also now and then without one, or what a burst drew after its first point
    never expires.

    Args:
        step_s: least time between points.
        known: points of an earlier run.
        retired_below: below this slot nothing is left to expire.
    """

    def __init__(
        self, *, step_s: float, known: Iterable[tuple[int, float]] = (), retired_below: int = 0
    ) -> None:
        self.step_s = step_s
        self._points = sorted(known)
        self._noted = max([retired_below, *(slot for slot, _ in self._points)])

    def note(self, position: int, now_s: float) -> list[tuple[int, float]]:
        """Notes below what all is spent; returns points to make durable, a new one at most once per step.

        What was noted while the clock had leapt forward was drawn by now at the latest: else it would
        live until that date, and no later point would be taken before it.
        """
        changed: list[tuple[int, float]] = []
        if self._points and now_s < self._points[-1][1]:
            changed = [(slot, now_s) for slot, at_s in self._points if at_s > now_s]
            self._points[-len(changed) :] = changed
        if position > self._noted and not (self._points and now_s < self._points[-1][1] + self.step_s):
            self._noted = position
            self._points.append((position, now_s))
            changed.append(self._points[-1])
        return changed

    def expired_below(self, now_s: float, lifetime_s: float) -> int:
        """The slot below which every key is older than its lifetime; forgets points below it."""
        below = 0
        while self._points and self._points[0][1] + lifetime_s <= now_s:
            below = self._points.pop(0)[0]
        return below


# -- the target's end ------------------------------------------------------------------------------


class Held(Enum):
    """What a key_ID's slots are to the target (4.3)."""

    HELD = "held"
    REDEEMED = "redeemed"
    ABSENT = "absent"


class InboundReserve:
    """The target's end of one reserve epoch: appends, redeems, retires.

    ``present`` holds every slot ever appended and not retired, ``used`` those redeemed, opened or
    voided. An append that overlaps anything present, in progress or retired is refused (3.5); a
    redeem that overlaps anything used or in progress is refused (4.4).
    """

    def __init__(
        self, source: str, epoch: int, *, retired_below: int = 0, tag_memory_slots: int = TAG_MEMORY_SLOTS
    ) -> None:
        self.source = source
        self.epoch = epoch
        self.retired_below = retired_below
        self._keys = RangeSet()
        self._sealed = RangeSet()
        self._used = RangeSet()
        self._appending: set[Range] = set()
        self._taking: set[Range] = set()
        self._tag_memory_slots = tag_memory_slots
        self._used_slots = 0
        # Counted along the way: used ranges are many where slaves fetch out of order.
        self._used_sealed = 0
        self.tag_floor = 0

    # appending

    def begin_append(self, span: Range) -> None:
        """Reserves the range of an append that is about to be made durable.

        Raises:
            PeerError: PEER_REFUSED: it overlaps something present, redeemed or retired.
        """
        if (
            span.start < self.retired_below
            or self._keys.overlaps(span)
            or self._sealed.overlaps(span)
            or any(span.overlaps(other) for other in self._appending)
        ):
            raise PeerError(
                _OVERLAP,
                reason=ErrorReason.PEER_REFUSED,
                facts={"epoch": self.epoch, "first_slot": span.start},
            )
        self._appending.add(span)

    def end_append(self, span: Range, kind: SlotKind, *, is_durable: bool) -> None:
        """The append is durable, and usable; or failed, and nothing of it stays."""
        self._appending.discard(span)
        if is_durable:
            self.restore(span, kind)

    def restore(self, span: Range, kind: SlotKind) -> None:
        """Brings an append back at start-up."""
        (self._keys if kind is SlotKind.KEYS else self._sealed).add(span)

    def restore_used(self, spans: Iterable[Range]) -> None:
        """Adds to the used set what the disk knows as used."""
        for span in spans:
            self._used.add(span)
        self._used_slots = self._used.total
        self._count_used_sealed()
        self._forget_tags()

    # redeeming

    def state(self, span: Range) -> Held:
        """What the slots of a key_ID are; says nothing about its tag."""
        if span.start < self.retired_below or not self._keys.contains(span):
            return Held.ABSENT
        if self._used.overlaps(span):
            return Held.ABSENT if span.start < self.tag_floor else Held.REDEEMED
        if any(span.overlaps(other) for other in self._taking):
            return Held.REDEEMED
        return Held.HELD

    def take(self, spans: list[Range], kind: SlotKind) -> None:
        """Takes slots for use, all or none; ``settle`` ends it once the store has answered.

        Raises:
            PeerError: PEER_REFUSED: not held, used already, or named twice.
        """
        present = self._keys if kind is SlotKind.KEYS else self._sealed
        taken: list[Range] = []
        for span in spans:
            if (
                span.start < self.retired_below
                or not present.contains(span)
                or self._used.overlaps(span)
                or any(span.overlaps(other) for other in self._taking)
            ):
                self._taking.difference_update(taken)
                raise PeerError("slots are not held or are used already", reason=ErrorReason.PEER_REFUSED)
            self._taking.add(span)
            taken.append(span)

    def settle(self, spans: Iterable[Range], *, is_durable: bool) -> None:
        """Ends a ``take``: used for ever, or (nothing was committed, nothing left) free again."""
        for span in spans:
            self._taking.discard(span)
            if is_durable and span.stop > self.retired_below:
                if self._sealed.overlaps(span):
                    self._used_sealed += _overlap(self._sealed, span)
                self._used.add(span)
                self._used_slots += span.stop - span.start
        self._forget_tags()

    def retire(self, below: int) -> None:
        """Forgets everything below ``below``; it answers as absent from now on."""
        if below <= self.retired_below:
            return
        self.retired_below = below
        for ranges in (self._keys, self._sealed, self._used):
            ranges.discard_below(below)
        self._used_slots = self._used.total
        self._count_used_sealed()

    def _count_used_sealed(self) -> None:
        self._used_sealed = sum(_overlap(self._used, span) for span in self._sealed)

    def _forget_tags(self) -> None:
        """Moves the floor below which redeemed slots' tag parts are no longer kept (4.3)."""
        if self._used_slots <= self._tag_memory_slots:
            return
        excess = self._used.total - self._tag_memory_slots
        for span in self._used:
            size = span.stop - span.start
            if excess < size:
                self.tag_floor = max(self.tag_floor, span.start + excess)
                break
            excess -= size
        # Count again only after another eighth of the memory has been used.
        self._used_slots = self._tag_memory_slots - self._tag_memory_slots // 8

    # levels

    def is_spent(self, span: Range) -> bool:
        """Every slot of an append is used and its tag parts need not be kept."""
        return span.stop <= self.tag_floor and self._used.contains(span)

    @property
    def held_key_slots(self) -> int:
        """Key slots that can still be redeemed."""
        return self.held_slots - self.held_sealed_slots

    @property
    def held_sealed_slots(self) -> int:
        """Sealed slots not used yet."""
        return self._sealed.total - self._used_sealed

    @property
    def redeemed_slots(self) -> int:
        """Used slots not forgotten yet, of both kinds."""
        return self._used.total

    @property
    def appending_slots(self) -> int:
        """Slots of appends in progress."""
        return sum(span.stop - span.start for span in self._appending)

    @property
    def held_slots(self) -> int:
        """Slots present and unused, of both kinds: what bounds a source (3.9)."""
        return self._keys.total + self._sealed.total - self._used.total


def _overlap(ranges: RangeSet, span: Range) -> int:
    """How many offsets of ``span`` are in the set."""
    return span.stop - span.start - sum(gap.stop - gap.start for gap in ranges.missing_in(span))
