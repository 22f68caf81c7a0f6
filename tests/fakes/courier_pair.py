"""A hub and its client whose link only courier files feed, over the adversary's wire."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mesh.node.psrd import PsrdTables
from mesh.node.psrd_courier import ImportOrder, IssueOrder
from mesh.node.psrd_link import CourierFed
from mesh.node.psrd_rows import TableRecord
from mesh.sources.randomness import RandomSource, SystemRandom
from tests.fakes.link_sites import Site, Uses, Wire

POOL = 1 << 20
TABLE = 64 << 10


class CourierPair:
    """Hub and client. The smaller id dials: choose the names to choose the dialler.

    Args:
        root: for data directories and courier files.
        hub, client: KME ids.
        proof: folder on tmpfs for the proofs of restarts.
    """

    def __init__(
        self,
        root: Path,
        *,
        hub: str = "hub-1",
        client: str = "kme-a",
        proof: Path | None = None,
        pool: int = POOL,
    ) -> None:
        self.root = root
        self.proof = proof
        self.pool = pool
        self.wire = Wire()
        self.names = {"hub": hub, "client": client}
        self.uses = {"hub": Uses(), "client": Uses()}
        self.couriers = root / "couriers"
        self.couriers.mkdir()
        self.hub = self.make("hub")
        self.client = self.make("client")

    def make(self, role: str) -> Site:
        """A new process of that end on its directory."""
        other = "client" if role == "hub" else "hub"
        site = Site(
            self.names[role],
            self.names[other],
            self.root,
            source=None,
            dial=self.wire.dial,
            proof=self.proof,
            pool=self.pool,
            uses=self.uses[role],
        )
        if self.names[role] > self.names[other]:
            self.wire.acceptor = site
        return site

    async def start(self) -> None:
        """Start both; the link opens once both have material."""
        await self.hub.plane.start()
        await self.client.plane.start()

    async def restart(self, role: str) -> Site:
        """Kill one end and start it again."""
        site: Site = getattr(self, role)
        await site.crash()
        if self.wire.acceptor is site:
            self.wire.acceptor = None
        site = self.make(role)
        setattr(self, role, site)
        await site.plane.start()
        return site

    async def stop(self) -> None:
        """Stop both."""
        await self.hub.crash()
        await self.client.crash()

    async def issue(
        self, name: str, *, down: int = TABLE, up: int = TABLE, source: RandomSource | None = None
    ) -> Path:
        """Issue a table at the hub; the courier file."""
        path = self.couriers / name
        ingest = fed(self.hub)
        async with ingest.lock:
            await ingest.tables.issue(
                IssueOrder(down, up, path), source or SystemRandom(), now_s=int(time.time())
            )
        return path

    async def take(self, path: Path, *, wipe: bool = False) -> TableRecord:
        """Import a courier file at the client."""
        ingest = fed(self.client)
        async with ingest.lock:
            return await ingest.tables.take(ImportOrder(path, wipe=wipe))

    async def bring(self, name: str, *, down: int = TABLE, up: int = TABLE) -> None:
        """Issue and import."""
        await self.take(await self.issue(name, down=down, up=up))

    async def until_open(self) -> None:
        """Wait until both ends are open."""
        await self.hub.until_open()
        await self.client.until_open()

    async def until(self, check: Callable[[], bool]) -> None:
        """Wait for a condition."""
        await self.hub.until(check)


def fed(site: Site) -> CourierFed:
    """The courier-fed ingest of a site's link."""
    ingest = site.link.ingest
    assert isinstance(ingest, CourierFed)
    return ingest


def tables_of(site: Site) -> PsrdTables:
    """The tables of a site's link."""
    return fed(site).tables
