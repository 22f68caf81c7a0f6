"""The tables: marks never fall, overlaps are refused, epochs are never used again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh.core.ranges import Range
from mesh.errors import CallerError, ErrorReason, IntegrityError, MeshError, PeerError
from mesh.store.store import Store
from mesh.store.tables import (
    AppendKind,
    AppendRow,
    BlockRow,
    BlockState,
    ExtentRow,
    ExtentState,
    JobRow,
    KeyState,
    ReserveRow,
    ReserveState,
    StoredKeyRow,
    Tables,
)
from mesh.store.tables.meta import INCARNATIONS_KEPT
from tests.power_cut_files import PowerCutFiles


@pytest.fixture
def store() -> Iterator[Store]:
    opened = Store.open(Path("/data"), kme_id="kme-a", files=PowerCutFiles(), proof_dir=Path("/none"))
    yield opened
    opened.close()


def _used(reserve_id: int, start: int, stop: int) -> Callable[[Tables], None]:
    return lambda t: t.slots.add_used(reserve_id, start, stop)


def _appended(reserve_id: int, first_slot: int, count: int) -> Callable[[Tables], None]:
    return lambda t: t.appends.put(_append(reserve_id, first_slot, count))


def _extended(start: int, stop: int) -> Callable[[Tables], None]:
    return lambda t: t.extents.put(ExtentRow(1, start, stop, "other"))


def _offered(name: bytes, start: int, stop: int) -> Callable[[Tables], None]:
    block = BlockRow(name * 16, 1, start, stop, BlockState.OFFERED, b"offer", None, True)
    return lambda t: t.blocks.put(block)


def _delivered(slave: str) -> Callable[[Tables], bytes]:
    return lambda t: t.keystore.mark_delivered("sae-1", b"i" * 16, slave)


def _drawn(slot: int, at_s: int) -> Callable[[Tables], None]:
    return lambda t: t.slots.put_draw_time(1, slot, at_s)


def _job_put(job: JobRow) -> Callable[[Tables], None]:
    return lambda t: t.jobs.put(job)


def _answered(number: int) -> Callable[[Tables], None]:
    return lambda t: t.jobs.put_inbound_result("kme-b", bytes([number]) * 16, number, b"answer")


def _refused(store: Store, family: type[MeshError], change: Callable[[Tables], object]) -> MeshError:
    with pytest.raises(family) as refused:
        store.commit_now(change)
    return refused.value


def _reserve(store: Store) -> ReserveRow:
    return store.commit_now(lambda t: t.reserves.open("kme-a", "kme-b", 0, "trusted-relay", is_outbound=True))


def _append(reserve_id: int, first_slot: int, count: int) -> AppendRow:
    data = bytes(48 * count)
    return AppendRow(
        reserve_id, first_slot, count, AppendKind.KEYS, "", 0, data, b"confirm", b"tag", False, 1_700_000_000
    )


def test_a_lane_mark_never_falls(store: Store) -> None:
    lane = store.commit_now(lambda t: t.lanes.put_lane("kme-b", True))
    store.commit_now(lambda t: t.lanes.set_mark(lane.lane_id, 4096))
    store.commit_now(lambda t: t.lanes.set_mark(lane.lane_id, 4096))
    error = _refused(store, IntegrityError, lambda t: t.lanes.set_mark(lane.lane_id, 4095))
    assert error.facts["stored"] == 4096
    assert store.read(lambda t: t.lanes.get(lane.lane_id)).mark == 4096
    _refused(store, CallerError, lambda t: t.lanes.set_mark(99, 1))


def test_a_lane_has_one_root_and_its_repr_does_not_show_it(store: Store) -> None:
    lane = store.commit_now(lambda t: t.lanes.put_lane("kme-b", False))
    root = os.urandom(32)
    store.commit_now(lambda t: t.lanes.set_root(lane.lane_id, root))
    store.commit_now(lambda t: t.lanes.set_root(lane.lane_id, root))
    _refused(store, IntegrityError, lambda t: t.lanes.set_root(lane.lane_id, bytes(32)))
    row = store.read(lambda t: t.lanes.lane("kme-b", False))
    assert row is not None
    assert row.root == root
    assert "root" not in repr(row)


def test_a_reset_lane_is_new_and_its_old_epochs_never_return(store: Store) -> None:
    def fill(tables: Tables) -> int:
        lane = tables.lanes.put_lane("kme-b", True)
        tables.blocks.put(
            BlockRow(b"b" * 16, lane.lane_id, 0, 1024, BlockState.ACCEPTED, b"offer", None, True)
        )
        tables.extents.put(ExtentRow(lane.lane_id, 0, 1024, "pad-1", 64))
        tables.lanes.set_mark(lane.lane_id, 512)
        return lane.lane_id

    old = store.commit_now(fill)
    lane, files = store.commit_now(lambda t: t.lanes.reset_lane("kme-b", True, 2))
    assert (lane.epoch, lane.mark, lane.root, files) == (2, 0, None, ["pad-1"])
    assert lane.lane_id != old
    assert store.read(lambda t: (t.blocks.list(), t.extents.list())) == ([], [])
    _refused(store, IntegrityError, lambda t: t.lanes.reset_lane("kme-b", True, 2))
    assert store.read(lambda t: t.lanes.list()) == [lane]


def test_blocks_never_overlap_and_move_only_legally(store: Store) -> None:
    store.commit_now(_offered(b"a", 0, 100))
    store.commit_now(_offered(b"b", 200, 300))
    for start, stop in ((0, 100), (99, 101), (150, 201), (0, 400), (250, 260)):
        _refused(store, IntegrityError, _offered(b"c", start, stop))
    store.commit_now(_offered(b"c", 100, 200))
    store.commit_now(lambda t: t.blocks.set_state(b"a" * 16, BlockState.ACCEPTED, answer=b"yes"))
    store.commit_now(lambda t: t.blocks.set_state(b"a" * 16, BlockState.ACCEPTED))
    _refused(store, IntegrityError, lambda t: t.blocks.set_state(b"a" * 16, BlockState.OFFERED))
    _refused(store, CallerError, lambda t: t.blocks.set_state(b"z" * 16, BlockState.ACCEPTED))
    accepted = store.read(lambda t: t.blocks.list(1, BlockState.ACCEPTED))
    assert [(row.block_id, row.answer) for row in accepted] == [(b"a" * 16, b"yes")]
    assert store.commit_now(lambda t: t.blocks.delete_below(1, 200)) == 2
    store.commit_now(lambda t: t.blocks.delete(b"b" * 16))
    assert store.read(lambda t: t.blocks.get(b"b" * 16)) is None


def test_extents_never_overlap_and_a_file_is_free_with_its_last_extent(store: Store) -> None:
    store.commit_now(lambda t: t.extents.put(ExtentRow(1, 0, 100, "pad", 64)))
    store.commit_now(lambda t: t.extents.put(ExtentRow(1, 100, 150, "pad", 164)))
    for start, stop in ((0, 1), (149, 151), (0, 200)):
        _refused(store, IntegrityError, _extended(start, stop))
    store.commit_now(lambda t: t.extents.set_state(1, 100, ExtentState.USABLE))
    _refused(store, CallerError, lambda t: t.extents.set_state(1, 50, ExtentState.USABLE))
    assert store.commit_now(lambda t: t.extents.delete_below(1, 149)) == []
    assert store.read(lambda t: t.extents.list(1)) == [ExtentRow(1, 100, 150, "pad", 164, ExtentState.USABLE)]
    assert store.commit_now(lambda t: t.extents.delete(1, 100)) == ["pad"]


def test_assign_and_draw_marks_never_fall_and_keep_their_order(store: Store) -> None:
    reserve = _reserve(store)
    store.commit_now(lambda t: t.reserves.set_assign_mark(reserve.reserve_id, 64))
    store.commit_now(lambda t: t.reserves.set_draw_mark(reserve.reserve_id, 32))
    _refused(store, IntegrityError, lambda t: t.reserves.set_assign_mark(reserve.reserve_id, 63))
    _refused(store, IntegrityError, lambda t: t.reserves.set_draw_mark(reserve.reserve_id, 31))
    _refused(store, IntegrityError, lambda t: t.reserves.set_draw_mark(reserve.reserve_id, 65))
    row = store.read(lambda t: t.reserves.get(reserve.reserve_id))
    assert (row.assign_mark, row.draw_mark) == (64, 32)


def test_a_reserve_epoch_stays_taken_after_deletion(store: Store) -> None:
    reserve = _reserve(store)
    _refused(store, CallerError, lambda t: t.reserves.delete(reserve.reserve_id))
    store.commit_now(lambda t: t.appends.put(_append(reserve.reserve_id, 0, 4)))
    store.commit_now(lambda t: t.reserves.close(reserve.reserve_id))
    assert store.commit_now(lambda t: t.reserves.delete(reserve.reserve_id)) == []
    assert store.read(lambda t: (t.reserves.list(), t.appends.list(reserve.reserve_id))) == ([], [])
    _refused(store, IntegrityError, lambda t: t.reserves.open("kme-a", "kme-b", 0, "x", is_outbound=True))
    assert store.read(lambda t: t.reserves.highest_epoch("kme-a", "kme-b")) == 0
    assert store.read(lambda t: t.reserves.highest_epoch("kme-b", "kme-a")) == -1
    again = store.commit_now(lambda t: t.reserves.open("kme-a", "kme-b", 1, "x", is_outbound=True))
    assert store.read(lambda t: t.reserves.find("kme-a", "kme-b", 1)) == again


def test_used_slots_merge_and_never_come_back(store: Store) -> None:
    reserve_id = _reserve(store).reserve_id
    for start, stop in ((10, 20), (30, 40), (20, 30), (0, 5), (50, 60)):
        store.commit_now(_used(reserve_id, start, stop))
    assert store.read(lambda t: t.slots.used_ranges(reserve_id)) == [
        Range(0, 5),
        Range(10, 40),
        Range(50, 60),
    ]
    for start, stop in ((4, 6), (0, 1), (15, 16), (39, 50), (0, 100), (45, 51)):
        error = _refused(store, CallerError, _used(reserve_id, start, stop))
        assert error.reason is ErrorReason.UNKNOWN_KEY
    store.commit_now(_used(reserve_id, 5, 10))
    assert store.read(lambda t: t.slots.used_ranges(reserve_id)) == [Range(0, 40), Range(50, 60)]


def test_retired_slots_stay_refused_once_forgotten(store: Store) -> None:
    reserve_id = _reserve(store).reserve_id
    store.commit_now(_used(reserve_id, 10, 20))

    def retire(tables: Tables) -> None:
        tables.reserves.set_retired_below(reserve_id, 15)
        tables.reserves.set_retired_below(reserve_id, 3)
        tables.slots.forget_used_below(reserve_id, 15)

    store.commit_now(retire)
    assert store.read(lambda t: t.slots.used_ranges(reserve_id)) == [Range(15, 20)]
    _refused(store, CallerError, _used(reserve_id, 5, 6))
    _refused(store, CallerError, _used(reserve_id, 14, 15))
    _refused(store, PeerError, _appended(reserve_id, 14, 1))
    store.commit_now(_used(reserve_id, 20, 21))


def test_an_append_overlaps_nothing_present_redeemed_or_retired(store: Store) -> None:
    reserve_id = _reserve(store).reserve_id
    store.commit_now(_appended(reserve_id, 10, 10))
    store.commit_now(_used(reserve_id, 40, 41))
    for first, count in ((10, 10), (19, 2), (5, 6), (0, 100), (40, 1), (35, 6)):
        _refused(store, PeerError, _appended(reserve_id, first, count))
    store.commit_now(_appended(reserve_id, 20, 20))
    found = store.read(lambda t: t.appends.find(reserve_id, 25))
    assert found is not None
    assert (found.first_slot, found.stop_slot) == (20, 40)
    assert store.read(lambda t: t.appends.find(reserve_id, 5)) is None
    assert store.read(lambda t: t.appends.find(reserve_id, 40)) is None
    _refused(store, CallerError, _appended(reserve_id, 50, 0))


def test_appends_are_confirmed_wiped_and_deleted(store: Store) -> None:
    reserve_id = _reserve(store).reserve_id
    secret = os.urandom(96)
    row = AppendRow(reserve_id, 0, 2, AppendKind.SEALED, "", 0, secret, b"confirmed", b"tag", True, 1)
    store.commit_now(lambda t: t.appends.put(row))
    assert secret.hex() not in repr(row)
    assert repr(secret)[2:10] not in repr(row)
    store.commit_now(lambda t: t.appends.wipe_inline(reserve_id, 0, 48, 4800))
    kept = store.read(lambda t: t.appends.list(reserve_id))[0]
    assert (kept.is_confirmed, kept.confirm, kept.inline) == (True, b"confirmed", secret[:48] + bytes(48))
    filed = AppendRow(reserve_id, 2, 2, AppendKind.KEYS, "r-1", 0, None, None, None, True, 1)
    store.commit_now(lambda t: t.appends.put(filed))
    store.commit_now(lambda t: t.appends.wipe_inline(reserve_id, 2, 0, 48))
    assert store.commit_now(lambda t: t.appends.delete_below(reserve_id, 3)) == []
    assert store.read(lambda t: t.appends.list(reserve_id)) == [filed]
    assert store.commit_now(lambda t: t.appends.delete(reserve_id, 2)) == ["r-1"]


def test_draw_times_and_wrong_tags_are_counted_and_forgotten(store: Store) -> None:
    for slot, at_s in ((10, 100), (20, 200), (30, 300)):
        store.commit_now(_drawn(slot, at_s))
    store.commit_now(lambda t: t.slots.forget_draw_times_below(1, 10))
    assert store.read(lambda t: t.slots.draw_times(1)) == [(20, 200), (30, 300)]
    assert store.commit_now(lambda t: t.wrong_tags.add("sae-2", "sae-1", 19_000)) == 1
    assert store.commit_now(lambda t: t.wrong_tags.add("sae-2", "sae-1", 19_000, 5)) == 6
    assert store.commit_now(lambda t: t.wrong_tags.add("sae-2", "sae-1", 19_001)) == 1
    store.commit_now(lambda t: t.wrong_tags.forget_before(19_001))
    assert store.read(lambda t: t.wrong_tags.count("sae-2", "sae-1", 19_000)) == 0
    assert store.read(lambda t: t.wrong_tags.list(19_001)) == [("sae-2", "sae-1", 1)]


def _key(key_id: bytes, slaves: dict[str, bool], expires_at_s: int = 1000) -> StoredKeyRow:
    return StoredKeyRow("sae-1", key_id, b"k" * 32, expires_at_s, "", "trusted-relay", slaves)


def test_a_stored_key_goes_to_each_slave_once_and_is_wiped_after_the_last(store: Store) -> None:
    key = _key(b"i" * 16, {"sae-2": False, "sae-3": False})
    store.commit_now(lambda t: t.keystore.put_stored_keys([key]))
    assert b"k" * 32 not in repr(key).encode()
    _refused(store, CallerError, lambda t: t.keystore.put_stored_keys([_key(b"j" * 16, {}), key]))
    assert store.read(lambda t: t.keystore.stored_key("sae-1", b"j" * 16)) is None
    assert store.commit_now(lambda t: t.keystore.mark_delivered("sae-1", b"i" * 16, "sae-2")) == b"k" * 32
    for slave in ("sae-2", "sae-9"):
        error = _refused(store, CallerError, _delivered(slave))
        assert error.reason is ErrorReason.UNKNOWN_KEY
    assert store.commit_now(lambda t: t.keystore.mark_delivered("sae-1", b"i" * 16, "sae-3")) == b"k" * 32
    row = store.read(lambda t: t.keystore.stored_key("sae-1", b"i" * 16))
    assert row is not None
    assert (row.state, row.value, row.slaves) == (KeyState.DELIVERED, b"", {"sae-2": True, "sae-3": True})
    assert store.commit_now(lambda t: t.keystore.void("sae-1", b"i" * 16)) is False


def test_voids_and_expiry_leave_tombstones_that_refuse_the_same_key_id(store: Store) -> None:
    keys = [_key(bytes([n]) * 16, {"sae-2": False}, 1000 + n) for n in range(3)]
    store.commit_now(lambda t: t.keystore.put_stored_keys(keys))
    assert store.commit_now(lambda t: t.keystore.void("sae-1", keys[2].key_id)) is True
    _refused(store, CallerError, lambda t: t.keystore.mark_delivered("sae-1", keys[2].key_id, "sae-2"))
    assert store.commit_now(lambda t: t.keystore.expire(1000)) == [("sae-1", keys[0].key_id)]
    assert store.read(lambda t: t.keystore.count_held("sae-1")) == store.read(
        lambda t: t.keystore.count_held()
    )
    assert store.read(lambda t: t.keystore.count_held()) == 1
    _refused(store, CallerError, lambda t: t.keystore.put_stored_keys([keys[0]]))
    store.commit_now(lambda t: t.keystore.bury_unknown(_key(b"z" * 16, {"sae-2": False}, 1001)))
    _refused(store, CallerError, lambda t: t.keystore.put_stored_keys([_key(b"z" * 16, {"sae-2": False})]))
    assert store.commit_now(lambda t: t.keystore.forget_tombstones(1002)) == 2
    assert store.read(lambda t: t.keystore.stored_key("sae-1", keys[0].key_id)) is None


def test_jobs_keep_numbers_and_final_states(store: Store) -> None:
    numbers = [store.commit_now(lambda t: t.jobs.next_number("kme-b")) for _ in range(3)]
    assert numbers == [1, 2, 3]
    jobs = [JobRow(bytes([n]) * 16, n, "deposit", "kme-b", "open", b"sealed") for n in numbers]
    for job in jobs:
        store.commit_now(_job_put(job))
    _refused(store, CallerError, lambda t: t.jobs.put(jobs[0]))
    _refused(store, CallerError, lambda t: t.jobs.put(JobRow(b"n" * 16, 1, "deposit", "kme-b", "open", b"")))
    store.commit_now(lambda t: t.jobs.update(jobs[0].job_id, state="done", result=b"ok", attempts=2))
    store.commit_now(lambda t: t.jobs.update(jobs[1].job_id))
    _refused(store, CallerError, lambda t: t.jobs.update(b"?" * 16, state="done"))
    assert store.read(lambda t: t.jobs.lowest_open("kme-b")) == 2
    assert store.read(lambda t: t.jobs.lowest_open("kme-c")) is None
    done = store.read(lambda t: t.jobs.get(jobs[0].job_id))
    assert done is not None
    assert (done.state, done.result, done.attempts) == ("done", b"ok", 2)
    assert "sealed" not in repr(done)
    store.commit_now(lambda t: t.jobs.delete(jobs[0].job_id))
    assert store.read(lambda t: t.jobs.list(kind="deposit", peer="kme-b")) == jobs[1:]
    assert store.read(lambda t: t.jobs.list(kind="other")) == []
    assert store.commit_now(lambda t: t.jobs.next_number("kme-b")) == 4


def test_inbound_results_are_stored_once_and_forgotten_below(store: Store) -> None:
    for number in (1, 2, 3):
        store.commit_now(_answered(number))
    _refused(store, CallerError, lambda t: t.jobs.put_inbound_result("kme-b", b"\1" * 16, 1, b"other"))
    assert store.commit_now(lambda t: t.jobs.forget_inbound_below("kme-b", 3)) == 2
    assert store.read(lambda t: t.jobs.inbound_result("kme-b", b"\1" * 16)) is None
    assert store.read(lambda t: t.jobs.inbound_result("kme-b", b"\3" * 16)) == b"answer"


def test_serials_never_fall(store: Store) -> None:
    store.commit_now(lambda t: t.meta.raise_serial("document", 7))
    store.commit_now(lambda t: t.meta.raise_serial("document", 7))
    _refused(store, IntegrityError, lambda t: t.meta.raise_serial("document", 6))
    assert store.commit_now(lambda t: t.meta.next_serial("document")) == 8
    assert store.read(lambda t: t.meta.serial("other")) == 0
    store.commit_now(lambda t: t.meta.put("document", b"signed"))
    assert store.read(lambda t: t.meta.get("document")) == b"signed"
    assert store.read(lambda t: t.meta.get("none")) is None


def test_a_peers_incarnation_is_replaced_and_its_serial_only_rises(store: Store) -> None:
    unknown = store.read(lambda t: t.peers.peer("kme-b"))
    assert (unknown.incarnation, unknown.is_proven, unknown.document_serial) == (None, False, 0)
    store.commit_now(
        lambda t: t.peers.set_peer_incarnation("kme-b", b"1" * 16, is_proven=True, document_serial=5)
    )
    store.commit_now(
        lambda t: t.peers.set_peer_incarnation("kme-b", b"2" * 16, is_proven=False, document_serial=4)
    )
    known = store.read(lambda t: t.peers.peer("kme-b"))
    assert (known.incarnation, known.is_proven, known.document_serial) == (b"2" * 16, False, 5)
    assert store.read(lambda t: t.peers.list()) == [known]


def test_own_incarnations_are_newest_first_and_pruned(store: Store) -> None:
    ids = [number.to_bytes(16, "big") for number in range(INCARNATIONS_KEPT + 5)]

    def begin_all(tables: Tables) -> None:
        for incarnation in ids:
            tables.incarnations.begin(incarnation, is_proven=True)

    store.commit_now(begin_all)
    own = store.read(lambda t: t.incarnations.own_incarnations())
    assert own == ids[:4:-1]
    assert store.read(lambda t: t.incarnations.own_incarnations(2)) == [ids[-1], ids[-2]]


def test_an_unproven_start_closes_outbound_reserves_and_unsettles_lanes(store: Store) -> None:
    outbound = _reserve(store)
    inbound = store.commit_now(
        lambda t: t.reserves.open("kme-b", "kme-a", 3, "trusted-relay", is_outbound=False)
    )
    lane = store.commit_now(lambda t: t.lanes.put_lane("kme-b", True))
    store.commit_now(lambda t: t.incarnations.begin(b"1" * 16, is_proven=True))
    assert store.read(lambda t: t.reserves.get(outbound.reserve_id)).state is ReserveState.OPEN
    store.commit_now(lambda t: t.incarnations.begin(b"2" * 16, is_proven=False))
    assert store.read(lambda t: t.reserves.get(outbound.reserve_id)).state is ReserveState.CLOSED
    assert store.read(lambda t: t.reserves.get(inbound.reserve_id)).state is ReserveState.OPEN
    assert store.read(lambda t: t.lanes.get(lane.lane_id)).is_settled is False
    store.commit_now(lambda t: t.lanes.settle(lane.lane_id))
    assert store.read(lambda t: t.lanes.get(lane.lane_id)).is_settled is True
