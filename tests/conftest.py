"""What every test session shares: a private place for proofs of restarts, ports of its own, no haste."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mesh.lab.ground import PORTS_VARIABLE, lab_ports
from mesh.store import proof
from mesh.store.files import OsFiles

_SHM = Path("/dev/shm")
# Whole labs run beside the unit tests: how long one example takes says nothing of the code.
settings.register_profile("keymesh", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("keymesh")


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


@pytest.fixture(scope="session", autouse=True)
def own_ports() -> Iterator[None]:
    """Workers take ports from ranges of their own: a port is found some time before it is bound."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        yield
        return
    ports = lab_ports()
    share = len(ports) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    own = ports[int(worker.removeprefix("gw")) * share :][:share]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PORTS_VARIABLE, f"{own[0]}-{own[-1]}")
        yield
