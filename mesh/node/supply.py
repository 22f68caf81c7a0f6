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
from mesh.core.transfer import KEY_PART_BYTES, SLOT_BYTES
from mesh.errors import ErrorReason, MeshError, ShortageError, UnavailableError
from mesh.node.establish import Establisher
from mesh.node.keyports import KeyPlaneConfig, Surroundings
from mesh.node.paths import Paths, Planned
from mesh.node.reserves import Reserves
from mesh.node.tasks import Background
from mesh.node.underway import BULK, ON_DEMAND, Order
from mesh.ops.logging import log_soon

_LEAST_BULK_SLOTS = 64
_FIRST_BULK_SLOTS = 1024
_BULK_IN_FLIGHT = 4
_BULK_TIMEOUT_S = 4.0
_REFILL_EVERY_S = 1.0
_MAX_PAUSE_S = 8.0
_WAIT_FOR_REFILL_S = 0.15
_RECENT_S = 3600.0
_FORGET_LOSS_S = 10.0
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
    """The refill of one reserve.

    Transfers double until one is lost or refused somewhere on its way; each loss halves them, and
    until none was lost for a while they stay as they are. So a route that runs dry again and again
    is probed with little, and one that was only cut for a moment is soon used in full.
    """

    water: WaterMarks
    bulk_slots: int = _FIRST_BULK_SLOTS
    lost_at_s: float = -_RECENT_S
    in_flight_slots: int = 0
    transfers: int = 0
    asked_at_s: float = -_RECENT_S
    pause_s: float = 0.0
    not_before_s: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def grown(self, now_s: float, at_most: int) -> None:
        """A transfer arrived."""
        if now_s - self.lost_at_s > _FORGET_LOSS_S:
            self.bulk_slots = min(at_most, 2 * self.bulk_slots)
        self.pause_s = 0.0

    def shrunk(self, slots: int, now_s: float, pause_s: float) -> None:
        """A transfer of that size was lost, or a share of it refused."""
        self.lost_at_s = now_s
        self.bulk_slots = max(_LEAST_BULK_SLOTS, min(self.bulk_slots, slots) // 2)
        self.back_off(now_s, pause_s)

    def back_off(self, now_s: float, pause_s: float = 0.0) -> None:
        """Waits, each time longer."""
        self.pause_s = min(_MAX_PAUSE_S, max(0.25, 2 * self.pause_s))
        self.not_before_s = max(self.not_before_s, now_s + max(self.pause_s, pause_s))


class Supply:
    """Draws keys towards peers and keeps the outbound reserves filled."""

    def __init__(
        self,
        around: Surroundings,
        *,
        reserves: Reserves,
        paths: Paths,
        establisher: Establisher,
        tasks: Background,
        config: KeyPlaneConfig,
    ) -> None:
        self._around = around
        self._reserves = reserves
        self._paths = paths
        self._establisher = establisher
        self._tasks = tasks
        self._config = config
        self._batches: dict[str, _Batch] = {}
        self._refills: dict[str, _Refill] = {}
        self._kick = asyncio.Event()
        self._planned: Planned = {}
        self._doubted: set[str] = set()
        self.prefilled: frozenset[str] = frozenset()
        #: Keys drawn towards each peer since the start, and their bytes: for metrics.
        self.drawn: dict[str, tuple[int, int]] = {}

    # drawing

    def draw_now(self, peer: str, master: str, slave: str, number: int, size_bytes: int) -> Keys | None:
        """Keys from the reserve as it is, without waiting; None if that is not possible now."""
        book = self._establisher.current(peer)
        if book is None:
            return None
        keys = book.try_draw(number, size_bytes, master, slave, self._around.now_s())
        if keys is not None:
            count, nbytes = self.drawn.get(peer, (0, 0))
            self.drawn[peer] = count + number, nbytes + number * size_bytes
            if book.level_bytes < self._config.low_water_bytes:
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
            book = self._establisher.current(peer)
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
        if batch is not None:
            log_soon(_LOG, "waits for another request's establish", peer=peer, other=batch.request_id)
        else:
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
        frame = min(self._config.transfer_max_bytes, self._paths.frame_bytes(peer))
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
        book = self._establisher.current(peer)
        level = 0 if book is None else book.level_bytes
        wanted = refill.water.wanted(level, refill.in_flight_slots * KEY_PART_BYTES) // KEY_PART_BYTES
        while wanted > 0 and refill.transfers < _BULK_IN_FLIGHT:
            try:
                spare = self._paths.spare_bytes(peer, self._planned) // SLOT_BYTES
                slots = min(wanted, refill.bulk_slots, self._transfer_slots(peer), spare)
            except ShortageError:
                refill.back_off(now_s)
                return
            if slots < min(wanted, _LEAST_BULK_SLOTS):
                return
            wanted -= slots
            self._paths.plan(peer, slots * SLOT_BYTES, self._planned)
            refill.in_flight_slots += slots
            refill.transfers += 1
            self._tasks.spawn(self._fill(peer, refill, slots))

    async def _fill(self, peer: str, refill: _Refill, slots: int) -> None:
        """One bulk transfer; the size of the next depends on what became of it."""

        refusals = 0

        def refused(pause_s: float) -> None:
            nonlocal refusals
            refusals += 1
            if refusals == 1:
                refill.shrunk(slots, self._around.monotonic_s(), pause_s)

        try:
            order = Order(peer, slots, priority=BULK, persists=True, on_refused=refused)
            await self._establisher.establish(order, timeout_s=_BULK_TIMEOUT_S)
        except MeshError as exc:
            _LOG.info("refill failed", extra={"peer": peer, "slots": slots, "cause": str(exc)})
            if not refusals:
                refill.shrunk(slots, self._around.monotonic_s(), exc.retry_after_s)
        else:
            at_most = self._config.transfer_max_bytes // SLOT_BYTES + 1
            if not refusals:
                refill.grown(self._around.monotonic_s(), at_most)
        finally:
            refill.in_flight_slots -= slots
            refill.transfers -= 1
            refill.changed.set()
            self._kick.set()
