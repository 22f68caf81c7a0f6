"""A link whose lanes are fed by courier files: what its stream tells, levels, alarms.

Takes the place of a block leader or follower on links without a device. Owns the reading of
``receive_filled`` (protocol 2.1: the issuing end writes with a table once an authenticated
frame says that the other has it), and the watch over levels: rate of use, time to empty,
low water. What is durable is ``mesh.node.psrd``'s.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mesh.core.lane import ReaderLane, WriterLane
from mesh.core.sizes import format_size
from mesh.errors import MeshError, PeerError, UnavailableError
from mesh.node.ingest import Decided, Ingest, IngestSettings
from mesh.node.psrd import PsrdTables
from mesh.node.userate import UseRate

if TYPE_CHECKING:
    from mesh.node.link import Link
    from mesh.node.link_stream import LinkStream

_LOG = logging.getLogger("keymesh.psrd")
#: How often levels are looked at.
WATCH_EVERY_S = 5.0
#: Low water, where none is configured: this part of the last table.
_LOW_PART = 8


@dataclass(slots=True)
class Gauge:
    """Level and use of one lane.

    Attributes:
        usable_bytes: left at or past the position.
        waiting_bytes: issued, and the client is not known to have it.
        use: smoothed rate of use.
        low_water_bytes: below it the alarm is raised.
    """

    usable_bytes: int = 0
    waiting_bytes: int = 0
    use: UseRate = field(default_factory=UseRate)
    low_water_bytes: int = 0

    def look(self, lane: WriterLane | ReaderLane, seconds: float) -> None:
        """Take the lane's present level; ``seconds`` since the last look."""
        self.usable_bytes = lane.usable_bytes
        self.use.look(lane.position, seconds)

    @property
    def seconds_to_empty(self) -> float:
        """At the present rate; infinity when nothing is used."""
        return self.use.seconds_to_empty(self.usable_bytes)

    @property
    def is_low(self) -> bool:
        """Whether more should be brought."""
        return self.usable_bytes < self.low_water_bytes

    @property
    def is_well(self) -> bool:
        """Twice the low water: the alarm may go (hysteresis)."""
        return self.usable_bytes >= 2 * self.low_water_bytes


class CourierFed(Ingest):
    """The ingest of a link without a device.

    Args:
        link: the link it feeds.
        settings: sizes and times.
        low_water_bytes: per lane; 0 takes an eighth of the last table.
    """

    tables: PsrdTables

    def __init__(self, link: Link, settings: IngestSettings, *, low_water_bytes: int = 0) -> None:
        super().__init__(link, None, settings)
        self.transmit = Gauge()
        self.receive = Gauge()
        self._low_water_bytes = low_water_bytes
        self._looked_at_s: float | None = None

    def load(self) -> None:
        """Find the tables of this link."""
        super().load()
        self.tables = PsrdTables(
            self.link.store,
            self.link.lanes,
            domain_id=self.link.domain_id,
            own_id=self.link.own_id,
            changed=self.link.material_changed,
            came=self._table_came,
            randomness=self.link.randomness,
        )
        self._learn()

    async def run(self) -> None:
        """Finish what a crash cut short, then watch the levels until cancelled."""
        try:
            for path in await asyncio.to_thread(self.tables.finish_couriers):
                _LOG.info("a courier file got its name after a crash", extra={"path": path})
        except MeshError as error:
            _LOG.warning("a courier file has not got its name", extra={"cause": str(error)})
        while True:
            self.look()
            await asyncio.sleep(WATCH_EVERY_S)

    # -- what the stream tells ------------------------------------------------------------

    def on_offer(self, offer: bytes, stream: LinkStream, decided: Decided | None) -> None:
        """A device's keys are offered on a link that has none here."""
        raise PeerError(
            "the peer has a device on this link and this end has none: give links[].device at both"
        )

    def on_filled(self, filled: int) -> None:
        """An authenticated frame says how far the reader's copy of our outbound lane is filled."""
        if self.tables.on_filled(filled):
            self.link.spawn(self.tables.keep_accepted())
            self.look()

    def before_hello(self, *, peer_has_material: bool) -> None:
        """Our hello is due; the peer's greeting says whether it has bytes of our lane."""
        if peer_has_material:
            self.tables.lend_hello()

    def forget(self) -> None:
        """The lanes were thrown away, and the tables with them."""
        super().forget()
        self.tables.reload()
        self._learn()

    def _table_came(self) -> None:
        """A table was issued, discarded or imported: let the other end know."""
        self._learn()
        if self.link.is_open:
            self.link.post_report()
        else:
            # A greeting said that there was nothing here: greet again.
            self.link.close_streams(UnavailableError("material was brought by courier"))

    # -- levels ---------------------------------------------------------------------------

    def look(self) -> None:
        """Bring the gauges up to date, and raise or clear the low-water alarm."""
        now_s = self.link.now_s()
        seconds = 0.0 if self._looked_at_s is None else now_s - self._looked_at_s
        self._looked_at_s = now_s
        self.transmit.look(self.link.lanes.tx.lane, seconds)
        self.receive.look(self.link.lanes.rx.lane, seconds)
        self.transmit.waiting_bytes = self.tables.waiting_bytes
        self._alarm()

    def _learn(self) -> None:
        """Take the low water from the last table."""
        records = [one for one in self.tables.records() if one.state != "discarded"]
        transmit, receive = (len(records[-1].transmit), len(records[-1].receive)) if records else (0, 0)
        self.transmit.low_water_bytes = self._low_water_bytes or transmit // _LOW_PART
        self.receive.low_water_bytes = self._low_water_bytes or receive // _LOW_PART
        self.look()

    def _alarm(self) -> None:
        alarm_id = f"psrd/{self.link.peer}/low"
        gauges = {"sending": self.transmit, "receiving": self.receive}
        low = {name: gauge for name, gauge in gauges.items() if gauge.is_low}
        if low:
            below = ", ".join(
                f"{name} below {format_size(gauge.low_water_bytes)}" for name, gauge in low.items()
            )
            is_empty = any(gauge.usable_bytes < gauge.low_water_bytes // 8 for gauge in low.values())
            is_coming = self.transmit.waiting_bytes > 0
            waits = "; a table is issued and waits for its import" if is_coming else ""
            self.link.alarms.raise_alarm(
                alarm_id,
                "critical" if is_empty and not is_coming else "warning",
                f"pre-shared random data runs low: {below}{waits}",
                "see keymesh psrd status; keymesh psrd issue at the hub, keymesh psrd import at the client",
            )
        elif all(gauge.is_well for gauge in gauges.values()):
            self.link.alarms.clear(alarm_id)
