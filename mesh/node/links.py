"""All links of a node: who dials, who is admitted, and what stops everything.

Owns the life of streams (protocol 1.8: only the smaller KME id dials, back-off up to 60 s)
and the stop after a revealed rollback, which is durable and waits for the operator. The
rules of one link are in ``mesh.node.link``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from mesh.core.lane import LaneLimits
from mesh.core.opening import NEXT_STEP
from mesh.errors import (
    CallerError,
    ErrorReason,
    IntegrityError,
    MeshError,
    PeerError,
    RolledBackError,
    UnavailableError,
)
from mesh.node.ingest import BlockFollower, BlockLeader, IngestSettings
from mesh.node.link import Link, LinkSettings, Surroundings
from mesh.node.link_stream import LinkStream
from mesh.node.ports import DocumentPort, LinkAlarms, PadRecorder, SharesHandler
from mesh.node.psrd_link import CourierFed
from mesh.node.tasks import Background
from mesh.node.transport import Transport
from mesh.sources.port import KeySource
from mesh.store.store import Store
from mesh.store.tables import Tables

_LOG = logging.getLogger("keymesh.links")


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """One neighbour.

    Attributes:
        peer: its KME id.
        source: this end of the device pair; None when courier files feed the lanes.
        pool_max_bytes: most unused material per lane; the same at both ends.
        window_bytes: 0 takes W = min(4 MiB, pool / 16).
        low_water_bytes: of lanes that courier files feed; 0 takes an eighth of the last table.
        redial_min_s, redial_max_s: first and longest pause before dialling again.
        open_timeout_s: given to a stream for its hellos.
        ingest: sizes and times of ingest.
    """

    peer: str
    source: KeySource | None = None
    pool_max_bytes: int = 64 << 20
    window_bytes: int = 0
    low_water_bytes: int = 0
    redial_min_s: float = 0.5
    redial_max_s: float = 60.0
    open_timeout_s: float = 10.0
    ingest: IngestSettings = field(default_factory=IngestSettings)


def rollback_alarm(peer: str) -> str:
    """The alarm that a neighbour's word raised; it ends when the operator resets the link."""
    return f"link/{peer}/rolled-back"


class NoShares:
    """A handler for nodes whose key plane is not there yet."""

    def on_shares(self, came_from: str, shares: object) -> None:
        """Drop them: they are forfeited."""

    def on_link_open(self, peer: str) -> None:
        """Nothing to do."""

    def on_link_closed(self, peer: str) -> None:
        """Nothing to do."""


class NoDocument:
    """A document port without a document."""

    def serial(self) -> int:
        """No document: 0."""
        return 0

    def signed_bytes(self) -> bytes:
        """No document: empty."""
        return b""

    def offer(self, document: bytes) -> None:
        """Ignore it."""


