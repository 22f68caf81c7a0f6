"""Kill both ends of a link at every durable step; the pad audit must show no byte used twice.

House rule 34. The two ends die together, the hardest case for marks: nobody is left who knows more
than the disks. Each directory is then opened again, and must carry traffic.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from mesh.store.failpoints import ALL, VARIABLE
from tests.fakes.link_sites import proof_folder

_SITE = Path(__file__).with_name("link_kill_site.py")
#: A count far into the run, besides the first passage.
_COUNTS = {"commit.before": 60, "commit.after": 60, "proof.before": 25, "proof.after": 25}


async def run_site(root: Path, proof: Path, failpoint: str | None) -> tuple[int, str]:
    """Run the two ends; the exit code and what they printed."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if failpoint is not None:
        environment[VARIABLE] = failpoint
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(_SITE),
        str(root),
        str(proof),
        "0.5",
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 90)
    assert process.returncode in (0, -signal.SIGKILL), err.decode()
    return process.returncode, out.decode()


def audit(root: Path) -> int:
    """Check every line of both ends; the number of outbound ranges."""
    ranges: dict[tuple[str, bool, int], list[tuple[int, int]]] = defaultdict(list)
    for name in ("a.jsonl", "b.jsonl"):
        for line in (root / name).read_text().splitlines():
            one = json.loads(line)
            ranges[one["kme"], one["outbound"], one["epoch"]].append((one["start"], one["stop"]))
    for key, used in ranges.items():
        used.sort()
        for (_, stop), (start, _) in pairwise(used):
            assert stop <= start, f"{key}: bytes at {start} used twice"
    for (kme, is_outbound, epoch), used in ranges.items():
        if not is_outbound:
            other = "kme-b" if kme == "kme-a" else "kme-a"
            assert set(used) <= set(ranges[other, True, epoch]), "accepted what was never written"
    return sum(len(used) for (_, is_outbound, _), used in ranges.items() if is_outbound)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ALL))
async def test_a_kill_at_every_durable_step_reuses_nothing(name: str, tmp_path: Path) -> None:
    """1.1: marks are on disk before use, whatever step the power button interrupts."""
    with proof_folder() as proof:
        if proof is None:
            pytest.skip("no tmpfs on this machine")
        for failpoint in (f"{name}:1", f"{name}:{_COUNTS.get(name, 3)}"):
            await run_site(tmp_path, proof, failpoint)
        code, out = await run_site(tmp_path, proof, None)
        assert code == 0
        assert all(int(count) > 0 for count in out.split())
        assert audit(tmp_path) > 0
