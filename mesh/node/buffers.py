"""Foreign keys kept ready: acknowledged by the far end, released when their master asks.

Owns the ``buffer`` of an SAE pair (off by default): with it no request waits for an ocean. A buffered key
is durable here and at the far end; it leaves the buffer durably before it is handed out, is voided when
it gets old or the policy asks for another grade, and can be taken back by the border as long as it is here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from mesh.core.border_rules import BufferSpec, pause_s
from mesh.errors import MeshError
from mesh.node.border.ports import After
from mesh.node.keyports import Surroundings
from mesh.node.supply import Keys
from mesh.node.tasks import Background, unbroken
from mesh.store.store import Store
from mesh.store.tables import BufferRow, Tables

FILL_BATCH = 32
FILL_TIMEOUT_S = 30.0
_FILL_EVERY_S = 0.25
_AGE_EVERY_S = 10.0
_SIDE_BY_SIDE = 4

_LOG = logging.getLogger("keymesh.buffers")


@dataclass(slots=True)
class _Stock:
    """The buffer of one pair."""

    spec: BufferSpec
    rows: deque[BufferRow]
    filling: int = 0
    attempts: int = 0
    not_before_s: float = 0.0


Fill = Callable[[BufferSpec, int, "Callable[[Sequence[BufferRow]], None]"], Awaitable[None]]
Void = Callable[[str, str, Sequence[bytes]], Awaitable[None]]


class Buffers:
    """The buffers of this node's SAEs.

    Args:
        fill: hands fresh keys of a pair over; their rows are durable with the decision, and told then.
        void: voids keys at their border.
        is_granted: whether a key has the grade that is asked for by now; one that has not is dropped.
    """

    def __init__(
        self,
        around: Surroundings,
        specs: Iterable[BufferSpec],
        *,
        store: Store,
        fill: Fill,
        void: Void,
        is_granted: Callable[[BufferRow], bool],
        tasks: Background,
    ) -> None:
        self._around = around
        self._store = store
        self._fill = fill
        self._void = void
        self._is_granted = is_granted
        self._tasks = tasks
        self._stocks = {(spec.master, spec.slave): _Stock(spec, deque()) for spec in specs}
        #: Keys that are not handed out any more and not voided yet, and their borders.
        self._leaving: dict[bytes, str] = {}
        self._kick = asyncio.Event()

    def load(self) -> None:
        """Reads back what is ready; keys of pairs that are no longer buffered stay until they are old."""
        for row in self._store.read(lambda tables: tables.border.buffered()):
            pair = (row.master, row.slave)
            if pair not in self._stocks:
                spec = BufferSpec(row.master, row.slave, 0, len(row.value))
                self._stocks[pair] = _Stock(spec, deque())
            self._stocks[pair].rows.append(row)

    def level(self, master: str, slave: str) -> int:
        """Keys of a pair that are ready."""
        stock = self._stocks.get((master, slave))
        return 0 if stock is None else len(stock.rows)

    async def take(self, master: str, slave: str, number: int, size_bytes: int) -> tuple[Keys, str] | None:
        """Ready keys of a pair, durably out of the buffer; None when there are too few of that size.

        Those of a caller that leaves are voided.

        Raises:
            UnavailableError: the store could not be written; nothing was handed out.
        """
        stock = self._stocks.get((master, slave))
        if stock is None:
            return None
        now_s = self._around.now_s()
        fresh = (
            row
            for row in stock.rows
            if len(row.value) == size_bytes and row.expires_at_s > now_s and self._is_granted(row)
        )
        rows = list(islice(fresh, number))
        if len(rows) < number:
            return None
        for row in rows:
            stock.rows.remove(row)
        self._kick.set()
        ids = [row.key_id for row in rows]
        try:
            await unbroken(self._store.commit(lambda tables: tables.border.take_buffered(ids)))
        except MeshError:
            stock.rows.extendleft(reversed(rows))
            raise
        except asyncio.CancelledError:
            self._discard(rows)
            raise
        return [(row.key_id, row.value) for row in rows], rows[0].grade

    def unbuffer(self, tables: Tables, after: After, key_id: bytes, border: str) -> bool:
        """Takes a key back for its border, inside a change of the store; False if it is not here."""
        if self._leaving.get(key_id) == border:
            return True
        for stock in self._stocks.values():
            for row in stock.rows:
                if row.key_id == key_id and row.border == border:
                    tables.border.take_buffered([key_id])
                    stock.rows.remove(row)
                    after.steps.append(self._kick.set)
                    after.undo.append(partial(stock.rows.appendleft, row))
                    return True
        return False

    async def run(self) -> None:
        """Fills and ages until cancelled."""
        age_at_s = self._around.monotonic_s()
        for stock in self._stocks.values():
            # Fills of a run that broke are over, some before they began.
            stock.filling = 0
        async with asyncio.TaskGroup() as group:
            while True:
                for stock in self._stocks.values():
                    while (number := self._wanted(stock)) > 0:
                        stock.filling += number
                        group.create_task(self._fill_one(stock, number))
                if self._around.monotonic_s() >= age_at_s:
                    age_at_s = self._around.monotonic_s() + _AGE_EVERY_S
                    self._drop_old()
                self._kick.clear()
                try:
                    async with asyncio.timeout(_FILL_EVERY_S):
                        await self._kick.wait()
                except TimeoutError:
                    continue

    def _wanted(self, stock: _Stock) -> int:
        if self._around.monotonic_s() < stock.not_before_s or stock.filling >= _SIDE_BY_SIDE * FILL_BATCH:
            return 0
        return min(FILL_BATCH, stock.spec.keys - len(stock.rows) - stock.filling)

    async def _fill_one(self, stock: _Stock, number: int) -> None:
        try:
            await self._fill(stock.spec, number, stock.rows.extend)
        except MeshError as exc:
            stock.attempts += 1
            stock.not_before_s = self._around.monotonic_s() + pause_s(stock.attempts)
            _LOG.info(
                "buffer not filled",
                extra={"master": stock.spec.master, "slave": stock.spec.slave, "cause": str(exc)},
            )
        else:
            stock.attempts = 0
        finally:
            stock.filling -= number
            self._kick.set()

    def _drop_old(self) -> None:
        now_s = self._around.now_s()
        for stock in self._stocks.values():
            old = [row for row in stock.rows if row.expires_at_s <= now_s or not self._is_granted(row)]
            for row in old:
                stock.rows.remove(row)
            self._discard(old)

    def _discard(self, rows: Sequence[BufferRow]) -> None:
        """Voids keys at their borders, then forgets them here; until then a restart finds them again."""
        for border, master in sorted({(row.border, row.master) for row in rows}):
            ids = [row.key_id for row in rows if (row.border, row.master) == (border, master)]
            self._leaving.update(dict.fromkeys(ids, border))
            self._tasks.insist(
                f"voiding buffered keys at {border}", partial(self._leave, border, master, ids)
            )

    async def _leave(self, border: str, master: str, ids: Sequence[bytes]) -> None:
        await self._void(border, master, ids)
        await self._store.commit(lambda tables: tables.border.forget_buffered(ids))
        for key_id in ids:
            self._leaving.pop(key_id, None)
