"""Courier files on disk: orders, names, room, wiping.

Owns how a courier file comes into being (durable under ``NAME.partial``, renamed once its
table is committed) and how it goes (overwritten, synced, unlinked). What is in it:
``mesh.sources.psrd_file``.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from mesh.errors import CallerError, ConfigError, ErrorReason, UnavailableError
from mesh.sources.psrd_file import MAGIC, wipe_bytes
from mesh.sources.randomness import open_at_once
from mesh.store.failpoints import fail_at
from mesh.store.files import File, FileLayer, OsFile, OsFiles

_MAX_PASSPHRASE_BYTES = 1024


@dataclass(frozen=True, slots=True, repr=False)
class IssueOrder:
    """What to issue.

    Attributes:
        to_client_bytes, from_client_bytes: for the lane that this end writes, and reads.
        path: the courier file; must not exist.
        passphrase: None leaves the file in clear.
    """

    to_client_bytes: int
    from_client_bytes: int
    path: Path
    passphrase: bytes | None = None


@dataclass(frozen=True, slots=True, repr=False)
class ImportOrder:
    """What to import.

    Attributes:
        path: the courier file.
        passphrase: what it was sealed with, None for none.
        wipe: overwrite and remove the file once its table is durable here.
    """

    path: Path
    passphrase: bytes | None = None
    wipe: bool = False


def read_passphrase(path: str) -> bytes | None:
    """The first line of a file; None for no file.

    Raises:
        ConfigError: it is no regular file, cannot be read, or is empty.
    """
    if not path:
        return None
    try:
        with open_at_once(Path(path)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError("passphrase_file: not a regular file", facts={"file": path})
            lines = (file.read(_MAX_PASSPHRASE_BYTES) or b"").splitlines()
    except OSError as error:
        raise ConfigError(
            f"passphrase_file: cannot be read: {error.strerror}", facts={"file": path}
        ) from error
    if not lines or not lines[0]:
        raise ConfigError("passphrase_file: its first line is empty", facts={"file": path})
    return lines[0]


def check_room(files: FileLayer, path: Path, needed_bytes: int) -> None:
    """Whether a new courier file may be made there.

    Raises:
        CallerError: the path is not absolute, its folder missing, or it exists.
        UnavailableError: too little room.
    """
    if not path.is_absolute() or not path.parent.is_dir():
        raise CallerError("path: must be absolute, in a folder that exists", facts={"path": path})
    if files.exists(path):
        raise CallerError("path: exists already; name a new file", facts={"path": path})
    if files.free_bytes(path.parent) < needed_bytes + needed_bytes // 1000 + (64 << 10):
        raise disk_full("path: its disk has too little room", path, needed_bytes)


def create_partial(files: FileLayer, path: Path) -> File:
    """A new file under the ``.partial`` name; one left over by a crash gives way."""
    remove_partial(files, path)
    return files.open(_partial(path), exclusive=True)


def remove_partial(files: FileLayer, path: Path) -> None:
    """Overwrite and remove an unfinished courier file, if there is one."""
    if files.exists(_partial(path)):
        _wipe(files, _partial(path))


def is_half_named(files: FileLayer, path: Path) -> bool:
    """Whether a crash came between the commit and the name."""
    return not files.exists(path) and files.exists(_partial(path))


def name_courier(files: FileLayer, path: Path) -> None:
    """Give the courier file its name; only now does anybody take it along.

    Raises:
        UnavailableError: the disk refuses; the table is issued all the same.
    """
    try:
        fail_at("courier.before_name")
        files.rename(_partial(path), path)
        files.sync_dir(path.parent)
        fail_at("courier.after_name")
    except OSError as error:
        raise UnavailableError(
            "the table is issued, but its courier file could not be renamed: rename it by hand",
            reason=ErrorReason.DISK_FULL,
            facts={"from": _partial(path), "to": path, "cause": error.strerror},
        ) from error


def open_courier(path: Path) -> File:
    """Open an existing courier file for reading; the medium may be read-only.

    Raises:
        CallerError: there is none, or it cannot be opened.
    """
    if not path.is_file():
        raise CallerError("path: no such courier file", facts={"path": path})
    try:
        return OsFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise CallerError(f"path: cannot be opened: {error.strerror}", facts={"path": path}) from error


def check_courier(path: Path) -> None:
    """Refuse to wipe what does not begin like a courier file.

    Raises:
        CallerError: it does not, or there is none.
    """
    file = open_courier(path)
    try:
        is_courier = file.pread(len(MAGIC), 0) == MAGIC
    finally:
        file.close()
    if not is_courier:
        raise CallerError("path: not a courier file", facts={"path": path})


def wipe_courier(path: Path) -> None:
    """Overwrite and remove a courier file. Flash may keep old blocks: destroy the medium to be sure.

    Raises:
        UnavailableError: the disk refuses.
    """
    try:
        _wipe(OsFiles(), path)
    except OSError as error:
        raise UnavailableError(
            f"courier file: could not be wiped: {error.strerror}; remove it by hand",
            reason=ErrorReason.DISK_FULL,
            facts={"path": path},
        ) from error


def _wipe(files: FileLayer, path: Path) -> None:
    fail_at("courier.before_wipe")
    file = files.open(path)
    try:
        wipe_bytes(file)
    finally:
        file.close()
    fail_at("courier.before_unlink")
    files.unlink(path)
    files.sync_dir(path.parent)
    fail_at("courier.after_unlink")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def disk_full(message: str, path: Path, needed_bytes: int) -> UnavailableError:
    """Too little room, in words."""
    return UnavailableError(
        f"{message}: make room",
        reason=ErrorReason.DISK_FULL,
        retry_after_s=5.0,
        facts={"path": path, "needed_bytes": needed_bytes},
    )
