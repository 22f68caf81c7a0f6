"""Background tasks of one node: kept, bounded in life, and never failing silently."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from mesh.core.border_rules import MAX_PAUSE_S, pause_s
from mesh.errors import MeshError

T = TypeVar("T")

#: What must be done still gets this long when the node stops.
_LAST_WORDS_S = 1.0

_LOG = logging.getLogger("keymesh.tasks")


async def unbroken(work: Coroutine[Any, Any, T]) -> T:
    """Awaits ``work``, which goes on to its end when the caller is cancelled meanwhile.

    A commit that was queued may become durable although nobody waits for it any more; what
    follows it in memory must then happen too, or memory and disk tell different stories. Give it
    only work whose every wait ends by itself (the disk's does).
    """
    return await asyncio.shield(asyncio.get_running_loop().create_task(work))


class Background:
    """Tasks that nobody awaits. Errors are logged with what they mean, never swallowed."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._needed: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts ``work``; after ``close`` it is cancelled at once."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        if self._is_closed:
            task.cancel()
        return task

    def keep(self, name: str, loop: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Task[Any]:
        """Runs a loop for as long as the node runs: one that breaks is logged, and begins again."""
        return self.spawn(self._kept(name, loop))

    async def _kept(self, name: str, loop: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        clock = asyncio.get_running_loop().time
        breaks = 0
        while True:
            began_s = clock()
            try:
                await loop()
            except Exception:  # noqa: BLE001 - whatever it is must not end the loop in silence
                _LOG.exception("a background loop broke and begins again", extra={"loop": name})
            else:
                return
            breaks = 1 if clock() - began_s > MAX_PAUSE_S else breaks + 1
            await asyncio.sleep(pause_s(breaks))

    def insist(self, what: str, work: Callable[[], Awaitable[object]]) -> None:
        """Does ``work``, again after every MeshError, until it is done; ``close`` waits a moment for it.

        Args:
            what: for the log.
        """
        self._need(self.spawn(self._insisted(what, work)))

    async def unbroken(self, work: Coroutine[Any, Any, T]) -> T:
        """As the function of that name; ``close`` waits for what follows from it, too."""
        return await asyncio.shield(self._need(asyncio.get_running_loop().create_task(work)))

    def _need(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        self._needed.add(task)
        task.add_done_callback(self._needed.discard)
        return task

    @staticmethod
    async def _insisted(what: str, work: Callable[[], Awaitable[object]]) -> None:
        attempts = 0
        while True:
            try:
                await work()
            except MeshError as exc:
                attempts += 1
                _LOG.warning("not possible yet: %s", what, extra={"cause": str(exc)})
                await asyncio.sleep(pause_s(attempts))
            else:
                return

    async def drain(self) -> None:
        """Waits until nothing is under way; for tests and for a graceful stop."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def close(self) -> None:
        """Cancels what is under way, what must be done a little later, and waits for it."""
        clock = asyncio.get_running_loop().time
        until_s = clock() + _LAST_WORDS_S
        while self._needed and (left_s := until_s - clock()) > 0:
            await asyncio.wait(set(self._needed), timeout=left_s)
        self._is_closed = True
        while self._tasks:
            for task in set(self._tasks):
                task.cancel()
            await asyncio.wait(set(self._tasks), timeout=1.0)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, MeshError):
            _LOG.warning("background work failed: %s", error, extra={"reason": error.reason.value})
        elif error is not None:
            _LOG.error("background work failed", exc_info=error)
