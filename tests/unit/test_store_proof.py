"""The proof copy: a process restart is proven, everything else is not (protocol 1.10)."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from mesh.errors import UnavailableError
from mesh.store import failpoints
from mesh.store.files import OsFiles
from mesh.store.proof import ProofCopy
from mesh.store.store import Store
from mesh.store.tables import Tables
from tests.power_cut_files import TMPFS, PowerCutFiles

DATA = Path("/data")
_starts = itertools.count(1)


def _open(files: PowerCutFiles, path: Path = DATA) -> Store:
    return Store.open(path, kme_id="kme-a", files=files, proof_dir=TMPFS)


def _begin(store: Store) -> Store:
    store.begin_incarnation(next(_starts).to_bytes(16, "big"))
    return store


def _set_mark(store: Store, mark: int) -> None:
    def change(tables: Tables) -> None:
        tables.lanes.set_mark(tables.lanes.put_lane("kme-b", True).lane_id, mark)

    store.commit_now(change)


@pytest.fixture
def files() -> Iterator[PowerCutFiles]:
    yield PowerCutFiles()
    failpoints.disarm_all()


@pytest.fixture
def used(files: PowerCutFiles) -> PowerCutFiles:
    """A node that ran, moved a mark to 4096 and was closed."""
    store = _begin(_open(files))
    _set_mark(store, 4096)
    store.close()
    return files


def test_a_new_directory_is_new_and_not_proven(files: PowerCutFiles) -> None:
    store = _open(files)
    assert (store.is_new, store.is_proven_restart) == (True, False)
    store.close()


def test_a_process_restart_is_proven_again_and_again(used: PowerCutFiles) -> None:
    for _ in range(3):
        store = _open(used)
        assert store.is_proven_restart
        _set_mark(_begin(store), store.read(lambda t: t.lanes.list())[0].mark + 1)
        store.close()


def test_a_restart_without_an_incarnation_is_not_proven(files: PowerCutFiles) -> None:
    store = _open(files)
    _set_mark(store, 1)
    store.close()
    again = _open(files)
    assert not again.is_proven_restart
    again.close()


def test_a_killed_process_is_proven_after_the_kernel_dropped_its_lock(used: PowerCutFiles) -> None:
    store = _begin(_open(used))
    _set_mark(store, 8192)
    used.kill()
    again = _open(used)
    assert again.is_proven_restart
    assert again.read(lambda t: t.lanes.list())[0].mark == 8192
    again.close()


def test_a_power_cut_is_not_proven(used: PowerCutFiles) -> None:
    store = _open(used.survivor(1))
    assert not store.is_proven_restart
    assert store.read(lambda t: t.lanes.list())[0].mark == 4096
    store.close()


def test_a_missing_copy_is_not_proven(used: PowerCutFiles) -> None:
    used.restore(TMPFS, {})
    store = _open(used)
    assert not store.is_proven_restart
    store.close()


def test_a_garbled_copy_is_not_proven(used: PowerCutFiles) -> None:
    for text in (
        b"",
        b"{",
        b"[]",
        b'{"version":2}',
        b'{"version":1,"incarnation":"zz","marks":{}}',
        b"\xff\xfe",
    ):
        used.restore(TMPFS, dict.fromkeys(used.copy_of(TMPFS), text))
        store = _open(used)
        assert not store.is_proven_restart
        store.close()


def test_a_restored_snapshot_is_not_proven(used: PowerCutFiles) -> None:
    snapshot = used.copy_of(DATA)
    store = _open(used)
    _set_mark(store, 5000)
    store.close()
    used.restore(DATA, snapshot)
    restored = _open(used)
    assert not restored.is_proven_restart
    assert restored.read(lambda t: t.lanes.list())[0].mark == 4096
    restored.close()


def test_a_snapshot_of_an_earlier_incarnation_is_not_proven(used: PowerCutFiles) -> None:
    snapshot = used.copy_of(DATA)
    _begin(_open(used)).close()
    used.restore(DATA, snapshot)
    restored = _open(used)
    assert not restored.is_proven_restart
    restored.close()


def test_a_snapshot_without_a_lane_of_the_copy_is_not_proven(files: PowerCutFiles) -> None:
    store = _begin(_open(files))
    store.close()
    snapshot = files.copy_of(DATA)
    store = _open(files)
    _set_mark(store, 0)
    store.close()
    files.restore(DATA, snapshot)
    restored = _open(files)
    assert not restored.is_proven_restart
    restored.close()


def test_a_copied_directory_is_not_proven(used: PowerCutFiles) -> None:
    clone = Path("/clone")
    used.make_dir(clone / "pads")
    used.make_dir(clone / "reserves")
    used.restore(clone, {clone / path.relative_to(DATA): data for path, data in used.copy_of(DATA).items()})
    store = _open(used, clone)
    assert not store.is_proven_restart
    store.close()


def test_an_unproven_start_stays_unproven_until_its_lanes_are_settled(used: PowerCutFiles) -> None:
    """A crash right after an unproven start must not launder it into a proven one."""
    used.restore(TMPFS, {})
    _begin(_open(used)).close()
    store = _begin(_open(used))
    assert not store.is_proven_restart
    store.commit_now(lambda t: t.lanes.settle(t.lanes.list()[0].lane_id))
    store.close()
    settled = _open(used)
    assert settled.is_proven_restart
    settled.close()


def test_a_new_lane_epoch_counts_as_higher(used: PowerCutFiles) -> None:
    store = _open(used)
    store.commit_now(lambda t: t.lanes.reset_lane("kme-b", True, 2))
    store.close()
    store = _open(used)
    assert store.is_proven_restart
    assert store.read(lambda t: t.lanes.list())[0].mark == 0
    store.close()


def test_assign_and_draw_marks_are_in_the_copy(used: PowerCutFiles) -> None:
    store = _open(used)
    reserve = store.commit_now(lambda t: t.reserves.open("kme-a", "kme-b", 0, "g", is_outbound=True))
    store.commit_now(lambda t: t.reserves.set_assign_mark(reserve.reserve_id, 64))
    store.close()
    snapshot = used.copy_of(DATA)
    store = _open(used)
    assert store.is_proven_restart
    store.commit_now(lambda t: t.reserves.set_draw_mark(reserve.reserve_id, 1))
    store.close()
    used.restore(DATA, snapshot)
    restored = _open(used)
    assert not restored.is_proven_restart
    restored.close()


def test_a_deleted_reserve_leaves_the_copy(used: PowerCutFiles) -> None:
    store = _open(used)
    reserve = store.commit_now(lambda t: t.reserves.open("kme-a", "kme-b", 0, "g", is_outbound=True))
    store.commit_now(lambda t: t.reserves.set_assign_mark(reserve.reserve_id, 64))
    store.commit_now(lambda t: t.reserves.close(reserve.reserve_id))
    store.commit_now(lambda t: t.reserves.delete(reserve.reserve_id))
    store.close()
    store = _open(used)
    assert store.is_proven_restart
    store.close()


def test_a_rolled_back_change_does_not_reach_the_copy(used: PowerCutFiles) -> None:
    store = _open(used)

    def bad(tables: Tables) -> None:
        tables.lanes.set_mark(1, 9000)
        tables.lanes.set_mark(1, 0)

    with pytest.raises(Exception, match="never falls"):
        store.commit_now(bad)
    store.close()
    store = _open(used)
    assert store.is_proven_restart
    store.close()


async def test_the_copy_is_written_after_the_disk_and_before_the_caller_knows(used: PowerCutFiles) -> None:
    store = _open(used)
    steps: list[tuple[str, bool]] = []
    failpoints.arm("commit.after", lambda: steps.append(("commit.after", future.done())))
    failpoints.arm("proof.before", lambda: steps.append(("proof.before", future.done())))
    failpoints.arm("proof.after", lambda: steps.append(("proof.after", future.done())))
    future = store.commit_soon(lambda t: t.lanes.set_mark(1, 5000))
    await future
    assert steps == [("commit.after", False), ("proof.before", False), ("proof.after", False)]
    steps.clear()
    await store.commit(lambda t: t.meta.next_serial("n"))
    assert [name for name, _ in steps] == ["commit.after"]
    store.close()


class _BrokenTmpfs(PowerCutFiles):
    """A tmpfs that is full; with ``is_stuck`` not even removals work."""

    is_full = False
    is_stuck = False

    def rename(self, source: Path, target: Path) -> None:
        if self.is_full and target.is_relative_to(TMPFS):
            raise OSError(28, "no space left on device")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        if self.is_stuck and path.is_relative_to(TMPFS):
            raise OSError(30, "read-only file system")
        super().unlink(path)


def test_a_copy_that_cannot_be_replaced_is_removed() -> None:
    files = _BrokenTmpfs()
    store = _begin(_open(files))
    files.is_full = True
    _set_mark(store, 1)
    assert [path.suffix for path in files.copy_of(TMPFS)] == [".new"]
    store.close()
    again = _open(files)
    assert not again.is_proven_restart
    again.commit_now(lambda t: t.lanes.settle(1))
    files.is_full = False
    _set_mark(again, 2)
    again.close()
    healed = _open(files)
    assert healed.is_proven_restart
    healed.close()


def test_marks_are_refused_if_an_old_copy_can_neither_be_replaced_nor_removed() -> None:
    files = _BrokenTmpfs()
    store = _begin(_open(files))
    files.is_full = files.is_stuck = True
    with pytest.raises(UnavailableError):
        _set_mark(store, 1)
    with pytest.raises(UnavailableError):
        _set_mark(store, 2)
    store.close()


def test_the_default_place_is_a_tmpfs_and_a_disk_is_refused(tmp_path: Path) -> None:
    files = OsFiles()
    copy = ProofCopy(tmp_path, files, None)
    assert copy.path is None or files.is_tmpfs(copy.path.parent)
    assert files.is_tmpfs(tmp_path) or ProofCopy(tmp_path, files, tmp_path).path is None
    assert ProofCopy(tmp_path, files, tmp_path / "none").path is None


@pytest.mark.skipif(not OsFiles().is_tmpfs(Path("/dev/shm")), reason="/dev/shm is not tmpfs")
def test_on_the_real_file_system_too(tmp_path: Path) -> None:
    proof_dir = Path(mkdtemp(dir="/dev/shm"))
    try:

        def restarted(path: Path) -> bool:
            store = Store.open(path, kme_id="kme-a", proof_dir=proof_dir)
            is_proven = store.is_proven_restart
            _set_mark(
                _begin(store), store.read(lambda t: max([0, *(lane.mark for lane in t.lanes.list())])) + 1
            )
            store.commit_now(lambda t: t.lanes.settle(1))
            store.close()
            return is_proven

        assert [restarted(tmp_path / "a") for _ in range(3)] == [False, True, True]
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        assert restarted(tmp_path / "b") is False
        assert restarted(tmp_path / "a") is True
        shutil.rmtree(tmp_path / "a")
        shutil.copytree(tmp_path / "b", tmp_path / "a")
        assert restarted(tmp_path / "a") is False
        (tmp_path / "link").symlink_to(tmp_path / "a")
        assert restarted(tmp_path / "link") is True
        next(proof_dir.glob("*.marks")).unlink()
        assert [restarted(tmp_path / name) for name in ("a", "b")].count(False) == 1
    finally:
        shutil.rmtree(proof_dir)
