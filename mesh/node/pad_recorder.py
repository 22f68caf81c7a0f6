"""Keeps a line per used pad range: what an audit of the pads reads. Never bytes.

One JSON object a line, appended with one write, so that lines before a kill are all there (the
kernel has them). A kill may tear the one that is being written, where it crosses a page: what it
tells of has not happened, and the next start drops it. Written before what was made with the range
leaves the process; not synced, because audits survive kills, not power cuts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

_MAX_LINE_BYTES = 4096


class JsonlPadRecorder:
    """A :class:`~mesh.node.ports.PadRecorder` on an append-only file.

    Args:
        path: the file, made with mode 0600; one process at a time.
        kme_id: named in each line, so that files of several nodes can be joined.
    """

    def __init__(self, path: Path, kme_id: str) -> None:
        self._kme_id = kme_id
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._drop_torn_line()

    def record(
        self, link: str, *, is_outbound: bool, epoch: int, start: int, stop: int, purpose: str
    ) -> None:
        """Append the line."""
        line = {
            "kme": self._kme_id,
            "link": link,
            "outbound": is_outbound,
            "epoch": epoch,
            "start": start,
            "stop": stop,
            "purpose": purpose,
        }
        os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _drop_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        start = max(0, size - _MAX_LINE_BYTES)
        tail = os.pread(self._file, size - start, start)
        torn = len(tail) - (tail.rfind(b"\n") + 1)
        if torn:
            os.ftruncate(self._file, size - torn)
