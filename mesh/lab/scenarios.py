"""What may go wrong with a route, played in a running lab: ``keymesh lab run --scenario NAME``.

Each scenario breaks something, then asks for keys until they cannot have come from what was
in reserve, compares them at both ends, looks for the name of what it broke in alarms and
logs, and mends it. It says what it does, and raises when anything is not as promised. The
program that lies is not part of the package: it is given by name.
"""

from __future__ import annotations

import http.client
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from mesh.client import operator
from mesh.core.collector import Verdict
from mesh.core.network import Grade, GradeKind
from mesh.core.network_parse import parse_document
from mesh.errors import ConfigError, ErrorReason, IntegrityError, MeshError, UnavailableError
from mesh.lab.control import Progress, restart_processes
from mesh.lab.encryptor import Encryptor, FetchedKey, RefusedError
from mesh.lab.processes import Process, stop_all
from mesh.lab.ready import encryptor
from mesh.lab.state import LabDirectory, operator_targets
from mesh.node.config import Reserves
from mesh.node.publishing import INTERVAL_S
from mesh.ops.yamltext import decode_yaml

_KEY_BITS, _KEYS_PER_CALL = 65_536, 8
_CALL_BYTES = _KEYS_PER_CALL * _KEY_BITS // 8
_ANSWER_S = 10.0
"""What cannot be met is refused within this time (contract)."""
_NAMED_S = 30.0
_RECOVER_S = 60.0
_FRESH_S = 15.0
_POLL_S = 0.3


