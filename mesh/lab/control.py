"""Starting, restarting and stopping a whole lab.

Owns the order of things: files first, then etcd, devices and relays, then the network
document, then nodes and gateways, then the wait until every gateway can deliver.
Whatever fails stops everything that was started and says why.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import msgspec

from mesh.core.sizes import format_size
from mesh.errors import CallerError, ErrorReason
from mesh.lab.couriers import supply_links
from mesh.lab.domain import prepare_domain, prepare_etcd
from mesh.lab.ground import claim_directory, clear_directory, writing_in
from mesh.lab.networks import Lab
from mesh.lab.plan import LabPlan, Planner
from mesh.lab.processes import stop_all
from mesh.lab.ready import DeliveryCheck, missing_health, wait_until
from mesh.lab.state import LabDirectory, put_pid

START_TIMEOUT_S = 100.0
"""The contract promises an answer within 120 s, stopping everything after a failure included."""
_RESTART_TIMEOUT_S = 90.0


class Progress:
    """Tells a person at the terminal what happens, one line per step.

    Args:
        stream: where to; in a terminal the line in work is rewritten in place.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._began_s = time.monotonic()
        self._is_terminal = self._stream.isatty()

    def done(self, text: str) -> None:
        """A step is done."""
        self._line(f"{self._elapsed()}  {text}", end="\n")

    def waiting(self, text: str) -> None:
        """What is being waited for; shown in terminals only."""
        if self._is_terminal:
            self._line(f"{self._elapsed()}  … {text}"[:120], end="")

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._began_s:6.1f} s"

    def _line(self, text: str, *, end: str) -> None:
        start = "\r\x1b[2K" if self._is_terminal else ""
        self._stream.write(f"{start}{text}{end}")
        self._stream.flush()


def start_lab(lab: Lab, root: Path, progress: Progress) -> LabDirectory:
    """Start a network and wait until every gateway can deliver.

    Returns:
        The lab's directory, with ``lab.json`` written.

    Raises:
        MeshError: it did not come up; everything is stopped again, and the message says why.
    """
    began_s = time.monotonic()
    directory = LabDirectory(root)
    with writing_in(directory):
        claim_directory(directory)
    with directory.locked(waits=False):
        with writing_in(directory):
            clear_directory(directory)
            plan = Planner(lab, directory).write()
            for domain in plan.domains:
                prepare_domain(domain)
        progress.done(f"files of {len(plan.processes)} processes written to {directory.root}")
        try:
            deadline_s = began_s + START_TIMEOUT_S
            if carried := sum(supply_links(one, directory, deadline_s=deadline_s) for one in lab.domains):
                progress.done(f"couriers brought {format_size(carried)} of pre-shared random data")
            _start_all(plan, progress, deadline_s)
        except BaseException:
            stop_all(plan.processes)
            directory.write_processes(plan.processes)
            directory.remove_proofs()
            raise
    progress.done(f"{lab.name} delivers: {directory.lab_file}")
    return directory


def _start_all(plan: LabPlan, progress: Progress, deadline_s: float) -> None:
    directory, lab = plan.directory, plan.lab

    def start(*kinds: str) -> None:
        for process in plan.of_kind(*kinds):
            process.start()
            put_pid(lab, process)
            # After each of them, so that lab down finds all there is, whenever this one is killed.
            directory.write_processes(plan.processes)

    start("etcd", "device", "relay")
    asyncio.run(_prepare_directories(plan, deadline_s))
    progress.done(f"etcd ({len(plan.of_kind('etcd'))}) holds the signed network documents")
    start("hub", "node", "gateway")
    devices = {entry["id"]: entry["control"].removeprefix("http://") for entry in lab["devices"]}
    for what, path, places in (
        ("devices", "/healthz", devices),
        ("nodes and hubs", "/readyz", {entry["id"]: entry["http"] for entry in lab["nodes"] + lab["hubs"]}),
        ("gateways", "/readyz", {entry["id"]: entry["http"] for entry in lab["gateways"]}),
    ):
        check = partial(missing_health, places, path, deadline_s=deadline_s)
        _wait(check, plan, progress, deadline_s)
        if places:
            progress.done(f"{len(places)} {what} up")
    reserves = [domain.network.reserves for domain in plan.domains]
    is_filled = all(one.prefill and one.high_water_bytes > 0 for one in reserves)
    delivery = DeliveryCheck(lab, wanted_keys=int(is_filled), deadline_s=deadline_s)
    _wait(delivery.missing, plan, progress, deadline_s)
    directory.write_lab(lab)