class LinkPlane:
    """All links of a node; implements :class:`~mesh.node.ports.LinkPlanePort`.

    Args:
        own_id, domain_id: who we are.
        store: open; ``begin_incarnation`` has written ``incarnation``.
        incarnation: id of this start, 16 bytes.
        links: the neighbours.
        dial: a new stream to a peer (``DialledTransport(channel)``); raises UnavailableError
            when its address is not known.
        alarms, document, recorder: ports.
        handler: takes shares; may be set later, before :meth:`start`.
        randomness: cryptographic, by number of bytes.
        now_s: monotonic seconds.
    """

    def __init__(
        self,
        own_id: str,
        domain_id: str,
        store: Store,
        incarnation: bytes,
        links: list[LinkConfig],
        *,
        dial: Callable[[str], Transport],
        alarms: LinkAlarms,
        document: DocumentPort | None = None,
        recorder: PadRecorder | None = None,
        handler: SharesHandler | None = None,
        randomness: Callable[[int], bytes] = os.urandom,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.own_id = own_id
        self.handler: SharesHandler = handler or NoShares()
        self.refusal: RolledBackError | None = None
        self._store = store
        self._alarms = alarms
        self._dial = dial
        self._background = Background()
        incarnations = frozenset(store.read(lambda tables: tables.incarnations.own_incarnations()))
        if incarnation not in incarnations:
            raise IntegrityError("the incarnation must be on disk before the first greeting")
        self._around = Surroundings(
            own_id=own_id,
            domain_id=domain_id,
            incarnation=incarnation,
            incarnations=incarnations,
            store=store,
            alarms=alarms,
            document=document or NoDocument(),
            recorder=recorder,
            randomness=randomness,
            now_s=now_s,
            spawn=self._background.spawn,
            handler=lambda: self.handler,
            stop=self.stop_for_rollback,
        )
        self._links = {config.peer: self._make(config) for config in links}
        self._is_stopping = False
        self._is_loaded = False

    def _make(self, config: LinkConfig) -> Link:
        limits = LaneLimits.of(config.pool_max_bytes, config.window_bytes)
        link = Link(
            self._around,
            config.peer,
            LinkSettings(limits, config.redial_min_s, config.redial_max_s, config.open_timeout_s),
        )
        if config.source is None:
            link.ingest = CourierFed(link, config.ingest, low_water_bytes=config.low_water_bytes)
        else:
            role = BlockLeader if link.is_dialler else BlockFollower
            link.ingest = role(link, config.source, config.ingest)
        return link

    @property
    def links(self) -> Mapping[str, Link]:
        """Links by peer KME id."""
        return self._links

    def link(self, peer: str) -> Link | None:
        """The link to a neighbour, None when there is none."""
        return self._links.get(peer)

    # -- life -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Load all lanes and begin to dial and to ingest."""
        for link in self._links.values():
            await link.load()
            link.ingest.load()
        self._is_loaded = True
        refused = self._store.read(self._read_refusals)
        if refused:
            told = self._store.read(lambda tables: tables.meta.get(f"refused/{refused[0]}"))
            self._refuse(refused[0], RolledBackError((told or b"").decode(errors="replace")))
        for link in self._links.values():
            self._background.keep(f"ingest/{link.peer}", link.ingest.run)
            if link.is_dialler:
                self._background.keep(f"dial/{link.peer}", partial(self._keep_dialling, link))

    def _read_refusals(self, tables: Tables) -> list[str]:
        return [peer for peer in self._links if tables.meta.get(f"refused/{peer}")]

    async def stop(self) -> None:
        """Close all streams; nothing is sent any more."""
        self._is_stopping = True
        for link in self._links.values():
            link.close_streams(UnavailableError("shutting down", reason=ErrorReason.SHUTTING_DOWN))
        await self._background.close()

    async def accept(self, peer: str, transport: Transport) -> None:
        """Serve a stream that ``peer`` dialled, until it ends.

        Args:
            peer: from the connection's certificate.

        Raises:
            PeerError: no neighbour of ours, or not the one that dials.
            UnavailableError: the link backs off.
            RolledBackError: we are stopped.
        """
        link = self._links.get(peer)
        if link is None or link.is_dialler:
            raise PeerError("no link that this peer dials", reason=ErrorReason.PEER_REFUSED)
        if self._is_stopping:
            raise UnavailableError("shutting down", reason=ErrorReason.SHUTTING_DOWN)
        if not self._is_loaded:
            raise UnavailableError("starting up", retry_after_s=1.0)
        error = await self._serve(link, transport, is_dialler=False)
        if error is not None:
            raise error

    async def _serve(self, link: Link, transport: Transport, *, is_dialler: bool) -> MeshError | None:
        stream = LinkStream(link, transport, is_dialler=is_dialler)
        try:
            link.admit(stream)
            await stream.run()
        finally:
            transport.close()
            link.ended(stream)
        return stream.error

    async def _keep_dialling(self, link: Link) -> None:
        """Dial, serve, pause; the pause doubles until a stream has opened."""
        settings = link.settings
        pause_s = settings.redial_min_s
        while True:
            has_opened = False
            try:
                transport = self._dial(link.peer)
                began_s = self._around.now_s()
                await self._serve(link, transport, is_dialler=True)
                has_opened = link.opened_at_s >= began_s
            except MeshError as error:
                link.last_error = error.message
                pause_s = max(pause_s, min(error.retry_after_s, settings.redial_max_s))
            pause_s = settings.redial_min_s if has_opened else min(2 * pause_s, settings.redial_max_s)
            await asyncio.sleep(max(pause_s, link.blocked_until_s - self._around.now_s()))

    # -- the operator's matters -----------------------------------------------------------

    def stop_for_rollback(self, peer: str, error: RolledBackError) -> None:
        """A peer revealed that our state is old, or that a copy of us runs: stop, durably."""
        if self.refusal is None:
            self._store.commit_soon(lambda tables: tables.meta.put(f"refused/{peer}", error.message.encode()))
        self._refuse(peer, error)

    def _refuse(self, peer: str, error: RolledBackError) -> None:
        self.refusal = error
        self._alarms.raise_alarm(
            rollback_alarm(peer), "critical", error.message, NEXT_STEP, needs_operator=True
        )
        for link in self._links.values():
            link.refusal = error
            link.close_streams(error)

    async def reset_link(self, peer: str) -> tuple[int, int]:
        """Throw a link's material away and open new epochs, at the operator's word."""
        link = self._links.get(peer)
        if link is None:
            raise CallerError("peer_kme_id names no link of this node", facts={"peer_kme_id": peer})

        def change(tables: Tables) -> list[str]:
            tables.meta.put(f"refused/{peer}", b"")
            return self._read_refusals(tables)

        still = await self._store.commit(change)
        epochs = await link.reset()
        if still:
            link.refusal = self.refusal
        else:
            self.refusal = None
            for other in self._links.values():
                other.refusal = None
        return epochs
