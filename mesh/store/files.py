"""The file layer: the few file operations the store needs, and nothing else.

``OsFiles`` is the real one. Tests put a model underneath (power cuts, a full
disk); the store never calls ``os`` for its data behind the layer's back, and
SQLite reaches the same layer through ``vfs``. Errors are ``OSError``.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Protocol

Buffer = bytes | bytearray | memoryview

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600


class File(Protocol):
    """One open file; offsets and lengths in bytes."""

    def pread(self, length: int, offset: int) -> bytes:
        """Read up to ``length`` bytes at ``offset``; shorter only at the end of the file."""

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of ``data`` at ``offset``; durable only after ``sync``."""

    def truncate(self, size_bytes: int) -> None:
        """Cut or extend (with zeros) to ``size_bytes``."""

    def sync(self) -> None:
        """Return once the data and the size are durable."""

    def size(self) -> int:
        """The size in bytes."""

    def close(self) -> None:
        """Close; idempotent."""


class Lock(Protocol):
    """A held lock."""

    def release(self) -> None:
        """Let go; idempotent."""


class FileLayer(Protocol):
    """A file system as the store sees it."""

    @property
    def is_native(self) -> bool:
        """True if SQLite may open the same paths through the operating system itself."""

    def open(self, path: Path, *, create: bool = False, exclusive: bool = False) -> File:
        """Open for reading and writing; ``exclusive`` fails if the file exists. New files have mode 0600."""

    def rename(self, source: Path, target: Path) -> None:
        """Move atomically over ``target``; durable only after ``sync_dir``."""

    def unlink(self, path: Path) -> None:
        """Remove the name; durable only after ``sync_dir``."""

    def make_dir(self, path: Path) -> None:
        """Make a directory with mode 0700, parents too, durably; tighten an existing one to 0700."""

    def sync_dir(self, path: Path) -> None:
        """Return once the names in this directory are durable."""

    def list_dir(self, path: Path) -> list[str]:
        """The names in a directory, sorted."""

    def exists(self, path: Path) -> bool:
        """True if the name exists."""

    def free_bytes(self, path: Path) -> int:
        """Bytes that an unprivileged process can still write below ``path``."""

    def is_tmpfs(self, path: Path) -> bool:
        """True if ``path`` is a directory on tmpfs: it dies with the machine, not with the process."""

    def real_path(self, path: Path) -> Path:
        """The absolute path with symbolic links resolved."""

    def lock(self, path: Path, holder: str) -> Lock:
        """Take the exclusive lock on ``path`` and write ``holder`` into it.

        Raises:
            BlockingIOError: someone else holds it; ``filename2`` is what the holder wrote.
        """


class OsFile:
    """A file descriptor of the operating system."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, length: int, offset: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def pwrite(self, data: Buffer, offset: int) -> None:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._fd, rest, offset)
            rest, offset = rest[written:], offset + written

    def truncate(self, size_bytes: int) -> None:
        os.ftruncate(self._fd, size_bytes)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def detach(self) -> int:
        """Give up the descriptor without closing it."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self.detach())


class OsLock:
    """An ``flock`` that the kernel drops when the process dies."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class OsFiles:
    """The operating system's files."""

    @property
    def is_native(self) -> bool:
        return True

    def open(self, path: Path, *, create: bool = False, exclusive: bool = False) -> File:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        if create or exclusive:
            flags |= os.O_CREAT
        if exclusive:
            flags |= os.O_EXCL
        return OsFile(os.open(path, flags, FILE_MODE))

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def make_dir(self, path: Path) -> None:
        missing = [part for part in (path, *path.parents) if not part.exists()]
        for part in reversed(missing):
            part.mkdir(mode=DIRECTORY_MODE)
            self.sync_dir(part.parent)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
        if path.stat().st_mode & 0o777 != DIRECTORY_MODE:
            path.chmod(DIRECTORY_MODE)

    def sync_dir(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def list_dir(self, path: Path) -> list[str]:
        return sorted(entry.name for entry in path.iterdir())

    def exists(self, path: Path) -> bool:
        return path.exists()

    def free_bytes(self, path: Path) -> int:
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    def is_tmpfs(self, path: Path) -> bool:
        if not path.is_dir():
            return False
        device = path.stat().st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted and after.split()[0] == "tmpfs":
                return True
        return False

    def real_path(self, path: Path) -> Path:
        return path.resolve()

    def lock(self, path: Path, holder: str) -> Lock:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            other = os.pread(fd, 64, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise BlockingIOError(errno.EWOULDBLOCK, "locked", str(path), None, other) from exc
        lock = OsLock(fd)
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, holder.encode("ascii"), 0)
        except OSError:
            lock.release()
            raise
        return lock
