"""Who is killed when: a plan that a seed decides, and its execution on a running lab.

Processes are killed with SIGKILL at random moments, or restarted with a failpoint armed
(``KEYMESH_FAILPOINT``), so that they kill themselves before or after a durable step.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mesh.store.failpoints import ALL
from tests.torture.lab import LabUnderTest, is_alive, pid_of, processes

KINDS = {"nodes": 6, "gateways": 2, "devices": 1, "etcd": 1}
"""How often a kind is chosen, in parts."""
COUNTS = {
    "commit": (1, 2, 3, 5, 8, 13, 21, 50, 120),
    "proof": (1, 2, 3, 5, 8, 13, 21, 50),
    "pads.remove": (1,),
}
"""At which passage of a failpoint, by the beginning of its name, a process kills itself."""
RARE_COUNTS = (1, 2, 3)
"""At which passage of all others: a node passes them about once a second."""
FAILPOINT_WAIT_S = 6.0


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
    failpoints = plan_failpoints(rng)
    groups = processes(lab)
    kinds = [kind for kind in KINDS if groups[kind]]
    weights = [KINDS[kind] for kind in kinds]
    while True:
        victims = []
        for _ in range(rng.choice((1, 1, 2, 3, 5))):
            kind = rng.choices(kinds, weights)[0]
            victims.append(rng.choice(groups[kind]))
        chosen = tuple(dict.fromkeys(victims))
        arms = chosen[0] in groups["nodes"] and rng.random() < 0.6
        failpoint = next(failpoints) if arms else ""
        yield Round(rng.uniform(0.2, 2.0), chosen, rng.choice((0.0, rng.uniform(0.0, 3.0))), failpoint)


def plan_failpoints(rng: random.Random) -> Iterator[str]:
    """Each failpoint as often as the others, ``name:count``."""
    while True:
        for name in rng.sample(sorted(ALL), len(ALL)):
            counts = next((some for start, some in COUNTS.items() if name.startswith(start)), RARE_COUNTS)
            yield f"{name}:{rng.choice(counts)}"


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
