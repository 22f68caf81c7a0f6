"""Kill a real process at every durable step of the store and look at what is left (house style 34)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from mesh.errors import CallerError
from mesh.store.failpoints import ALL, VARIABLE
from mesh.store.files import OsFiles
from mesh.store.store import Store
from tests.fault.store_child import PAD_BYTES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OsFiles().is_tmpfs(Path("/dev/shm")), reason="/dev/shm is not tmpfs"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def proof_dir() -> Iterator[Path]:
    path = Path(mkdtemp(dir="/dev/shm", prefix="keymesh-test-"))
    yield path
    shutil.rmtree(path)


def _run(data: Path, proof_dir: Path, failpoint: str) -> tuple[int, list[list[str]]]:
    environment = {**os.environ, VARIABLE: failpoint} if failpoint else os.environ
    done = subprocess.run(
        [sys.executable, "-m", "tests.fault.store_child", str(data), str(proof_dir)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(done.stderr)
    return done.returncode, [line.split() for line in done.stdout.splitlines()]


def _check(data: Path, proof_dir: Path, facts: list[list[str]]) -> None:
    promised = {
        word: [fact[1] for fact in facts if fact[0] == word] for word in ("mark", "used", "pad", "gone")
    }
    store = Store.open(data, kme_id="kme-a", proof_dir=proof_dir)
    try:
        lane = store.read(lambda t: t.lanes.lane("kme-b", True))
        mark = lane.mark if lane else 0
        assert mark >= max([0, *map(int, promised["mark"])])
        used = {
            slot
            for part in store.read(lambda t: t.slots.used_ranges(1))
            for slot in range(part.start, part.stop)
        }
        assert {int(slot) for slot in promised["used"]} <= used
        for slot in used:
            with pytest.raises(CallerError):
                store.commit_now(lambda t: t.slots.add_used(1, slot, slot + 1))  # noqa: B023 - runs at once
        rows = {row.file for row in store.read(lambda t: t.extents.list())}
        assert set(store.pads.list()) == rows
        # A removal may have been committed and not yet said: one pad at most.
        assert len(set(promised["pad"]) - set(promised["gone"]) - rows) <= 1
        assert not rows & set(promised["gone"])
        for name in rows:
            assert store.pads.read(name, 16, PAD_BYTES - 16) == name.encode().ljust(PAD_BYTES, b".")[16:]
        is_begun = ["begun"] in facts
        assert store.is_proven_restart or not is_begun
    finally:
        store.close()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", sorted(ALL))
def test_a_kill_at_any_step_loses_nothing_that_was_promised(
    tmp_path: Path, proof_dir: Path, name: str, count: int
) -> None:
    code, facts = _run(tmp_path / "data", proof_dir, f"{name}:{count}")
    assert code == -signal.SIGKILL or count > 1
    _check(tmp_path / "data", proof_dir, facts)
    code, facts = _run(tmp_path / "data", proof_dir, "")
    assert (code, facts[-1]) == (0, ["done"])
    _check(tmp_path / "data", proof_dir, facts)


def test_a_kill_is_a_proven_restart_and_a_lost_copy_is_not(tmp_path: Path, proof_dir: Path) -> None:
    code, facts = _run(tmp_path / "data", proof_dir, "commit.after:7")
    assert (code, facts[0]) == (-signal.SIGKILL, ["open", "0"])
    code, facts = _run(tmp_path / "data", proof_dir, "commit.before:5")
    assert (code, facts[0]) == (-signal.SIGKILL, ["open", "1"])
    next(proof_dir.glob("*.marks")).unlink()
    code, facts = _run(tmp_path / "data", proof_dir, "")
    assert (code, facts[0]) == (0, ["open", "0"])