class Stage:
    """A lab, and the pair of nodes whose keys cross several routes.

    Args:
        directory: of the running lab.
        progress: told each step.
        stand_in: Python file to run in place of a hub (``FILE --config CONFIG``).

    Raises:
        ConfigError: the lab has no pair with several routes.
    """

    def __init__(self, directory: LabDirectory, progress: Progress, stand_in: Path | None = None) -> None:
        self.directory = directory
        self.progress = progress
        self.stand_in = stand_in
        self.lab = directory.read_lab()
        self._document = parse_document(decode_yaml((directory.network / "document.yaml").read_bytes()))
        self.master, self.slave = self._pair()
        self.grade: Grade = self._document.policy(self.master["node"], self.slave["node"]).grade
        # What was said before this scenario began names nobody.
        self._old_alarms = self._alarms()
        self._logs = {node["id"]: Path(node["log"]).stat().st_size for node in self.lab["nodes"]}

    def _pair(self) -> tuple[dict[str, Any], dict[str, Any]]:
        for a in self.lab["saes"]:
            for b in self.lab["saes"]:
                if a["node"] != b["node"] and self._document.policy(a["node"], b["node"]).grade.n > 1:
                    return a, b
        raise ConfigError("the lab has no pair of grade multipath or dske: try --network dske or multipath")

    def say(self, text: str) -> None:
        """Tell what happens."""
        self.progress.done(text)

    @property
    def hubs(self) -> list[str]:
        """The pair's hubs.

        Raises:
            ConfigError: it has none.
        """
        hubs = self._document.policy(self.master["node"], self.slave["node"]).hubs
        if self.grade.kind is not GradeKind.DSKE:
            raise ConfigError(f"the pair's grade is {self.grade}: it has no hubs; try --network dske")
        return list(hubs)

    def first_link(self) -> tuple[str, str]:
        """The relay on a link of the master's node, and who is behind it.

        Raises:
            ConfigError: no link has a delay, so none has a relay.
        """
        end, other = self.master["node"], self.slave["node"]
        for relay in self.lab["relays"]:
            for neighbour in set(relay["between"]) - {end}:
                is_link = end in relay["between"] and neighbour in self._document.neighbours(end)
                if is_link and neighbour != other:
                    return relay["id"], neighbour
        raise ConfigError("no link of this lab has a delay, so none can be cut; try --network multipath")

    @contextmanager
    def broken(self, process_ids: list[str]) -> Iterator[None]:
        """Kill processes, and start them again in the end."""
        for process in self._processes(process_ids):
            process.signal(signal.SIGKILL)
        self.say(f"killed {', '.join(process_ids)}")
        try:
            yield
        finally:
            restart_processes(self.directory, process_ids, self.progress)

    def needed_stand_in(self) -> Path:
        """The file to run in place of a hub.

        Raises:
            ConfigError: none was named.
        """
        if self.stand_in is None:
            raise ConfigError("--stand-in: name the Python file that is to run in place of a hub")
        return self.stand_in

    @contextmanager
    def replaced(self, hub: str) -> Iterator[None]:
        """Run the stand-in in a hub's place, on its data and with its certificate."""
        stand_in = self.needed_stand_in()
        with self.directory.locked():
            processes = self.directory.read_processes()
            process = next(one for one in processes if one.id == hub)
            honest = process.argv
            stop_all([process])
            process.argv = [sys.executable, str(stand_in.resolve()), "--config", honest[-1]]
            process.start()
            # What is written down is how to start it again; lab down finds the liar by its pid.
            process.argv = honest
            self.directory.write_processes(processes)
        self.say(f"{stand_in.name} runs in place of {hub}, as {process.pid}")
        try:
            yield
            process.check_running()
        finally:
            restart_processes(self.directory, [hub], self.progress)

    def _processes(self, process_ids: list[str]) -> list[Process]:
        known = {process.id: process for process in self.directory.read_processes()}
        return [known[process_id] for process_id in process_ids]

    def fresh_bytes(self) -> int:
        """So many bytes cannot all have lain in the reserve of one direction."""
        text = (self.directory.config / f"{self.master['node']}.yaml").read_bytes()
        reserves = msgspec.convert(decode_yaml(text)["reserves"], Reserves)
        return 2 * reserves.high_water_bytes + 4 * _CALL_BYTES

    def exchange(self) -> None:
        """Get fresh keys in both directions and compare them.

        Raises:
            IntegrityError: they differ.
            UnavailableError: they do not come.
        """
        for master, slave in ((self.master, self.slave), (self.slave, self.master)):
            wanted = self.fresh_bytes()
            with encryptor(self.lab, master["id"]) as a, encryptor(self.lab, slave["id"]) as b:
                for _ in range(0, wanted, _CALL_BYTES):
                    compare(b, master["id"], self._get(a, slave["id"]))
            self.say(
                f"{wanted >> 10} KiB of keys {master['id']} -> {slave['id']} ({self.grade}): both ends agree"
            )

    @staticmethod
    def _get(sae: Encryptor, slave: str) -> list[FetchedKey]:
        try:
            return sae.enc_keys(slave, number=_KEYS_PER_CALL, size_bits=_KEY_BITS)
        except (RefusedError, OSError, http.client.HTTPException) as error:
            raise UnavailableError(
                f"a key is missing: {error}", reason=ErrorReason.OUT_OF_MATERIAL
            ) from error

    def settle(self) -> None:
        """Exchange keys before anything is broken; a lab that was mended a moment ago gets some time.

        Raises:
            IntegrityError: they differ.
            UnavailableError: they do not come in time.
        """
        is_fresh = any(process.age_s < _FRESH_S for process in self.directory.read_processes())
        self.wait_for_links()
        if is_fresh:
            # Everybody knows of a link that opened only when its ends have published their levels.
            time.sleep(INTERVAL_S + 1)
        deadline_s = time.monotonic() + _RECOVER_S
        while True:
            try:
                return self.exchange()
            except UnavailableError:
                if time.monotonic() > deadline_s:
                    raise
            time.sleep(_POLL_S)

    def drain(self) -> tuple[list[FetchedKey], RefusedError]:
        """Ask until refused; returns the last keys given and the refusal.

        Raises:
            IntegrityError: keys go on coming, or the refusal is not 503 with a reason in time.
        """
        keys: list[FetchedKey] = []
        with encryptor(self.lab, self.master["id"]) as a, encryptor(self.lab, self.slave["id"]) as b:
            for _ in range(0, 4 * self.fresh_bytes(), _CALL_BYTES):
                began_s = time.monotonic()
                try:
                    given = a.enc_keys(self.slave["id"], number=_KEYS_PER_CALL, size_bits=_KEY_BITS)
                except RefusedError as refusal:
                    check_refusal(refusal, time.monotonic() - began_s)
                    return keys, refusal
                if keys:
                    compare(b, self.master["id"], keys)
                keys = given
        raise _broken("keys go on coming although too few routes are left")

    def wait_for_keys(self) -> float:
        """Ask until keys come again; returns the seconds that took."""
        began_s = time.monotonic()
        with encryptor(self.lab, self.master["id"]) as a, encryptor(self.lab, self.slave["id"]) as b:
            while True:
                try:
                    compare(b, self.master["id"], a.enc_keys(self.slave["id"]))
                except RefusedError as refusal:
                    if time.monotonic() - began_s > _RECOVER_S:
                        raise UnavailableError(f"keys do not come back: {refusal}") from refusal
                    time.sleep(_POLL_S)
                else:
                    return time.monotonic() - began_s

    def wait_for_links(self) -> None:
        """Wait until every link of both ends is open.

        Raises:
            UnavailableError: one is not in time.
        """
        deadline_s = time.monotonic() + _RECOVER_S
        while closed := [*self._closed_links(self.master["node"]), *self._closed_links(self.slave["node"])]:
            if time.monotonic() > deadline_s:
                raise UnavailableError(f"a link does not open: {closed[0]}")
            time.sleep(_POLL_S)

    def _closed_links(self, end: str) -> list[str]:
        (target,) = operator_targets(self.directory.root, end)
        links = operator.as_plain(operator.ask(target, "links"))["links"]
        return [f"{end} -- {link['peer_kme_id']}" for link in links if link["state"] != "open"]

    def expect_named(self, member: str, verdict: Verdict) -> None:
        """Wait until an alarm or a log line of an end gives ``member``, on a route, that verdict.

        Raises:
            IntegrityError: none does in time.
        """
        deadline_s = time.monotonic() + _NAMED_S
        while time.monotonic() < deadline_s:
            alarms = [
                alarm for alarm, count in self._alarms().items() if count > self._old_alarms.get(alarm, 0)
            ]
            for text in [*alarms, *self._log_lines()]:
                if names(text, member, verdict):
                    self.say(f"{member} is named as {verdict.value}: {text[:300]}")
                    return
            time.sleep(_POLL_S)
        raise _broken(f"nothing names {member} as {verdict.value}")

    def _alarms(self) -> dict[str, int]:
        """Open alarms of both ends, each as JSON, and how often it was raised."""
        found: dict[str, int] = {}
        for end in (self.master["node"], self.slave["node"]):
            (target,) = operator_targets(self.directory.root, end)
            try:
                answer = operator.as_plain(operator.ask(target, "alarms"))
            except MeshError:
                continue
            for alarm in answer["alarms"]:
                facts = {"end": end, "alarm_id": alarm["alarm_id"], "message": alarm["message"]}
                found[json.dumps(facts)] = alarm["count"]
        return found

    def _log_lines(self) -> list[str]:
        """What both ends have logged since this scenario began, a JSON text per event."""
        texts = []
        for node in self.lab["nodes"]:
            if node["id"] in (self.master["node"], self.slave["node"]):
                with Path(node["log"]).open("rb") as log:
                    log.seek(self._logs[node["id"]])
                    texts += [line.decode(errors="replace").strip() for line in log]
        return texts


