"""Noticing that files changed, cheaply and without threads.

Certificates, keys and deny lists are replaced while processes run, often by a
symbolic link swap. ``FileWatch`` compares what ``stat`` says and asks the disk at
most once per interval, so that hot paths may call it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_Stamp = tuple[tuple[int, int, int] | None, ...]


class FileWatch:
    """Tells whether any of some files changed since last asked.

    Args:
        paths: the files; one that is missing counts as a state of its own.
        interval_s: least time between two looks at the disk.
        now_s: monotonic seconds.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        *,
        interval_s: float = 1.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = tuple(paths)
        self._interval_s = interval_s
        self._now_s = now_s
        self._next_s = now_s() + interval_s
        self._stamp = self._look()

    def changed(self) -> bool:
        """Whether something changed since the last True (or since construction)."""
        now_s = self._now_s()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._interval_s
        stamp = self._look()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        return True

    def _look(self) -> _Stamp:
        return tuple(_stamp_of(path) for path in self._paths)


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - os.stat skips a Path allocation on hot paths
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
