"""The lab signals only what it started, and its files are replaced whole."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import pytest

from mesh.errors import ConfigError, UnavailableError
from mesh.lab import domain, ready
from mesh.lab.control import Progress, _start_all, start_lab
from mesh.lab.ground import PORTS_VARIABLE, claim_directory, clear_directory, free_ports
from mesh.lab.measure import Stopwatch, summarise
from mesh.lab.networks import load_lab
from mesh.lab.plan import LabPlan
from mesh.lab.processes import Process, stop_all
from mesh.lab.state import LabDirectory, put_pid


def sleeper(tmp_path: Path, code: str = "import time; time.sleep(60)") -> Process:
    return Process(
        id="p", kind="node", argv=[sys.executable, "-c", code], log=str(tmp_path / "log" / "p.log")
    )


def test_ports_come_from_the_range_in_force_and_not_twice_while_there_are_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(PORTS_VARIABLE, "19000-19199")
    found = [*free_ports(60), *free_ports(60)]
    assert len(set(found)) == 120
    assert set(found) <= set(range(19_000, 19_200))
    assert len(set(free_ports(100))) == 100, "what was given before comes last"
    with pytest.raises(UnavailableError, match="no 201 free ports between 19000 and 19199"):
        free_ports(201)


@pytest.mark.parametrize("text", ["", "20000", "0-7", "9-8", "20000-70000", "a-b"])
def test_a_range_of_ports_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(PORTS_VARIABLE, text)
    with pytest.raises(ConfigError, match=PORTS_VARIABLE):
        free_ports(1)


def test_a_process_has_its_own_session_and_is_stopped(tmp_path: Path) -> None:
    process = sleeper(tmp_path)
    process.start()
    assert process.is_running()
    assert os.getsid(process.pid) == process.pid
    assert stop_all([process]) == []
    assert not process.is_running()


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    process = sleeper(tmp_path, f"{ignore}; print(1, flush=True); time.sleep(60)")
    process.start()
    while "1" not in process.log_tail():
        time.sleep(0.01)
    assert stop_all([process], grace_s=0.2) == ["p"]
    assert not process.is_running()


def test_a_pid_that_became_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    process = sleeper(tmp_path)
    process.start()
    same_pid = Process(
        id="q", kind="node", argv=[], log="", pid=process.pid, started=process.started - 1, boot=process.boot
    )
    other_boot = Process(
        id="r", kind="node", argv=[], log="", pid=process.pid, started=process.started, boot="another"
    )
    assert not same_pid.is_running()
    assert not other_boot.is_running()
    same_pid.signal(signal.SIGKILL)
    assert process.is_running()
    stop_all([process])


def test_one_that_ended_says_its_last_words(tmp_path: Path) -> None:
    process = sleeper(tmp_path, "print('no such file'); raise SystemExit(2)")
    process.start()
    while process.is_running():
        time.sleep(0.01)
    with pytest.raises(UnavailableError, match="no such file"):
        process.check_running()


def test_a_running_lab_is_not_overwritten_and_a_stopped_one_is(tmp_path: Path) -> None:
    directory = LabDirectory(tmp_path / "lab")
    claim_directory(directory)
    process = sleeper(tmp_path / "lab")
    process.start()
    directory.write_processes([process])
    with pytest.raises(UnavailableError, match="lab down"):
        clear_directory(directory)
    stop_all([process])
    (directory.root / ".processes.json.new").touch()  # as a killed command may leave it
    claim_directory(directory)
    clear_directory(directory)
    assert [entry.name for entry in directory.root.iterdir()] == [".lock"]


def test_a_second_start_in_a_directory_touches_nothing_of_the_first(tmp_path: Path) -> None:
    directory = LabDirectory(tmp_path / "lab")
    claim_directory(directory)
    directory.config.mkdir()
    with directory.locked(), pytest.raises(UnavailableError, match="another lab command"):
        start_lab(load_lab("metro"), directory.root, Progress(StringIO()))
    assert directory.config.exists()


def test_each_process_is_on_disk_before_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = LabDirectory(tmp_path)
    seen: list[list[int]] = []

    def start(process: Process) -> None:
        seen.append([one.pid for one in directory.read_processes()])
        process.pid = 7 + len(seen)
        if len(seen) == 3:
            raise OSError("killed here")

    monkeypatch.setattr(Process, "start", start)
    processes = [Process(id=f"etcd-{n}", kind="etcd", argv=[], log="") for n in range(3)]
    lab = {"domains": [{"etcd": {"members": ["etcd-0", "etcd-1", "etcd-2"], "pids": [0, 0, 0]}}]}
    with pytest.raises(OSError, match="killed"):
        _start_all(LabPlan(directory, processes=processes, lab=lab), Progress(StringIO()), float("inf"))
    assert seen == [[], [8, 0, 0], [8, 9, 0]]


def test_no_answer_is_waited_for_beyond_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve pairs that answer slowly must not cost ten seconds each after the time is up."""
    given: list[float] = []

    def slow(_lab: object, _sae: str, *, timeout_s: float) -> NoReturn:
        given.append(timeout_s)
        time.sleep(min(timeout_s, 0.4))
        raise TimeoutError

    monkeypatch.setattr(ready, "encryptor", slow)
    nodes = [{"id": f"n{n}", "domain": "d"} for n in range(4)]
    saes = [{"id": f"s{n}", "node": f"n{n}", "gateway": f"g{n}"} for n in range(4)]
    deadline_s = time.monotonic() + 0.5
    check = ready.DeliveryCheck({"saes": saes, "nodes": nodes}, wanted_keys=1, deadline_s=deadline_s)
    with pytest.raises(UnavailableError, match="not ready in time: g0"):
        ready.wait_until(check.missing, deadline_s=deadline_s, processes=[])
    assert time.monotonic() - deadline_s < 3
    assert max(given) <= 0.5


async def test_an_etcd_that_hangs_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(domain, "_prepare_etcd", hang)
    plan: Any = None
    with pytest.raises(UnavailableError, match="in time"):
        await domain.prepare_etcd(plan, [], deadline_s=time.monotonic() + 0.1)


def test_restarted_pids_reach_every_place_in_lab_json(tmp_path: Path) -> None:
    etcd = {"pids": [1, 2], "members": ["etcd-1", "etcd-2"]}
    lab = {"nodes": [{"id": "a", "pid": 1}], "hubs": [], "domains": [{"etcd": etcd}], "etcd": etcd}
    put_pid(lab, Process(id="a", kind="node", argv=[], log="", pid=7))
    put_pid(lab, Process(id="etcd-2", kind="etcd", argv=[], log="", pid=8))
    assert lab["nodes"] == [{"id": "a", "pid": 7}]
    directory = LabDirectory(tmp_path)
    directory.write_lab(lab)
    assert directory.read_lab()["etcd"]["pids"] == [1, 8]
    directory.lab_file.write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        directory.read_lab()


def test_latencies_are_summed_up() -> None:
    summary = summarise([float(value) for value in range(1, 101)])
    assert summary == {"n": 100, "mean": 50.5, "std": 29.011, "p50": 50.5, "p99": 99.0}
    watch = Stopwatch()
    with watch:
        pass
    with pytest.raises(ValueError, match="x"), watch:
        raise ValueError("x")
    assert len(watch.samples_ms) == 1
