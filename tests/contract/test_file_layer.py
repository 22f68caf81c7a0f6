"""One suite for the real file layer and for the model whose power can be cut."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from mesh.store.files import FileLayer, OsFiles
from tests.power_cut_files import FullDiskFiles, PowerCutFiles

Layered = tuple[FileLayer, Path]


@pytest.fixture(params=[OsFiles, FullDiskFiles, PowerCutFiles])
def layered(request: pytest.FixtureRequest, tmp_path: Path) -> Layered:
    make: Callable[[], FileLayer] = request.param
    files = make()
    root = Path("/data") if isinstance(files, PowerCutFiles) else tmp_path / "data"
    files.make_dir(root)
    return files, root


def test_writes_are_read_back_and_short_only_at_the_end(layered: Layered) -> None:
    files, root = layered
    file = files.open(root / "a", create=True)
    file.pwrite(b"0123456789", 0)
    file.pwrite(memoryview(b"xy"), 12)
    assert file.pread(4, 3) == b"3456"
    assert file.pread(100, 8) == b"89\0\0xy"
    assert file.pread(5, 50) == b""
    assert file.size() == 14
    file.close()
    file.close()


def test_truncate_cuts_and_extends_with_zeros(layered: Layered) -> None:
    files, root = layered
    file = files.open(root / "a", create=True)
    file.pwrite(b"0123456789", 0)
    file.truncate(4)
    file.truncate(6)
    assert file.pread(10, 0) == b"0123\0\0"
    file.close()


def test_two_handles_see_the_same_file(layered: Layered) -> None:
    files, root = layered
    first, second = files.open(root / "a", create=True), files.open(root / "a")
    first.pwrite(b"abc", 0)
    first.sync()
    assert second.pread(3, 0) == b"abc"
    first.close()
    second.close()


def test_open_refuses_what_is_missing_and_exclusive_what_is_there(layered: Layered) -> None:
    files, root = layered
    with pytest.raises(FileNotFoundError):
        files.open(root / "a")
    files.open(root / "a", exclusive=True).close()
    with pytest.raises(FileExistsError):
        files.open(root / "a", exclusive=True)
    with pytest.raises(FileNotFoundError):
        files.open(root / "nowhere" / "a", create=True)


def test_rename_replaces_and_an_open_handle_follows(layered: Layered) -> None:
    files, root = layered
    for name in ("old", "new"):
        file = files.open(root / name, create=True)
        file.pwrite(name.encode(), 0)
        file.sync()
        file.close()
    handle = files.open(root / "new")
    files.rename(root / "new", root / "old")
    files.sync_dir(root)
    assert files.list_dir(root) == ["old"]
    reopened = files.open(root / "old")
    assert reopened.pread(3, 0) == handle.pread(3, 0) == b"new"
    handle.close()
    reopened.close()
    with pytest.raises(FileNotFoundError):
        files.rename(root / "new", root / "old")


def test_unlink_takes_the_name_away(layered: Layered) -> None:
    files, root = layered
    files.open(root / "a", create=True).close()
    assert files.exists(root / "a")
    files.unlink(root / "a")
    assert not files.exists(root / "a")
    with pytest.raises(FileNotFoundError):
        files.unlink(root / "a")


def test_directories_are_made_with_parents_and_listed(layered: Layered) -> None:
    files, root = layered
    files.make_dir(root / "deep" / "er")
    files.make_dir(root / "deep" / "er")
    files.open(root / "z", create=True).close()
    assert files.list_dir(root) == ["deep", "z"]
    assert files.list_dir(root / "deep") == ["er"]
    with pytest.raises(FileNotFoundError):
        files.list_dir(root / "none")
    with pytest.raises(OSError, match="directory") as refused:
        files.make_dir(root / "z")
    assert refused.value.errno in (errno.EEXIST, errno.ENOTDIR)


def test_the_lock_is_held_once_and_names_its_holder(layered: Layered) -> None:
    files, root = layered
    lock = files.lock(root / "LOCK", "4711\n")
    with pytest.raises(BlockingIOError) as refused:
        files.lock(root / "LOCK", "4712\n")
    assert refused.value.filename2 == "4711"
    lock.release()
    lock.release()
    files.lock(root / "LOCK", "4712\n").release()


def test_facts_about_the_place(layered: Layered) -> None:
    files, root = layered
    assert files.free_bytes(root) > 0
    assert files.real_path(root) == root.resolve()
    assert not files.is_tmpfs(root / "none")
