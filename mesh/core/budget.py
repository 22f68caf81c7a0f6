"""Bounds on what a stranger can make us do: failures per hour, fetches per second.

Owns protocol 1.7 (failed tags) and the rate cap of 2.3. Time is an argument.
"""

from __future__ import annotations

from collections import deque

MAX_FAILED_TAGS = 1 << 10
FAILED_TAGS_PER_S = 3600.0


class FailureBudget:
    """Counts failures in a sliding span of time.

    Args:
        limit: how many are one too many.
        span_s: seconds after which a failure is forgotten.
    """

    def __init__(self, limit: int = MAX_FAILED_TAGS, span_s: float = FAILED_TAGS_PER_S) -> None:
        self._span_s = span_s
        self._times: deque[float] = deque(maxlen=limit)
        self.total = 0

    def failed(self, now_s: float) -> bool:
        """Count one; whether the budget is spent."""
        self.total += 1
        self._times.append(now_s)
        return len(self._times) == self._times.maxlen and now_s - self._times[0] < self._span_s


class RateCap:
    """A token bucket.

    Args:
        per_s: tokens that come back each second.
        burst: most tokens at a time.
    """

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._tokens = float(burst)
        self._at_s: float | None = None

    def take(self, now_s: float) -> bool:
        """Take one token if there is one."""
        if self._at_s is not None:
            gained = max(0.0, now_s - self._at_s) * self._per_s
            self._tokens = min(float(self._burst), self._tokens + gained)
        self._at_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
