"""``make paper``: the transatlantic experiment, measured as the paper did (its Fig. 3c).

An application at CAN-Site-X asks for 256-bit keys for one at UK-Site-Z, again and again, through three
key managers, two ETSI GS QKD 020 borders and an emulated ocean; every key is fetched at the other end
and compared. Uses the REST interface alone. Everything runs on this one machine, and the figures say so.
"""

from __future__ import annotations

import http.client
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from mesh.client import operator
from mesh.core.transfer import KEY_PART_BYTES
from mesh.errors import ConfigError, ErrorReason, IntegrityError, MeshError, UnavailableError
from mesh.lab.control import Progress, restart_processes, rewrite_config, start_lab, stop_lab
from mesh.lab.encryptor import Encryptor, FetchedKey, RefusedError
from mesh.lab.measure import PAPER_DEC_MS, PAPER_ENC_MS, Sample, Summary, summarise
from mesh.lab.networks import Lab, LinkSpec, Network, load_lab
from mesh.lab.paper_picture import Series, draw_paper
from mesh.lab.ready import DeliveryCheck, encryptor, wait_until
from mesh.lab.state import LabDirectory, operator_targets
from mesh.node.config import BufferedPair, Reserves

DURATION_S = 60.0
ROUND_TRIP_MS = 85.0
MASTER, SLAVE = "can-sae-a", "uk-sae-b"
HOME, BORDER = "can-site-x", "can-site-z"
RESERVE_BYTES = 256 * 1024
BUFFER_KEYS = 512
_WARM_UP = 10
_ECHO_EVERY = 5
_FILL_TIMEOUT_S = 60.0
_SAY_EVERY_S = 10.0
_PAUSE_S = 0.2
_FIRST_KEY_S = 30.0
_MAX_REFUSED = 0.01
#: At most so many milliseconds beyond the round trip, at the median.
GOALS_MS = {"enc_on_demand": 20.0, "enc_reserve": 12.0}
# Parts of the duration: with buffers there are ten times as many keys in the same time.
_SHARES = {"enc_on_demand": 0.4, "enc_reserve": 0.4, "enc_buffered": 0.2}
_TITLES = {
    "enc_on_demand": "get a key, reserves empty",
    "enc_reserve": "get a key, reserves filled in each domain",
    "enc_buffered": "get a key, buffered for this pair",
    "dec": "fetch it at the other end",
}


class Echo:
    """One byte there and back over the emulated ocean: the least that any request over it takes.

    Args:
        place: ``host:port`` of the relay's echo.
    """

    def __init__(self, place: str) -> None:
        host, _, port = place.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=10.0)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.samples_ms: list[float] = []

    def measure(self) -> None:
        """Takes one sample.

        Raises:
            UnavailableError: the relay is gone.
        """
        began_s = time.perf_counter()
        self._socket.sendall(b"x")
        if not self._socket.recv(1):
            raise UnavailableError("the emulated ocean does not answer")
        self.samples_ms.append((time.perf_counter() - began_s) * 1000)

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()


@dataclass(slots=True)
class Mode:
    """What was measured in one mode; samples are (seconds of measuring so far, milliseconds).

    ``mismatches`` counts keys that differ, and acknowledged keys that the other end does not have.
    """

    samples: list[Sample] = field(default_factory=list)
    floors_ms: list[float] = field(default_factory=list)
    mismatches: int = 0
    refused: int = 0

    def result(self, round_trip_ms: float) -> dict[str, Any]:
        """As in the result file."""
        summary = self.summary()
        return {
            "n": summary["n"],
            **{f"{name}_ms": summary[name] for name in ("mean", "std", "p50", "p99")},
            "round_trip_ms": round_trip_ms,
            "floor_ms": round(statistics.median(self.floors_ms), 3),
            "mismatches": self.mismatches,
        }

    def summary(self) -> Summary:
        """Of the latencies."""
        return summarise([ms for _, ms in self.samples])

    def check_refused(self, name: str) -> None:
        """Few calls may be refused: what is measured is the others.

        Raises:
            UnavailableError: more than one in a hundred was.
        """
        calls = len(self.samples) + self.refused
        if self.refused > _MAX_REFUSED * calls:
            raise UnavailableError(
                "more than one call in a hundred was refused",
                facts={"mode": name, "refused": self.refused, "calls": calls},
            )


