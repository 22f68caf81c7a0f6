"""The lab signals only what it started, and its files are replaced whole."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from mesh.errors import ConfigError, UnavailableError
from mesh.lab.ground import PORTS_VARIABLE, clear_directory, free_ports
from mesh.lab.measure import Stopwatch, summarise
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
    clear_directory(directory)
    process = sleeper(tmp_path / "lab")
    process.start()
    directory.write_processes([process])
    with pytest.raises(UnavailableError, match="lab down"):
        clear_directory(directory)
    stop_all([process])
    clear_directory(directory)
    assert list(directory.root.iterdir()) == []


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
