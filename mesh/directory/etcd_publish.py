"""Publishing to etcd: what this end wants to say, kept there under one lease.

Owns the lease and the newest value per key. Wanting is immediate and never fails; writing
happens when etcd takes it. A key that vanished (lease expired, etcd restored from an old
backup, somebody deleted it) is written again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

from mesh.directory.etcd import EtcdClient, LeaseGoneError
from mesh.directory.etcd_follow import pause_s
from mesh.errors import MeshError

WITHDRAW_S = 1.0
"""How long a stop waits for etcd to take the records out; they expire anyway."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Wanted:
    value: bytes
    leased: bool


class Publisher:
    """Writes wanted entries and renews the lease that some of them hang on.

    Args:
        client: to write with.
        lease_s: life of the lease; renewed three times in that.
        clock: monotonic seconds.
    """

    def __init__(self, client: EtcdClient, lease_s: int, clock: Callable[[], float]) -> None:
        self._client = client
        self._lease_s = lease_s
        self._clock = clock
        self._wanted: dict[bytes, _Wanted] = {}
        self._dirty: set[bytes] = set()
        self._wake = asyncio.Event()
        self._lease = 0
        self._renew_at_s = 0.0

    def want(self, key: bytes, value: bytes, *, leased: bool) -> None:
        """Has ``key`` hold ``value`` from now on; the newest value wins."""
        wanted = _Wanted(value, leased)
        if self._wanted.get(key) != wanted:
            self._wanted[key] = wanted
            self._dirty.add(key)
            self._wake.set()

    def want_no_leased(self) -> None:
        """Has no entry of this end's hang on the lease any more; it is given back, so that they vanish."""
        for key in [key for key, wanted in self._wanted.items() if wanted.leased]:
            del self._wanted[key]
            self._dirty.discard(key)
            self._wake.set()

    def lost(self, key: bytes) -> None:
        """Told that etcd no longer has ``key``: writes it again if it is ours."""
        if key in self._wanted:
            self._dirty.add(key)
            self._wake.set()

    def listed(self, keys: Collection[bytes]) -> None:
        """Told all keys that etcd has: writes those of ours that are missing."""
        for key in self._wanted.keys() - keys:
            self.lost(key)

    async def run(self) -> None:
        """Runs until cancelled."""
        failures = 0
        while True:
            self._wake.clear()
            try:
                await self._round()
            except MeshError as error:
                if isinstance(error, LeaseGoneError):
                    self._lease = 0
                failures += 1
                if failures == 1:
                    _log.warning("directory took no records; trying on", extra={"error": str(error)})
                await asyncio.sleep(pause_s(failures))
                continue
            failures = 0
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    max(0.0, self._renew_at_s - self._clock()) if self._lease else None
                ):
                    await self._wake.wait()

    async def withdraw(self) -> None:
        """Takes the leased entries out, if etcd answers soon; call it after ``run`` ended."""
        if self._lease:
            with suppress(MeshError, TimeoutError):
                async with asyncio.timeout(WITHDRAW_S):
                    await self._client.revoke(self._lease)
            self._lease = 0

    async def _round(self) -> None:
        if self._lease and not any(wanted.leased for wanted in self._wanted.values()):
            await self._client.revoke(self._lease)
            self._lease = 0
        if self._lease and self._clock() >= self._renew_at_s:
            if await self._client.keep_alive(self._lease) == 0:
                self._lease = 0
            self._renew_at_s = self._clock() + self._lease_s / 3
        leased = {key for key, wanted in self._wanted.items() if wanted.leased}
        if leased and not self._lease:
            self._lease = await self._client.grant(self._lease_s)
            self._renew_at_s = self._clock() + self._lease_s / 3
            self._dirty |= leased
        while self._dirty:
            key = next(iter(self._dirty))
            wanted = self._wanted[key]
            await self._client.put(key, wanted.value, lease=self._lease if wanted.leased else 0)
            if self._wanted.get(key, wanted) is wanted:
                self._dirty.discard(key)
