"""A process that draws and redeems keys over a line of nodes until a failpoint kills it.

Run as ``python -m tests.fakes.key_crash_child ROOT``. Every line of output is one fact that the
outside world learnt: ``drawn ID KEY`` and ``redeemed ID KEY``, flushed before the next step.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.fakes.key_network import LINE, REFILLED, KeyNetwork

ROUNDS = 40


def tell(event: str, keys: list[tuple[bytes, bytes]]) -> None:
    """Says what was answered."""
    for key_id, value in keys:
        sys.stdout.write(f"{event} {key_id.hex()} {value.hex()}\n")
    sys.stdout.flush()


async def main(root: Path) -> None:
    """Draws three keys a round, redeems one of them, until killed or done."""
    network = KeyNetwork(root, LINE, config=REFILLED)
    await network.start()
    for _ in range(ROUNDS):
        drawn = await network.get("sae-a", "sae-c", 3)
        tell("drawn", drawn.keys)
        more = await network.get("sae-a", "sae-c", 1, more=["sae-c2"])
        tell("drawn", more.keys)
        tell("redeemed", (await network.redeem("sae-c", "sae-a", [drawn.keys[0][0], more.keys[0][0]])).keys)
    await network.stop()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
