"""Establishes through real processes: relay over one link and two, DSKE over hubs; one key, and bulk.

Brings the network ``bench`` up: lanes filled by courier, reserves empty. One key: drawn over REST on
demand, with what it burns of each lane. Bulk: the source's high-water mark is raised, one key drawn,
and the refill that starts is watched; durable appends at both ends and the wiping of lanes are part
of it. Floors from the same run: the TLS stub, a bare gRPC stream, and synced files on the same disk.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.labs import (
    checked,
    connections,
    cpu_seconds,
    gateway_url,
    lab,
    lab_meter,
    resident_mb,
    sae_context,
    tls_stub,
)
from benchmarks.load import fetch_repeatedly
from benchmarks.rows import Meter, Row, row
from benchmarks.stream import read_pem, send
from mesh.client import operator
from mesh.core.identity import Role
from mesh.core.transfer import KEY_PART_BYTES, SLOT_BYTES
from mesh.lab.control import Progress, restart_processes, rewrite_config
from mesh.lab.ready import get_plain
from mesh.lab.state import LabDirectory
from mesh.pki.authority import Pki
from mesh.v1.admin_pb2 import ListLinksResponse

ON_DEMAND_CALLS = 200
BULK_SECONDS = float(os.environ.get("KEYMESH_BENCH_SECONDS", "5"))
TRANSFER_BYTES = 1 << 20
_START_S = 20.0
_STALLED_S = 3.0
_FULL_S = 60.0


@dataclass(frozen=True)
class Case:
    """A pair of the network, its routes, and what is hoped for."""

    name: str
    source: str
    target: str
    routes: tuple[tuple[str, ...], ...]
    high_water_bytes: int
    goal_gbit_s: float | None = None

    @property
    def hops(self) -> list[tuple[str, str]]:
        """Every lane of every route, once."""
        return sorted({hop for route in self.routes for hop in pairwise(route)})


def _over(source: str, target: str, hubs: int) -> tuple[tuple[str, ...], ...]:
    return tuple((source, f"hub-{number}", target) for number in range(1, hubs + 1))


MIB = 1 << 20
CASES = (
    Case("relay, one link", "a", "b", (("a", "b"),), 200 * MIB, 2.0),
    Case("relay, two links", "a", "c", (("a", "b", "c"),), 110 * MIB, 1.0),
    Case("dske(2,2)", "b", "d", _over("b", "d", 2), 75 * MIB),
    Case("dske(2,3)", "a", "d", _over("a", "d", 3), 75 * MIB, 1.0),
    Case("dske(3,5)", "c", "d", _over("c", "d", 5), 35 * MIB),
)


class _Lab:
    """A running lab, asked as an operator asks."""

    def __init__(self, lab_json: dict[str, Any]) -> None:
        self.json = lab_json
        self.directory = LabDirectory(Path(lab_json["tool"]["cert"]).parent.parent)
        self._members = {one["id"]: one for one in [*lab_json["nodes"], *lab_json["hubs"]]}

    def positions(self, hops: list[tuple[str, str]]) -> int:
        """Positions of these lanes, summed up: what was burnt of them, between two calls."""
        return sum(self._position(*hop) for hop in hops)

    def _position(self, own: str, peer: str) -> int:
        one, tool, ca = self._members[own], self.json["tool"], self.json["ca"]["node"]
        role = Role.HUB if own.startswith("hub-") else Role.NODE
        target = operator.OperatorTarget(
            one["grpc"], own, one["domain"], Path(ca), Path(tool["cert"]), Path(tool["key"]), role
        )
        answer = operator.ask(target, "links")
        if not isinstance(answer, ListLinksResponse):
            raise TypeError("not an answer on links")
        return next(link.transmit.position for link in answer.links if link.peer_kme_id == peer)

    def established_bytes(self, node: str) -> float:
        """Key bytes that a node has established as source."""
        status, body = get_plain(self._members[node]["http"], "/metrics")
        if status != 200:
            return 0.0
        lines = body.decode().splitlines()
        name = "keymesh_established_key_bytes_total{"
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def restart(self, node: str, high_water_bytes: int) -> None:
        """Start a node again with another high-water mark."""

        def change(config: dict[str, Any]) -> None:
            config["reserves"] = {
                **config["reserves"],
                "high_water_bytes": high_water_bytes,
                "transfer_max_bytes": TRANSFER_BYTES,
                "inbound_max_bytes": 1 << 30,
            }

        rewrite_config(self.directory, node, change)
        restart_processes(self.directory, [node], Progress(io.StringIO()))
        self.json = self.directory.read_lab()

    def sae(self, node: str) -> dict[str, Any]:
        """The application of a node."""
        return next(sae for sae in self.json["saes"] if sae["node"] == node)


async def _one_key(where: _Lab, case: Case, calls: int) -> tuple[list[float], float]:
    """Seconds per key drawn on demand, and lane bytes per key and hop."""
    master, slave = where.sae(case.source), where.sae(case.target)
    path = f"/api/v1/keys/{slave['id']}/enc_keys"
    async with connections(gateway_url(where.json, master), sae_context(where.json, master), 1) as one:
        end = time.monotonic() + _START_S
        while (answer := await one[0].get(path))[0] != 200:
            if time.monotonic() > end:
                raise RuntimeError(f"{case.name}: {answer[1]!r}")
        before = where.positions(case.hops)
        outcome = checked(await fetch_repeatedly(one, path, duration_s=60, most=calls), case.name)
        burnt = where.positions(case.hops) - before
    return outcome.times_s, burnt / calls / len(case.hops)


def _on_demand(where: _Lab, floor_ms: float) -> Iterator[Row]:
    for case in CASES:
        meter = lab_meter(where.json)
        times_s, burnt = uvloop.run(_one_key(where, case, ON_DEMAND_CALLS))
        used = meter.used()
        yield row(
            f"{case.name}, one key on demand, p50",
            1e3 * statistics.median(times_s),
            "ms",
            floor=floor_ms,
            goal="round trip + 5 ms",
            cpu=used,
        )
        name = f"{case.name}, lane bytes per 256-bit key and hop"
        yield row(name, burnt, "bytes", floor=32, goal="<= 160 bytes", cpu=used)


def _memory(where: _Lab) -> Iterator[Row]:
    """The largest node of the network holds 1 GiB of pools; the gateway is that of the node drawn from."""
    for what, members, goal in (
        ("node with 1 GiB of pools", where.json["nodes"], 150),
        ("gateway", where.json["gateways"], 100),
    ):
        largest = max(resident_mb(member["pid"]) for member in members)
        name, since_start = f"resident memory, {what}", cpu_seconds(where.json)
        yield row(name, largest, "MB", goal=f"<= {goal} MB", cpu=since_start)


def _bulk(where: _Lab, case: Case, stream_bytes_per_s: float) -> Iterator[Row]:
    where.restart(case.target, 0)
    where.restart(case.source, case.high_water_bytes)
    before = where.positions(case.hops)
    uvloop.run(_one_key(where, case, 1))
    _under_way(where, case.source)
    first, begun = where.established_bytes(case.source), time.perf_counter()
    meter = lab_meter(where.json)
    last, last_s = first, begun
    while (now_s := time.perf_counter()) - begun < BULK_SECONDS and now_s - last_s < _STALLED_S:
        time.sleep(0.25)
        now = where.established_bytes(case.source)
        if now > last:
            last, last_s = now, time.perf_counter()
    if last == first:
        raise RuntimeError(f"{case.name}: the refill stopped at once; see the log of {case.source}")
    used = meter.used()
    in_all = _when_full(where, case.source)
    burnt = where.positions(case.hops) - before
    where.restart(case.source, 0)
    payload = (last - first) / KEY_PART_BYTES * SLOT_BYTES
    rate = payload / (last_s - begun)
    goal = "" if case.goal_gbit_s is None else f">= {case.goal_gbit_s:g} Gbit/s"
    yield row(
        f"{case.name}, bulk, {last_s - begun:.1f} s",
        rate * 8 / 1e9,
        "Gbit/s",
        floor=stream_bytes_per_s * 8 / 1e9,
        goal=goal,
        cpu=used,
    )
    yield row(
        f"{case.name}, bulk, lane bytes per secret byte and hop",
        burnt / len(case.hops) / (in_all / KEY_PART_BYTES * SLOT_BYTES),
        "",
        goal="<= 1.02",
        cpu=used,
    )


def _under_way(where: _Lab, node: str) -> None:
    """Wait until refills have grown to full transfers."""
    end = time.monotonic() + _START_S
    while where.established_bytes(node) < 4 * TRANSFER_BYTES:
        if time.monotonic() > end:
            raise RuntimeError(f"node {node} does not refill; see its log")
        time.sleep(0.05)


def _when_full(where: _Lab, node: str) -> float:
    """Key bytes established once the refill has come to its end, nothing being under way."""
    level, since = 0.0, time.monotonic()
    end = since + _FULL_S
    while time.monotonic() - since < _STALLED_S and time.monotonic() < end:
        time.sleep(0.25)
        if (now := where.established_bytes(node)) > level:
            level, since = now, time.monotonic()
    return level


async def _stub_ms() -> float:
    async with tls_stub() as stub, connections(*stub, 1) as bare:
        floor = checked(await fetch_repeatedly(bare, "/", duration_s=1), "stub")
    return 1e3 * statistics.median(floor.times_s)


@contextlib.contextmanager
def _stream() -> Iterator[Callable[[], float]]:
    """A bare stream between two processes; gives bytes per second when called."""
    with tempfile.TemporaryDirectory(prefix="keymesh-stream-") as name:
        folder = Path(name)
        pki = Pki.create("stream")
        ca = pki.save(folder / "roots")["node"]
        server = pki.node("stream-server", hosts=["localhost"]).save(folder, "server")
        client = pki.node("stream-client").save(folder, "client")
        command = [sys.executable, "-m", "benchmarks.stream", str(ca), str(server.cert), str(server.key)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                port = int(process.stdout.readline())
                pem = read_pem(str(ca), str(client.cert), str(client.key))
                yield lambda: uvloop.run(send(port, pem, message_bytes=TRANSFER_BYTES, seconds=2))
            finally:
                process.terminate()


def _synced_bytes_per_s() -> float:
    """Files of a transfer's size, written and synced one after the other."""
    data = os.urandom(TRANSFER_BYTES)
    with tempfile.TemporaryDirectory(prefix="keymesh-disk-") as name:
        begun = time.perf_counter()
        for number in range(256):
            with (Path(name) / str(number)).open("wb", buffering=0) as file:
                file.write(data)
                os.fdatasync(file.fileno())
        return 256 * TRANSFER_BYTES / (time.perf_counter() - begun)


def run() -> Iterator[Row]:
    """Measure; a row at a time, for it takes some minutes."""
    meter = Meter()
    with _stream() as stream:
        stream_rate = stream()
    name = "bare gRPC stream over mutual TLS, 1 MiB messages"
    yield row(name, stream_rate * 8 / 1e9, "Gbit/s", cpu=meter.used())
    meter = Meter()
    synced_rate = _synced_bytes_per_s()
    name = "files of 1 MiB, each synced, one disk"
    yield row(name, synced_rate * 8 / 1e9, "Gbit/s", cpu=meter.used())
    floor_ms = uvloop.run(_stub_ms())
    with lab("bench") as lab_json:
        where = _Lab(lab_json)
        yield from _memory(where)
        yield from _on_demand(where, floor_ms)
        for case in CASES:
            yield from _bulk(where, case, stream_rate)


if __name__ == "__main__":
    print(json.dumps(list(run()), indent=2))
