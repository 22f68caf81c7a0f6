"""Slot machines of a reserve: marks, holes, forfeits, epochs, redeems, retires (protocol 3.5, 4.3 to 4.7)."""

from __future__ import annotations

from random import Random

import pytest

from mesh.core.ranges import Range
from mesh.core.reserve import (
    DrawClock,
    Held,
    InboundReserve,
    OutboundReserve,
    check_append_epoch,
    next_epoch,
    slots_per_key,
)
from mesh.core.transfer import MAX_EPOCH, SlotKind
from mesh.errors import PeerError, ShortageError

KEYS, SEALED = SlotKind.KEYS, SlotKind.SEALED


def outbound(mark: int = 1000) -> OutboundReserve:
    """A reserve whose marks are durable up to ``mark``."""
    reserve = OutboundReserve(0)
    reserve.raise_assign_mark(mark)
    reserve.raise_draw_mark(mark)
    return reserve


def confirmed(reserve: OutboundReserve, count: int, kind: SlotKind = KEYS) -> int:
    """Assigns and confirms."""
    first = reserve.assign(count, kind)
    assert reserve.confirm(first)
    return first


@pytest.mark.parametrize(("size", "slots"), [(1, 1), (32, 1), (33, 2), (8192, 256)])
def test_slots_per_key(size: int, slots: int) -> None:
    assert slots_per_key(size) == slots


def test_nothing_is_assigned_or_drawn_beyond_a_durable_mark() -> None:
    reserve = OutboundReserve(0)
    assert reserve.assign_mark_wanted(1, 64) == 65
    with pytest.raises(ValueError, match="mark"):
        reserve.assign(1, KEYS)
    reserve.raise_assign_mark(65)
    assert reserve.assign_mark_wanted(65, 64) is None
    first = confirmed(reserve, 65)
    plan = reserve.plan(1, 1)
    assert plan is not None
    with pytest.raises(ValueError, match="mark"):
        reserve.draw(plan)
    # The draw mark never passes the assign mark.
    assert reserve.draw_mark_wanted(1, 1000) == 65
    reserve.raise_draw_mark(65)
    reserve.draw(plan)
    assert reserve.draw_position == first + 1


def test_draws_in_order_over_merged_runs() -> None:
    reserve = outbound()
    firsts = [reserve.assign(4, KEYS) for _ in range(3)]
    for first in (firsts[1], firsts[0], firsts[2]):
        reserve.confirm(first)
    assert reserve.plan(6, 2) == [Range(0, 12)]
    assert reserve.available(5) == 2
    assert reserve.plan(13, 1) is None


def test_a_transfer_confirmed_below_the_draw_position_is_forfeited() -> None:
    reserve = outbound()
    late = reserve.assign(4, KEYS)
    confirmed(reserve, 4)
    plan = reserve.plan(1, 1)
    assert plan == [Range(4, 5)]
    reserve.draw(plan)
    assert reserve.confirm(late) is False
    assert reserve.held_slots == 3


def test_forfeited_and_unknown_transfers_cannot_be_confirmed() -> None:
    reserve = outbound()
    first = reserve.assign(4, KEYS)
    reserve.forfeit(first)
    assert reserve.confirm(first) is False
    assert reserve.confirm(999) is False
    assert reserve.assign(1, KEYS) == 4


def test_what_is_forfeited_is_spent_up_to_the_first_slot_that_may_still_be_drawn() -> None:
    reserve = OutboundReserve(0)
    reserve.raise_assign_mark(100)
    reserve.raise_draw_mark(100)
    for _ in range(5):
        reserve.assign(10, SlotKind.KEYS)
    assert reserve.spent_below == 0
    reserve.forfeit(0)
    assert reserve.spent_below == 10
    reserve.confirm(10)
    reserve.forfeit(20)
    assert reserve.spent_below == 10
    reserve.draw([Range(10, 12)])
    assert reserve.spent_below == 12
    reserve.draw([Range(12, 20)])
    assert reserve.spent_below == 30
    reserve.forfeit(40)
    assert reserve.spent_below == 30
    reserve.forfeit(30)
    assert reserve.spent_below == 50
    # What a run left under way is forfeited by the next.
    assert OutboundReserve(0, assign_mark=100, draw_mark=20).spent_below == 100


