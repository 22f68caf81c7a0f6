"""Lanes: where bytes may be used, rule by rule (protocol 1.1 to 1.4, 1.10, 2.3)."""

from __future__ import annotations

import pytest

from mesh.core.lane import LaneLimits, Purpose, ReaderLane, WriterLane, stretch
from mesh.core.ranges import Range, RangeSet
from mesh.errors import ErrorReason, IntegrityError, PeerError, RolledBackError, ShortageError

LIMITS = LaneLimits.of(1 << 20)


def writer(material: int = 100_000, *, mark: int = 0, reported: int = 0) -> WriterLane:
    lane = WriterLane(1, LIMITS, mark=mark, reported=reported)
    lane.add_material(Range(0, material))
    return lane


def reader(material: int = 100_000, *, mark: int = 0) -> ReaderLane:
    lane = ReaderLane(1, LIMITS, mark=mark)
    lane.add_material(Range(0, material))
    return lane


def test_limits_of_the_default_pool() -> None:
    limits = LaneLimits.of(64 << 20)
    assert (limits.window_bytes, limits.stride_bytes, limits.frame_bytes) == (4 << 20, 64 << 10, 1 << 20)


def test_limits_of_a_small_pool() -> None:
    assert LaneLimits(1 << 20, 64 << 10, 10485, 16 << 10) == LIMITS


def test_window_is_only_widened() -> None:
    assert LaneLimits.of(64 << 20, 1).window_bytes == 4 << 20
    assert LaneLimits.of(1 << 20, 1 << 20).window_bytes == 1 << 20


def test_narrower_end_counts() -> None:
    assert LIMITS.narrowed(16 << 10).frame_bytes == 4 << 10
    assert LIMITS.narrowed(1 << 30) == LIMITS


def test_first_32_bytes_are_the_root() -> None:
    lane = writer()
    assert lane.position == 32
    lane.mark_moved(64)
    assert lane.claim(32, Purpose.HELLO) == Range(32, 64)


def test_nothing_is_used_beyond_the_mark() -> None:
    lane = writer()
    with pytest.raises(ShortageError):
        lane.claim(100, Purpose.DATA)
    assert lane.position == 32
    mark = lane.mark_for(100, Purpose.DATA)
    assert mark == 132 + LIMITS.stride_bytes
    lane.mark_moved(mark)
    assert lane.claim(100, Purpose.DATA) == Range(32, 132)


def test_mark_never_passes_the_material() -> None:
    lane = writer(5000)
    assert lane.mark_for(100, Purpose.DATA) == 5000


def test_mark_never_falls() -> None:
    lane = writer(mark=500)
    with pytest.raises(IntegrityError):
        lane.mark_moved(499)


def test_first_hello_takes_no_stride() -> None:
    lane = writer(mark=1000)
    assert lane.bare_mark_for(32) == 1032


def test_restart_resumes_at_the_mark() -> None:
    assert writer(mark=12_345).position == 12_345


def test_tail_is_for_control_only() -> None:
    lane = writer(20_000, mark=20_000 - 300)
    assert lane.tail_bytes == 200
    with pytest.raises(ShortageError):
        lane.find(128, Purpose.DATA)
    assert lane.find(100, Purpose.DATA) == 19_700
    assert lane.find(128, Purpose.CONTROL) == 19_700


def test_under_64_bytes_the_lane_is_new() -> None:
    assert writer(1000, mark=937).is_new
    assert not writer(1000, mark=936).is_new


