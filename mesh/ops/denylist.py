"""Certificates that are no longer welcome: a file that is re-read when it changes.

One certificate a line: the SHA-256 fingerprint or the serial number, hexadecimal,
colons and case ignored; ``#`` starts a comment. A serial counts for any issuer that
the listener trusts (each plane has one root). A list that becomes unreadable keeps
what was last read, and says so: forgetting who was refused would let them in.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from mesh.errors import ConfigError
from mesh.ops.watch import FileWatch

_LOG = logging.getLogger("keymesh.denylist")
_ENTRY = re.compile(r"[0-9a-f]{1,64}")
_MAX_BYTES = 16 * 1024 * 1024


class DenyList:
    """The refused certificates of one listener.

    Args:
        path: the file; None refuses nobody.
        interval_s: least time between two looks at the file.

    Raises:
        ConfigError: the file cannot be read, or a line is not hexadecimal.
    """

    def __init__(self, path: Path | None, *, interval_s: float = 1.0) -> None:
        self._path = path
        self._entries: frozenset[str] = frozenset()
        self._watch: FileWatch | None = None
        if path is not None:
            self._watch = FileWatch([path], interval_s=interval_s)
            self._entries = _read(path)

    def denies(self, *, fingerprint: str, serial: str) -> bool:
        """Whether a certificate is refused; both arguments as ``mesh.ops.certificates`` writes them."""
        if self._path is not None and self._watch is not None and self._watch.changed():
            self._reload(self._path)
        return fingerprint in self._entries or serial in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def _reload(self, path: Path) -> None:
        try:
            self._entries = _read(path)
        except ConfigError as exc:
            _LOG.error("deny list unreadable, the last one stays in force", extra={"cause": str(exc)})
            return
        _LOG.info("deny list read", extra={"path": str(path), "entries": len(self._entries)})


def _read(path: Path) -> frozenset[str]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError("deny_list is larger than 16 MiB", facts={"file": path})
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError("deny_list cannot be read", facts={"file": path, "cause": exc}) from exc
    entries = set()
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.split("#", 1)[0].strip().lower().replace(":", "").removeprefix("0x")
        if not entry:
            continue
        if not _ENTRY.fullmatch(entry):
            raise ConfigError(
                "deny_list has a line that is neither a serial nor a SHA-256 fingerprint in hexadecimal",
                facts={"file": path, "line": number},
            )
        entries.add(entry if len(entry) == 64 else entry.lstrip("0") or "0")
    return frozenset(entries)