class Paper:
    """One run.

    Args:
        folder: where results go; the lab runs in ``folder/lab``.
        duration_s: for all modes together, without starting and filling.
        round_trip_ms: of the emulated ocean.
    """

    def __init__(self, folder: Path, *, duration_s: float, round_trip_ms: float) -> None:
        self._folder = folder
        self._duration_s = duration_s
        self._round_trip_ms = round_trip_ms
        self._progress = Progress()
        self._modes = {name: Mode() for name in _TITLES}
        # Now, less the seconds of measuring so far.
        self._began_s = 0.0
        self._measured_s = 0.0

    def run(self) -> None:
        """Run all of it; the lab is stopped whatever happens.

        Raises:
            MeshError: something did not come up, or a key was not as it must be.
        """
        lab = _empty(with_round_trip(load_lab("paper"), self._round_trip_ms))
        directory = start_lab(lab, self._folder / "lab", self._progress)
        try:
            self._measure(directory, "enc_on_demand")
            self._fill_reserves(directory)
            self._measure(directory, "enc_reserve")
            self._fill_buffer(directory)
            self._measure(directory, "enc_buffered")
        finally:
            stop_lab(directory, self._progress)
        self._report()
        if mismatches := self._modes["dec"].mismatches:
            raise IntegrityError(
                "keys differ between the two ends, or are missing at one",
                reason=ErrorReason.POOL_MISMATCH,
                facts={"mismatches": mismatches},
            )
        for name, mode in self._modes.items():
            mode.check_refused(name)

    def _measure(self, directory: LabDirectory, name: str) -> None:
        """Keys one after the other for this mode's part of the duration, at least one.

        Raises:
            UnavailableError: there was none, nor soon afterwards.
        """
        lab, mode, dec = directory.read_lab(), self._modes[name], self._modes["dec"]
        echo = Echo(_ocean(lab)["echo"])
        try:
            with encryptor(lab, MASTER) as a, encryptor(lab, SLAVE) as b:
                warm_up = Mode()
                for _ in range(_WARM_UP):
                    self._exchange(a, b, warm_up, warm_up)
                    echo.measure()
                echo.samples_ms.clear()
                mode.mismatches += warm_up.mismatches
                now_s = time.perf_counter()
                self._began_s = now_s - self._measured_s
                end_s, say_at_s = now_s + _SHARES[name] * self._duration_s, now_s + _SAY_EVERY_S
                count = 0
                while (left_s := end_s - time.perf_counter()) > 0 or not mode.samples:
                    if left_s < -_FIRST_KEY_S:
                        raise UnavailableError(
                            "not one key was to be had", facts={"mode": name, "refused": mode.refused}
                        )
                    if count % _ECHO_EVERY == 0:
                        echo.measure()
                    count += 1
                    self._exchange(a, b, mode, dec)
                    self._progress.waiting(f"{_TITLES[name]}: {len(mode.samples)} keys")
                    if time.perf_counter() > say_at_s:
                        say_at_s += _SAY_EVERY_S
                        self._say(self._line(name))
        finally:
            echo.close()
        self._measured_s = time.perf_counter() - self._began_s
        dec.mismatches += mode.mismatches
        mode.floors_ms += echo.samples_ms
        dec.floors_ms += echo.samples_ms
        self._say(self._line(name))

    def _line(self, name: str) -> str:
        mode = self._modes[name]
        summary = mode.summary() if mode.samples else None
        text = f"{_TITLES[name]}: {len(mode.samples)} keys"
        text += f", {summary['mean']:.1f} ± {summary['std']:.1f} ms" if summary else ""
        return f"{text}, {mode.refused} calls refused" if mode.refused else text

    def _exchange(self, a: Encryptor, b: Encryptor, enc: Mode, dec: Mode) -> None:
        """One key, fetched at both ends and compared."""
        asked_s = time.perf_counter()
        try:
            (key,) = a.enc_keys(SLAVE)
        except RefusedError:
            enc.refused += 1
            time.sleep(_PAUSE_S)
            return
        had_s = time.perf_counter()
        enc.samples.append((asked_s - self._began_s, (had_s - asked_s) * 1000))
        fetched = _fetch(b, key)
        dec.samples.append((had_s - self._began_s, (time.perf_counter() - had_s) * 1000))
        enc.mismatches += fetched != key

    def _fill_reserves(self, directory: LabDirectory) -> None:
        """Give every node water marks and wait until the reserve that keys are drawn from is full."""
        lab = directory.read_lab()
        nodes = [node["id"] for node in lab["nodes"]]
        reserves = msgspec.to_builtins(Reserves(high_water_bytes=RESERVE_BYTES))
        for node_id in nodes:
            rewrite_config(directory, node_id, lambda config: config.update(reserves=reserves))
        restart_processes(directory, nodes, self._progress)
        self._wait(directory, DeliveryCheck(lab, wanted_keys=0).missing)
        self._wait(directory, lambda: _missing_keys(directory))
        self._say(f"nodes restarted with water marks, {RESERVE_BYTES // KEY_PART_BYTES} keys in the reserve")

    def _fill_buffer(self, directory: LabDirectory) -> None:
        """Let the master's home keep keys of this pair ready, and wait until they are."""
        pair = msgspec.to_builtins(BufferedPair(master=MASTER, slave=SLAVE, buffer=BUFFER_KEYS))
        rewrite_config(directory, HOME, lambda config: config.update(foreign_buffers=[pair]))
        restart_processes(directory, [HOME], self._progress)
        lab = directory.read_lab()

        def missing() -> str:
            try:
                with encryptor(lab, MASTER) as sae:
                    held = sae.status(SLAVE)["stored_key_count"]
            except (RefusedError, OSError, http.client.HTTPException) as error:
                return f"the buffer ({error})"
            return "" if held >= BUFFER_KEYS else f"keys in the buffer: {held} of {BUFFER_KEYS}"

        self._wait(directory, missing)
        self._say(f"{BUFFER_KEYS} keys of this pair are buffered")

    def _wait(self, directory: LabDirectory, check: Callable[[], str]) -> None:
        wait_until(
            check,
            deadline_s=time.monotonic() + _FILL_TIMEOUT_S,
            processes=directory.read_processes(),
            progress=self._progress.waiting,
        )

    def _say(self, text: str) -> None:
        self._progress.done(text)

    def _report(self) -> None:
        results = {name: mode.result(self._round_trip_ms) for name, mode in self._modes.items()}
        (self._folder / "result.json").write_text(
            msgspec.json.format(msgspec.json.encode(results)).decode() + "\n", encoding="utf-8"
        )
        note = (
            f"Here: all on one machine ({platform.machine()}, Python {platform.python_version()}), simulated "
            f"QKD devices, emulated ocean of {self._round_trip_ms:g} ms. Paper: Toronto – Cambridge."
        )
        draw_paper(
            [Series(name, _TITLES[name], self._modes[name].samples) for name in _TITLES],
            round_trip_ms=self._round_trip_ms,
            note=note,
            path=self._folder / "latency.png",
        )
        print()
        print(
            f"{'milliseconds per 256-bit key':44}{'n':>6}{'mean':>8}{'std':>7}{'p50':>8}{'p99':>8}"
            f"{'p50 - floor':>13}   paper"
        )
        for name, result in results.items():
            mean, std = PAPER_DEC_MS if name == "dec" else PAPER_ENC_MS
            beyond = f"{result['p50_ms'] - result['floor_ms']:13.1f}" if name in GOALS_MS else 13 * " "
            print(
                f"{_TITLES[name]:44}{result['n']:6}{result['mean_ms']:8.1f}{result['std_ms']:7.1f}"
                f"{result['p50_ms']:8.1f}{result['p99_ms']:8.1f}{beyond}   {mean:.0f} ± {std:.0f}"
            )
        floor_ms = results["dec"]["floor_ms"]
        print(
            f"\nRound trip of the ocean, the physical limit: {self._round_trip_ms:g} ms as configured, "
            f"{floor_ms:.1f} ms for an echo over it in this run."
        )
        print(note)
        refused = sum(mode.refused for mode in self._modes.values())
        print(
            f"{results['dec']['n']} keys compared at both ends, {results['dec']['mismatches']} differ or are "
            f"missing, {refused} calls refused."
        )
        print(f"Written: {self._folder / 'result.json'}, {self._folder / 'latency.png'}")
        print(goals_line({name: results[name]["p50_ms"] for name in GOALS_MS}, self._round_trip_ms))


