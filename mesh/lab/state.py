"""What a lab's directory holds, and the two files that say what runs.

``lab.json`` is for users and harnesses (its shape is documented in docs/lab.md and
does not change within ``version`` 1); ``processes.json`` is the lab's own. Both are
replaced at once, under one lock, so that readers never see half and two commands never
mix.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mesh.client.operator import OperatorTarget
from mesh.core.identity import Role
from mesh.errors import ConfigError, ErrorReason, UnavailableError
from mesh.lab.processes import Process
from mesh.pki.authority import write_file
from mesh.store import proof
from mesh.store.files import OsFiles

OWN_ENTRIES = frozenset(
    {
        "lab.json",
        "processes.json",
        ".lab.json.new",
        ".processes.json.new",
        ".lock",
        "pki",
        "config",
        "data",
        "etcd",
        "log",
        "audit",
        "network",
    }
)
"""What the lab writes in its directory; a start replaces just these."""


@dataclass(frozen=True, slots=True)
class DomainFolder:
    """Where one domain of a lab keeps certificates and passwords, and its network document."""

    pki: Path
    network: Path

    def password_file(self, etcd_user: str) -> Path:
        """The password of an etcd user."""
        return self.pki / f"etcd-{etcd_user}.password"


class LabDirectory:
    """Paths of one lab, and reading and writing its two files.

    Args:
        root: the lab's directory; made absolute.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.pki = self.root / "pki"
        self.config = self.root / "config"
        self.data = self.root / "data"
        self.etcd = self.root / "etcd"
        self.log = self.root / "log"
        self.audit = self.root / "audit"
        self.network = self.root / "network"
        self.lab_file = self.root / "lab.json"
        self.processes_file = self.root / "processes.json"

    @property
    def proofs(self) -> Path | None:
        """This lab's own folder on tmpfs for its nodes' proofs of a mere restart; None without tmpfs."""
        name = f"keymesh-lab-{hashlib.sha256(str(self.root).encode()).hexdigest()[:16]}"
        files = OsFiles()
        places = reversed(proof.DEFAULT_DIRECTORIES)
        usable = (place for place in places if files.is_tmpfs(place) and os.access(place, os.W_OK))
        return next((place / name for place in usable), None)

    @contextlib.contextmanager
    def locked(self, *, waits: bool = True) -> Iterator[None]:
        """Keep other lab commands off this directory's files.

        Raises:
            ConfigError: there is no such directory.
            UnavailableError: another command is at work there, and we are not to wait for it.
        """
        try:
            stream = (self.root / ".lock").open("a")
        except OSError as error:
            raise ConfigError(f"no lab at {self.root}: {error.strerror}") from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UnavailableError(
                    f"another lab command is at work in {self.root}", reason=ErrorReason.ALREADY_RUNNING
                ) from error
            yield

    def courier_folder(self, needed_bytes: int) -> Path:
        """Where courier files lie for a moment: in memory if there is room, else beside the data."""
        if self.proofs is None or OsFiles().free_bytes(self.proofs) < 4 * needed_bytes:
            return self.data
        return self.proofs

    def log_of(self, process_id: str) -> Path:
        """The log of a process."""
        return self.log / f"{process_id}.log"

    def config_of(self, process_id: str) -> Path:
        """The configuration of a process."""
        return self.config / f"{process_id}.yaml"

    def pad_audit_of(self, kme_id: str) -> Path:
        """Where a node records the pad ranges that it used, if its network says so."""
        return self.audit / f"{kme_id}.pads.jsonl"

    def remove_proofs(self) -> None:
        """Leave nothing on tmpfs: nodes of a stopped lab need no proof."""
        if self.proofs is not None:
            shutil.rmtree(self.proofs, ignore_errors=True)

    def domain_folder(self, domain: str, *, is_only: bool) -> DomainFolder:
        """A domain's own folders; those of the lab itself where there is only one domain."""
        own = "" if is_only else domain
        return DomainFolder(self.pki / own, self.network / own)

    def read_lab(self) -> dict[str, Any]:
        """Read ``lab.json``.

        Raises:
            ConfigError: there is none, or it is not one.
        """
        try:
            lab = msgspec.json.decode(self.lab_file.read_bytes(), type=dict[str, Any])
        except OSError as error:
            raise ConfigError(f"no lab at {self.root}: start one with keymesh lab up") from error
        except msgspec.DecodeError as error:
            raise ConfigError(f"{self.lab_file} is damaged: {error}") from error
        return lab

    def read_processes(self) -> list[Process]:
        """Read ``processes.json``; empty if there is none.

        Raises:
            ConfigError: it is damaged.
        """
        try:
            return msgspec.json.decode(self.processes_file.read_bytes(), type=list[Process])
        except FileNotFoundError:
            return []
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(f"{self.processes_file} cannot be read: {error}") from error

    def write_lab(self, lab: dict[str, Any]) -> None:
        """Replace ``lab.json`` at once."""
        write_file(self.lab_file, msgspec.json.format(msgspec.json.encode(lab)) + b"\n", mode=0o600)

    def write_processes(self, processes: list[Process]) -> None:
        """Replace ``processes.json`` at once."""
        write_file(self.processes_file, msgspec.json.format(msgspec.json.encode(processes)), mode=0o600)


def put_pid(lab: dict[str, Any], process: Process) -> None:
    """Write a process's pid wherever ``lab.json`` shows it."""
    for section in ("nodes", "hubs", "gateways", "devices", "relays"):
        for entry in lab.get(section, []):
            if entry["id"] == process.id:
                entry["pid"] = process.pid
    for domain in lab["domains"]:
        etcd = domain["etcd"]
        for index, member in enumerate(etcd["members"]):
            if member == process.id:
                etcd["pids"][index] = process.pid
    lab["etcd"] = lab["domains"][0]["etcd"]


def operator_targets(root: Path, kme_id: str | None) -> list[OperatorTarget]:
    """The nodes and hubs of a lab as an operator asks them, or only ``kme_id``.

    Raises:
        ConfigError: there is no lab, or no such node.
    """
    lab = LabDirectory(root).read_lab()
    domains = {domain["id"]: domain for domain in lab["domains"]}
    targets = [
        OperatorTarget(
            address=entry["grpc"],
            kme_id=entry["id"],
            domain_id=entry["domain"],
            ca=Path(domains[entry["domain"]]["ca"]["node"]),
            cert=Path(domains[entry["domain"]]["tool"]["cert"]),
            key=Path(domains[entry["domain"]]["tool"]["key"]),
            role=role,
        )
        for section, role in (("nodes", Role.NODE), ("hubs", Role.HUB))
        for entry in lab[section]
        if kme_id in (None, entry["id"])
    ]
    if not targets:
        raise ConfigError(f"no node {kme_id!r} in this lab")
    return targets
