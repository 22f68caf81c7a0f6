"""A disk that has refused a block is asked before a device is.

What a device gave it does not give again. With a full disk under it, an ingest that went on
would take key after key and lose it; after the first refusal it writes a probe first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mesh.errors import ErrorReason, UnavailableError
from mesh.node.ports import LinkAlarms
from mesh.store.store import Store

ALARM = "node/disk-full"


class DiskGuard:
    """Remembers whether the disk refused, and finds out when it is over.

    Args:
        store: where blocks go.
        alarms: told when it begins and ends.
        randomness: cryptographic, by number of bytes; names probes.
        probe_bytes: as much as a block needs.
    """

    def __init__(
        self, store: Store, alarms: LinkAlarms, randomness: Callable[[int], bytes], *, probe_bytes: int
    ) -> None:
        self._store = store
        self._alarms = alarms
        self._randomness = randomness
        self._probe_bytes = probe_bytes
        self.is_doubted = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes when the disk refuses what is done inside."""
        try:
            yield
        except UnavailableError as error:
            if error.reason is ErrorReason.DISK_FULL:
                self.is_doubted = True
                self._alarms.raise_alarm(
                    ALARM,
                    "critical",
                    f"the disk takes no more blocks of key: {error.message}",
                    "free space where data_dir lies; ingest and deliveries go on by themselves then",
                )
            raise

    async def check(self) -> None:
        """Return if a block can be written now.

        Raises:
            UnavailableError: (disk-full) it cannot.
        """
        if not self.is_doubted:
            return
        name = f"probe-{self._randomness(8).hex()}"
        with self.watching():
            await self._store.pads.create(name, bytes(self._probe_bytes))
            await self._store.pads.remove(name)
            await self._store.commit(lambda tables: tables.meta.put("disk-probe", name.encode()))
        self.is_doubted = False
        self._alarms.clear(ALARM)
