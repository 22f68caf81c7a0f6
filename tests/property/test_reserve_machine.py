"""Both ends of a reserve under arbitrary interleavings and crashes (protocol 3.5, 4.4 to 4.6).

The source draws from its machine, the target appends to its own; messages are late, lost or doubled;
either end crashes at any point, proven or not. Bytes stand for themselves: slot s of append n holds
(n, s), so a key that differs between the ends, or comes twice, shows at once.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mesh.core.ranges import Range, RangeSet
from mesh.core.reserve import InboundReserve, OutboundReserve
from mesh.core.transfer import SlotKind
from mesh.errors import PeerError

KEYS = SlotKind.KEYS
ASSIGN_STRIDE, DRAW_STRIDE = 20, 7


class ReserveMachine(RuleBasedStateMachine):
    """One reserve epoch at both ends, the disk under each, and everything the outside saw."""

    def __init__(self) -> None:
        super().__init__()
        self.source = OutboundReserve(0)
        self.target = InboundReserve("a", 0)
        self.epoch = 0
        self.disk = {"assign": 0, "draw": 0}
        self.recorded: list[tuple[int, int]] = []
        self.frames: list[tuple[int, int, int, int]] = []
        self.confirms: list[tuple[int, int]] = []
        self.source_bytes: dict[int, tuple[int, int]] = {}
        self.target_disk: dict[int, dict[int, tuple[int, int]]] = {0: {}}
        self.used_disk: dict[int, RangeSet] = {0: RangeSet()}
        self.handed_out: dict[tuple[int, int], tuple[int, int]] = {}
        self.redeemed: set[tuple[int, int]] = set()
        self.transfers = 0
        self.assigned: set[tuple[int, int]] = set()

    # the source

    @rule(count=st.integers(1, 9))
    def send(self, count: int) -> None:
        """Assigns slots under a durable mark and sends a transfer."""
        mark = self.source.assign_mark_wanted(count, ASSIGN_STRIDE)
        if mark is not None:
            self.disk["assign"] = mark
            self.source.raise_assign_mark(mark)
        first = self.source.assign(count, KEYS)
        self.transfers += 1
        for slot in range(first, first + count):
            assert (self.epoch, slot) not in self.assigned
            self.assigned.add((self.epoch, slot))
            self.source_bytes[slot] = (self.transfers, slot)
        self.frames.append((self.epoch, first, count, self.transfers))

    @rule(number=st.integers(1, 5), per_key=st.integers(1, 3))
    def draw(self, number: int, per_key: int) -> None:
        """Draws keys: durable mark first, then out they go."""
        plan = self.source.plan(number, per_key)
        if plan is None:
            assert self.source.available(per_key) < number
            return
        mark = self.source.draw_mark_wanted(plan[-1].stop, DRAW_STRIDE)
        if mark is not None:
            assert mark <= self.disk["assign"]
            self.disk["draw"] = mark
            self.source.raise_draw_mark(mark)
        self.source.draw(plan)
        for piece in plan:
            assert len(piece) % per_key == 0
            for slot in range(piece.start, piece.stop):
                assert (self.epoch, slot) not in self.handed_out
                self.handed_out[self.epoch, slot] = self.source_bytes[slot]

    @precondition(lambda self: self.confirms)
    @rule(data=st.data(), keeps=st.booleans())
    def confirm(self, data: st.DataObject, keeps: bool) -> None:
        """A confirm arrives, in any order, perhaps again later."""
        at = data.draw(st.integers(0, len(self.confirms) - 1))
        epoch, first = self.confirms[at] if keeps else self.confirms.pop(at)
        if epoch != self.epoch:
            return
        count = next(count for e, f, count, _ in self.frames if (e, f) == (epoch, first))
        if self.source.confirm(first):
            self.recorded.append((first, count))

    @precondition(lambda self: self.frames)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """The source forfeits a transfer: too late."""
        epoch, first, _, _ = data.draw(st.sampled_from(self.frames))
        if epoch == self.epoch:
            self.source.forfeit(first)

    @rule(is_proven=st.booleans(), loses_records=st.booleans())
    def crash_source(self, is_proven: bool, loses_records: bool) -> None:
        """A restart: at the marks with what was recorded, or in a new epoch with nothing."""
        if is_proven:
            restored = OutboundReserve(
                self.epoch, assign_mark=self.disk["assign"], draw_mark=self.disk["draw"]
            )
            if loses_records and self.recorded:
                self.recorded.pop()
            for first, count in self.recorded:
                restored.restore(first, count, KEYS)
            self.source = restored
            return
        self.epoch += 1
        self.source = OutboundReserve(self.epoch)
        self.disk = {"assign": 0, "draw": 0}
        self.recorded = []
        self.target_disk[self.epoch] = {}
        self.used_disk[self.epoch] = RangeSet()

    # the target

    @precondition(lambda self: self.frames)
    @rule(data=st.data(), is_durable=st.booleans())
    def deliver(self, data: st.DataObject, is_durable: bool) -> None:
        """A frame arrives, late, again, or just before a crash of the disk."""
        epoch, first, count, transfer = data.draw(st.sampled_from(self.frames))
        if epoch != self.epoch:
            return
        span = Range(first, first + count)
        disk = self.target_disk[epoch]
        target = self.current_target()
        try:
            target.begin_append(span)
        except PeerError:
            assert any(slot in disk for slot in range(first, first + count))
            return
        assert not any(slot in disk for slot in range(first, first + count))
        if is_durable:
            disk.update({slot: (transfer, slot) for slot in range(first, first + count)})
            self.confirms.append((epoch, first))
        target.end_append(span, KEYS, is_durable=is_durable)

    def current_target(self) -> InboundReserve:
        """The target's machine of the current epoch."""
        if self.target.epoch != self.epoch:
            self.target = InboundReserve("a", self.epoch)
        return self.target

    @precondition(lambda self: self.handed_out)
    @rule(data=st.data(), is_durable=st.booleans())
    def redeem(self, data: st.DataObject, is_durable: bool) -> None:
        """A slave presents an ID; what it gets is what the master got, once."""
        epoch, slot = data.draw(st.sampled_from(sorted(self.handed_out)))
        if epoch != self.epoch:
            return
        target, span = self.current_target(), Range(slot, slot + 1)
        try:
            target.take([span], KEYS)
        except PeerError:
            assert (epoch, slot) in self.redeemed
            return
        assert (epoch, slot) not in self.redeemed
        if is_durable:
            self.used_disk[epoch].add(span)
            self.redeemed.add((epoch, slot))
            assert self.target_disk[epoch][slot] == self.handed_out[epoch, slot]
        target.settle([span], is_durable=is_durable)

    @rule()
    def crash_target(self) -> None:
        """The target comes back with what its disk holds."""
        target = InboundReserve("a", self.epoch)
        for slot in self.target_disk[self.epoch]:
            target.restore(Range(slot, slot + 1), KEYS)
        target.restore_used(self.used_disk[self.epoch])
        self.target = target

    @invariant()
    def positions_stay_under_marks(self) -> None:
        """Position ≤ mark ≤ disk, and the draw never passes the assignments."""
        source = self.source
        assert source.draw_position <= source.draw_mark <= self.disk["draw"] <= self.disk["assign"]
        assert source.assign_position <= source.assign_mark <= self.disk["assign"]

    @invariant()
    def what_was_handed_out_is_at_the_target(self) -> None:
        """Invariant 5: a key is handed to the master only after the target durably holds it."""
        for (epoch, slot), value in self.handed_out.items():
            assert self.target_disk[epoch].get(slot) == value


TestReserveMachine = ReserveMachine.TestCase
TestReserveMachine.settings = settings(max_examples=150, stateful_step_count=40)
