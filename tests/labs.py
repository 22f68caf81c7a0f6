"""Labs for tests: brought up, asked and stopped through the command line, as users do."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEYMESH = [sys.executable, "-m", "mesh.cli"]


def keymesh(*words: str, timeout_s: float = 125.0) -> subprocess.CompletedProcess[str]:
    """A ``keymesh`` command to its end."""
    return subprocess.run([*KEYMESH, *words], capture_output=True, text=True, timeout=timeout_s, check=False)


@contextlib.contextmanager
def running_lab(network: str, root: Path) -> Iterator[Path]:
    """A lab of a shipped network, or of a file; stopped in the end."""
    up = keymesh("lab", "up", "--network", network, "--dir", str(root), "--detach")
    assert up.returncode == 0, up.stdout + up.stderr
    try:
        yield root
    finally:
        down = keymesh("lab", "down", "--dir", str(root))
        assert down.returncode == 0, down.stderr


def lab_json(root: Path) -> dict[str, Any]:
    """``lab.json`` as it is now."""
    return dict(json.loads((root / "lab.json").read_text()))


def play(root: Path, scenario: str, *options: str) -> str:
    """Play a scenario; what it printed. It may wait twice 60 s, for a name or keys, and drain reserves."""
    run = keymesh("lab", "run", "--dir", str(root), "--scenario", scenario, *options, timeout_s=280.0)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
