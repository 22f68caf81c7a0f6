"""The store: group commit, savepoints, a full disk, damage, the lock, file modes."""

from __future__ import annotations

import asyncio
import functools
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from mesh.cli import build_parser
from mesh.errors import CallerError, ConfigError, ErrorReason, IntegrityError, ShortageError, UnavailableError
from mesh.store import failpoints, schema
from mesh.store.files import File, OsFile, OsFiles
from mesh.store.store import MAX_BATCH, MAX_QUEUED, Store
from mesh.store.tables import ExtentRow, Tables
from tests.power_cut_files import FullDiskFiles, PowerCutFiles

NOWHERE = Path("/nowhere")


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[[], Store]]:
    opened: list[Store] = []

    def open_one(kme_id: str = "kme-a") -> Store:
        opened.append(Store.open(tmp_path / "data", kme_id=kme_id, proof_dir=NOWHERE))
        return opened[-1]

    yield open_one
    failpoints.disarm_all()
    for store in opened:
        store.close()


def _used(slot: int) -> Callable[[Tables], None]:
    return lambda t: t.slots.add_used(1, slot, slot + 1)


def _note(order: list[int], number: int, future: asyncio.Future[int]) -> None:
    assert future.done()
    order.append(number)


def _count_commits() -> list[str]:
    commits: list[str] = []
    failpoints.arm("commit.before", lambda: commits.append("commit"))
    return commits


def test_a_new_directory_is_private_and_remembers_whose_it_is(
    open_store: Callable[..., Store], tmp_path: Path
) -> None:
    previous = os.umask(0)
    try:
        store = open_store()
        store.begin_incarnation(b"i" * 16)
        store.pads.create_now("pad", b"p")
    finally:
        os.umask(previous)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "data").rglob("*")}
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert (store.is_new, store.is_proven_restart) == (True, False)
    store.close()
    store.close()
    again = open_store()
    assert again.is_new is False
    again.close()
    with pytest.raises(ConfigError) as refused:
        open_store("kme-b")
    assert refused.value.facts["kme_id"] == "kme-a"


