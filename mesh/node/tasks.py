"""Background tasks of one node: kept, bounded in life, and never failing silently."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from mesh.errors import MeshError

T = TypeVar("T")

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

    async def drain(self) -> None:
        """Waits until nothing is under way; for tests and for a graceful stop."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def close(self) -> None:
        """Cancels what is under way and waits for it."""
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