@pytest.mark.parametrize(
    ("purpose", "share"),
    [
        (Purpose.DATA, LIMITS.window_bytes // 2),
        (Purpose.LOCAL, LIMITS.window_bytes // 2),
        (Purpose.CONTROL, LIMITS.window_bytes * 3 // 4),
        (Purpose.HELLO, LIMITS.window_bytes + LIMITS.stride_bytes),
    ],
)
def test_graded_bound_past_the_last_report(purpose: Purpose, share: int) -> None:
    lane = writer(1 << 20, mark=10_000, reported=10_000)
    lane.jump(10_000 + share - 64)
    lane.base = 0
    assert lane.find(64, purpose) == 10_000 + share - 64
    with pytest.raises(ShortageError) as caught:
        lane.find(65, purpose)
    assert caught.value.reason is ErrorReason.WINDOW_FULL


def test_claimable_is_what_claim_grants() -> None:
    lane = writer(1 << 19, mark=40_000)
    lane.reported = 39_000
    granted = lane.claimable_bytes()
    assert granted == 0
    lane.mark_moved(45_000)
    assert lane.claimable_bytes() == 5_000
    lane.claim(5_000, Purpose.DATA)
    assert lane.claimable_bytes() == 0


def test_claims_never_span_a_hole() -> None:
    lane = writer(50_000, mark=45_000, reported=44_000)
    lane.jump(9_000)
    lane.add_hole(Range(46_000, 48_000))
    lane.mark_moved(50_000)
    assert lane.claimable_bytes() == 1_500  # behind the hole, less the tail
    assert lane.claim(900, Purpose.DATA) == Range(45_000, 45_900)
    assert lane.claim(200, Purpose.DATA) == Range(48_000, 48_200)


def test_holes_do_not_count_in_the_window() -> None:
    holes = RangeSet([Range(100, 200), Range(300, 1000)])
    assert stretch(holes, 0, 100) == 100
    assert stretch(holes, 0, 101) == 201
    assert stretch(holes, 50, 200) == 1050
    assert stretch(holes, 150, 100) == 300
    assert stretch(RangeSet(), 5, 7) == 12


def test_report_past_our_position_is_a_rollback() -> None:
    lane = writer(mark=500)
    lane.take_report(400)
    lane.take_report(300)
    assert lane.reported == 400
    with pytest.raises(RolledBackError):
        lane.take_report(501)


def test_unproven_writer_goes_past_all_that_its_peer_may_have_seen() -> None:
    lane = writer(1 << 20, mark=5_000)
    expected = 4_000 + LIMITS.window_bytes + LIMITS.stride_bytes
    assert lane.past_peer(4_000, LIMITS.window_bytes) == expected
    assert lane.past_peer(4_000, 2 * LIMITS.window_bytes) == expected + LIMITS.window_bytes


def test_unproven_writer_stops_at_the_end_of_known_blocks() -> None:
    lane = writer(20_000, mark=5_000)
    lane.extend(24_000)  # offered, not accepted as far as this end knows
    assert lane.past_peer(6_000, LIMITS.window_bytes) == 24_000
    assert writer(20_000, mark=30_000).past_peer(6_000, LIMITS.window_bytes) == 30_000


def test_jump_moves_the_window_along() -> None:
    lane = writer(1 << 20, mark=5_000, reported=4_000)
    target = lane.past_peer(4_000, LIMITS.window_bytes)
    lane.mark_moved(target)
    lane.jump(target)
    assert lane.bare_mark_for(32) == target + 32
    lane.jump(0)
    assert lane.position == target


def test_reader_takes_frames_within_the_window_only() -> None:
    lane = reader(1 << 19, mark=1_000)
    lane.check_frame(Range(1_000, 1_100))
    lane.check_frame(Range(1_000 + LIMITS.window_bytes - 100, 1_000 + LIMITS.window_bytes))
    for start, stop in ((999, 1_100), (1_000 + LIMITS.window_bytes - 99, 1_001 + LIMITS.window_bytes)):
        with pytest.raises(PeerError):
            lane.check_frame(Range(start, stop))
    with pytest.raises(PeerError):
        lane.check_frame(Range(1_000, 1_001 + LIMITS.frame_bytes))


def test_reader_refuses_what_it_does_not_hold() -> None:
    lane = reader(2_000, mark=1_000)
    lane.add_hole(Range(1_500, 1_600))
    for start, stop in ((1_950, 2_050), (1_450, 1_550), (1_450, 1_650)):
        with pytest.raises(PeerError):
            lane.check_frame(Range(start, stop))
    with pytest.raises(PeerError):
        lane.check_held(Range(0, 32))


def test_hello_is_taken_below_the_position_while_bytes_are_held() -> None:
    lane = reader(2_000, mark=1_000)
    lane.check_held(Range(500, 532))
    lane.wiped(600)
    lane.check_held(Range(500, 532))
    lane.accept(532)
    lane.wiped(600)
    lane.check_held(Range(532, 564))
    with pytest.raises(PeerError):
        lane.check_held(Range(500, 532))


def test_a_reader_wipes_what_its_writer_is_past_and_no_more() -> None:
    lane = reader(2_000, mark=1_000)
    assert (lane.position, lane.wipeable) == (1_000, 0)
    lane.accept(532)
    assert (lane.position, lane.wipeable) == (1_000, 532)
    lane.accept(1_064)
    assert lane.wipeable == 1_000
    lane.mark_moved(1_200)
    assert lane.wipeable == 1_064


def test_position_never_goes_back_and_reports_stay_below_the_mark() -> None:
    lane = reader(50_000, mark=1_000)
    lane.accept(1_200)
    lane.accept(1_100)
    assert lane.position == 1_200
    assert lane.reportable == 1_000
    assert lane.mark_for(1_200) == 1_200 + LIMITS.stride_bytes
    lane.mark_moved(1_200 + LIMITS.stride_bytes)
    assert lane.reportable == 1_200
    assert lane.mark_for(1_300) is None


def test_report_is_due_after_an_eighth_of_the_window() -> None:
    lane = reader(50_000, mark=20_000)
    lane.told = 20_000 - LIMITS.window_bytes // 8 + 1
    assert not lane.is_report_due
    lane.told -= 1
    assert lane.is_report_due


def test_marks_run_ahead_of_half_a_stride() -> None:
    lane = writer(1 << 19, mark=1_000)
    assert lane.next_mark == 1_000 + LIMITS.stride_bytes
    lane.mark_moved(1_000 + LIMITS.stride_bytes)
    assert lane.next_mark is None


def test_clear_offers_count_only_where_the_writer_may_be_emptied() -> None:
    bound = 64 + 2 * (LIMITS.window_bytes + LIMITS.stride_bytes)
    assert reader(1_000 + bound - 1, mark=1_000).may_be_emptied()
    assert not reader(1_000 + bound, mark=1_000).may_be_emptied()
    assert reader(1_000 + bound, mark=1_000).may_be_emptied(1)
