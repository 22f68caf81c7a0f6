"""What every test session shares: a private place for proofs of restarts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.store import proof
from mesh.store.files import OsFiles

_SHM = Path("/dev/shm")


@pytest.fixture(scope="session", autouse=True)
def private_proofs() -> Iterator[Path]:
    """Stores opened without ``proof_dir`` leave their copies of the marks here, not in /run or /dev/shm."""
    on = _SHM if OsFiles().is_tmpfs(_SHM) else None
    with (
        tempfile.TemporaryDirectory(prefix="keymesh-tests-", dir=on) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(proof, "DEFAULT_DIRECTORIES", (Path(folder),))
        yield Path(folder)
