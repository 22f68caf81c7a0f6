"""Where drawn keys come from: the reserve when it has bytes, an establish when it has not, refills behind.

Owns architecture 2.1 step 2 and the water marks: one path for all draws, concurrent misses share one
transfer, refills run from the low mark to the high mark and leave lane material for keys on demand.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from mesh.core.policy import WaterMarks
from mesh.core.reserve import slots_per_key
from mesh.core.transfer import KEY_PART_BYTES, PREFIX_BYTES, SLOT_BYTES
from mesh.errors import ErrorReason, MeshError, ShortageError, UnavailableError
from mesh.node.establish import BULK, ON_DEMAND, Establisher, Order
from mesh.node.keyports import KeyPlaneConfig, RoutePort, Surroundings
from mesh.node.ports import LinkPlanePort
from mesh.node.reserves import Reserves
from mesh.node.tasks import Background

_FRAME_OVERHEAD_BYTES = 32 + PREFIX_BYTES + 64
_LEAST_BULK_SLOTS = 64
_FIRST_BULK_SLOTS = 1024
_BULK_IN_FLIGHT = 4
_BULK_TIMEOUT_S = 4.0
_REFILL_EVERY_S = 1.0
_MAX_PAUSE_S = 8.0
_WAIT_FOR_REFILL_S = 0.15
_RECENT_S = 3600.0
_DOUBT_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)

_LOG = logging.getLogger("keymesh.supply")

Keys = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class _Batch:
    """Misses that share one establish: open until its transfer is assigned."""

    slots: int
    request_id: str
    done: asyncio.Future[None]


@dataclass(slots=True)
class _Refill:
    """The refill of one reserve."""

    water: WaterMarks
    bulk_slots: int = _FIRST_BULK_SLOTS
    in_flight_slots: int = 0
    transfers: int = 0
    asked_at_s: float = -_RECENT_S
    pause_s: float = 0.0
    not_before_s: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Supply:
    """Draws keys towards peers and keeps the outbound reserves filled."""

    def __init__(
        self,
        around: Surroundings,
        *,
        links: LinkPlanePort,
        reserves: Reserves,
        routes: RoutePort,
        establisher: Establisher,
        tasks: Background,
        config: KeyPlaneConfig,
    ) -> None:
        self._around = around
        self._links = links
        self._reserves = reserves
        self._routes = routes
        self._establisher = establisher
        self._tasks = tasks
        self._config = config
        self._batches: dict[str, _Batch] = {}
        self._refills: dict[str, _Refill] = {}
        self._kick = asyncio.Event()
        self._planned: dict[str, int] = {}
        self._doubted: set[str] = set()
        self.prefilled: frozenset[str] = frozenset()

    # drawing

    def draw_now(self, peer: str, master: str, slave: str, number: int, size_bytes: int) -> Keys | None:
        """Keys from the reserve as it is, without waiting; None if that is not possible now."""
        book = self._reserves.outbound.get(peer)
        if book is None:
            return None
        keys = book.try_draw(number, size_bytes, master, slave, self._around.now_s())
        if keys is not None and book.level_bytes < self._config.low_water_bytes:
            self._kick.set()
        return keys

    async def draw(
        self,
        peer: str,
        master: str,
        slave: str,
        number: int,
        size_bytes: int,
        *,
        timeout_s: float,
        request_id: str,
    ) -> tuple[Keys, str]:
        """Keys for a pair, established now if they must be; with the grade they have.

        Raises:
            ShortageError, UnavailableError: they cannot be had in time; nothing was handed out.
        """
        deadline = self._around.monotonic_s() + timeout_s
        self._refill(peer).asked_at_s = self._around.monotonic_s()
        per_key = slots_per_key(size_bytes)
        while True:
            keys = self.draw_now(peer, master, slave, number, size_bytes)
            book = self._reserves.outbound.get(peer)
            if keys is not None and book is not None:
                return keys, book.grade
            if book is not None and await book.ready_to_draw(number, per_key):
                continue
            left_s = deadline - self._around.monotonic_s()
            if left_s <= 0:
                raise UnavailableError(
                    "keys could not be established in time",
                    reason=ErrorReason.DEADLINE_EXCEEDED,
                    retry_after_s=1.0,
                )
            await self._more(peer, number * per_key, left_s, request_id)

    async def _more(self, peer: str, slots: int, left_s: float, request_id: str) -> None:
        """Waits for a refill that is on its way, else joins the establish that this tick's misses share."""
        refill = self._refill(peer)
        if refill.in_flight_slots >= slots:
            refill.changed.clear()
            try:
                async with asyncio.timeout(min(_WAIT_FOR_REFILL_S, left_s)):
                    await refill.changed.wait()
            except TimeoutError:
                _LOG.info("refill is slow, establishing on demand", extra={"peer": peer})
            else:
                return
        batch = self._batches.get(peer)
        if batch is None:
            batch = self._batches[peer] = _Batch(0, request_id, asyncio.get_running_loop().create_future())
            # Ends before its waiters do, so that they learn the reason and not just a timeout.
            self._tasks.spawn(self._run_batch(peer, batch, 0.9 * left_s))
        batch.slots += slots
        try:
            async with asyncio.timeout(left_s):
                await asyncio.shield(batch.done)
        except TimeoutError as exc:
            raise UnavailableError(
                "keys could not be established in time",
                reason=ErrorReason.DEADLINE_EXCEEDED,
                retry_after_s=1.0,
            ) from exc

    async def _run_batch(self, peer: str, batch: _Batch, timeout_s: float) -> None:
        # One turn of the loop collects all misses of this tick: they share one transfer and one tag.
        await asyncio.sleep(0)
        del self._batches[peer]
        try:
            at_most = self._transfer_slots(peer)
            pieces = [min(at_most, batch.slots - at) for at in range(0, batch.slots, at_most)]
            orders = [Order(peer, piece, priority=ON_DEMAND, request_id=batch.request_id) for piece in pieces]
            async with asyncio.TaskGroup() as group:
                for order in orders:
                    group.create_task(self._establisher.establish(order, timeout_s=timeout_s))
        except BaseExceptionGroup as group_error:
            self._fail(batch, group_error.exceptions[0])
        except MeshError as exc:
            self._fail(batch, exc)
        except BaseException:
            batch.done.cancel()
            raise
        else:
            batch.done.set_result(None)

    @staticmethod
    def _fail(batch: _Batch, error: BaseException) -> None:
        if not isinstance(error, MeshError):
            batch.done.cancel()
            raise error
        batch.done.set_exception(error)
        batch.done.exception()

    def _transfer_slots(self, peer: str) -> int:
        """Slots that fit one frame on every first link, and the configured bound.

        Raises:
            ShortageError: no route, or a link with so little material that not one slot fits.
        """
        frame = self._config.transfer_max_bytes
        for route in self._routes.routes(peer):
            link = self._links.link(route[1])
            if link is None:
                raise ShortageError("no link to the first node of the route", reason=ErrorReason.NO_ROUTE)
            frame = min(frame, link.max_frame_bytes - _FRAME_OVERHEAD_BYTES)
        if frame < SLOT_BYTES:
            raise ShortageError("the link's frames are too small for a key", retry_after_s=1.0)
        return frame // SLOT_BYTES

    # doubting

    def doubt(self, peer: str) -> None:
        """The peer may have lost what it confirmed: ask, with one slot, before the reserve runs down.

        A full reserve sends nothing by itself, and every key drawn from it would be lost (protocol 4.6
        learns of a lost disk from the next confirm). Costs 160 lane bytes a hop if it was nothing.
        """
        book = self._reserves.outbound.get(peer)
        if book is not None and book.slots.held_slots and peer not in self._doubted:
            self._doubted.add(peer)
            self._tasks.spawn(self._ask(peer))

    async def _ask(self, peer: str) -> None:
        for pause_s in _DOUBT_PAUSES_S:
            try:
                await self._establisher.establish(Order(peer, 1), timeout_s=_BULK_TIMEOUT_S)
                break
            except MeshError as exc:
                _LOG.info("a doubted peer did not answer", extra={"peer": peer, "cause": str(exc)})
                await asyncio.sleep(pause_s)
        self._doubted.discard(peer)
        self._kick.set()

    # refilling

    def _refill(self, peer: str) -> _Refill:
        refill = self._refills.get(peer)
        if refill is None:
            refill = self._refills[peer] = _Refill(self._config.water_marks())
        return refill

    async def run(self) -> None:
        """Refills reserves until cancelled."""
        while True:
            now_s = self._around.monotonic_s()
            self._planned.clear()
            recent = {peer for peer, one in self._refills.items() if now_s - one.asked_at_s < _RECENT_S}
            for peer in sorted(self.prefilled | recent):
                self._start_refills(peer, self._refill(peer), now_s)
            try:
                async with asyncio.timeout(_REFILL_EVERY_S):
                    await self._kick.wait()
            except TimeoutError:
                continue
            self._kick.clear()

    def _start_refills(self, peer: str, refill: _Refill, now_s: float) -> None:
        if now_s < refill.not_before_s:
            return
        book = self._reserves.outbound.get(peer)
        level = 0 if book is None else book.level_bytes
        wanted = refill.water.wanted(level, refill.in_flight_slots * KEY_PART_BYTES) // KEY_PART_BYTES
        while wanted > 0 and refill.transfers < _BULK_IN_FLIGHT:
            try:
                slots = min(wanted, refill.bulk_slots, self._transfer_slots(peer), self._spare_slots(peer))
            except ShortageError:
                self._back_off(refill, now_s)
                return
            if slots < min(wanted, _LEAST_BULK_SLOTS):
                return
            wanted -= slots
            self._plan(peer, slots)
            refill.in_flight_slots += slots
            refill.transfers += 1
            self._tasks.spawn(self._fill(peer, refill, slots))

    def _spare_slots(self, peer: str) -> int:
        """What the scarcest first link can give to refills without touching the floor."""
        spare = None
        for route in self._routes.routes(peer):
            link = self._links.link(route[1])
            if link is None or not link.is_open:
                return 0
            usable = link.status().transmit.usable - self._planned.get(link.peer, 0)
            left = usable - self._config.lane_floor_bytes - _FRAME_OVERHEAD_BYTES
            spare = left if spare is None else min(spare, left)
        return max(0, spare or 0) // SLOT_BYTES

    def _plan(self, peer: str, slots: int) -> None:
        """Counts what this round is about to claim, so that several refills respect one floor."""
        for route in self._routes.routes(peer):
            planned = self._planned.get(route[1], 0)
            self._planned[route[1]] = planned + slots * SLOT_BYTES + _FRAME_OVERHEAD_BYTES

    async def _fill(self, peer: str, refill: _Refill, slots: int) -> None:
        """One bulk transfer; its size doubles when one fits, and halves when one does not arrive."""
        try:
            order = Order(peer, slots, priority=BULK, persists=True)
            await self._establisher.establish(order, timeout_s=_BULK_TIMEOUT_S)
        except MeshError as exc:
            _LOG.info("refill failed", extra={"peer": peer, "slots": slots, "cause": str(exc)})
            refill.bulk_slots = max(_LEAST_BULK_SLOTS, min(refill.bulk_slots, slots) // 2)
            self._back_off(refill, self._around.monotonic_s())
        else:
            refill.bulk_slots = min(2 * refill.bulk_slots, self._config.transfer_max_bytes // SLOT_BYTES + 1)
            refill.pause_s = 0.0
        finally:
            refill.in_flight_slots -= slots
            refill.transfers -= 1
            refill.changed.set()
            self._kick.set()

    def _back_off(self, refill: _Refill, now_s: float) -> None:
        refill.pause_s = min(_MAX_PAUSE_S, max(0.25, 2 * refill.pause_s))
        refill.not_before_s = now_s + refill.pause_s