async def _prepare_directories(plan: LabPlan, deadline_s: float) -> None:
    async with asyncio.TaskGroup() as group:
        for domain in plan.domains:
            ids = {member.id for member in domain.members}
            processes = [process for process in plan.of_kind("etcd") if process.id in ids]
            group.create_task(prepare_etcd(domain, processes, deadline_s=deadline_s))


def _wait(check: Callable[[], str], plan: LabPlan, progress: Progress, deadline_s: float) -> None:
    wait_until(check, deadline_s=deadline_s, processes=plan.processes, progress=progress.waiting)


def hold_lab(directory: LabDirectory, progress: Progress) -> None:
    """Stay until Ctrl-C or SIGTERM, then stop the lab."""

    progress.done("Ctrl-C stops it")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        stop_lab(directory, progress)
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_lab(directory: LabDirectory, progress: Progress) -> None:
    """Stop everything of a lab, in whatever state it is.

    Raises:
        ConfigError: there is no lab there.
    """
    with directory.locked():
        processes = directory.read_processes()
        for kinds in (("gateway",), ("node", "hub"), ("relay", "device", "etcd")):
            killed = stop_all([process for process in processes if process.kind in kinds])
            for process_id in killed:
                progress.done(f"{process_id} did not stop by itself and was killed")
        directory.lab_file.unlink(missing_ok=True)
        directory.remove_proofs()
    progress.done(f"stopped {len(processes)} processes; logs stay in {directory.log}")


def restart_processes(directory: LabDirectory, process_ids: Sequence[str], progress: Progress) -> None:
    """Start processes of a running lab again, all at once, stopping first those that run.

    Returns once they answer on their health ports. Whether they can serve depends on
    their neighbours too, and is not waited for.

    Raises:
        CallerError: the lab has no such process.
        UnavailableError: one ended again, or does not answer in time.
    """
    with directory.locked():
        lab = directory.read_lab()
        processes = directory.read_processes()
        known = {process.id: process for process in processes}
        if unknown := [process_id for process_id in process_ids if process_id not in known]:
            raise CallerError(
                f"no process {unknown[0]!r} in this lab; there are {', '.join(known)}",
                reason=ErrorReason.INVALID_ARGUMENT,
            )
        chosen = [known[process_id] for process_id in process_ids]
        stop_all(chosen)
        for process in chosen:
            process.start()
            put_pid(lab, process)
            directory.write_processes(processes)
        directory.write_lab(lab)
    deadline_s = time.monotonic() + _RESTART_TIMEOUT_S
    places = {process.id: place for process in chosen if (place := _health_place(lab, process.id))}
    wait_until(
        lambda: missing_health(places, "/healthz", deadline_s=deadline_s),
        deadline_s=deadline_s,
        processes=chosen,
        progress=progress.waiting,
    )
    progress.done(", ".join(f"{process.id} runs as {process.pid}" for process in chosen))


def _health_place(lab: dict[str, Any], process_id: str) -> str | None:
    for entry in [*lab["nodes"], *lab["hubs"], *lab["gateways"], *lab["devices"]]:
        if entry["id"] == process_id:
            place: str = entry.get("http") or entry["control"].removeprefix("http://")
            return place
    return None


def rewrite_config(
    directory: LabDirectory, process_id: str, change: Callable[[dict[str, Any]], None]
) -> None:
    """Change one process's configuration file; it takes effect with ``restart_processes``.

    Raises:
        CallerError: no such configuration.
    """
    path = directory.config_of(process_id)
    try:
        config = msgspec.yaml.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise CallerError(f"no configuration {path}") from error
    change(config)
    path.write_bytes(msgspec.yaml.encode(config))
