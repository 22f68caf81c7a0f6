"""Both ends of a link in one process, to be killed at a failpoint: ``link_kill_site.py DIR PROOF SECONDS``.

Sends shares both ways as fast as it may and writes the pad audit of both ends to DIR.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mesh.errors import MeshError
from mesh.node.pad_recorder import JsonlPadRecorder
from tests.fakes.link_sites import DevicePair, Pair, Site, send_share


async def _talk(site: Site, goes_on: Callable[[], bool]) -> None:
    while goes_on():
        try:
            await send_share(site, bytes(1000), timeout_s=0.2)
        except MeshError:
            await asyncio.sleep(0.01)


async def main(root: Path, proof: Path, seconds: float) -> None:
    """Run both ends for so long, with a restart of the link every now and then.

    Until a share has come both ways it goes on, for 30 s at most.
    """
    pair = Pair(root, proof=proof, devices=DevicePair(8 << 20, seed=time.monotonic_ns()))
    pair.uses_a = JsonlPadRecorder(root / "a.jsonl", "kme-a")  # type: ignore[assignment]
    pair.uses_b = JsonlPadRecorder(root / "b.jsonl", "kme-b")  # type: ignore[assignment]
    await pair.start()
    began_s = time.monotonic()

    def goes_on() -> bool:
        has_talked = pair.a.shares.got and pair.b.shares.got
        return time.monotonic() - began_s < (seconds if has_talked else 30)

    async with asyncio.TaskGroup() as group:
        group.create_task(_talk(pair.a, goes_on))
        group.create_task(_talk(pair.b, goes_on))
        while goes_on():
            await asyncio.sleep(seconds / 4)
            pair.wire.cut()
    print(len(pair.a.shares.got), len(pair.b.shares.got))
    await pair.stop()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])))