def names(text: str, member: str, verdict: Verdict) -> bool:
    """Whether a log line or an alarm, as JSON, gives a route through ``member`` that verdict."""
    try:
        facts = json.loads(text)
    except ValueError:
        return False  # the last line, half written
    if facts.get("logger") == "keymesh.routes":
        subject = ["route", facts["via"], facts["verdict"]]
    else:
        subject = facts.get("alarm_id", "").split("/")
    match subject:
        case ["route", via, said]:
            return said == verdict.value and member in via.split("+")
    return False


def _broken(text: str) -> IntegrityError:
    """Something is not as promised."""
    return IntegrityError(text, reason=ErrorReason.INTERNAL)


def compare(slave: Encryptor, master: str, keys: list[FetchedKey]) -> None:
    """Fetch keys at the other end and compare.

    Raises:
        IntegrityError: they are refused or differ.
    """
    try:
        fetched = slave.dec_keys(master, [key.key_id for key in keys])
    except RefusedError as error:
        raise _broken(f"an acknowledged key is missing: {error}") from error
    if {key.key_id: key.value for key in fetched} != {key.key_id: key.value for key in keys}:
        raise _broken("keys differ between the two ends")


def check_refusal(refusal: RefusedError, seconds: float) -> None:
    """What cannot be met is a 503 with a reason, soon.

    Raises:
        IntegrityError: it is not.
    """
    try:
        body = json.loads(refusal.body)
    except ValueError:
        body = {}
    has_reason = any("reason" in detail for detail in body.get("details", ()))
    if refusal.status != http.client.SERVICE_UNAVAILABLE or not has_reason or seconds > _ANSWER_S:
        raise _broken(f"refused after {seconds:.1f} s, not with 503 and a reason: {refusal}")


