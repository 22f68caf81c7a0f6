"""Cut the power anywhere: what was acknowledged is there, marks never fall, used slots stay used.

Random operations run on a modelled disk; before a random one of its steps (a write,
a sync, a rename, a truncation, ...) the power goes. What was not synced is then
kept, lost or torn at random, the store is opened again, compared with what its
callers were told, and the next generation goes on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import IntegrityError, MeshError
from mesh.store.store import Store
from mesh.store.tables import ExtentRow, JobRow, StoredKeyRow, Tables
from tests.power_cut_files import TMPFS, PowerCutFiles

DATA = Path("/data")
LANES = 2
Operation = tuple[str, int]
Change = Callable[[Tables], object]

operations = st.lists(
    st.tuples(
        st.sampled_from(
            ["mark", "use", "pad", "remove", "key", "deliver", "job", "batch", "reset", "reopen"]
        ),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=25,
)
generations = st.lists(
    st.tuples(operations, st.integers(0, 250), st.integers(0, 2**16)), min_size=1, max_size=3
)


@dataclass
class Model:
    """What callers were told, and what they asked for without an answer."""

    marks: dict[int, tuple[int, int]] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    unsure_used: set[int] = field(default_factory=set)
    pads: dict[str, bytes] = field(default_factory=dict)
    unsure_removed: set[str] = field(default_factory=set)
    keys: dict[int, bool] = field(default_factory=dict)
    unsure_delivered: set[int] = field(default_factory=set)
    jobs: set[int] = field(default_factory=set)
    next_slot: int = 0
    next_name: int = 0

    def fresh(self) -> int:
        self.next_name += 1
        return self.next_name


class Cut(Exception):  # noqa: N818 - an outcome, not an error
    """The power went while an operation ran."""


def _open(files: PowerCutFiles) -> Store:
    store = Store.open(DATA, kme_id="kme-a", files=files, proof_dir=TMPFS)
    store._database.execute("PRAGMA wal_autocheckpoint = 6")
    return store


def _lane_number(index: int) -> tuple[str, bool]:
    return "kme-b", index % LANES == 0


def _mark_change(index: int, mark: int) -> Change:
    def change(tables: Tables) -> None:
        tables.lanes.set_mark(tables.lanes.put_lane(*_lane_number(index)).lane_id, mark)

    return change


def _use_change(slot: int) -> Change:
    return lambda tables: tables.slots.add_used(1, slot, slot + 1)


def _key(number: int) -> StoredKeyRow:
    return StoredKeyRow(
        "sae-1", number.to_bytes(16, "big"), bytes([number % 256]) * 32, 10**10, "", "g", {"s": False}
    )


class Machine:
    """Runs operations on the store and the model side by side."""

    def __init__(self, store: Store, model: Model) -> None:
        self.store = store
        self.model = model

    def run(self, name: str, value: int) -> None:
        getattr(self, f"_{name}")(value)

    def _mark(self, value: int) -> None:
        epoch, mark = self.model.marks.get(value % LANES, (1, 0))
        self.store.commit_now(_mark_change(value, mark + 100 + value))
        self.model.marks[value % LANES] = (epoch, mark + 100 + value)

    def _reset(self, value: int) -> None:
        if value % LANES in self.model.marks:
            row = self.store.read(lambda t: t.lanes.lane(*_lane_number(value)))
            assert row is not None
            lane, files = self.store.commit_now(
                lambda t: t.lanes.reset_lane(*_lane_number(value), row.epoch + 1)
            )
            self.model.marks[value % LANES] = (lane.epoch, 0)
            assert files == []

    def _use(self, value: int) -> None:
        slot = self.model.next_slot = self.model.next_slot + 1 + value % 3
        self.model.unsure_used.add(slot)
        self.store.commit_now(_use_change(slot))
        self.model.used.add(slot)

    def _batch(self, value: int) -> None:
        asyncio.run(self._batch_async(value + 1))

    async def _batch_async(self, size: int) -> None:
        waiting = []
        for _ in range(size):
            slot = self.model.next_slot = self.model.next_slot + 2
            self.model.unsure_used.add(slot)
            waiting.append((slot, self.store.commit_soon(_use_change(slot))))
        refused = self.store.commit_soon(_use_change(waiting[0][0]))
        outcomes = await asyncio.gather(refused, *(future for _, future in waiting), return_exceptions=True)
        assert isinstance(outcomes[0], MeshError)
        for (slot, _), outcome in zip(waiting, outcomes[1:], strict=True):
            if outcome is None:
                self.model.used.add(slot)

    def _pad(self, value: int) -> None:
        name, data = f"pad-{self.model.fresh()}", bytes([value + 1]) * (300 + 700 * value)
        number = self.model.next_name
        self.store.pads.create_now(name, data)
        row = ExtentRow(99, number * 10_000, number * 10_000 + len(data), name)
        self.store.commit_now(lambda t: t.extents.put(row))
        self.model.pads[name] = data

    def _remove(self, value: int) -> None:
        if self.model.pads:
            name = sorted(self.model.pads)[value % len(self.model.pads)]
            self.model.unsure_removed.add(name)
            data = self.model.pads.pop(name)
            number = int(name.removeprefix("pad-"))
            files = self.store.commit_now(lambda t: t.extents.delete(99, number * 10_000))
            assert (files, self.store.pads.read(name, 0, len(data))) == ([name], data)
            self.store.pads.remove_now(name)

    def _key(self, value: int) -> None:
        number = self.model.fresh()
        self.store.commit_now(lambda t: t.keystore.put_stored_keys([_key(number)]))
        self.model.keys[number] = False

    def _deliver(self, value: int) -> None:
        undelivered = [
            number
            for number, is_delivered in self.model.keys.items()
            if not is_delivered and number not in self.model.unsure_delivered
        ]
        if undelivered:
            number = undelivered[value % len(undelivered)]
            self.model.unsure_delivered.add(number)
            self.store.commit_now(lambda t: t.keystore.mark_delivered("sae-1", _key(number).key_id, "s"))
            self.model.keys[number] = True

    def _job(self, value: int) -> None:
        def change(tables: Tables) -> int:
            number = tables.jobs.next_number("kme-b")
            tables.jobs.put(
                JobRow(number.to_bytes(16, "big"), number, "deposit", "kme-b", "open", bytes(value))
            )
            return number

        self.model.jobs.add(self.store.commit_now(change))

    def _reopen(self, value: int) -> None:
        del value
        self.store.close()
        self.store = _open(self.files)

    @property
    def files(self) -> PowerCutFiles:
        files = self.store._files
        assert isinstance(files, PowerCutFiles)
        return files


def _check(store: Store, model: Model) -> None:
    """Everything acknowledged is there; what had no answer is there whole or not at all."""
    for index in range(LANES):
        lane = store.read(lambda t: t.lanes.lane(*_lane_number(index)))  # noqa: B023 - runs at once
        assert lane is not None or index not in model.marks
        if lane is not None:
            assert (lane.epoch, lane.mark) >= model.marks.get(index, (0, 0))
            model.marks[index] = (lane.epoch, lane.mark)
    used = {
        slot for part in store.read(lambda t: t.slots.used_ranges(1)) for slot in range(part.start, part.stop)
    }
    assert model.used <= used <= model.used | model.unsure_used
    for slot in used:
        try:
            store.commit_now(_use_change(slot))
        except MeshError:
            continue
        raise AssertionError(f"slot {slot} was used twice")
    named = {row.file: row for row in store.read(lambda t: t.extents.list(99))}
    assert set(store.pads.list()) == set(named)
    for name, data in model.pads.items():
        assert name in named
        assert store.pads.read(name, 0, len(data)) == data
    for number, is_delivered in model.keys.items():
        key = store.read(lambda t: t.keystore.stored_key("sae-1", _key(number).key_id))  # noqa: B023 - at once
        assert key is not None
        if is_delivered or key.slaves["s"]:
            assert number in model.unsure_delivered
            assert (key.slaves["s"], key.value) == (True, b"")
        else:
            assert key.value == _key(number).value
    assert model.jobs <= {job.number for job in store.read(lambda t: t.jobs.list())}
    highest = max(model.jobs, default=0)
    assert store.read(lambda t: t.meta.serial("job/kme-b")) >= highest
    model.used, model.unsure_used = used, set()


@settings(max_examples=60)
@given(generations)
def test_power_cuts_lose_nothing_that_was_acknowledged(
    generations: list[tuple[list[Operation], int, int]],
) -> None:
    files, model = PowerCutFiles(), Model()
    store: Store | None = None
    try:
        for number, (sequence, cut_after, seed) in enumerate(generations):
            files.cut_before_step = cut_after
            store = None
            try:
                store = _open(files)
                machine = Machine(store, model)
                store.begin_incarnation(number.to_bytes(16, "big"))
                for name, value in sequence:
                    machine.run(name, value)
                    store = machine.store
                    if files.is_cut:
                        break
            except MeshError:
                assert files.is_cut
            if store is not None:
                store.close()
            files = files.survivor(seed)
            store = _open(files)
            assert not store.is_proven_restart
            _check(store, model)
            store.close()
            files.steps = 0
    finally:
        if store is not None:
            store.close()


@settings(max_examples=30)
@given(st.integers(0, 60), st.integers(0, 2**16))
def test_a_cut_while_the_directory_is_made_leaves_a_new_or_a_finished_one(cut_after: int, seed: int) -> None:
    files = PowerCutFiles(cut_before_step=cut_after)
    try:
        _open(files).close()
    except MeshError as exc:
        assert files.is_cut
        assert not isinstance(exc, IntegrityError)
    after = _open(files.survivor(seed))
    after.begin_incarnation(b"i" * 16)
    after.close()
