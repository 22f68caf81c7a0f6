"""A metro lab that was brought up with the command line, to be killed, restarted and asked."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mesh.cli import main
from mesh.lab import networks
from mesh.store.failpoints import VARIABLE

KEYMESH = [sys.executable, "-m", "mesh.cli"]
_COMMAND_TIMEOUT_S = 130.0
_UP_TIMEOUT_S = 130.0


def write_network(
    folder: Path,
    *,
    high_water_bytes: int,
    links: Mapping[str, Any] | None = None,
    request_timeout_s: float = 8.0,
) -> Path:
    """The shipped metro with the pad audit on and another high-water mark; 0 means keys on demand only.

    Args:
        folder: for the file.
        high_water_bytes: of every reserve.
        links: settings of all links that differ.
        request_timeout_s: of every node.
    """
    shipped = Path(networks.__file__).parent / "networks" / "metro.yaml"
    source = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    source["links"] = [link | dict(links or {}) for link in source["links"]]
    reserves = {"high_water_bytes": high_water_bytes, "prefill": high_water_bytes > 0}
    path = folder / "metro.yaml"
    limits = source.get("limits", {}) | {"request_timeout_s": request_timeout_s}
    own = {"pad_audit": True, "reserves": reserves, "limits": limits}
    text = yaml.safe_dump(source | own, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def processes(lab: Mapping[str, Any]) -> dict[str, list[str]]:
    """Ids of a lab's processes by kind."""
    found = {kind: [entry["id"] for entry in lab[kind]] for kind in ("nodes", "gateways", "devices")}
    return found | {"etcd": list(lab["etcd"]["members"])}


def pid_of(lab: Mapping[str, Any], process_id: str) -> int:
    """The pid that ``lab.json`` names."""
    for kind in ("nodes", "gateways", "devices"):
        for entry in lab[kind]:
            if entry["id"] == process_id:
                return int(entry["pid"])
    return int(dict(zip(lab["etcd"]["members"], lab["etcd"]["pids"], strict=True))[process_id])


def is_alive(pid: int) -> bool:
    """Whether a process runs: it exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class LabUnderTest:
    """A lab that was brought up with the command line, and is killed and restarted.

    Args:
        folder: the lab's directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._is_down = False

    @property
    def lab(self) -> dict[str, Any]:
        """``lab.json`` as it is now."""
        return dict(json.loads((self.folder / "lab.json").read_text()))

    def up(self, network: str) -> None:
        """Bring it up.

        Raises:
            RuntimeError: it did not come up; says why.
        """
        self._is_down = False
        done = self.run(
            "lab", "up", "--network", network, "--dir", str(self.folder), "--detach", timeout_s=130
        )
        if done.returncode:
            raise RuntimeError(f"the lab did not come up: {done.stderr or done.stdout}")

    def down(self) -> None:
        """Stop whatever runs."""
        if not self._is_down:
            self.run("lab", "down", "--dir", str(self.folder))
            self._is_down = True

    def kill(self, process_id: str) -> int:
        """Kill with SIGKILL; returns the pid, which is this lab's own by its command line."""
        pid = pid_of(self.lab, process_id)
        if is_alive(pid):
            if process_id.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes():
                raise RuntimeError(f"pid {pid} is not {process_id}")
            os.kill(pid, signal.SIGKILL)
        return pid

    def restart(self, *ids: str, failpoint: str = "") -> bool:
        """``keymesh lab restart``; whether all came up."""
        environment = dict(os.environ)
        if failpoint:
            environment[VARIABLE] = failpoint
        done = self.run("lab", "restart", "--dir", str(self.folder), *ids, environment=environment)
        return done.returncode == 0

    def run(
        self,
        *words: str,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = _COMMAND_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        """A ``keymesh`` command to its end."""
        return subprocess.run(
            [*KEYMESH, *words],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=environment,
        )

    def ask(self, what: str) -> dict[str, Any]:
        """What operators see: ``status``, ``links``, ``reserves`` or ``alarms``, by node that answers."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            main([what, "--lab", str(self.folder), "--json"])
        return dict(json.loads(said.getvalue() or "{}"))

    def alarms_for_operators(self) -> list[str]:
        """Alarms that mere kills may not raise: critical ones, and those that wait for the operator."""
        return [
            f"{kme}: {alarm['alarm_id']}: {alarm['message']}"
            for kme, answer in self.ask("alarms").items()
            for alarm in answer["alarms"]
            if alarm["needs_operator"] or alarm["severity"] == "critical"
        ]

    def pad_audits(self) -> list[Path]:
        """The nodes' pad audit files."""
        return sorted((self.folder / "audit").glob("*.pads.jsonl"))

    def metrics(self) -> dict[str, bytes]:
        """The metrics pages of all nodes and gateways that answer."""
        pages: dict[str, bytes] = {}
        for entry in self.lab["nodes"] + self.lab["gateways"]:
            try:
                with urllib.request.urlopen(f"http://{entry['http']}/metrics", timeout=10) as page:
                    pages[f"metrics of {entry['id']}"] = page.read()
            except OSError as error:
                pages[f"metrics of {entry['id']}"] = str(error).encode()
        return pages

    def dead(self) -> list[str]:
        """Ids of processes that do not run."""
        lab = self.lab
        return [one for group in processes(lab).values() for one in group if not is_alive(pid_of(lab, one))]
