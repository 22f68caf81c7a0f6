"""When a pair of sites has nothing left to do by itself, so that a test may count what it does to them.

Silence on the wire is no sign of that: on a busy machine a disk may take longer than anybody's patience.
"""

from __future__ import annotations

import asyncio

from mesh.node.ingest import BlockFollower, BlockLeader, Ingest
from tests.fakes.link_sites import FAST_INGEST, DevicePair, Site

_LIMIT_S = 60.0


async def until_still(a: Site, b: Site, devices: DevicePair) -> None:
    """Waits until the devices' key is in the lanes, both ends agree on them and nothing is under way."""
    seen = 0
    async with asyncio.timeout(_LIMIT_S):
        while seen < 2:
            is_fed = devices.budget_bytes < FAST_INGEST.gather_bytes
            is_still = is_fed and _agree(a, b) and _agree(b, a) and _is_idle(a) and _is_idle(b)
            seen = seen + 1 if is_still else 0
            await asyncio.sleep(0.01)


def _agree(writer: Site, reader: Site) -> bool:
    """What was sent has arrived, and what the reader has the writer may use."""
    tx, rx = writer.link.lanes.tx.lane, reader.link.lanes.rx.lane
    return writer.link.is_open and (tx.filled, tx.position) == (rx.filled, rx.position)


def _is_idle(site: Site) -> bool:
    link, store = site.link, site.store
    stream, ends = link.stream, (link.lanes.tx, link.lanes.rx)
    return (
        stream is not None
        and not (stream._outbox or stream._verified)
        and not (link._control or link._relay or link._raising or link.lanes.rx.lane.is_report_due)
        and not any(end.is_moving for end in ends)
        and not _is_ingesting(link.ingest)
        and not (store._queue or store._is_scheduled or store._is_committing)
    )


def _is_ingesting(ingest: Ingest) -> bool:
    if ingest.lock.locked():
        return True
    if isinstance(ingest, BlockLeader):
        held = sum(len(key.value) for key in ingest._gathered)
        return bool(ingest._open or ingest._answers) or held >= FAST_INGEST.gather_bytes
    return isinstance(ingest, BlockFollower) and bool(ingest._offers or ingest._to_discard)
