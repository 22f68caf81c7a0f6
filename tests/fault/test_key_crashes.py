"""Kills at every durable step of drawing and redeeming: nothing acknowledged is lost, nothing comes twice.

The child process holds three whole nodes and dies by SIGKILL inside one of their stores; then all three
start again here (protocol 3.5, 4.4 to 4.6; words as in the contract: a redeem whose answer was cut is
indeterminate). Source crash after hand-out and target crash between append and confirm are among them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.errors import CallerError, ErrorReason, MeshError
from tests.fakes.key_network import LINE, REFILLED, KeyNetwork

CASES = [
    *(("commit.before", count) for count in (9, 14, 21)),
    *(("commit.after", count) for count in (8, 10, 15, 17, 22, 40)),
    ("proof.before", 4),
    ("proof.after", 4),
    ("pads.create.before_sync", 2),
    ("pads.create.after", 3),
    ("pads.wipe.after", 4),
]


def run_child(root: Path, failpoint: str) -> tuple[dict[str, str], dict[str, str]]:
    """Runs until the failpoint kills it; returns what was drawn and what was redeemed."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.fakes.key_crash_child", str(root)],
        env={**os.environ, "KEYMESH_FAILPOINT": failpoint},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == -9, child.stderr
    facts: dict[str, dict[str, str]] = {"drawn": {}, "redeemed": {}}
    for line in child.stdout.splitlines():
        event, key_id, *value = line.split()
        if value:
            facts[event][key_id] = value[0]
    return facts["drawn"], facts["redeemed"]


@pytest.mark.slow
@pytest.mark.parametrize(("failpoint", "count"), CASES)
async def test_kill_loses_and_doubles_nothing(tmp_path: Path, failpoint: str, count: int) -> None:
    drawn, redeemed = run_child(tmp_path, f"{failpoint}:{count}")
    network = KeyNetwork(tmp_path, LINE, config=REFILLED)
    await network.start()
    try:
        new = await network.get("sae-a", "sae-c", 100)
        assert not {key_id.hex() for key_id, _ in new.keys} & set(drawn)
        assert not {value.hex() for _, value in new.keys} & set(drawn.values())
        assert all(drawn[key_id] == value for key_id, value in redeemed.items())
        indeterminate = 0
        for key_id, value in drawn.items():
            try:
                got = await network.redeem("sae-c", "sae-a", [bytes.fromhex(key_id)])
            except MeshError as exc:
                assert isinstance(exc, CallerError)
                assert exc.reason == ErrorReason.UNKNOWN_KEY
                indeterminate += key_id not in redeemed
            else:
                assert key_id not in redeemed
                assert got.keys[0][1].hex() == value
        # Only the redeem that the kill cut may have happened without its answer.
        assert indeterminate <= 2
        ids = [key_id for key_id, _ in new.keys]
        assert (await network.redeem("sae-c", "sae-a", ids)).keys == new.keys
    finally:
        await network.stop()
