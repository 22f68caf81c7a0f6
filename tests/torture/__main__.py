"""``make torture``: a metro under checked traffic while its processes are killed, then an audit.

Writes ``build/torture/result.json`` and ends with status 1 on any violation. The seed decides the
plan of kills and what is asked; moments depend on the machine. The lab's directory stays for
looking at. With ``--kills N``, runs of that duration follow each other, seed by seed, until there
were N kills in all or one run was violated; the result sums them up.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.torture.history import History
from tests.torture.kills import Killer, plan_rounds
from tests.torture.lab import LabUnderTest, write_network
from tests.torture.leaks import KeySearch, search_files
from tests.torture.pads import audit_pads
from tests.torture.traffic import Caller, Traffic, wait_until_healed

HEAL_TIMEOUT_S = 90.0
FETCH_TIMEOUT_S = 60.0
RESERVES = (0, 16_384, 262_144, 4_194_304)
"""High-water marks, in bytes: keys on demand only, refilled all the time, or from the reserve."""


class Run:
    """One run.

    Args:
        folder: for the result, the lab and the log of kills.
        duration_s: of the killing.
        seed: see the module.
    """

    def __init__(self, folder: Path, duration_s: float, seed: int) -> None:
        self._folder = folder
        self._duration_s = duration_s
        self._seed = seed
        self._began_s = time.monotonic()
        self._under_test = LabUnderTest(folder / "lab")
        self._log = (folder / "torture.log").open("w", encoding="utf-8")
        self.result: dict[str, Any] = {}

    def say(self, text: str) -> None:
        """Write a line to the run's own log."""
        self._log.write(f"{time.monotonic() - self._began_s:8.2f} {text}\n")
        self._log.flush()

    def run(self) -> None:
        """Run all of it; ``result`` says whether anything was violated."""
        under_test = self._under_test
        try:
            high_water_bytes = random.Random(f"{self._seed}/reserves").choice(RESERVES)
            under_test.up(str(write_network(self._folder, high_water_bytes=high_water_bytes)))
            lab = under_test.lab
            history = History({sae["id"]: sae["node"] for sae in lab["saes"]})
            killer = Killer(under_test, plan_rounds(lab, self._seed), self.say)
            print(f"torture: seed {self._seed}, {self._duration_s:.0f} s, log {self._log.name}", flush=True)
            with Traffic(lab, history, seed=self._seed):
                killer.run(threading.Event(), time.monotonic() + self._duration_s)
            healed, took_s = self._heal(lab, history)
            alarms = under_test.alarms_for_operators()
            seen = self._what_others_see()
        finally:
            under_test.down()
            self._log.close()
        self._judge(history, killer, seen, healed=healed, heal_s=took_s, alarms=alarms)

    def _heal(self, lab: dict[str, Any], history: History) -> tuple[bool, float]:
        """Everything runs again: the network must heal by itself and give out what it promised."""
        dead = self._under_test.dead()
        if dead and not self._under_test.restart(*dead):
            history.wrong(f"{', '.join(dead)} cannot be restarted")
        try:
            took_s = wait_until_healed(lab, history, timeout_s=HEAL_TIMEOUT_S, seed=self._seed)
        except TimeoutError as error:
            self.say(f"not healed: {error}")
            history.wrong(f"the network did not heal: {error}")
            return False, HEAL_TIMEOUT_S
        caller = Caller(lab, history, random.Random(f"{self._seed}/end"))
        try:
            if not caller.fetch_all(time.monotonic() + FETCH_TIMEOUT_S):
                history.wrong("acknowledged keys could not be fetched in time after healing")
        finally:
            caller.close()
        return True, took_s

    def _what_others_see(self) -> dict[str, bytes]:
        """Everything that is not for keys but could hold some, by name."""
        seen = self._under_test.metrics()
        for what in ("status", "links", "reserves", "alarms"):
            seen[what] = json.dumps(self._under_test.ask(what)).encode()
        return seen

    def _judge(
        self,
        history: History,
        killer: Killer,
        seen: dict[str, bytes],
        *,
        healed: bool,
        heal_s: float,
        alarms: list[str],
    ) -> None:
        lab = self._folder / "lab"
        pads = audit_pads(self._under_test.pad_audits())
        search = KeySearch(history.values)
        leaks = {name: count for name, page in seen.items() if (count := search.count(page))}
        # etcd's own files hold every revision that ever was, so they are more than a dump.
        places = [lab / part for part in ("log", "audit", "etcd", "config", "network")]
        leaks |= search_files(search, [*places, self._folder / "torture.log"])
        counts = history.counts
        violations = {
            "reused": counts["reused"] + pads.reused_bytes + pads.invented_bytes,
            "lost": counts["lost"],
            "differing": counts["differing"],
            "doubled": counts["doubled"],
            "leaked": sum(leaks.values()),
            "wrong": counts["wrong"] + len(alarms),
        }
        is_idle = not (pads.lines and counts["fetched"] and killer.kills)
        self.result = {
            "seed": self._seed,
            "duration_s": self._duration_s,
            "kills": killer.kills,
            "requests": counts["requests"],
            **violations,
            "indeterminate": counts["indeterminate"],
            "ok": healed and not is_idle and not any(violations.values()),
            "healed": healed,
            "heal_s": round(heal_s, 1),
            "keys": counts["keys"],
            "fetched": counts["fetched"],
            "slowest_s": round(history.slowest_s, 2),
            "kills_by": dict(killer.by),
            "answers": {name: count for name, count in sorted(counts.items()) if " " in name},
            "late": counts["late"],
            "pad_ranges": pads.lines,
            "pad_bytes": dict(pads.spent),
            "notes": [*history.notes, *pads.notes[:20], *alarms, *(f"key bytes in {name}" for name in leaks)],
        }