def test_a_wide_open_directory_is_tightened(open_store: Callable[[], Store], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    open_store()
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


async def test_a_failing_change_is_undone_alone(open_store: Callable[[], Store]) -> None:
    store = open_store()

    def bad(tables: Tables) -> None:
        tables.slots.add_used(1, 10, 11)
        tables.slots.add_used(1, 0, 1)

    futures = [
        store.commit_soon(lambda t: t.slots.add_used(1, 0, 1)),
        store.commit_soon(bad),
        store.commit_soon(lambda t: t.slots.add_used(1, 20, 21)),
    ]
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert outcomes[0] is None
    assert isinstance(outcomes[1], CallerError)
    assert outcomes[2] is None
    assert [part.start for part in store.read(lambda t: t.slots.used_ranges(1))] == [0, 20]


async def test_a_programming_error_reaches_its_caller_only(open_store: Callable[[], Store]) -> None:
    store = open_store()
    good = store.commit_soon(lambda t: t.meta.next_serial("good"))
    with pytest.raises(ZeroDivisionError):
        await store.commit(lambda t: t.meta.next_serial("bad") // 0)
    assert await good == 1
    assert store.read(lambda t: t.meta.serial("bad")) == 0
    with pytest.raises(RuntimeError, match="uses its tables"):
        await store.commit(lambda t: store.read(lambda u: u.meta.serial("good")))


async def test_waiting_changes_share_one_commit_and_resolve_in_order(open_store: Callable[[], Store]) -> None:
    store = open_store()
    commits = _count_commits()
    order: list[int] = []
    futures = []
    for number in range(100):
        future = store.commit_soon(lambda t: t.meta.next_serial("n"))
        future.add_done_callback(functools.partial(_note, order, number))
        futures.append(future)
    assert await asyncio.gather(*futures) == list(range(1, 101))
    assert order == list(range(100))
    assert len(commits) == 1
    many = [store.commit_soon(lambda t: t.meta.next_serial("n")) for _ in range(3 * MAX_BATCH)]
    await asyncio.gather(*many)
    assert len(commits) == 4


async def test_changes_made_during_a_commit_follow_in_the_next(open_store: Callable[[], Store]) -> None:
    store = open_store()
    commits = _count_commits()

    async def client(rounds: int) -> None:
        for _ in range(rounds):
            await store.commit(lambda t: t.meta.next_serial("n"))

    await asyncio.gather(*(client(10) for _ in range(20)))
    assert store.read(lambda t: t.meta.serial("n")) == 200
    assert len(commits) <= 20


async def test_nothing_is_reported_before_it_is_durable(open_store: Callable[[], Store]) -> None:
    store = open_store()
    states: list[bool] = []
    future = store.commit_soon(lambda t: t.meta.next_serial("n"))
    failpoints.arm("commit.before", lambda: states.append(future.done()))
    failpoints.arm("commit.after", lambda: states.append(future.done()))
    await future
    assert states == [False, False]


async def test_a_cancelled_caller_does_not_undo_its_change(open_store: Callable[[], Store]) -> None:
    store = open_store()
    task = asyncio.create_task(store.commit(lambda t: t.meta.next_serial("n")))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await store.drain()
    assert store.read(lambda t: t.meta.serial("n")) == 1


async def test_the_queue_is_bounded_and_a_full_one_still_drains(open_store: Callable[[], Store]) -> None:
    store = open_store()
    futures = [store.commit_soon(lambda t: None) for _ in range(MAX_QUEUED)]
    with pytest.raises(ShortageError) as refused:
        store.commit_soon(lambda t: None)
    assert refused.value.reason is ErrorReason.BUSY
    await store.aclose()
    assert all(future.done() and future.exception() is None for future in futures)


async def test_a_closed_store_refuses_and_says_so(open_store: Callable[[], Store]) -> None:
    store = open_store()
    first = store.commit_soon(lambda t: t.meta.next_serial("n"))
    await asyncio.sleep(0)
    second = store.commit_soon(lambda t: t.meta.next_serial("n"))
    store.close()
    assert await first == 1
    for attempt in (second, store.commit(lambda t: t.meta.next_serial("n"))):
        with pytest.raises(UnavailableError) as refused:
            await attempt
        assert refused.value.reason is ErrorReason.SHUTTING_DOWN
    await store.aclose()
    with pytest.raises(UnavailableError):
        store.read(lambda t: None)
    assert open_store().read(lambda t: t.meta.serial("n")) == 1


async def test_a_full_disk_fails_the_batch_and_the_store_goes_on_afterwards(tmp_path: Path) -> None:
    files = FullDiskFiles()
    store = Store.open(tmp_path / "data", kme_id="kme-a", files=files, proof_dir=NOWHERE)
    try:
        await store.commit(lambda t: t.slots.add_used(1, 0, 1))
        for fault in ("is_full", "is_failing"):
            setattr(files, fault, True)
            futures = [store.commit_soon(_used(slot)) for slot in (10, 20)]
            for outcome in await asyncio.gather(*futures, return_exceptions=True):
                assert isinstance(outcome, UnavailableError)
                assert outcome.reason is ErrorReason.DISK_FULL
                assert outcome.retry_after_s > 0
            with pytest.raises(UnavailableError) as refused:
                await store.pads.create("pad", b"p" * 100)
            assert refused.value.reason is ErrorReason.DISK_FULL
            assert store.pads.list() == []
            setattr(files, fault, False)
            assert [part.start for part in store.read(lambda t: t.slots.used_ranges(1))] == [0]
            await store.pads.create("pad", b"p" * 100)
            await store.pads.remove("pad")
        await store.commit(lambda t: t.slots.add_used(1, 10, 11))
    finally:
        await store.aclose()
    again = Store.open(tmp_path / "data", kme_id="kme-a", files=files, proof_dir=NOWHERE)
    assert [part.start for part in again.read(lambda t: t.slots.used_ranges(1))] == [0, 10]
    again.close()


def test_a_full_disk_at_start_is_a_clear_error_and_lets_go_of_the_lock(tmp_path: Path) -> None:
    files = FullDiskFiles()
    files.is_full = True
    with pytest.raises(UnavailableError) as refused:
        Store.open(tmp_path / "data", kme_id="kme-a", files=files, proof_dir=NOWHERE)
    assert refused.value.reason is ErrorReason.DISK_FULL
    files.is_full = False
    Store.open(tmp_path / "data", kme_id="kme-a", files=files, proof_dir=NOWHERE).close()


@pytest.mark.slow
def test_a_second_process_is_refused_and_told_who_holds_the_directory(
    open_store: Callable[[], Store], tmp_path: Path
) -> None:
    open_store()
    program = (
        "import sys; from pathlib import Path; from mesh.store.store import Store\n"
        "from mesh.errors import MeshError\n"
        "try: Store.open(Path(sys.argv[1]), kme_id='kme-a')\n"
        "except MeshError as exc: print(exc.reason, exc.facts['pid'], exc.facts['path'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "data")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["already-running", str(os.getpid()), str(tmp_path / "data")]


def _damage_header(data: Path) -> None:
    (data / "state.db").write_bytes(b"not a database" * 1000)


def _truncate_half(data: Path) -> None:
    content = (data / "state.db").read_bytes()
    (data / "state.db").write_bytes(content[: len(content) // 2 // 4096 * 4096])


def _empty(data: Path) -> None:
    (data / "state.db").write_bytes(b"")


def _remove(data: Path) -> None:
    (data / "state.db").unlink()


def _scribble(data: Path) -> None:
    content = bytearray((data / "state.db").read_bytes())
    for page in range(1, len(content) // 4096):
        content[page * 4096 : page * 4096 + 64] = os.urandom(64)
    (data / "state.db").write_bytes(content)


def _other_program(data: Path) -> None:
    (data / "state.db").unlink()
    database = apsw.Connection(str(data / "state.db"))
    database.execute("CREATE TABLE other (name TEXT)")
    database.close()


def _forget_owner(data: Path) -> None:
    database = apsw.Connection(str(data / "state.db"))
    database.execute("DELETE FROM meta")
    database.close()


def _lose_pad(data: Path) -> None:
    (data / "pads" / "pad").unlink()


def _shorten_pad(data: Path) -> None:
    (data / "pads" / "pad").write_bytes(b"p")


def _lose_format(data: Path) -> None:
    (data / "FORMAT").unlink()


def _scribble_format(data: Path) -> None:
    (data / "FORMAT").write_bytes(b"\0\0\0")


@pytest.mark.parametrize(
    "damage",
    [
        _damage_header,
        _truncate_half,
        _empty,
        _remove,
        _scribble,
        _other_program,
        _forget_owner,
        _lose_pad,
        _shorten_pad,
        _lose_format,
        _scribble_format,
    ],
)
def test_damage_is_refused_with_the_operators_next_step(
    open_store: Callable[[], Store], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    store = open_store()
    store.pads.create_now("pad", b"p" * 164)
    lane = store.commit_now(lambda t: t.lanes.put_lane("kme-b", True))
    store.commit_now(lambda t: t.extents.put(ExtentRow(lane.lane_id, 0, 100, "pad", 64)))
    store.close()
    damage(tmp_path / "data")
    with pytest.raises(IntegrityError) as refused:
        open_store()
    assert refused.value.reason is ErrorReason.STATE_CORRUPT
    command = re.search(r"\(keymesh (.*)\)", refused.value.message)
    assert command is not None
    assert build_parser("links").parse_args(command[1].split()).peer == "PEER"
    assert str(tmp_path) in str(refused.value.facts["path"])


def test_a_newer_release_is_refused(open_store: Callable[[], Store], tmp_path: Path) -> None:
    open_store().close()
    database = apsw.Connection(str(tmp_path / "data" / "state.db"))
    database.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    database.close()
    with pytest.raises(ConfigError, match="newer release") as refused:
        open_store()
    assert refused.value.facts["version"] == schema.VERSION + 1
    (tmp_path / "data" / "FORMAT").write_bytes(b"keymesh-data 2\n")
    with pytest.raises(ConfigError, match="newer release"):
        open_store()


def test_a_directory_that_is_not_ours_is_left_alone(open_store: Callable[[], Store], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError) as refused:
        open_store()
    assert refused.value.facts["found"] == "thesis.txt"
    assert (tmp_path / "data" / "thesis.txt").read_text() == "precious"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        Store.open(tmp_path / "file", kme_id="kme-a")


def test_a_store_that_was_never_finished_is_made_again(
    open_store: Callable[[], Store], tmp_path: Path
) -> None:
    (tmp_path / "data" / "pads").mkdir(parents=True)
    (tmp_path / "data" / "state.db").write_bytes(b"half")
    assert open_store().is_new


def test_files_that_no_row_names_are_removed_at_start(open_store: Callable[[], Store]) -> None:
    store = open_store()
    store.pads.create_now("left-over", b"secret")
    store.reserve_files.create_now("left-over", b"secret")
    store.close()
    store = open_store()
    assert (store.pads.list(), store.reserve_files.list()) == ([], [])


class _HeldFile(OsFile):
    """A file whose sync waits for the test."""

    gate = threading.Event()

    def sync(self) -> None:
        """Waits, then syncs."""
        assert self.gate.wait(10)
        super().sync()


class _HeldFiles(OsFiles):
    """A disk that is slow to sync, once ``is_slow``."""

    is_slow = False

    def open(self, path: Path, *, create: bool = False, exclusive: bool = False) -> File:
        """Open; slow files wait in sync."""
        file = super().open(path, create=create, exclusive=exclusive)
        assert isinstance(file, OsFile)
        return _HeldFile(file.detach()) if self.is_slow else file


async def test_a_disk_that_is_slow_to_sync_holds_up_no_reader_and_no_new_file(tmp_path: Path) -> None:
    files = _HeldFiles()
    store = Store.open(tmp_path / "data", kme_id="kme-a", proof_dir=NOWHERE, files=files)
    await store.pads.create("old", bytes(100_000))
    await store.pads.create("other", b"pads")
    files.is_slow = True
    removals = asyncio.gather(*(store.pads.remove(name) for name in ("old", "gone")))
    await asyncio.sleep(0.05)
    assert not removals.done()
    files.is_slow = False
    assert store.pads.read("other", 0, 4) == b"pads"
    store.pads.wipe("other", 0, 2)
    await store.pads.create("new", b"x")
    assert not removals.done()
    _HeldFile.gate.set()
    await removals
    assert store.pads.list() == ["new", "other"]
    store.close()


async def test_pad_files_are_written_once_read_wiped_and_removed(open_store: Callable[[], Store]) -> None:
    store = open_store()
    data = os.urandom(3_000_000)
    await store.pads.create("pad", memoryview(data))
    with pytest.raises(CallerError):
        await store.pads.create("pad", b"other")
    for name in ("", "../pad", "a/b", ".hidden", "x" * 129):
        with pytest.raises(CallerError):
            await store.pads.create(name, b"")
    assert store.pads.read("pad", 1000, 32) == data[1000:1032]
    store.pads.wipe("pad", 10, 2_500_000)
    assert store.pads.read("pad", 0, 20) == data[:10] + bytes(10)
    assert store.pads.read("pad", 2_500_005, 10) == bytes(5) + data[2_500_010:2_500_015]
    store.pads.wipe("pad", 2_999_990, 1000)
    assert store.pads.size("pad") == len(data)
    with pytest.raises(IntegrityError):
        store.pads.read("pad", len(data) - 1, 2)
    await asyncio.gather(store.pads.remove("pad"), store.pads.remove("pad", "none"), store.pads.remove())
    assert store.pads.list() == []
    store.pads.wipe("pad", 0, 10)
    with pytest.raises(IntegrityError):
        store.pads.read("pad", 0, 1)
    await store.pads.create("pad", b"new")
    assert store.pads.read("pad", 0, 3) == b"new"
    assert store.pads.free_bytes() > 0


def test_more_pad_files_than_descriptors_are_kept(open_store: Callable[[], Store]) -> None:
    store = open_store()
    for number in range(200):
        store.pads.create_now(f"pad-{number}", number.to_bytes(2, "big"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(200):
        assert store.pads.read(f"pad-{number}", 0, 2) == number.to_bytes(2, "big")
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 128


def test_deleted_secrets_are_not_left_in_the_database_file(
    open_store: Callable[[], Store], tmp_path: Path
) -> None:
    store = open_store()
    secret = os.urandom(32)
    store.commit_now(lambda t: t.meta.put("canary", secret))
    store.close()
    assert secret in (tmp_path / "data" / "state.db").read_bytes()
    store = open_store()
    store.commit_now(lambda t: t.meta.put("canary", b""))
    store.close()
    everything = b"".join(path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert secret not in everything


def test_unknown_failpoints_are_refused() -> None:
    with pytest.raises(ConfigError):
        failpoints.arm("commit.befor", lambda: None)
    for text in ("nonsense", "commit.before:0", "commit.before:x"):
        with pytest.raises(ConfigError):
            failpoints._parse(text)
    assert failpoints._parse("commit.before") == ("commit.before", 1)
    assert failpoints._parse("commit.after:3") == ("commit.after", 3)


def test_the_store_runs_on_the_power_cut_model_too() -> None:
    files = PowerCutFiles()
    store = Store.open(Path("/data"), kme_id="kme-a", files=files)
    store.commit_now(lambda t: t.meta.next_serial("n"))
    store.close()
    again = Store.open(Path("/data"), kme_id="kme-a", files=files)
    assert again.read(lambda t: t.meta.serial("n")) == 1
    again.close()
