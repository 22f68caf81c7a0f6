"""The state of a simulated device pair: how much key there is, and who still has to fetch what.

Pure: time and randomness are arguments. Fresh key is a count, not bytes: a key's
bytes come into being when one end takes it and are kept only until the other end
fetches it, so memory is bounded by ``pending_bytes`` whatever the buffer holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple
from uuid import UUID

from mesh.devices.config import Faults
from mesh.errors import CallerError, ErrorReason, ShortageError


class PairKey(NamedTuple):
    """One key at one end; never printed."""

    key_id: str
    value: bytes


class DevicePair:
    """Fresh key shared by ends 0 and 1, and keys each end has still to fetch.

    Args:
        rate_bps: secret key rate, bit/s.
        buffer_bytes: bound on fresh key.
        pending_bytes: bound, per end, on keys that the other end took.
        initial_bytes: fresh key at ``now_s``.
        now_s: monotonic seconds.
        randomness: returns that many random bytes.
        faults: live fault switches, shared with the control endpoint.
    """

    def __init__(
        self,
        *,
        rate_bps: float,
        buffer_bytes: int,
        pending_bytes: int,
        initial_bytes: int,
        now_s: float,
        randomness: Callable[[int], bytes],
        faults: Faults,
    ) -> None:
        self.rate_bps = rate_bps
        self.faults = faults
        self.handed_out_bytes = 0
        self.lost_keys = 0
        self._buffer_bytes = buffer_bytes
        self._pending_limit = pending_bytes
        self._fresh = float(min(initial_bytes, buffer_bytes))
        self._then_s = now_s
        self._randomness = randomness
        self._pending: tuple[OrderedDict[str, bytes], OrderedDict[str, bytes]] = (
            OrderedDict(),
            OrderedDict(),
        )
        self._pending_bytes = [0, 0]

    @property
    def buffer_bytes(self) -> int:
        """The bound on fresh key."""
        return self._buffer_bytes

    def level_bytes(self, now_s: float) -> int:
        """Produce up to ``now_s`` and return the fresh key there is."""
        elapsed_s = max(0.0, now_s - self._then_s)
        self._then_s = max(self._then_s, now_s)
        if not self.faults.stall:
            self._fresh = min(self._buffer_bytes, self._fresh + elapsed_s * self.rate_bps / 8)
        return int(self._fresh)

    def pending_bytes(self, end: int) -> int:
        """Bytes that the other end took and ``end`` has not fetched."""
        return self._pending_bytes[end]

    def take(self, end: int, number: int, size_bytes: int, now_s: float) -> list[PairKey]:
        """Hand out fresh keys at ``end`` and leave them for the other end to fetch.

        Raises:
            ShortageError: the buffer holds less; nothing is consumed.
        """
        total = number * size_bytes
        if self.level_bytes(now_s) < total:
            raise ShortageError("not enough key in the device", facts={"asked_bytes": total})
        self._fresh -= total
        self.handed_out_bytes += total
        stream = self._randomness(total + 16 * number)
        keys = []
        for index in range(number):
            start = total + 16 * index
            key_id = str(UUID(bytes=stream[start : start + 16], version=4))
            value = stream[index * size_bytes : (index + 1) * size_bytes]
            keys.append(PairKey(key_id, value))
            self._leave(1 - end, key_id, value)
        return keys

    def _leave(self, end: int, key_id: str, value: bytes) -> None:
        if self.faults.lose_keys:
            self.faults.lose_keys -= 1
            self.lost_keys += 1
            return
        if self.faults.mismatch_keys:
            self.faults.mismatch_keys -= 1
            value = bytes([value[0] ^ 1]) + value[1:]
        pending = self._pending[end]
        pending[key_id] = value
        self._pending_bytes[end] += len(value)
        while self._pending_bytes[end] > self._pending_limit:
            _, dropped = pending.popitem(last=False)
            self._pending_bytes[end] -= len(dropped)
            self.lost_keys += 1

    def fetch(self, end: int, key_ids: Sequence[str]) -> list[PairKey]:
        """Hand out at ``end`` keys that the other end took: all of them or none.

        Raises:
            CallerError: ``UNKNOWN_KEY``, one is not here (any more), or asked for twice.
        """
        pending = self._pending[end]
        if len(set(key_ids)) != len(key_ids) or any(key_id not in pending for key_id in key_ids):
            raise CallerError(
                "one or more keys specified are not found on KME", reason=ErrorReason.UNKNOWN_KEY
            )
        keys = [PairKey(key_id, pending.pop(key_id)) for key_id in key_ids]
        self._pending_bytes[end] -= sum(len(key.value) for key in keys)
        return keys

    def restart(self, now_s: float) -> None:
        """Lose everything buffered, as a device does that restarts."""
        self._fresh = 0.0
        self._then_s = now_s
        for end in (0, 1):
            self.lost_keys += len(self._pending[end])
            self._pending[end].clear()
            self._pending_bytes[end] = 0
