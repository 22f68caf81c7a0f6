"""Opening the database: pragmas, schema version, damage; translating its errors.

One connection, exclusive locking (so no shared memory file), WAL with
``synchronous=FULL``: a COMMIT returns after the log is synced. ``secure_delete``
overwrites what is deleted; the log itself is emptied by checkpoints only, so
freed bytes may stay on the disk until then (at rest is the operator's disk
encryption, architecture 5).
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import apsw

from mesh.errors import CallerError, ConfigError, ErrorReason, IntegrityError, MeshError, UnavailableError
from mesh.store import schema
from mesh.store.files import FileLayer
from mesh.store.vfs import registered

_log = logging.getLogger(__name__)

NAME = "state.db"
SIDE_NAMES = ("state.db-wal", "state.db-journal", "state.db-shm")

_NEXT_STEP = (
    "do not restore a copy of it; move the directory away, start with an empty one, and reset every link "
    "at its peer (keymesh links reset PEER --confirm PEER)"
)

_PRAGMAS = (
    "locking_mode = EXCLUSIVE",
    "journal_mode = WAL",
    "synchronous = FULL",
    "secure_delete = ON",
    "wal_autocheckpoint = 500",
    "journal_size_limit = 8388608",
    "cache_size = -8192",
    "mmap_size = 0",
    "temp_store = MEMORY",
    "trusted_schema = OFF",
    "cell_size_check = ON",
)


def damaged(path: Path, what: str) -> IntegrityError:
    """The error for state that cannot be trusted, with the operator's next step."""
    return IntegrityError(
        f"the node's state is damaged: {what}; {_NEXT_STEP}",
        reason=ErrorReason.STATE_CORRUPT,
        facts={"path": path},
    )


def open_database(path: Path, files: FileLayer) -> apsw.Connection:
    """Open ``path`` (an existing, possibly empty file) and bring its schema up to date.

    Raises:
        ConfigError: it was written by a newer release.
        IntegrityError: it is damaged or not ours.
        UnavailableError: the disk is full or fails.
    """
    database: apsw.Connection | None = None
    try:
        vfs = None if files.is_native else registered(files)
        database = apsw.Connection(
            str(path), flags=apsw.SQLITE_OPEN_READWRITE, vfs=vfs, statementcachesize=300
        )
        for pragma in _PRAGMAS:
            database.execute(f"PRAGMA {pragma}").fetchall()
        _migrate(database, path)
    except (apsw.Error, OSError) as exc:
        close_database(database)
        raise translated(exc, path) from exc
    except MeshError:
        close_database(database)
        raise
    return database


def check_database(database: apsw.Connection, path: Path) -> None:
    """Walk the whole database once.

    Raises:
        IntegrityError: it is damaged.
    """
    try:
        verdict = database.execute("PRAGMA quick_check(1)").fetchall()
    except apsw.Error as exc:
        raise translated(exc, path) from exc
    if verdict != [("ok",)]:
        raise damaged(path, "state.db fails its integrity check")


def _migrate(database: apsw.Connection, path: Path) -> None:
    version = database.pragma("user_version")
    identity = database.pragma("application_id")
    is_empty = database.execute("SELECT count(*) FROM sqlite_schema").get == 0
    if is_empty and (version or identity):
        raise damaged(path, "state.db has lost its tables")
    if not is_empty and identity != schema.APPLICATION_ID:
        raise damaged(path, "state.db is not a keymesh database")
    if version > schema.VERSION:
        raise ConfigError(
            "state.db was written by a newer release; start that release or a later one",
            facts={"path": path, "version": version, "known": schema.VERSION},
        )
    if version == schema.VERSION:
        return
    database.execute("BEGIN IMMEDIATE")
    for migration in schema.MIGRATIONS[version:]:
        database.execute(migration)
    database.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    database.execute(f"PRAGMA user_version = {schema.VERSION}")
    database.execute("COMMIT")


def close_database(database: apsw.Connection | None) -> None:
    """Close; a disk that fails now loses nothing, the log is read again at the next start."""
    if database is None:
        return
    try:
        database.close(True)
    except (apsw.Error, OSError) as exc:
        _log.warning("the database was closed without a checkpoint: %s", type(exc).__name__)


def translated(exc: Exception, path: Path) -> Exception:
    """The error of ours for one of SQLite's or the file layer's; anything else as it is."""
    if isinstance(exc, (apsw.NotADBError, apsw.CorruptError, apsw.FormatError)):
        return damaged(path, "state.db cannot be read")
    if isinstance(exc, apsw.ConstraintError):
        return CallerError("the change contradicts what is stored", facts={"rule": str(exc)})
    if isinstance(exc, (apsw.FullError, apsw.IOError, apsw.CantOpenError, apsw.ReadOnlyError, OSError)):
        return disk_error(exc, path)
    return exc


def disk_error(exc: Exception, path: Path) -> UnavailableError:
    """A full or failing disk: the caller may retry once the operator has made room."""
    is_full = isinstance(exc, apsw.FullError) or (isinstance(exc, OSError) and exc.errno == errno.ENOSPC)
    what = "the disk is full: make room" if is_full else "the disk refuses: see the system log"
    return UnavailableError(
        what,
        reason=ErrorReason.DISK_FULL,
        retry_after_s=5.0,
        facts={"path": path, "cause": type(exc).__name__},
    )
