"""Where the bytes of PSRD tables come from: the operating system, or a device on top of it.

A device's bytes are XORed with the operating system's, so that a bad device never makes a
table worse than none, and a good one makes it truly random. A device that is stuck or stalls
is refused: opening and reading it never wait without bound. Must not keep what it drew.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from io import FileIO
from pathlib import Path
from typing import Protocol

import numpy as np

from mesh.errors import ConfigError, ErrorReason, UnavailableError

OS = "os"
_PROBE_BYTES = 64
_STEP_BYTES = 1 << 20
#: A device that gives nothing for so long is broken.
_STALL_S = 10.0
#: Between two looks at a device that has nothing yet: doubled from the first to the last.
_PAUSES_S = (0.0002, 0.02)


class RandomSource(Protocol):
    """Draws random bytes; blocking, so call it from a thread."""

    def read(self, count: int) -> bytes:
        """Exactly ``count`` fresh bytes."""
        ...

    def close(self) -> None:
        """Let go of the device."""
        ...


def open_random(name: str) -> RandomSource:
    """The source of that name: ``os`` or empty for the operating system, else a device file.

    Raises:
        ConfigError: no such device, or not one (a plain file would hold the same bytes each time).
    """
    return SystemRandom() if name in ("", OS) else DeviceRandom(Path(name))


def open_at_once(path: Path) -> FileIO:
    """A file for reading, neither whose opening (a pipe without a writer) nor whose reading waits.

    Raises:
        OSError: it cannot be opened.
    """
    flags = os.O_NONBLOCK | os.O_NOCTTY
    return FileIO(path, "rb", opener=lambda name, mode: os.open(name, mode | flags))


class SystemRandom:
    """The operating system's generator: computational, and said so in the docs."""

    def read(self, count: int) -> bytes:
        """Exactly ``count`` fresh bytes."""
        return os.urandom(count)

    def close(self) -> None:
        """Nothing to let go of."""


class DeviceRandom:
    """A character device or pipe, XORed with the operating system's generator.

    Args:
        path: the device.

    Raises:
        ConfigError: it cannot be opened, or is not a device.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = b""
        self._is_closed = False
        self._reads = threading.Lock()
        try:
            self._device = open_at_once(path)
        except OSError as error:
            raise ConfigError(
                f"random source: cannot be opened: {error.strerror}; check the path and its permissions",
                facts={"path": path},
            ) from error
        mode = os.fstat(self._device.fileno()).st_mode
        if not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
            self._device.close()
            raise ConfigError(
                "random source: not a device file; name a character device such as /dev/hwrng, or 'os'",
                facts={"path": path},
            )

    def read(self, count: int) -> bytes:
        """Exactly ``count`` fresh bytes.

        Raises:
            UnavailableError: the device fails, stalls, ends, or repeats itself.
        """
        drawn = bytearray()
        with self._reads:
            while len(drawn) < count:
                drawn += self._some(min(_STEP_BYTES, count - len(drawn)))
        self._check(drawn)
        mixed = np.frombuffer(drawn, np.uint8) ^ np.frombuffer(os.urandom(count), np.uint8)
        return mixed.tobytes()

    def close(self) -> None:
        """Close the device; a read under way in another thread ends at once."""
        self._is_closed = True
        with self._reads:
            self._device.close()

    def _some(self, most: int) -> bytes:
        """What the device has next, at least a byte."""
        pause_s, last_s = _PAUSES_S
        give_up_s = time.monotonic() + _STALL_S
        while not self._is_closed:
            try:
                piece = self._device.read(most)
            except OSError as error:
                raise self._broken(f"cannot be read: {error.strerror}") from error
            if piece:
                return piece
            if piece is not None:
                raise self._broken("ended")
            if time.monotonic() > give_up_s:
                raise self._broken(f"gave nothing for {_STALL_S:g} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, last_s)
        raise self._broken("was closed")

    def _check(self, drawn: bytearray) -> None:
        """A repetition test: 64 bytes that equal the 64 before never happen by chance."""
        size = len(drawn) // _PROBE_BYTES * _PROBE_BYTES
        if not size:
            return
        rows = np.frombuffer(memoryview(drawn)[:size], np.uint8).reshape(-1, _PROBE_BYTES)
        is_stuck = bool((rows[1:] == rows[:-1]).all(axis=1).any()) or rows[0].tobytes() == self._last
        self._last = rows[-1].tobytes()
        if is_stuck:
            raise self._broken("repeats itself")

    def _broken(self, what: str) -> UnavailableError:
        return UnavailableError(
            f"random source: the device {what}; repair it, or use 'os'",
            reason=ErrorReason.DEVICE_UNAVAILABLE,
            facts={"path": self._path},
        )
