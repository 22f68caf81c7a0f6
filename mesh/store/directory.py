"""The data directory: who owns it, what may stand in it, whether it is ours at all.

``FORMAT`` is written last when a directory is made and named durably, so its
absence means "never finished": only then may a half-made database be thrown away.
"""

from __future__ import annotations

import os
from pathlib import Path

from mesh.errors import ConfigError, ErrorReason, UnavailableError
from mesh.store import database
from mesh.store.files import FileLayer, Lock

FORMAT_NAME = "FORMAT"
LOCK_NAME = "LOCK"
PADS_NAME = "pads"
RESERVES_NAME = "reserves"
FORMAT_TEXT = b"keymesh-data 1\n"

_MADE_BY_US = {FORMAT_NAME, FORMAT_NAME + ".new", LOCK_NAME, PADS_NAME, RESERVES_NAME, database.NAME}
_MADE_BY_US.update(database.SIDE_NAMES)
_FOUND_ON_NEW_VOLUMES = {"lost+found"}


def lock_directory(path: Path, files: FileLayer) -> Lock:
    """Make the directory if need be and take it for this process.

    Raises:
        UnavailableError: (already-running) another process holds it.
        ConfigError: it cannot be made, or kept from other users.
    """
    try:
        files.make_dir(path)
    except OSError as exc:
        raise ConfigError(
            "the data directory must be a directory that only its owner (the node's user) can enter: "
            "make it, chown it to that user and chmod it to 700",
            facts={"path": path, "cause": exc.strerror},
        ) from exc
    try:
        return files.lock(path / LOCK_NAME, f"{os.getpid()}\n")
    except BlockingIOError as exc:
        raise UnavailableError(
            "another process runs on this data directory; stop it first",
            reason=ErrorReason.ALREADY_RUNNING,
            facts={"path": path, "pid": exc.filename2 or "unknown"},
        ) from exc
    except OSError as exc:
        raise database.disk_error(exc, path) from exc


def is_finished(path: Path, files: FileLayer) -> bool:
    """True if the directory holds a complete store; False if it is new or was never finished.

    Raises:
        ConfigError: there is something else in it, or a newer format.
        IntegrityError: our own files lack what must be there.
    """
    names = set(files.list_dir(path)) - _FOUND_ON_NEW_VOLUMES
    if FORMAT_NAME in names:
        _check_format(path, files)
        if database.NAME not in names:
            raise database.damaged(path, "state.db is gone")
        return True
    strangers = sorted(names - _MADE_BY_US)
    if strangers:
        raise ConfigError(
            "this is not a keymesh data directory and not empty; name an empty one",
            facts={"path": path, "found": strangers[0]},
        )
    for name in (PADS_NAME, RESERVES_NAME):
        if name in names and files.list_dir(path / name):
            raise database.damaged(path, f"{name} has files but {FORMAT_NAME} is gone")
    return False


def write_format(path: Path, files: FileLayer) -> None:
    """Declare the directory complete, durably."""
    new = path / (FORMAT_NAME + ".new")
    file = files.open(new, create=True)
    try:
        file.truncate(0)
        file.pwrite(FORMAT_TEXT, 0)
        file.sync()
    finally:
        file.close()
    files.rename(new, path / FORMAT_NAME)
    files.sync_dir(path)


def _check_format(path: Path, files: FileLayer) -> None:
    file = files.open(path / FORMAT_NAME)
    try:
        text = file.pread(64, 0)
    finally:
        file.close()
    if text == FORMAT_TEXT:
        return
    word, _, version = text.decode("ascii", "replace").strip().partition(" ")
    if word == "keymesh-data" and version.isdecimal():
        raise ConfigError(
            "the data directory was written by a newer release; start that release or a later one",
            facts={"path": path, "format": int(version), "known": 1},
        )
    raise database.damaged(path, f"{FORMAT_NAME} cannot be read")