def goals_line(p50_ms: dict[str, float], round_trip_ms: float) -> str:
    """Which goals were met, the others by how much not, and how to see where the time goes."""
    parts = []
    for name, beyond_ms in GOALS_MS.items():
        over_ms = p50_ms[name] - round_trip_ms - beyond_ms
        how = "met" if over_ms <= 0 else f"missed by {over_ms:.1f} ms"
        parts.append(f"{_TITLES[name]}, p50 at most the round trip + {beyond_ms:g} ms: {how}")
    return (
        f"Goals: {'; '.join(parts)}. Where the milliseconds go: 'keymesh lab up --network paper --dir DIR', "
        "then 'keymesh lab trace --dir DIR' (docs/lab.md)."
    )


def with_round_trip(lab: Lab, round_trip_ms: float) -> Lab:
    """The same lab with an ocean of another width; hubs keep their relative places."""
    widest_ms = max(
        (network.delay_ms(a, b) for network in lab.domains for a in network.borders for b in network.borders),
        default=0.0,
    )
    if widest_ms == 0:
        raise ConfigError("no two borders of this network are apart: it has no ocean")
    factor = round_trip_ms / 2 / widest_ms

    def wider(link: LinkSpec) -> LinkSpec:
        return msgspec.structs.replace(link, one_way_delay_ms=link.one_way_delay_ms * factor)

    def widened(network: Network) -> Network:
        return msgspec.structs.replace(network, links=[wider(link) for link in network.links])

    return Lab(lab.name, tuple(widened(network) for network in lab.domains))


