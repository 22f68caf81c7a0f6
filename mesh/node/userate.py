"""How fast something that only grows is being used, and how long the rest lasts. Time is an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass

_HALF_LIFE_S = 60.0
#: A slower use is none: the rest lasts for ever.
_IDLE_BYTES_PER_S = 1.0


@dataclass(slots=True)
class UseRate:
    """The smoothed rate of a position; a use counts half after a minute.

    Attributes:
        bytes_per_s: 0 before the second look.
        position: the last one seen; give the first where it is known.
    """

    bytes_per_s: float = 0.0
    position: int | None = None

    def look(self, position: int, seconds: float) -> None:
        """Take the present position; ``seconds`` since the last look. One that fell begins anew."""
        if self.position is None or position < self.position:
            self.position = position
        elif seconds > 0:
            rate = (position - self.position) / seconds
            self.bytes_per_s += (1 - 2 ** (-seconds / _HALF_LIFE_S)) * (rate - self.bytes_per_s)
            self.position = position

    def seconds_to_empty(self, usable_bytes: int) -> float:
        """How long that much lasts at the present rate; infinity when nothing is used."""
        if self.bytes_per_s < _IDLE_BYTES_PER_S:
            return math.inf
        return usable_bytes / self.bytes_per_s