def report(result: dict[str, Any]) -> str:
    """The line that sums up."""
    words = ("reused", "lost", "differing", "doubled", "leaked", "wrong", "indeterminate")
    return (
        f"torture: {'ok' if result['ok'] else 'VIOLATED'}: seed {result['seed']}, "
        f"{result['kills']} kills, {result['requests']} requests, "
        f"{result['fetched']} keys fetched and compared; "
        + ", ".join(f"{result[word]} {word}" for word in words)
    )


def total(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs as one: numbers added, the slowest of each, notes with their seed."""
    first, *rest = results
    summed = dict(first)
    if not rest:
        return summed
    for one in rest:
        for name, value in one.items():
            if name in ("slowest_s", "heal_s"):
                summed[name] = max(summed[name], value)
            elif isinstance(value, dict):
                summed[name] = dict(Counter(summed[name]) + Counter(value))
            elif isinstance(value, bool):
                summed[name] = summed[name] and value
            elif name not in ("seed", "notes"):
                summed[name] += value
    summed["notes"] = [f"seed {one['seed']}: {note}" for one in results for note in one["notes"]]
    return summed | {"runs": [report(one) for one in results]}


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """``result.json``, as docs promise it."""
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Parse, run, sum up."""
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("--duration", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=1, metavar="N", help="go on with more runs until then")
    parser.add_argument("--out", type=Path, default=Path("build/torture"), metavar="DIR")
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    results: list[dict[str, Any]] = []
    while not results or (results[-1]["ok"] and sum(one["kills"] for one in results) < arguments.kills):
        if (folder / "lab" / "lab.json").exists():
            LabUnderTest(folder / "lab").down()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if results:
            write_result(folder, total(results))
        run = Run(folder, arguments.duration, arguments.seed + len(results))
        run.run()
        results.append(run.result)
        result = total(results)
        write_result(folder, result)
        for note in run.result["notes"]:
            print(f"torture: {note}")
        print(report(run.result), flush=True)
    if len(results) > 1:
        print(report(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
