"""Requests for gateways: each leased to one gateway at a time, in order per exchange.

Owns leases, back-off and the order of requests about the same keys (the void of a key never runs beside
the request that hands it over). What is to be posted is durable in the store; who performs it now is
not: a lease ends with its result, when its time is over, or when its gateway starts again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from mesh.core.border_rules import pause_s
from mesh.node.keyports import Surroundings
from mesh.ops.logging import request_id
from mesh.store.tables import PostRow
from mesh.v1.border_pb2 import LeasedJob

LEASE_S = 10.0
MAX_IN_FLIGHT = 256

_LOG = logging.getLogger("keymesh.border")


@dataclass(slots=True, repr=False)
class Entry:
    """A request and how it went so far.

    Attributes:
        attempts: leases that ended without an answer that decides.
        is_doubtful: something of an earlier attempt may have arrived, or may still.
        refusals: answers 400 or 401.
        request_id: of the request that made it necessary; empty after a restart.
    """

    post: PostRow
    attempts: int = 0
    is_doubtful: bool = False
    refusals: int = 0
    is_waiting: bool = False
    lease_id: bytes = b""
    request_id: str = field(default_factory=request_id.get)


@dataclass(slots=True, repr=False)
class _Session:
    gateway: str
    session_id: bytes
    capacity: int
    leased: set[bytes] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: bool = False


@dataclass(slots=True, repr=False)
class _Lease:
    entry: Entry
    session: _Session
    ends_at_s: float


class Board:
    """What is to be posted, and which gateway does it now.

    Args:
        prepare: makes a request ready to leave, durably where that matters; None if it need not leave
            any more.
    """

    def __init__(
        self,
        around: Surroundings,
        *,
        prepare: Callable[[Entry], Awaitable[LeasedJob | None]],
    ) -> None:
        self._around = around
        self._prepare = prepare
        self._entries: dict[bytes, Entry] = {}
        self._ready: deque[bytes] = deque()
        self._parked: dict[bytes, deque[bytes]] = {}
        self._busy: set[bytes] = set()
        self._leases: dict[bytes, _Lease] = {}
        self._sessions: dict[str, _Session] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def has_room(self) -> bool:
        """Whether a gateway could take a request at once."""
        return any(len(one.leased) < one.capacity for one in self._sessions.values())

    @property
    def sessions(self) -> int:
        """Gateways that are connected."""
        return len(self._sessions)

    def add(self, post: PostRow, *, is_doubtful: bool = False) -> None:
        """A request is durable and may leave."""
        self._entries[post.job_id] = Entry(post, is_doubtful=is_doubtful)
        self._offer(post.job_id)

    def discard(self, job_id: bytes) -> None:
        """A request is done or has lost its reason; one that is leased ends as it ends."""
        self._entries.pop(job_id, None)

    def retry(self, entry: Entry, *, pause: float | None = None, retry_after_s: float = 0.0) -> None:
        """A request is to leave again after a pause, by default the back-off's."""
        if self._entries.get(entry.post.job_id) is not entry:
            return
        if pause is None:
            entry.attempts += 1
            chance = int.from_bytes(self._around.randomness(2), "big") / 65_536
            pause = pause_s(entry.attempts, retry_after_s=retry_after_s, chance=chance)
        asyncio.get_running_loop().call_later(pause, self._offer_if_current, entry)

    def _offer_if_current(self, entry: Entry) -> None:
        if self._entries.get(entry.post.job_id) is entry and not entry.lease_id:
            self._offer(entry.post.job_id)

    def _offer(self, job_id: bytes) -> None:
        self._ready.append(job_id)
        for session in self._sessions.values():
            session.changed.set()

    def _next(self) -> Entry | None:
        """The oldest ready request whose exchange has none under way."""
        while self._ready:
            entry = self._entries.get(self._ready.popleft())
            if entry is None or entry.lease_id:
                continue
            exchange = entry.post.exchange_id
            if exchange in self._busy:
                self._parked.setdefault(exchange, deque()).append(entry.post.job_id)
                continue
            return entry
        return None

    # leases

    async def feed(self, gateway: str, session_id: bytes, capacity: int) -> AsyncIterator[LeasedJob]:
        """Requests for one gateway, as it has room for them; an older stream of the same gateway ends."""
        session = _Session(gateway, session_id, max(1, min(capacity, MAX_IN_FLIGHT)))
        older = self._sessions.pop(gateway, None)
        if older is not None:
            older.is_over = True
            older.changed.set()
        # A gateway that starts again performs nothing of before.
        for lease_id in [key for key, lease in self._leases.items() if lease.session.gateway == gateway]:
            self._lapse(lease_id)
        self._sessions[gateway] = session
        _LOG.info("border gateway connected", extra={"gateway": gateway})
        try:
            while not session.is_over:
                entry = self._next() if len(session.leased) < session.capacity else None
                if entry is None:
                    session.changed.clear()
                    await session.changed.wait()
                    continue
                leased = await self._lease(session, entry)
                if leased is not None:
                    yield leased
        finally:
            if self._sessions.get(gateway) is session:
                del self._sessions[gateway]
                _LOG.warning("border gateway gone", extra={"gateway": gateway})

    async def _lease(self, session: _Session, entry: Entry) -> LeasedJob | None:
        lease_id = self._around.randomness(16)
        entry.lease_id = lease_id
        entry.is_waiting = False
        self._busy.add(entry.post.exchange_id)
        self._leases[lease_id] = _Lease(entry, session, self._around.monotonic_s() + LEASE_S)
        session.leased.add(lease_id)
        is_prepared = False
        try:
            leased = await self._prepare(entry)
            is_prepared = leased is not None
        finally:
            if not is_prepared:
                self._end(lease_id)
                self.retry(entry)
        if leased is not None:
            leased.lease_id = lease_id
            leased.lease_s = LEASE_S
        return leased

    def complete(self, gateway: str, lease_id: bytes) -> Entry | None:
        """Ends a lease with its result; None when it had ended before."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.session.gateway != gateway:
            return None
        self._end(lease_id)
        return lease.entry if self._entries.get(lease.entry.post.job_id) is lease.entry else None

    def expire(self) -> None:
        """Ends the leases whose time is over; call about once a second."""
        now_s = self._around.monotonic_s()
        for lease_id in [key for key, lease in self._leases.items() if lease.ends_at_s <= now_s]:
            self._lapse(lease_id)

    def _lapse(self, lease_id: bytes) -> None:
        """Nobody says what became of it."""
        entry = self._leases[lease_id].entry
        self._end(lease_id)
        entry.is_doubtful = True
        self.retry(entry)

    def _end(self, lease_id: bytes) -> None:
        lease = self._leases.pop(lease_id)
        lease.session.leased.discard(lease_id)
        lease.session.changed.set()
        lease.entry.lease_id = b""
        exchange = lease.entry.post.exchange_id
        self._busy.discard(exchange)
        for job_id in self._parked.pop(exchange, ()):
            self._offer(job_id)
