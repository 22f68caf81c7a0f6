"""Carrying pre-shared random data between members of a lab before they start.

Does what couriers do, with the same code: a table is issued at the hub, imported at the
client, and the file between them is wiped. Links that share no member are supplied side
by side.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict

from mesh.errors import ErrorReason, UnavailableError
from mesh.hub.config import load_hub_config
from mesh.lab.networks import LinkSpec, Network
from mesh.lab.state import LabDirectory
from mesh.node.config import NodeConfig, load_node_config
from mesh.node.psrd_offline import supply_offline


def supply_links(network: Network, directory: LabDirectory, *, deadline_s: float) -> int:
    """Bring a table to every link that couriers feed; ``psrd_bytes`` for each of its lanes.

    Args:
        network: what is being started; none of its members runs.
        directory: with its configurations written.
        deadline_s: on the monotonic clock.

    Returns:
        Bytes of all tables.

    Raises:
        UnavailableError: not done by the deadline, or the disk is full.
    """
    links = [link for link in network.links if link.is_couriered]
    hubs = {hub.id for hub in network.hubs}
    total = sum(sum(link.courier_bytes) for link in links)
    folder = directory.courier_folder(total)
    busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def config(member: str) -> NodeConfig:
        file = directory.config / f"{member}.yaml"
        return load_hub_config(file)[1] if member in hubs else load_node_config(file)

    async def supply(link: LinkSpec) -> None:
        issuer = network.issuer(link)
        to_second, to_first = link.courier_bytes
        client, to_client, from_client = (
            (link.between[1], to_second, to_first)
            if issuer == link.between[0]
            else (link.between[0], to_first, to_second)
        )
        first, second = sorted(link.between)
        # A data directory takes one order at a time; in this order nobody waits in a circle.
        async with busy[first], busy[second]:
            await supply_offline(
                config(issuer),
                config(client),
                folder / f"{link.link_id}.psrd",
                to_client_bytes=to_client,
                from_client_bytes=from_client,
            )

    async def supply_all() -> None:
        async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
            await asyncio.gather(*(supply(link) for link in links))

    try:
        asyncio.run(supply_all())
    except TimeoutError as error:
        raise UnavailableError(
            "the couriers were not there in time: use smaller psrd_bytes or a faster disk",
            reason=ErrorReason.DEADLINE_EXCEEDED,
        ) from error
    return total