def test_a_stale_plan_is_refused() -> None:
    reserve = outbound()
    confirmed(reserve, 4)
    plan = reserve.plan(2, 1)
    assert plan is not None
    reserve.draw(plan)
    with pytest.raises(ValueError, match="below"):
        reserve.draw(plan)


def test_sealed_slots_are_apart_from_keys() -> None:
    reserve = outbound()
    first = confirmed(reserve, 8, SEALED)
    confirmed(reserve, 2)
    assert reserve.plan(3, 1) is None
    assert reserve.take_sealed(3) == Range(first, first + 3)
    assert reserve.sealed_slots == 5
    assert (reserve.sealed_messages(2), reserve.sealed_messages(6)) == (2, 0)
    assert reserve.take_sealed(6) is None
    reserve.forfeit_sealed_below(first + 6)
    assert reserve.sealed_slots == 2
    assert reserve.take_sealed(2) == Range(6, 8)
    assert reserve.sealed_slots == 0


def test_a_restart_resumes_at_the_marks() -> None:
    reserve = OutboundReserve(0, assign_mark=100, draw_mark=40)
    reserve.restore(30, 20, KEYS)
    reserve.restore(0, 10, KEYS)
    assert reserve.plan(10, 1) == [Range(40, 50)]
    assert reserve.assign_mark_wanted(1, 10) == 111
    reserve.raise_assign_mark(111)
    assert reserve.assign(1, KEYS) == 100
    with pytest.raises(ValueError, match="draw mark"):
        OutboundReserve(0, assign_mark=1, draw_mark=2)


def test_epochs_and_slots_run_out_in_words() -> None:
    assert next_epoch() == 0
    assert next_epoch(3, 7) == 8
    with pytest.raises(ShortageError):
        next_epoch(MAX_EPOCH)
    with pytest.raises(ShortageError):
        OutboundReserve(0, assign_mark=(1 << 36) - 1).assign_mark_wanted(2, 1)


def test_only_the_current_epoch_or_an_opened_one_takes_appends() -> None:
    assert check_append_epoch(5, None, opens=None)
    assert not check_append_epoch(5, 5, opens=None)
    assert check_append_epoch(6, 5, opens=6)
    for epoch, highest, opens in ((4, 5, None), (4, 5, 4), (6, 5, None), (6, 5, 7)):
        with pytest.raises(PeerError):
            check_append_epoch(epoch, highest, opens=opens)


def held() -> InboundReserve:
    """Keys 0..10, sealed 10..20."""
    reserve = InboundReserve("a", 0)
    for span, kind in ((Range(0, 10), KEYS), (Range(10, 20), SEALED)):
        reserve.begin_append(span)
        reserve.end_append(span, kind, is_durable=True)
    return reserve


@pytest.mark.parametrize("span", [Range(0, 1), Range(9, 11), Range(19, 25), Range(0, 30)])
def test_an_append_overlaps_nothing_present(span: Range) -> None:
    with pytest.raises(PeerError):
        held().begin_append(span)


def test_an_append_overlaps_nothing_in_progress_redeemed_or_retired() -> None:
    reserve = held()
    reserve.begin_append(Range(30, 40))
    with pytest.raises(PeerError):
        reserve.begin_append(Range(39, 41))
    reserve.end_append(Range(30, 40), KEYS, is_durable=False)
    reserve.begin_append(Range(39, 41))
    reserve.take([Range(0, 5)], KEYS)
    reserve.settle([Range(0, 5)], is_durable=True)
    reserve.retire(7)
    for span in (Range(0, 2), Range(5, 8)):
        with pytest.raises(PeerError):
            reserve.begin_append(span)


def test_states_of_a_range() -> None:
    reserve = held()
    assert reserve.state(Range(0, 10)) is Held.HELD
    assert reserve.state(Range(9, 11)) is Held.ABSENT
    assert reserve.state(Range(12, 13)) is Held.ABSENT
    reserve.take([Range(2, 4)], KEYS)
    assert reserve.state(Range(3, 5)) is Held.REDEEMED
    reserve.settle([Range(2, 4)], is_durable=False)
    assert reserve.state(Range(3, 5)) is Held.HELD
    reserve.take([Range(2, 4)], KEYS)
    reserve.settle([Range(2, 4)], is_durable=True)
    assert reserve.state(Range(2, 4)) is Held.REDEEMED
    reserve.retire(4)
    assert reserve.state(Range(2, 4)) is Held.ABSENT
    assert (reserve.held_key_slots, reserve.held_sealed_slots) == (6, 10)


