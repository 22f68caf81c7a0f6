"""Who is killed when: a plan that a seed decides, and its execution on a running lab.

Processes are killed with SIGKILL at random moments, or restarted with a failpoint armed
(``KEYMESH_FAILPOINT``), so that they kill themselves before or after a durable step.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mesh.store.failpoints import ALL, VARIABLE

KEYMESH = [sys.executable, "-m", "mesh.cli"]
KINDS = {"nodes": 6, "gateways": 2, "devices": 1, "etcd": 1}
"""How often a kind is chosen, in parts."""
COUNTS = (1, 2, 3, 5, 8, 13, 21, 50, 120)
"""At which passage of a failpoint a process kills itself."""
FAILPOINT_WAIT_S = 6.0
_COMMAND_TIMEOUT_S = 90.0
_UP_TIMEOUT_S = 130.0


@dataclass(frozen=True, slots=True)
class Round:
    """One kill, or several at once, and how the killed come back.

    Attributes:
        pause_s: before it.
        victims: ids of processes.
        down_s: how long they stay dead.
        failpoint: armed in the first victim as it comes back; "" for none.
    """

    pause_s: float
    victims: tuple[str, ...]
    down_s: float
    failpoint: str


def plan_rounds(lab: Mapping[str, Any], seed: int) -> Iterator[Round]:
    """An endless plan; the same seed and lab give the same one."""
    rng = random.Random(f"{seed}/kills")
    groups = processes(lab)
    kinds = [kind for kind in KINDS if groups[kind]]
    weights = [KINDS[kind] for kind in kinds]
    while True:
        victims = []
        for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
            kind = rng.choices(kinds, weights)[0]
            victims.append(rng.choice(groups[kind]))
        chosen = tuple(dict.fromkeys(victims))
        arms = chosen[0] in groups["nodes"] and rng.random() < 0.6
        failpoint = f"{rng.choice(sorted(ALL))}:{rng.choice(COUNTS)}" if arms else ""
        yield Round(rng.uniform(0.2, 3.0), chosen, rng.choice((0.0, rng.uniform(0.0, 4.0))), failpoint)


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

    @property
    def lab(self) -> dict[str, Any]:
        """``lab.json`` as it is now."""
        return dict(json.loads((self.folder / "lab.json").read_text()))

    def up(self, network: str) -> None:
        """Bring it up.

        Raises:
            RuntimeError: it did not come up; says why.
        """
        done = self.run(
            "lab", "up", "--network", network, "--dir", str(self.folder), "--detach", timeout_s=130
        )
        if done.returncode:
            raise RuntimeError(f"the lab did not come up: {done.stderr or done.stdout}")

    def down(self) -> None:
        """Stop whatever runs."""
        self.run("lab", "down", "--dir", str(self.folder))

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
        return dict(json.loads(self.run(what, "--lab", str(self.folder), "--json").stdout or "{}"))

    def dead(self) -> list[str]:
        """Ids of processes that do not run."""
        lab = self.lab
        return [one for group in processes(lab).values() for one in group if not is_alive(pid_of(lab, one))]


class Killer:
    """Kills by a plan until told to stop.

    Args:
        lab: the victim.
        rounds: the plan.
        say: told what happens, one line each.
    """

    def __init__(self, lab: LabUnderTest, rounds: Iterator[Round], say: Callable[[str], None]) -> None:
        self._lab = lab
        self._rounds = rounds
        self._say = say
        self.kills = 0
        self.by: Counter[str] = Counter()

    def run(self, stop: threading.Event, until_s: float) -> None:
        """Kill until ``stop`` is set or the monotonic clock passes ``until_s``; the killed are back then."""
        while not stop.is_set() and time.monotonic() < until_s:
            one = next(self._rounds)
            stop.wait(one.pause_s)
            self._play(one, stop)

    def _play(self, one: Round, stop: threading.Event) -> None:
        self._say(json.dumps(asdict(one)))
        for victim in one.victims:
            self._lab.kill(victim)
            self._count(victim)
        stop.wait(one.down_s)
        first, *rest = one.victims
        if rest:
            self._back(*rest)
        if not one.failpoint:
            self._back(first)
            return
        self._lab.restart(first, failpoint=one.failpoint)
        if self._dies(first):
            self._count(one.failpoint.partition(":")[0])
        else:
            self._lab.kill(first)
            self._count(first)
        self._back(first)

    def _dies(self, victim: str) -> bool:
        """Whether the armed failpoint is reached in time."""
        pid = pid_of(self._lab.lab, victim)
        deadline_s = time.monotonic() + FAILPOINT_WAIT_S
        while time.monotonic() < deadline_s:
            if not is_alive(pid):
                return True
            time.sleep(0.05)
        return False

    def _back(self, *ids: str) -> None:
        for _ in range(3):
            if self._lab.restart(*ids):
                return
            self._say(f"{', '.join(ids)} did not come back at once")
        with contextlib.suppress(OSError):
            self._say(f"dead: {self._lab.dead()}")

    def _count(self, what: str) -> None:
        self.kills += 1
        self.by[what] += 1
