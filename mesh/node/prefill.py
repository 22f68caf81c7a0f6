"""Fill a link's lanes with given bytes, without devices: benchmarks, couriered material, labs.

Both ends must be given the same bytes in the same order, before they meet: nothing here asks
the other end. Each call adds one extent, durable when it returns (protocol 2.1 does the same
for blocks once both ends have them). Never fill a lane whose bytes somebody else may hold.
"""

from __future__ import annotations

from mesh.core.lane import ROOT_BYTES
from mesh.node.ports import Buffer
from mesh.store.store import Store
from mesh.store.tables import ExtentRow, ExtentState, Tables


async def prefill(store: Store, peer: str, data: Buffer, *, is_outbound: bool) -> None:
    """Append ``data`` to a lane of a node whose link plane is not running.

    Args:
        store: the node's.
        peer: KME id of the other end.
        data: at least 32 bytes for an empty lane: the first 32 become its root.
        is_outbound: whether this node writes the lane.

    Raises:
        CallerError: a file of that name is there already.
        UnavailableError: the disk is full.
    """
    lane = await store.commit(lambda tables: tables.lanes.put_lane(peer, is_outbound))
    start = store.read(
        lambda tables: max((extent.stop for extent in tables.extents.list(lane.lane_id)), default=0)
    )
    file = f"prefill-{lane.lane_id}-{lane.epoch}-{start}"
    await store.pads.create(file, data)

    def change(tables: Tables) -> None:
        tables.extents.put(ExtentRow(lane.lane_id, start, start + len(data), file, 0, ExtentState.USABLE))
        if start == 0:
            tables.lanes.set_root(lane.lane_id, bytes(data[:ROOT_BYTES]))

    await store.commit(change)
