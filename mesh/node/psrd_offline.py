"""Pre-shared random data at a node that does not run: first supply, labs, benchmarks.

Owns opening a data directory for one order and closing it again. The store's lock keeps a
running node out; ask that one through its admin service instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from mesh.core.lane import LaneLimits
from mesh.errors import ConfigError, ErrorReason, UnavailableError
from mesh.node.config import LinkSection, NodeConfig
from mesh.node.lanes import LinkLanes
from mesh.node.psrd import PsrdTables
from mesh.node.psrd_courier import ImportOrder, IssueOrder
from mesh.node.psrd_rows import TableRecord
from mesh.sources.psrd_file import Progress, no_progress
from mesh.sources.randomness import open_random
from mesh.store.store import Store


async def issue_offline(
    config: NodeConfig,
    peer: str,
    order: IssueOrder,
    *,
    random_source: str = "",
    progress: Progress = no_progress,
) -> TableRecord:
    """Issue a table for ``peer`` from the data directory of a node that does not run.

    Raises:
        MeshError: as ``PsrdTables.issue``; ``ALREADY_RUNNING`` when the node runs.
    """
    source = open_random(random_source)
    try:
        async with _tables(config, peer) as tables:
            return await tables.issue(order, source, now_s=int(time.time()), progress=progress)
    finally:
        source.close()


async def import_offline(
    config: NodeConfig, peer: str, order: ImportOrder, *, progress: Progress = no_progress
) -> TableRecord:
    """Import a courier file of hub ``peer`` at a node that does not run.

    Raises:
        MeshError: as ``PsrdTables.take``; ``ALREADY_RUNNING`` when the node runs.
    """
    async with _tables(config, peer) as tables:
        return await tables.take(order, progress=progress)


async def supply_offline(
    hub: NodeConfig, client: NodeConfig, path: Path, *, to_client_bytes: int, from_client_bytes: int
) -> None:
    """Issue, carry and import a table between two nodes of this machine; no file stays.

    Args:
        hub, client: neither runs.
        path: of the courier file in between.
        to_client_bytes, from_client_bytes: for the lane that the hub writes, and reads.
    """
    await issue_offline(hub, client.kme_id, IssueOrder(to_client_bytes, from_client_bytes, path))
    await import_offline(client, hub.kme_id, ImportOrder(path, wipe=True))


@contextlib.asynccontextmanager
async def _tables(config: NodeConfig, peer: str) -> AsyncIterator[PsrdTables]:
    link = _link(config, peer)
    try:
        store = Store.open(
            Path(config.data_dir),
            kme_id=config.kme_id,
            proof_dir=None if config.proof_dir is None else Path(config.proof_dir),
        )
    except UnavailableError as error:
        if error.reason is ErrorReason.ALREADY_RUNNING:
            raise UnavailableError(
                "the node runs: ask it itself (--address and a tool certificate, or --lab), not --config",
                reason=error.reason,
                facts=error.facts,
            ) from error
        raise
    try:
        lanes = LinkLanes(
            store,
            config.kme_id,
            peer,
            LaneLimits.of(link.pool_max_bytes, link.window_bytes),
            spawn=_refuse_work,
        )
        await lanes.load()
        tables = PsrdTables(
            store,
            lanes,
            domain_id=config.domain_id,
            own_id=config.kme_id,
            changed=_nobody,
            came=_nobody,
            randomness=os.urandom,
        )
        tables.finish_couriers()
        yield tables
    finally:
        await asyncio.shield(store.aclose())


def _link(config: NodeConfig, peer: str) -> LinkSection:
    for link in config.links:
        if link.peer == peer and link.device is not None:
            raise ConfigError(
                "links[].device: a device feeds this link, and courier files cannot be mixed in; remove it "
                "at both ends",
                facts={"peer": peer},
            )
        if link.peer == peer:
            return link
    raise ConfigError("links: none to this peer; add one at both ends", facts={"peer": peer})


def _nobody() -> None:
    """No link runs that would want to know."""


def _refuse_work(work: Coroutine[Any, Any, Any]) -> object:
    """Lanes at rest start no background work; if they did it would be lost."""
    work.close()
    raise RuntimeError("background work at a node that does not run")
