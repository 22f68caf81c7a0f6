"""The copy of the marks on tmpfs that proves a mere process restart (protocol 1.10).

tmpfs dies with the machine, so a copy that names the disk's latest incarnation and
no mark above the disk's shows that this very directory, not an older copy of it, is
what the last process wrote. The copy is replaced atomically, after the disk and
before anyone is told of the commit: a mark in use is never above the copy's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from mesh.errors import ErrorReason, UnavailableError
from mesh.store.failpoints import fail_at
from mesh.store.files import FileLayer

VERSION = 1
DEFAULT_DIRECTORIES = (Path("/run"), Path("/dev/shm"))  # noqa: S108 - tmpfs is what is wanted

Marks = Mapping[str, tuple[int, ...]]


class ProofCopy:
    """The copy for one data directory; without a tmpfs there is none and no restart is proven.

    Args:
        data_dir: the data directory; its real path names the copy.
        files: the file layer.
        proof_dir: where to put it; None tries /run, then /dev/shm. It must be on tmpfs.
    """

    def __init__(self, data_dir: Path, files: FileLayer, proof_dir: Path | None) -> None:
        self._files = files
        candidates = DEFAULT_DIRECTORIES if proof_dir is None else (proof_dir,)
        name = hashlib.sha256(str(files.real_path(data_dir)).encode()).hexdigest()[:32]
        self.path: Path | None = None
        for directory in candidates:
            if files.is_tmpfs(directory):
                self.path = directory / f"keymesh-{name}.marks"
                break
        self._incarnation = b""
        self._marks: dict[str, tuple[int, ...]] = {}

    def proves(self, incarnation: bytes | None, marks: Marks) -> bool:
        """Whether the copy on tmpfs fits the disk's latest incarnation and marks."""
        self._incarnation = incarnation or b""
        self._marks = dict(marks)
        copy = self._load()
        if copy is None or incarnation is None or copy[0] != incarnation:
            return False
        return all(name in marks and mark <= marks[name] for name, mark in copy[1].items())

    def publish(self, moved: Mapping[str, tuple[int, ...] | None], incarnation: bytes | None) -> None:
        """Replace the copy after a commit that moved marks or began an incarnation.

        Raises:
            UnavailableError: the copy could neither be replaced nor removed; nothing
                of that commit may be used.
        """
        for name, mark in moved.items():
            if mark is None:
                self._marks.pop(name, None)
            else:
                self._marks[name] = max(mark, self._marks.get(name, mark))
        if incarnation is not None:
            self._incarnation = incarnation
        if self.path is None:
            return
        fail_at("proof.before")
        try:
            self._write(self.path)
        except OSError as exc:
            self._remove(self.path, exc)
        fail_at("proof.after")

    def _write(self, path: Path) -> None:
        text = json.dumps(
            {"version": VERSION, "incarnation": self._incarnation.hex(), "marks": self._marks},
            separators=(",", ":"),
        )
        new = path.with_suffix(".new")
        file = self._files.open(new, create=True)
        try:
            data = text.encode()
            file.pwrite(data, 0)
            file.truncate(len(data))
        finally:
            file.close()
        self._files.rename(new, path)

    def _remove(self, path: Path, cause: OSError) -> None:
        """An old copy would vouch for an older disk: without a new one there must be none."""
        try:
            if self._files.exists(path):
                self._files.unlink(path)
        except OSError as exc:
            raise UnavailableError(
                "the copy of the marks can be neither replaced nor removed: restart the node",
                reason=ErrorReason.INTERNAL,
                facts={"path": path, "cause": cause.strerror},
            ) from exc

    def _load(self) -> tuple[bytes, dict[str, tuple[int, ...]]] | None:
        if self.path is None or not self._files.exists(self.path):
            return None
        try:
            file = self._files.open(self.path)
            try:
                content = json.loads(file.pread(file.size(), 0))
            finally:
                file.close()
            if content["version"] != VERSION:
                return None
            marks = {str(name): tuple(int(part) for part in mark) for name, mark in content["marks"].items()}
            return bytes.fromhex(content["incarnation"]), marks
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return None
