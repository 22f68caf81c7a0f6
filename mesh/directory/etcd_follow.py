"""Following a prefix in etcd: list, watch, resume, list again when history is gone.

Owns which revision comes next and how long ago etcd last answered. Must not interpret what
the entries mean: that is ``mesh.directory.etcd_directory``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from mesh.directory.etcd import Change, CompactedError, EtcdClient
from mesh.errors import MeshError

RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Pauses between attempts while etcd is away; the last one repeats."""

Apply = Callable[[tuple[Change, ...], bool], Awaitable[None]]
"""Takes changes; the flag says that they are everything there is."""

_log = logging.getLogger(__name__)


def pause_s(failures: int) -> float:
    """How long to wait after that many failures in a row."""
    return RETRY_S[min(failures, len(RETRY_S)) - 1]


class Follower:
    """Keeps ``apply`` told about a prefix, whatever happens to etcd.

    Args:
        client: to ask.
        prefix: of the keys.
        apply: awaited for each batch, in order.
        clock: monotonic seconds.
    """

    def __init__(self, client: EtcdClient, prefix: bytes, apply: Apply, clock: Callable[[], float]) -> None:
        self.first_attempt = asyncio.Event()
        self.answered_at_s = float("-inf")
        self._client = client
        self._prefix = prefix
        self._apply = apply
        self._clock = clock
        self._next_revision = 0
        self._failures = 0

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            try:
                if self._next_revision == 0:
                    await self._list()
                await self._watch()
            except CompactedError as error:
                _log.info("directory history was compacted; listing again", extra={"error": str(error)})
                self._next_revision = 0
            except MeshError as error:
                self._failures += 1
                if self._failures == 1:
                    _log.warning(
                        "directory is away; going on with what is known", extra={"error": str(error)}
                    )
                self.first_attempt.set()
                await asyncio.sleep(pause_s(self._failures))

    async def _list(self) -> None:
        entries, revision = await self._client.range(self._prefix)
        self._answered()
        await self._apply(tuple(Change(entry.key, entry.value) for entry in entries), True)
        self._next_revision = revision + 1
        self.first_attempt.set()

    async def _watch(self) -> None:
        async with aclosing(self._client.watch(self._prefix, self._next_revision)) as stream:
            async for batch in stream:
                self._answered()
                if batch.changes:
                    await self._apply(batch.changes, False)
                    self._next_revision = batch.last_revision + 1
                elif batch.store_revision < self._next_revision - 1:
                    # A restored or new cluster, or a member that lags: a watch "from the future"
                    # would stay silent for ever.
                    _log.warning("directory revision fell; listing again")
                    self._next_revision = 0
                    await asyncio.sleep(RETRY_S[0])
                    return

    def _answered(self) -> None:
        if self._failures:
            _log.info("directory is back", extra={"failures": self._failures})
        self._failures = 0
        self.answered_at_s = self._clock()
