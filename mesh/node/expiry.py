"""What is old: by the wall clock, but never because the wall clock leapt.

Between two looks the wall clock must advance as the monotonic one does. A leap forward would make
every key look expired at once, so from then on nothing expires for one key lifetime: keys may live
twice as long, and none is lost. A leap back ages nothing. Both are alarmed. How long expiry is held
back survives a restart; a leap while the node is down cannot be told from a long time down.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from mesh.node.keyports import Surroundings
from mesh.store.store import Store

LEAP_S = 30.0
"""Less than this is a clock being corrected, or an event loop that was busy."""
ALARM = "node/clock"
_HELD_UNTIL = "expiry/held-until"
_ALARM_LIFE_S = 3600.0

_LOG = logging.getLogger("keymesh.expiry")


class Expiry:
    """Tells the time by which keys expire.

    Args:
        around: clocks and alarms.
        store: remembers how long expiry is held back.
        lifetime_s: of a key.
        spawn: starts background work.
    """

    def __init__(
        self, around: Surroundings, *, store: Store, lifetime_s: float, spawn: Callable[..., object]
    ) -> None:
        self._around = around
        self._store = store
        self._lifetime_s = lifetime_s
        self._spawn = spawn
        self._wall_s = around.now_s()
        self._monotonic_s = around.monotonic_s()
        self._leapt_at_s = float("-inf")
        stored = store.read(lambda tables: tables.meta.get(_HELD_UNTIL))
        self._held_until_s = min(float(stored or b"0"), self._wall_s + lifetime_s)

    @property
    def is_held(self) -> bool:
        """Whether the clock leapt forward less than a key lifetime ago."""
        return self._around.now_s() < self._held_until_s

    @property
    def wall_s(self) -> float:
        """Seconds since 1970 to stamp things with, also while expiry is held back."""
        return self._around.now_s()

    @property
    def now_s(self) -> float:
        """Seconds since 1970 to compare stamps with; 0, before all of them, while expiry is held back."""
        self.look()
        return 0.0 if self.is_held else self._around.now_s()

    def look(self) -> None:
        """Compare the clocks; call it now and then."""
        wall_s, monotonic_s = self._around.now_s(), self._around.monotonic_s()
        leap_s = (wall_s - self._wall_s) - (monotonic_s - self._monotonic_s)
        self._wall_s, self._monotonic_s = wall_s, monotonic_s
        if abs(leap_s) > LEAP_S:
            self._leapt(leap_s, wall_s, monotonic_s)
        elif monotonic_s - self._leapt_at_s > _ALARM_LIFE_S:
            self._around.alarms.clear(ALARM)

    def _leapt(self, leap_s: float, wall_s: float, monotonic_s: float) -> None:
        self._leapt_at_s = monotonic_s
        if leap_s > 0:
            self._held_until_s = wall_s + self._lifetime_s
        else:
            self._held_until_s = min(self._held_until_s, wall_s + self._lifetime_s)
        text = str(int(self._held_until_s)).encode()
        self._spawn(self._store.commit(lambda tables: tables.meta.put(_HELD_UNTIL, text)))
        _LOG.warning("the clock leapt", extra={"leap_s": round(leap_s), "is_held": self.is_held})
        self._around.alarms.raise_alarm(
            ALARM,
            "warning",
            f"the wall clock leapt by {leap_s:+.0f} s"
            + ("; no key expires for one key lifetime" if leap_s > 0 else ""),
            "keep the clock with NTP, slewing: key lifetimes, certificates and logs go by it",
        )