def hub_killed(stage: Stage) -> None:
    """One hub is killed: keys still come, and it is named."""
    hub = stage.hubs[1]
    stage.settle()
    with stage.broken([hub]):
        stage.exchange()
        stage.expect_named(hub, Verdict.SILENT)


def hub_liar(stage: Stage) -> None:
    """One hub lies: keys still come, none is wrong, and it is convicted."""
    hub = stage.hubs[0]
    stage.needed_stand_in()
    stage.settle()
    with stage.replaced(hub):
        stage.wait_for_links()
        stage.exchange()
        stage.expect_named(hub, Verdict.LIED)


def cut_link(stage: Stage) -> None:
    """One link is cut: keys still come, and the route is named."""
    relay, neighbour = stage.first_link()
    stage.settle()
    with stage.broken([relay]):
        stage.exchange()
        stage.expect_named(neighbour, Verdict.SILENT)


def hubs_dead(stage: Stage) -> None:
    """More hubs are dead than the grade can miss: 503 with a reason, and recovery without help."""
    dead = stage.hubs[: stage.grade.n - stage.grade.k + 1]
    stage.settle()
    with stage.broken(dead):
        kept, refusal = stage.drain()
        stage.say(f"refused, with a reason: {refusal}")
        with encryptor(stage.lab, stage.slave["id"]) as slave:
            compare(slave, stage.master["id"], kept)
        stage.say("what was acknowledged before is there at the other end")
    stage.say(f"keys come again after {stage.wait_for_keys():.1f} s")
    stage.exchange()


SCENARIOS: Mapping[str, Callable[[Stage], None]] = {
    "hub-killed": hub_killed,
    "hub-liar": hub_liar,
    "cut-link": cut_link,
    "two-of-three-hubs-dead": hubs_dead,
}


def run_scenario(name: str, root: Path, progress: Progress, *, stand_in: Path | None = None) -> None:
    """Play a scenario in the lab of ``root``.

    Raises:
        ConfigError: no such lab or scenario, or the lab has not what it needs.
        MeshError: something was not as promised; says what.
    """
    stage = Stage(LabDirectory(root), progress, stand_in)
    scenario = SCENARIOS[name]
    stage.say(f"{name}: {scenario.__doc__}".splitlines()[0])
    scenario(stage)
    stage.say(f"{name}: all as promised")