def test_a_take_is_all_or_none_and_of_one_kind() -> None:
    reserve = held()
    with pytest.raises(PeerError):
        reserve.take([Range(0, 2), Range(1, 3)], KEYS)
    with pytest.raises(PeerError):
        reserve.take([Range(10, 12)], KEYS)
    with pytest.raises(PeerError):
        reserve.take([Range(0, 2)], SEALED)
    reserve.take([Range(0, 2)], KEYS)


def test_old_tag_parts_are_forgotten_beyond_the_memory() -> None:
    reserve = InboundReserve("a", 0, tag_memory_slots=64)
    span = Range(0, 200)
    reserve.begin_append(span)
    reserve.end_append(span, KEYS, is_durable=True)
    for start in range(0, 200, 10):
        reserve.take([Range(start, start + 10)], KEYS)
        reserve.settle([Range(start, start + 10)], is_durable=True)
    assert 200 - 64 - 8 <= reserve.tag_floor <= 200 - 64
    assert reserve.state(Range(0, 1)) is Held.ABSENT
    assert reserve.state(Range(199, 200)) is Held.REDEEMED
    assert not reserve.is_spent(span)
    assert reserve.is_spent(Range(0, 100))


def test_draw_times_step_coarsely_and_expire() -> None:
    clock = DrawClock(step_s=10)
    assert clock.note(0, 0) == []
    assert clock.note(5, 1) == [(5, 1)]
    assert clock.note(9, 5) == []
    assert clock.note(20, 11) == [(20, 11)]
    assert clock.expired_below(100, 95) == 5
    assert clock.expired_below(100, 95) == 0
    assert DrawClock(step_s=10, known=[(20, 11.0)]).expired_below(200, 95) == 20


def test_a_position_that_stands_is_noted_once_also_after_it_expired_and_after_a_restart() -> None:
    clock = DrawClock(step_s=10)
    clock.note(5, 0)
    assert clock.note(9, 10) == [(9, 10)]
    assert clock.expired_below(200, 95) == 9
    assert clock.note(9, 200) == []
    assert DrawClock(step_s=10, retired_below=9).note(9, 300) == []


def test_points_from_a_clock_that_had_leapt_forward_are_set_back_to_now() -> None:
    clock = DrawClock(step_s=10, known=[(3, 5.0), (6, 900.0), (9, 910.0)])
    assert clock.note(12, 20.0) == [(6, 20.0), (9, 20.0)]
    assert clock.note(12, 31.0) == [(12, 31.0)]
    assert clock.expired_below(115.0, 95.0) == 9


def test_held_slots_of_each_kind_are_what_is_present_and_not_used() -> None:
    """Counted along the way; here counted anew, slot by slot, over a random life."""
    random = Random(7)
    reserve = InboundReserve("kme-a", 0)
    present: dict[SlotKind, set[int]] = {kind: set() for kind in SlotKind}
    used: set[int] = set()
    end = 0
    for _ in range(300):
        if random.random() < 0.3:
            kind = random.choice(list(SlotKind))
            span = Range(end := end + random.randrange(3), end := end + random.randrange(1, 40))
            reserve.begin_append(span)
            reserve.end_append(span, kind, is_durable=True)
            present[kind].update(range(span.start, span.stop))
        kind = random.choice(list(SlotKind))
        free = sorted(present[kind] - used)
        if free:
            slot = random.choice(free)
            reserve.take([Range(slot, slot + 1)], kind)
            is_durable = random.random() < 0.9
            reserve.settle([Range(slot, slot + 1)], is_durable=is_durable)
            used |= {slot} if is_durable else set()
        if random.random() < 0.02:
            reserve.restore_used(Range(slot, slot + 1) for slot in used)
        if random.random() < 0.03:
            below = random.randrange(end + 1)
            reserve.retire(below)
            for slots in (*present.values(), used):
                slots.difference_update(range(below))
        assert reserve.held_key_slots == len(present[SlotKind.KEYS] - used)
        assert reserve.held_sealed_slots == len(present[SlotKind.SEALED] - used)
