"""A few dozen lives of three whole nodes, each ended by SIGKILL: ``make kills`` has a thousand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.store.failpoints import ALL


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_kills_at_every_durable_step_lose_double_and_reuse_nothing(tmp_path: Path) -> None:
    """Keys, key_IDs, slots and pad bytes of all lives are held against each other."""
    command = [sys.executable, "-m", "tests.torture.lives", "--kills", "24", "--seed", "5"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "kills")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "kills" / "result.json").read_text())
    assert result["ok"]
    assert result["fetched"] > 20
    assert len(ALL & result["kills_by"].keys()) > len(ALL) // 2
