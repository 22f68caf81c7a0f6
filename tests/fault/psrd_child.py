"""The process that ``test_psrd_kills`` kills: one issue at a hub, one import at its client.

``python -m tests.fault.psrd_child ROOT`` carries on from whatever an earlier life left: a table
that waits with its courier is imported, else one is issued first.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from mesh.errors import CallerError
from mesh.hub.config import load_hub_config
from mesh.node import psrd_rows
from mesh.node.config import load_node_config
from mesh.node.psrd_courier import ImportOrder, IssueOrder, wipe_courier
from mesh.node.psrd_offline import import_offline, issue_offline

TABLE = 20_000


async def supply(root: Path) -> None:
    """Issue unless a courier is there, import, wipe."""
    psrd_rows.PIECE_BYTES = 8192
    hub, client = load_hub_config(root / "hub-1.yaml")[1], load_node_config(root / "kme-a.yaml")
    path = root / "one.psrd"
    if not path.exists():
        try:
            await issue_offline(hub, "kme-a", IssueOrder(TABLE, TABLE, path))
        except CallerError as error:
            # Opening the hub's directory gave an issue that was cut short its courier file.
            if "exists already" not in error.message:
                raise
    try:
        await import_offline(client, "hub-1", ImportOrder(path, wipe=True))
    except CallerError as error:
        # The last: it was wiped, and the kill came before its name went.
        if "imported already" not in error.message and "version" not in error.message:
            raise
        wipe_courier(path)


if __name__ == "__main__":
    asyncio.run(supply(Path(sys.argv[1])))
