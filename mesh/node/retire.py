"""Retiring: the source tells the target what it may wipe and forget.

Owns protocol 4.7 at the source: only the source expires, after the key lifetime, cumulatively, never
past an unanswered sealed message; closed epochs are retired as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable

from mesh.errors import MeshError
from mesh.node.expiry import Expiry
from mesh.node.jobs import Jobs
from mesh.node.outbound import OutboundBook
from mesh.node.reserves import RETIRE_ALL, OldEpoch, Reserves
from mesh.store.store import Store
from mesh.store.tables import Tables
from mesh.v1.peer_pb2 import Retire, SealedMessage

_TIMEOUT_S = 30.0

_LOG = logging.getLogger("keymesh.retire")


class Retirer:
    """Sends retires when key lifetimes end; one at a time per peer."""

    def __init__(
        self, expiry: Expiry, *, store: Store, reserves: Reserves, jobs: Jobs, lifetime_s: float
    ) -> None:
        self._expiry = expiry
        self._store = store
        self._reserves = reserves
        self._jobs = jobs
        self._lifetime_s = lifetime_s
        self._due: dict[int, int] = {}

    async def run_once(self) -> None:
        """Retires whatever is due at every peer; failures are tried again the next time."""
        for book in list(self._reserves.outbound.values()):
            await self._guarded(self._retire_current(book), book.peer)
        for peer in self._reserves.old_peers():
            for old in list(self._reserves.old_epochs(peer)):
                self._reserves.closed_by(old, int(self._expiry.wall_s))
                if old.closed_at_s + self._lifetime_s <= self._expiry.now_s:
                    await self._guarded(self._retire_old(peer, old), peer)

    async def _guarded(self, work: Awaitable[None], peer: str) -> None:
        try:
            await work
        except MeshError as exc:
            _LOG.info("retire failed", extra={"peer": peer, "cause": str(exc)})

    async def _retire_current(self, book: OutboundBook) -> None:
        book.note_spent(self._expiry.wall_s)
        expired = book.clock.expired_below(self._expiry.now_s, self._lifetime_s)
        due = self._due[book.reserve_id] = max(self._due.get(book.reserve_id, 0), expired)
        bounds = [self._jobs.lowest_unanswered(book.peer, book.epoch), book.slots.lowest_sealed_in_flight]
        below = min([due, *(bound for bound in bounds if bound is not None)])
        if below <= book.retired_below:
            return
        # Sealed slots below it go at the target too: give them up here first.
        book.forget_sealed_below(below)
        message = SealedMessage(retire=Retire(epoch=book.epoch, below_slot=below))
        answer = await self._jobs.send(book.peer, message, timeout_s=_TIMEOUT_S)
        if not answer.applied:
            return

        def change(tables: Tables) -> None:
            tables.reserves.set_retired_below(book.reserve_id, below)
            tables.slots.forget_draw_times_below(book.reserve_id, below)
            tables.slots.forget_used_below(book.reserve_id, below)

        await self._store.commit(change)
        book.retired_below = max(book.retired_below, below)

    async def _retire_old(self, peer: str, old: OldEpoch) -> None:
        message = SealedMessage(retire=Retire(epoch=old.epoch, below_slot=RETIRE_ALL))
        answer = await self._jobs.send(peer, message, timeout_s=_TIMEOUT_S)
        if answer.applied:
            await self._reserves.forget_old(peer, old)
