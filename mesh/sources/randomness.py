"""Where the bytes of PSRD tables come from: the operating system, or a device on top of it.

A device's bytes are XORed with the operating system's, so that a bad device never makes a
table worse than none, and a good one makes it truly random. A device that is stuck is
refused. Must not keep what it drew.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from mesh.errors import ConfigError, ErrorReason, UnavailableError

OS = "os"
_PROBE_BYTES = 64
_STEP_BYTES = 1 << 20


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
        try:
            mode = path.stat().st_mode
            if not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
                raise ConfigError(
                    "random source: not a device file; name a character device such as /dev/hwrng, or 'os'",
                    facts={"path": path},
                )
            self._device: BinaryIO = path.open("rb", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"random source: cannot be opened: {error.strerror}; check the path and its permissions",
                facts={"path": path},
            ) from error

    def read(self, count: int) -> bytes:
        """Exactly ``count`` fresh bytes.

        Raises:
            UnavailableError: the device fails, ends, or repeats itself.
        """
        drawn = bytearray()
        while len(drawn) < count:
            try:
                piece = self._device.read(min(_STEP_BYTES, count - len(drawn)))
            except OSError as error:
                raise self._broken(f"cannot be read: {error.strerror}") from error
            if not piece:
                raise self._broken("ended")
            drawn += piece
        self._check(drawn)
        mixed = np.frombuffer(drawn, np.uint8) ^ np.frombuffer(os.urandom(count), np.uint8)
        return mixed.tobytes()

    def close(self) -> None:
        """Close the device."""
        self._device.close()

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
