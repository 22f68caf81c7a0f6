"""A process that writes to a store and says what it was promised, to be killed at a failpoint.

Run as ``python -m tests.fault.store_child DATA_DIR PROOF_DIR``. Each line on stdout
is a fact written after the store acknowledged it: the parent holds it to that.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mesh.store.store import Store
from mesh.store.tables import ExtentRow, Tables

ROUNDS = 6
PAD_BYTES = 4096


def say(*words: object) -> None:
    """One acknowledged fact, past any buffer of ours."""
    os.write(1, (" ".join(str(word) for word in words) + "\n").encode())


async def work(store: Store) -> None:
    """Move a mark, use slots, make and remove pad files, round after round."""

    def start(tables: Tables) -> tuple[int, int, int]:
        lane = tables.lanes.put_lane("kme-b", True)
        used = tables.slots.used_ranges(1)
        return lane.lane_id, lane.mark, used[-1].stop if used else 0

    lane_id, mark, slot = await store.commit(start)
    for number in range(ROUNDS):
        mark += 1000
        await store.commit(lambda t: t.lanes.set_mark(lane_id, mark))  # noqa: B023 - awaited at once
        say("mark", mark)
        batch = [store.commit_soon(_used(slot + 2 * index)) for index in range(5)]
        await asyncio.gather(*batch)
        for index in range(5):
            say("used", slot + 2 * index)
        slot += 10
        name = f"pad-{slot}"
        await store.pads.create(name, name.encode().ljust(PAD_BYTES, b"."))
        row = ExtentRow(lane_id, slot * PAD_BYTES, (slot + 1) * PAD_BYTES, name)
        await store.commit(lambda t: t.extents.put(row))  # noqa: B023 - awaited at once
        say("pad", name)
        if number % 2:
            files = await store.commit(lambda t: t.extents.delete(row.lane_id, row.start))  # noqa: B023 - at once
            say("gone", name)
            await store.pads.remove(*files)
        else:
            store.pads.wipe(name, 0, 16)


def _used(slot: int) -> Callable[[Tables], None]:
    return lambda tables: tables.slots.add_used(1, slot, slot + 1)


def main() -> None:
    """Open, begin, work until done or killed."""
    store = Store.open(Path(sys.argv[1]), kme_id="kme-a", proof_dir=Path(sys.argv[2]))
    say("open", int(store.is_proven_restart))
    store.begin_incarnation(os.urandom(16))
    say("begun")
    asyncio.run(work(store))
    say("done")


if __name__ == "__main__":
    main()
