"""What a node tells its directory, and what the directory's copy of its marks may tell it.

Owns protocol 1.9's last sentence: the copy of the marks in the directory never moves a
mark. A copy that is above this disk makes the node refuse to serve until the operator has
looked, because a restored snapshot looks like that; for lanes an authenticated peer
outranks it. Levels are coarse, so that watching etcd shows little.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

from mesh import __version__
from mesh.core.identity import Role
from mesh.directory.port import Directory, LinkLevel, MarksCopy, NodeLevels, NodeRecord
from mesh.node.links import LinkPlane
from mesh.ops.alarms import Alarms
from mesh.store.store import Store
from mesh.store.tables import Tables

COARSE_BYTES = 64 * 1024
INTERVAL_S = 5.0
_LOOK_EVERY_S = 0.5
ALARM = "node/rolled-back"
STALE_ALARM = "directory/stale"
STALE_AFTER_S = 30.0
_NEXT_STEP = (
    "if this data directory was restored, cloned or moved back in time, wipe it and reset the node's links; "
    "if it was not, the directory's copy lies: acknowledge this alarm"
)


def own_marks(tables: Tables) -> dict[str, int]:
    """Every mark on disk by name; the name carries the epoch, so that new epochs start afresh."""
    marks: dict[str, int] = {}
    for lane in tables.lanes.list():
        direction = "out" if lane.is_outbound else "in"
        marks[f"lane/{lane.peer}/{direction}/{lane.epoch}"] = lane.mark
    for reserve in tables.reserves.list():
        if reserve.is_outbound:
            name = f"reserve/{reserve.target}/{reserve.epoch}"
            marks[f"{name}/assign"] = reserve.assign_mark
            marks[f"{name}/draw"] = reserve.draw_mark
    return marks


def above(copy: Mapping[str, int], own: Mapping[str, int]) -> list[str]:
    """Names of marks that the copy has higher than the disk, or of epochs that the disk does not know.

    A lane or reserve of which the disk has a newer epoch was reset or renewed since: no doubt there.
    """
    newest: dict[str, int] = {}
    for name in own:
        subject, epoch = _subject(name)
        newest[subject] = max(epoch, newest.get(subject, -1))
    return sorted(
        name
        for name, mark in copy.items()
        if mark > own.get(name, 0) and _subject(name)[1] >= newest.get(_subject(name)[0], -1)
    )


def _subject(name: str) -> tuple[str, int]:
    """What a mark's name is about without its epoch, and the epoch; 0 for a name we did not write."""
    parts = name.split("/")
    at = 3 if parts[0] == "lane" else 2
    epoch = int(parts[at]) if len(parts) > at and parts[at].isdecimal() else 0
    return "/".join(parts[:at]), epoch


class Publisher:
    """Publishes record, levels and marks; watches the copy of the marks at start.

    Args:
        record: this node's record.
        reserves: key bytes that can be drawn now, by peer KME.
    """

    def __init__(
        self,
        directory: Directory,
        store: Store,
        links: LinkPlane,
        alarms: Alarms,
        *,
        kme_id: str,
        address: str,
        role: Role,
        incarnation: bytes,
        reserves: Callable[[], Mapping[str, int]],
    ) -> None:
        self._directory = directory
        self._store = store
        self._links = links
        self._alarms = alarms
        self._kme_id = kme_id
        self._incarnation = incarnation
        self._reserves = reserves
        self._record = NodeRecord(
            kme_id, address, role=role.value, software_version=__version__, started_at_s=time.time()
        )
        self._start_marks = store.read(own_marks)
        self._is_checked = False
        self._is_withdrawn = False
        self._doubted: list[str] = []

    def doubts(self) -> bool:
        """Whether the directory's copy says this disk is old, and nobody has said otherwise yet."""
        if not self._doubted:
            return False
        opened = {peer for peer, link in self._links.links.items() if link.is_open}
        self._doubted = [
            name for name in self._doubted if not (name.startswith("lane/") and name.split("/")[1] in opened)
        ]
        if not self._doubted:
            self._alarms.clear(ALARM)
        elif not self._alarms.is_open(ALARM):
            self._doubted = []
        return bool(self._doubted)

    def check_copy(self) -> None:
        """Compare the directory's copy, once it is there, with the marks that this start found on disk."""
        copy = self._directory.marks(self._kme_id)
        if self._is_checked or copy is None:
            return
        self._is_checked = True
        if copy.incarnation == self._incarnation.hex() or self._store.is_new:
            return
        self._doubted = above(copy.marks, self._start_marks)
        if self._doubted:
            self._alarms.raise_alarm(
                ALARM,
                "critical",
                f"the directory remembers higher marks than this disk: {', '.join(self._doubted[:4])}",
                _NEXT_STEP,
            )

    async def run(self) -> None:
        """Publish until cancelled."""
        await self._directory.publish_node(self._record)
        self.check_copy()
        while True:
            if self._directory.staleness_s() <= STALE_AFTER_S:
                self.check_copy()
                self._alarms.clear(STALE_ALARM)
            else:
                self._alarms.raise_alarm(
                    STALE_ALARM,
                    "warning",
                    "the directory does not answer; going on with what was last known",
                    "look at etcd and at the path to it; routes and new homes are not followed meanwhile",
                )
            await self.publish()
            await self._pause()

    async def _pause(self) -> None:
        """Until the next round, or a refusal begins or ends."""
        end_s = asyncio.get_running_loop().time() + INTERVAL_S
        while asyncio.get_running_loop().time() < end_s:
            await asyncio.sleep(_LOOK_EVERY_S)
            if (self._links.refusal is not None) != self._is_withdrawn:
                return

    async def publish(self) -> None:
        """Publish what is now; nothing of a disk that is not current.

        A node that was refused takes its record out: it may be a copy, and the others must reach
        the original. The copy of the marks stays as it is, for the operator and the next start.
        """
        if self._links.refusal is not None:
            if not self._is_withdrawn:
                self._is_withdrawn = True
                await self._directory.withdraw()
            return
        if self._is_withdrawn:
            self._is_withdrawn = False
            await self._directory.publish_node(self._record)
        if not self.doubts():
            await self._publish()

    async def _publish(self) -> None:
        levels = {}
        for peer, link in self._links.links.items():
            status = link.status()
            usable = status.transmit.usable // COARSE_BYTES * COARSE_BYTES
            levels[peer] = LinkLevel(usable, max(status.transmit.filled, usable, 1), is_up=link.is_open)
        reserves = {peer: level // COARSE_BYTES * COARSE_BYTES for peer, level in self._reserves().items()}
        await self._directory.publish_levels(NodeLevels(self._kme_id, levels, reserves))
        marks = self._store.read(own_marks)
        await self._directory.publish_marks(self._kme_id, MarksCopy(self._incarnation.hex(), marks))

    async def withdraw(self, task: asyncio.Task[None]) -> None:
        """End ``run``; the directory's own stop withdraws the leased records."""
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
