"""File layers for tests: a disk whose power can be cut, and one that fills up.

``PowerCutFiles`` is a model in memory. What was not synced when the power goes may
be there, be lost, or be torn into any subset of its 512-byte sectors; a name is
durable only after its directory was synced, and without that any of its states
since may survive; tmpfs is empty afterwards. A kill of the process alone loses
nothing. Every operation that changes something is a step; the cut comes before the
step that is asked for, and every later operation fails.
"""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field
from pathlib import Path

from mesh.store.files import Buffer, File, Lock, OsFile, OsFiles

SECTOR_BYTES = 512
TMPFS = Path("/tmpfs")


class PowerCutError(OSError):
    """The power is off."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "power cut")


@dataclass
class Node:
    """A file's bytes: those on the disk, and the operations since the last sync."""

    durable: bytearray = field(default_factory=bytearray)
    live: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        _write(self.live, offset, data)
        self.pending.append((offset, data))

    def truncate(self, size_bytes: int) -> None:
        _truncate(self.live, size_bytes)
        self.pending.append((size_bytes, None))

    def sync(self) -> None:
        self.durable = bytearray(self.live)
        self.pending.clear()

    def survivor(self, rng: random.Random) -> Node:
        """The file after the power came back."""
        content = bytearray(self.durable)
        chance = rng.choice((0.0, 0.5, 0.9, 1.0))
        for position, data in self.pending:
            if data is None:
                if rng.random() < chance:
                    _truncate(content, position)
                continue
            start = position
            while start < position + len(data):
                stop = min((start // SECTOR_BYTES + 1) * SECTOR_BYTES, position + len(data))
                if rng.random() < chance:
                    _write(content, start, data[start - position : stop - position])
                start = stop
        return Node(bytearray(content), bytearray(content))


def _write(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _truncate(content: bytearray, size_bytes: int) -> None:
    del content[size_bytes:]
    content.extend(bytes(size_bytes - len(content)))


class PowerCutFile:
    """An open file of the model."""

    def __init__(self, files: PowerCutFiles, node: Node) -> None:
        self._files = files
        self._node = node

    def pread(self, length: int, offset: int) -> bytes:
        self._files.check_power()
        return bytes(self._node.live[offset : offset + length])

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._files.step()
        self._node.write(offset, bytes(data))

    def truncate(self, size_bytes: int) -> None:
        self._files.step()
        self._node.truncate(size_bytes)

    def sync(self) -> None:
        self._files.step()
        self._node.sync()

    def size(self) -> int:
        self._files.check_power()
        return len(self._node.live)

    def close(self) -> None:
        """Nothing to let go of."""


class PowerCutLock:
    """A lock of the model."""

    def __init__(self, locks: dict[Path, str], path: Path) -> None:
        self._locks = locks
        self._path = path

    def release(self) -> None:
        self._locks.pop(self._path, None)


class PowerCutFiles:
    """The disk and the tmpfs of one machine.

    Args:
        cut_before_step: the step, counted from 0, before which the power goes; None for never.
    """

    is_native = False

    def __init__(self, *, cut_before_step: int | None = None) -> None:
        self.cut_before_step = cut_before_step
        self.steps = 0
        self.is_cut = False
        self._directories: set[Path] = {Path("/"), TMPFS}
        self._live: dict[Path, Node] = {}
        self._durable: dict[Path, Node] = {}
        self._unsynced: dict[Path, list[Node | None]] = {}
        self._locks: dict[Path, str] = {}

    # -- what the test does --------------------------------------------------

    def survivor(self, seed: int) -> PowerCutFiles:
        """The machine after the power came back; the choice among what may survive is seeded."""
        rng = random.Random(seed)
        after = PowerCutFiles()
        after._directories = set(self._directories)
        nodes: dict[int, Node] = {}
        for path in sorted(self._durable.keys() | self._unsynced.keys()):
            node = rng.choice([self._durable.get(path), *self._unsynced.get(path, [])])
            if node is None or path.is_relative_to(TMPFS):
                continue
            if id(node) not in nodes:
                nodes[id(node)] = node.survivor(rng)
            after._live[path] = after._durable[path] = nodes[id(node)]
        return after

    def kill(self) -> None:
        """The process died: its locks are gone, its writes are not."""
        self._locks.clear()

    def copy_of(self, path: Path) -> dict[Path, bytes]:
        """A snapshot of every file below ``path``."""
        return {name: bytes(node.live) for name, node in self._live.items() if name.is_relative_to(path)}

    def restore(self, path: Path, snapshot: dict[Path, bytes]) -> None:
        """Put a snapshot back, as an operator would."""
        for name in [name for name in self._live if name.is_relative_to(path)]:
            del self._live[name]
        for name, data in snapshot.items():
            self._live[name] = Node(bytearray(data), bytearray(data))

    # -- power ---------------------------------------------------------------

    def check_power(self) -> None:
        if self.is_cut:
            raise PowerCutError

    def step(self) -> None:
        self.check_power()
        if self.steps == self.cut_before_step:
            self.is_cut = True
            raise PowerCutError
        self.steps += 1

    # -- the file layer ------------------------------------------------------

    def open(self, path: Path, *, create: bool = False, exclusive: bool = False) -> File:
        self.check_power()
        if path.parent not in self._directories or path in self._directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(path))
        if exclusive and path in self._live:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        if path not in self._live:
            if not (create or exclusive):
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            self._name(path, Node())
        return PowerCutFile(self, self._live[path])

    def rename(self, source: Path, target: Path) -> None:
        if source not in self._live:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(source))
        node = self._live[source]
        self._name(target, node)
        self._live.pop(source)
        self._unsynced.setdefault(source, []).append(None)

    def unlink(self, path: Path) -> None:
        if path not in self._live:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        self._name(path, None)

    def make_dir(self, path: Path) -> None:
        self.check_power()
        if path in self._live:
            raise FileExistsError(errno.EEXIST, "not a directory", str(path))
        self._directories.update((path, *path.parents))

    def sync_dir(self, path: Path) -> None:
        self.step()
        for name in [name for name in self._unsynced if name.parent == path]:
            del self._unsynced[name]
            if name in self._live:
                self._durable[name] = self._live[name]
            else:
                self._durable.pop(name, None)

    def list_dir(self, path: Path) -> list[str]:
        self.check_power()
        if path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(path))
        names = {name.name for name in (*self._live, *self._directories) if name.parent == path != name}
        return sorted(names)

    def exists(self, path: Path) -> bool:
        self.check_power()
        return path in self._live or path in self._directories

    def free_bytes(self, path: Path) -> int:
        self.check_power()
        return 1 << 40

    def is_tmpfs(self, path: Path) -> bool:
        return path.is_relative_to(TMPFS)

    def real_path(self, path: Path) -> Path:
        return path

    def lock(self, path: Path, holder: str) -> Lock:
        self.check_power()
        if path in self._locks:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked", str(path), None, self._locks[path].strip())
        self._locks[path] = holder
        self.open(path, create=True).pwrite(holder.encode(), 0)
        return PowerCutLock(self._locks, path)

    def _name(self, path: Path, node: Node | None) -> None:
        self.step()
        self._unsynced.setdefault(path, []).append(node)
        if node is None:
            self._live.pop(path)
        else:
            self._live[path] = node


class FullDiskFile(OsFile):
    """A real file on a disk that is full while its layer says so."""

    __slots__ = ("_files",)

    def __init__(self, fd: int, files: FullDiskFiles) -> None:
        super().__init__(fd)
        self._files = files

    def pwrite(self, data: Buffer, offset: int) -> None:
        if self._files.is_full:
            raise OSError(errno.ENOSPC, "no space left on device")
        super().pwrite(data, offset)

    def sync(self) -> None:
        if self._files.is_failing:
            raise OSError(errno.EIO, "input/output error")
        super().sync()


class FullDiskFiles(OsFiles):
    """The operating system's files; ``is_full`` refuses writes, ``is_failing`` syncs."""

    is_native = False

    def __init__(self) -> None:
        self.is_full = False
        self.is_failing = False

    def open(self, path: Path, *, create: bool = False, exclusive: bool = False) -> File:
        file = super().open(path, create=create, exclusive=exclusive)
        assert isinstance(file, OsFile)
        return FullDiskFile(file.detach(), self)
