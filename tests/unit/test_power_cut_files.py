"""What the power-cut model may lose, and what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.power_cut_files import TMPFS, PowerCutError, PowerCutFiles

ROOT = Path("/data")


def _made() -> PowerCutFiles:
    files = PowerCutFiles()
    files.make_dir(ROOT)
    return files


def _contents(files: PowerCutFiles, path: Path) -> bytes | None:
    return files.open(path).pread(10_000, 0) if files.exists(path) else None


def test_synced_bytes_under_a_synced_name_survive_every_cut() -> None:
    files = _made()
    file = files.open(ROOT / "a", create=True)
    file.pwrite(b"kept", 0)
    file.sync()
    files.sync_dir(ROOT)
    assert {_contents(files.survivor(seed), ROOT / "a") for seed in range(20)} == {b"kept"}


def test_an_unsynced_name_may_be_lost_or_kept() -> None:
    files = _made()
    file = files.open(ROOT / "a", create=True)
    file.pwrite(b"kept", 0)
    file.sync()
    assert {_contents(files.survivor(seed), ROOT / "a") for seed in range(30)} == {None, b"kept"}


def test_an_unsynced_rename_leaves_old_or_new_never_a_mixture() -> None:
    files = _made()
    for name in ("mark", "new"):
        file = files.open(ROOT / name, create=True)
        file.pwrite(name.encode(), 0)
        file.sync()
    files.sync_dir(ROOT)
    files.rename(ROOT / "new", ROOT / "mark")
    assert {_contents(files.survivor(seed), ROOT / "mark") for seed in range(30)} == {b"mark", b"new"}


def test_unsynced_writes_tear_at_sectors_only() -> None:
    files = _made()
    file = files.open(ROOT / "a", create=True)
    file.pwrite(b"o" * 1536, 0)
    file.sync()
    files.sync_dir(ROOT)
    file.pwrite(b"N" * 1536, 0)
    outcomes = {_contents(files.survivor(seed), ROOT / "a") for seed in range(200)}
    assert len(outcomes) == 8
    for outcome in outcomes:
        assert outcome is not None
        assert all(len(set(outcome[start : start + 512])) == 1 for start in (0, 512, 1024))


def test_tmpfs_dies_with_the_machine_and_not_with_the_process() -> None:
    files = _made()
    file = files.open(TMPFS / "copy", create=True)
    file.pwrite(b"marks", 0)
    file.sync()
    files.sync_dir(TMPFS)
    files.kill()
    assert _contents(files, TMPFS / "copy") == b"marks"
    assert _contents(files.survivor(1), TMPFS / "copy") is None


def test_the_cut_comes_before_its_step_and_lasts() -> None:
    files = _made()
    file = files.open(ROOT / "a", create=True)
    files.cut_before_step = files.steps + 1
    file.pwrite(b"one", 0)
    with pytest.raises(PowerCutError):
        file.pwrite(b"two", 0)
    with pytest.raises(PowerCutError):
        file.pread(1, 0)
