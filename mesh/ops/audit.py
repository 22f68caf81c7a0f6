"""The audit log: who got which key_ID when, and how it ended.

Owns one append-only file of JSON lines, mode 0600, opened O_APPEND, rotated by size
with a bound on how many old ones stay; one that somebody else moved away is begun anew
within a second. A line is written with one system call before
the answer leaves; when it cannot be written the call fails, so that no key leaves
unrecorded. A list that no line holds is cut, and the line says by how many; what one
request may ask for fits. The file is not synced: a power cut may lose the last lines
(syncing belongs to ``mesh.store``). Never key bytes; values that hold bytes are refused.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import msgspec

from mesh.errors import NOTHING_HAPPENED, ConfigError, ErrorReason, UnavailableError
from mesh.ops.logging import request_id

_MAX_LINE_BYTES = 65_536
_CUT_NOTE_BYTES = 64
#: With less room than this on its disk a log is full: what one batch of calls writes must fit.
_LEAST_ROOM_BYTES = 1 << 20
_LOOK_EVERY_S = 1.0
AuditValue = str | int | float | bool | None | Sequence[str]


class AuditLog:
    """An append-only log of facts; may be used from any thread.

    Args:
        path: the file; its directory must exist.
        max_bytes: size at which the file is rotated to ``path.1``, ``path.2``, …
        keep: how many rotated files stay.
        now_s: seconds since the epoch.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = 64 * 1024 * 1024,
        keep: int = 8,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        if max_bytes < 1 or keep < 1:
            raise ConfigError("audit: max_bytes and keep must be at least 1")
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._now_s = now_s
        self._lock = threading.Lock()
        self._encoder = msgspec.json.Encoder()
        self._is_torn = False
        self._is_doubted = False
        self._has_room_until_s = 0.0
        self._looked_at_s = -1
        self._second = -1
        self._second_text = ""
        try:
            self._descriptor, self._size, self._file = _open(path)
        except OSError as exc:
            raise ConfigError("audit_log cannot be opened", facts={"file": path, "cause": exc}) from exc

    def record(self, event: str, **facts: AuditValue) -> None:
        """Writes one line: ``ts``, ``event``, ``request_id`` (of the context unless given), facts.

        Raises:
            TypeError: a fact is not text, number, boolean, None or a list of text.
            UnavailableError: DISK_FULL, the line could not be written; do not answer.
        """
        self.record_all(event, (facts,))

    def record_all(self, event: str, lines: Sequence[dict[str, AuditValue]]) -> None:
        """Writes one line per element with a single system call; see ``record``."""
        common: dict[str, AuditValue] = {"ts": self._time(), "event": event, "request_id": request_id.get()}
        encoded = bytearray()
        for facts in lines:
            for name, value in facts.items():
                if not _is_fit(value):
                    raise TypeError(f"audit fact {name} must be text, a number or a list of text")
            encoded += self._line({**common, **facts})
            encoded += b"\n"
        if encoded:
            with self._lock:
                self._append(encoded)

    def check(self) -> None:
        """Returns if a line can be written, as far as that can be known: ask before a key is spent.

        Once a second looks for room on the disk. After a line was lost it first writes one of its own,
        ``audit_resumed``, so that at most what was under way then is spent and not answered.

        Raises:
            UnavailableError: DISK_FULL, nothing could be recorded now.
        """
        try:
            if self._is_doubted or time.monotonic() >= self._has_room_until_s:
                with self._lock:
                    self._look_for_room()
                if self._is_doubted:
                    self.record("audit_resumed")
        except UnavailableError as exc:
            exc.facts.update(NOTHING_HAPPENED)
            raise

    def close(self) -> None:
        """Closes the file; recording afterwards fails."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, facts: dict[str, AuditValue]) -> bytes:
        """One line; while it is too long its longest list loses what is too much of it."""
        line, cut = self._encoder.encode(facts), dict[str, int]()
        while len(line) > _MAX_LINE_BYTES:
            lists = [
                (name, value) for name, value in facts.items() if isinstance(value, list | tuple) and value
            ]
            if not lists:
                raise TypeError("an audit line is longer than 64 KiB")
            size, name, items = max((len(self._encoder.encode(value)), name, value) for name, value in lists)
            too_many = len(line) + _CUT_NOTE_BYTES - _MAX_LINE_BYTES
            kept = min(max(0, int(len(items) * (1 - too_many / size))), len(items) - 1)
            cut[f"{name}_cut"] = cut.get(f"{name}_cut", 0) + len(items) - kept
            facts = {**facts, **cut, name: items[:kept]}
            line = self._encoder.encode(facts)
        return line

    def _look_for_room(self) -> None:
        self._check_open()
        try:
            status = os.fstatvfs(self._descriptor)
        except OSError as exc:
            raise self._unwritable(exc) from exc
        room_bytes = (status.f_bavail if os.geteuid() else status.f_bfree) * status.f_frsize
        if status.f_blocks and room_bytes < _LEAST_ROOM_BYTES:
            raise UnavailableError(
                "audit log has no room left; free space",
                reason=ErrorReason.DISK_FULL,
                facts={"file": self._path, "free_bytes": room_bytes},
            )
        self._has_room_until_s = time.monotonic() + _LOOK_EVERY_S

    def _check_open(self) -> None:
        if self._descriptor < 0:
            raise UnavailableError("audit log is closed", reason=ErrorReason.SHUTTING_DOWN)

    def _append(self, encoded: bytearray) -> None:
        self._check_open()
        try:
            if self._looked_at_s != self._second:
                self._looked_at_s = self._second
                self._follow()
            if self._size and self._size + len(encoded) > self._max_bytes:
                self._rotate()
            # A line torn by a full disk is ended first, so that the next one stays readable.
            data = b"\n" + encoded if self._is_torn else encoded
            written = os.write(self._descriptor, data)
        except OSError as exc:
            self._is_doubted = True
            raise self._unwritable(exc) from exc
        self._size += written
        self._is_torn = self._is_doubted = written < len(data)
        if self._is_torn:
            raise UnavailableError(
                "audit log was written in part; free space",
                reason=ErrorReason.DISK_FULL,
                facts={"file": self._path},
            )

    def _unwritable(self, cause: OSError) -> UnavailableError:
        return UnavailableError(
            "audit log cannot be written; free space or fix its path",
            reason=ErrorReason.DISK_FULL,
            facts={"file": self._path, "cause": cause.strerror},
        )

    def _follow(self) -> None:
        """Begins a new file if ours is not at its path any more."""
        try:
            found = os.stat(self._path)  # noqa: PTH116 - as in mesh.ops.watch: no Path on hot paths
        except FileNotFoundError:
            self._reopen()
        else:
            if (found.st_dev, found.st_ino) != self._file:
                self._reopen()

    def _reopen(self) -> None:
        descriptor, size, file = _open(self._path)
        os.close(self._descriptor)
        self._descriptor, self._size, self._file, self._is_torn = descriptor, size, file, False

    def _rotate(self) -> None:
        for number in range(self._keep - 1, 0, -1):
            older = self._numbered(number)
            if older.exists():
                older.replace(self._numbered(number + 1))
        self._path.replace(self._numbered(1))
        self._reopen()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def _time(self) -> str:
        now_s = self._now_s()
        second = int(now_s)
        if second != self._second:
            self._second_text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
            self._second = second
        return f"{self._second_text}.{int((now_s - second) * 1000):03d}Z"


def _is_fit(value: object) -> bool:
    if value is None or isinstance(value, str | int | float):
        return True
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _open(path: Path) -> tuple[int, int, tuple[int, int]]:
    """Opens for appending; with the size, and what tells the file from another at the same path."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.fchmod(descriptor, 0o600)
    status = os.fstat(descriptor)
    return descriptor, status.st_size, (status.st_dev, status.st_ino)
