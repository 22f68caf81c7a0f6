"""SQLite over a file layer, so that a test's power cut or full disk hits the database too.

Only for layers that are not the operating system itself. The store's connection
uses exclusive locking, hence neither locks nor shared memory are needed here.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import apsw

from mesh.store.files import Buffer, File, FileLayer

_SECTOR_BYTES = 512
_numbers = itertools.count()


class LayerFile(apsw.VFSFile):
    """One database, log or journal file."""

    def __init__(self, files: FileLayer, path: Path, file: File, *, is_new: bool, is_temporary: bool) -> None:
        self._files = files
        self._path = path
        self._file = file
        self._is_name_durable = not is_new
        self._is_temporary = is_temporary

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        return self._file.pread(amount, offset)

    def xWrite(self, data: Buffer, offset: int) -> None:  # noqa: N802
        self._file.pwrite(bytes(data), offset)

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        self._file.truncate(newsize)

    def xSync(self, flags: int) -> None:  # noqa: N802
        self._file.sync()
        if not self._is_name_durable:
            self._files.sync_dir(self._path.parent)
            self._is_name_durable = True

    def xFileSize(self) -> int:  # noqa: N802
        return self._file.size()

    def xClose(self) -> None:  # noqa: N802
        self._file.close()
        if self._is_temporary:
            self._files.unlink(self._path)

    def xSectorSize(self) -> int:  # noqa: N802
        return _SECTOR_BYTES

    def xDeviceCharacteristics(self) -> int:  # noqa: N802
        return 0

    def xFileControl(self, op: int, ptr: int) -> bool:  # noqa: N802
        return False

    def xLock(self, level: int) -> None:  # noqa: N802
        """The store's own lock file guards the directory."""

    def xUnlock(self, level: int) -> None:  # noqa: N802
        """The store's own lock file guards the directory."""

    def xCheckReservedLock(self) -> bool:  # noqa: N802
        return False


class LayerVFS(apsw.VFS):
    """The files of one layer under a VFS name of their own."""

    def __init__(self, files: FileLayer) -> None:
        self.files = files
        self.vfs_name = f"keymesh-{next(_numbers)}"
        super().__init__(self.vfs_name, "")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> LayerFile:  # noqa: N802
        if name is None:
            raise apsw.CantOpenError("temporary files are kept in memory")
        path = Path(name if isinstance(name, str) else name.filename())
        is_new = not self.files.exists(path)
        if is_new and not flags[0] & apsw.SQLITE_OPEN_CREATE:
            raise apsw.CantOpenError(f"no such file: {path.name}")
        file = self.files.open(path, create=is_new)
        flags[1] = flags[0]
        is_temporary = bool(flags[0] & apsw.SQLITE_OPEN_DELETEONCLOSE)
        return LayerFile(self.files, path, file, is_new=is_new, is_temporary=is_temporary)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        path = Path(filename)
        if self.files.exists(path):
            self.files.unlink(path)
        if syncdir:
            self.files.sync_dir(path.parent)

    def xAccess(self, pathname: str, flags: int) -> bool:  # noqa: N802
        return self.files.exists(Path(pathname))

    def xFullPathname(self, name: str) -> str:  # noqa: N802
        return name


_registered: dict[int, LayerVFS] = {}


def registered(files: FileLayer) -> str:
    """The VFS name for this layer, registered with SQLite until ``forget``."""
    vfs = _registered.get(id(files))
    if vfs is None:
        vfs = _registered[id(files)] = LayerVFS(files)
    return vfs.vfs_name


def forget(files: FileLayer) -> None:
    """Unregister the layer's VFS, once no connection uses it."""
    vfs = _registered.pop(id(files), None)
    if vfs is not None:
        vfs.unregister()
