"""Keeps a line per used pad range: what an audit of the pads reads. Never bytes.

One JSON object a line, appended with one write, so that lines of a killed process are
whole and those before a kill are all there (the kernel has them). Written before what was
made with the range leaves the process; not synced, because audits survive kills, not power cuts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


class JsonlPadRecorder:
    """A :class:`~mesh.node.ports.PadRecorder` on an append-only file.

    Args:
        path: the file, made with mode 0600.
        kme_id: named in each line, so that files of several nodes can be joined.
    """

    def __init__(self, path: Path, kme_id: str) -> None:
        self._kme_id = kme_id
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

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