def _empty(lab: Lab) -> Lab:
    """Reserves start empty and are not filled, so that the first keys are made on demand."""
    empty = Reserves(high_water_bytes=0, prefill=False)
    return Lab(lab.name, tuple(msgspec.structs.replace(one, reserves=empty) for one in lab.domains))


def _ocean(lab: dict[str, Any]) -> dict[str, Any]:
    """The relay between the two nodes that the ocean parts: the path of everything but shares."""
    nodes = {node["id"] for node in lab["nodes"]}
    return next(relay for relay in lab["relays"] if set(relay["between"]) <= nodes)


def _missing_keys(directory: LabDirectory) -> str:
    (target,) = operator_targets(directory.root, HOME)
    try:
        reserves = operator.as_plain(operator.ask(target, "reserves"))["reserves"]
    except MeshError as error:
        return f"{HOME}: {error}"
    towards = (one for one in reserves if one["peer_kme_id"] == BORDER and one["is_outbound"])
    held = max((int(one["held_key_slots"]) for one in towards), default=0)
    wanted = RESERVE_BYTES // KEY_PART_BYTES * 95 // 100
    return "" if held >= wanted else f"keys in the reserve: {held} of {wanted}"


def _fetch(sae: Encryptor, key: FetchedKey) -> FetchedKey | None:
    """The key as the other end has it; None if it does not."""
    try:
        (fetched,) = sae.dec_keys(MASTER, [key.key_id])
    except RefusedError:
        return None
    return fetched


def run_paper(folder: Path, *, duration_s: float = DURATION_S, round_trip_ms: float = ROUND_TRIP_MS) -> int:
    """Run the experiment into ``folder``; return the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        Paper(folder.resolve(), duration_s=duration_s, round_trip_ms=round_trip_ms).run()
    except (MeshError, RefusedError, OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"paper: {error}\n")
        return 1
    return 0
