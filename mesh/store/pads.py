"""Pad files: key material on disk, outside the database.

A file is written once, durable before its name is given to anyone, then only read
and wiped. Nothing refers to it before the commit that names it, so no temporary
name is needed: left-overs of a crash are files that no row names, removed at start.
Wiping overwrites with zeros, synced only before a removal: best effort on today's
disks, which may keep old blocks (at rest is the operator's disk encryption).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from mesh.errors import CallerError, ErrorReason, IntegrityError, MeshError
from mesh.store.database import disk_error
from mesh.store.failpoints import fail_at
from mesh.store.files import Buffer, File, FileLayer

_OPEN_FILES_KEPT = 128
_ZEROS = bytes(1 << 20)
#: Up to here a wipe only dirties the cache: it may share the readers' descriptor and lock.
_SMALL_WIPE_BYTES = 64 << 10
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class PadFiles:
    """The pad files of one directory. Reads and wipes are sync; the rest runs in threads.

    Nothing that may wait for the disk holds the lock that readers on the event loop take: large
    wipes and removals use descriptors of their own.

    Args:
        path: the directory; it exists.
        files: the file layer.
        executor: runs ``create``.
        remover: runs ``remove``, for which nobody waits.
    """

    def __init__(
        self, path: Path, files: FileLayer, executor: ThreadPoolExecutor, remover: ThreadPoolExecutor
    ) -> None:
        self._path = path
        self._files = files
        self._executor = executor
        self._remover = remover
        self._open_files: OrderedDict[str, File] = OrderedDict()
        self._lock = Lock()

    async def create(self, name: str, data: Buffer) -> None:
        """Write a new file and return once it is durable.

        Args:
            name: 1 to 128 of ``A-Za-z0-9._-``, not in use.
            data: the bytes; must not change before this returns.

        Raises:
            CallerError: the name is malformed or taken.
            UnavailableError: (disk-full) no room or a failing disk; no file is left.
        """
        await asyncio.get_running_loop().run_in_executor(self._executor, self.create_now, name, data)

    def create_now(self, name: str, data: Buffer) -> None:
        """``create`` in the calling thread."""
        path = self._checked(name)
        fail_at("pads.create.before_write")
        self._forget(name)
        try:
            file = self._files.open(path, exclusive=True)
        except FileExistsError as exc:
            raise CallerError("a pad file is written once", facts={"file": name}) from exc
        except OSError as exc:
            raise disk_error(exc, path) from exc
        try:
            try:
                file.pwrite(data, 0)
                fail_at("pads.create.before_sync")
                file.sync()
            finally:
                file.close()
            fail_at("pads.create.before_dir_sync")
            self._files.sync_dir(self._path)
        except OSError as exc:
            with contextlib.suppress(OSError):
                self._files.unlink(path)
            raise disk_error(exc, path) from exc
        fail_at("pads.create.after")

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes at ``offset``.

        Raises:
            IntegrityError: the file is gone or too short.
            UnavailableError: the disk fails.
        """
        try:
            with self._lock:
                data = self._opened(name).pread(length, offset)
        except FileNotFoundError as exc:
            raise self._lost(name, "is gone") from exc
        except OSError as exc:
            raise disk_error(exc, self._path / name) from exc
        if len(data) != length:
            raise self._lost(name, "is too short")
        return data

    def wipe(self, name: str, offset: int, length: int) -> None:
        """Overwrite with zeros, clipped to the file; not synced. A file that is gone is wiped already.

        Raises:
            UnavailableError: the disk fails.
        """
        fail_at("pads.wipe.before")
        try:
            stop = min(offset + length, self.size(name))
            if stop - offset <= _SMALL_WIPE_BYTES:
                with self._lock:
                    self._opened(name).pwrite(_ZEROS[: max(0, stop - offset)], offset)
            else:
                with contextlib.closing(self._files.open(self._checked(name))) as file:
                    _zero(file, offset, stop)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise disk_error(exc, self._path / name) from exc
        fail_at("pads.wipe.after")

    async def remove(self, *names: str) -> None:
        """Overwrite, sync and unlink; names that are gone are skipped.

        The unlink is not synced: what a crash brings back is removed at the next start.
        """
        if names:
            await asyncio.get_running_loop().run_in_executor(self._remover, self.remove_now, *names)

    def remove_now(self, *names: str) -> None:
        """``remove`` in the calling thread."""
        for name in names:
            path = self._checked(name)
            fail_at("pads.remove.before_wipe")
            try:
                with contextlib.closing(self._files.open(path)) as file:
                    _zero(file, 0, file.size())
                    file.sync()  # or the zeros of an unlinked file never reach the disk
                fail_at("pads.remove.before_unlink")
                self._files.unlink(path)
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise disk_error(exc, path) from exc
            finally:
                self._forget(name)
            fail_at("pads.remove.after")

    def size(self, name: str) -> int:
        """The file's size in bytes.

        Raises:
            FileNotFoundError: it is gone.
        """
        with self._lock:
            return self._opened(name).size()

    def list(self) -> list[str]:
        """The names of all pad files."""
        return self._files.list_dir(self._path)

    def free_bytes(self) -> int:
        """Bytes that can still be written."""
        return self._files.free_bytes(self._path)

    def reconcile(self, needed: Iterable[tuple[str, int]]) -> None:
        """At start: remove the files that no row names, check that the named ones are long enough.

        Args:
            needed: (name, least size in bytes) of every row.

        Raises:
            IntegrityError: a named file is gone or too short.
        """
        sizes: dict[str, int] = {}
        for name, size_bytes in needed:
            sizes[name] = max(size_bytes, sizes.get(name, 0))
        self.remove_now(*(name for name in self.list() if name not in sizes))
        for name, size_bytes in sizes.items():
            try:
                if self.size(name) < size_bytes:
                    raise self._lost(name, "is too short")
            except FileNotFoundError as exc:
                raise self._lost(name, "is gone") from exc

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            while self._open_files:
                self._open_files.popitem()[1].close()

    def _opened(self, name: str) -> File:
        file = self._open_files.get(name)
        if file is not None:
            self._open_files.move_to_end(name)
            return file
        file = self._files.open(self._checked(name))
        self._open_files[name] = file
        if len(self._open_files) > _OPEN_FILES_KEPT:
            self._open_files.popitem(last=False)[1].close()
        return file

    def _forget(self, name: str) -> None:
        """Close the descriptor kept for a name that is gone or about to be made anew."""
        with self._lock:
            file = self._open_files.pop(name, None)
            if file is not None:
                file.close()

    def _checked(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise CallerError("malformed pad file name", facts={"file": name})
        return self._path / name

    def _lost(self, name: str, what: str) -> MeshError:
        return IntegrityError(
            f"a pad file {what}: something other than this node has changed the data directory; move it "
            "away, start with an empty one, and reset every link at its peer "
            "(keymesh links reset PEER --confirm PEER)",
            reason=ErrorReason.STATE_CORRUPT,
            facts={"path": self._path / name},
        )


def _zero(file: File, offset: int, stop: int) -> None:
    while offset < stop:
        piece = _ZEROS[: stop - offset]
        file.pwrite(piece, offset)
        offset += len(piece)
