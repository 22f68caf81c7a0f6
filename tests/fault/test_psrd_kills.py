"""Kill a real process at every durable step of an issue and an import, then carry on (house style 34).

Whatever the step: after the next lives both ends hold the same tables at the same offsets, no
pad file is unnamed, no courier file is left, and no table is half there.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.hub.config import load_hub_config
from mesh.node.config import load_node_config
from mesh.node.psrd_offline import _tables
from mesh.node.psrd_rows import TableRecord
from mesh.store.failpoints import COURIER, VARIABLE
from mesh.store.store import Store
from tests.fakes.hub_network import HubNetwork
from tests.fault.psrd_child import TABLE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
#: The hub commits its id, its lanes, the table; so does the client. Each writes six pads.
STEPS = (
    *sorted(COURIER),
    "commit.before:3",
    "commit.after:3",
    "commit.before:6",
    "commit.after:6",
    "pads.create.before_sync:2",
    "pads.create.after:6",
    "pads.create.before_dir_sync:8",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of a hub and its client; the data directories are made by the tests."""
    root = tmp_path_factory.mktemp("psrd")
    HubNetwork(root, hubs=("hub-1",), grade="dske(1,1)")
    return root


def run(root: Path, failpoint: str = "") -> int:
    """One life of the child."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fault.psrd_child", str(root)],
        cwd=ROOT,
        env={**os.environ, VARIABLE: failpoint} if failpoint else os.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(done.stderr)
    return done.returncode


async def held(network_root: Path, one: str, peer: str) -> tuple[list[TableRecord], bytes, bytes]:
    """The tables of an end, and the bytes of its outbound and inbound lane."""
    path = network_root / f"{one}.yaml"
    config = load_hub_config(path)[1] if one.startswith("hub") else load_node_config(path)
    async with _tables(config, peer) as tables:
        lanes = tables._lanes
        return (
            tables.records(),
            lanes.tx.material.read(0, lanes.tx.lane.filled),
            lanes.rx.material.read(0, lanes.rx.lane.filled),
        )


def check_files(data: Path, kme_id: str) -> None:
    """Every pad file is named by a row."""
    store = Store.open(data, kme_id=kme_id)
    try:
        rows = {row.file for row in store.read(lambda tables: tables.extents.list())}
        assert set(store.pads.list()) == rows
    finally:
        store.close()


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_leaves_all_or_nothing(files: Path, tmp_path: Path, step: str) -> None:
    for one in ("hub-1", "kme-a"):
        shutil.copy(files / f"{one}.yaml", tmp_path)
    assert run(tmp_path, step) == -signal.SIGKILL
    for one in ("hub-1", "kme-a"):
        if (tmp_path / "data" / one).exists():
            check_files(tmp_path / "data" / one, one)
    run(tmp_path)
    hub_tables, hub_tx, hub_rx = asyncio.run(held(tmp_path, "hub-1", "kme-a"))
    client_tables, client_tx, client_rx = asyncio.run(held(tmp_path, "kme-a", "hub-1"))
    assert (hub_tx, hub_rx) == (client_rx, client_tx)
    assert len(hub_tx) % TABLE == 0
    assert hub_tx != hub_rx
    assert [one.table_id for one in hub_tables] == [one.table_id for one in client_tables]
    assert not list(tmp_path.glob("*.psrd*"))
