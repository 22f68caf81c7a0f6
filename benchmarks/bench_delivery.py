"""Key delivery over the real path: REST with mutual TLS, gateway, gRPC, node, and the relay behind it.

Brings the network ``metro`` up as a lab and drives it as encryptors do, everything
and the load generator on this machine. Floors come from a bare TLS stub of the same
API, driven by the same generator in the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.load import Connection, Outcome, client_context, fetch_pairs, fetch_repeatedly
from benchmarks.rows import Row, percentile, row
from mesh.pki.authority import Pki

KEYMESH = Path(sys.executable).with_name("keymesh")
CONNECTIONS = 16
SECONDS = float(os.environ.get("KEYMESH_BENCH_SECONDS", "5"))


@contextlib.contextmanager
def lab(network: str) -> Iterator[dict[str, Any]]:
    """A running lab of ``network``; its ``lab.json``."""
    with tempfile.TemporaryDirectory(prefix="keymesh-bench-") as folder:
        where = ["--dir", str(Path(folder) / "lab")]
        try:
            subprocess.run([KEYMESH, "lab", "up", "--network", network, *where, "--detach"], check=True)
            yield json.loads((Path(folder) / "lab" / "lab.json").read_text())
        finally:
            subprocess.run([KEYMESH, "lab", "down", *where], check=False, stdout=subprocess.DEVNULL)


def cpu_seconds(lab_json: dict[str, Any]) -> dict[str, float]:
    """Processor seconds so far of each node and gateway of a lab, and of this process."""
    ticks = os.sysconf("SC_CLK_TCK")
    seconds = {"load": sum(os.times()[:2])}
    for process in [*lab_json["nodes"], *lab_json["gateways"]]:
        with contextlib.suppress(FileNotFoundError):
            fields = Path(f"/proc/{process['pid']}/stat").read_text().rpartition(")")[2].split()
            seconds[process["id"]] = (int(fields[11]) + int(fields[12])) / ticks
    return seconds


def spent(lab_json: dict[str, Any], before: dict[str, float]) -> dict[str, float]:
    """Processor seconds since ``before``, by process; those that did nothing left out."""
    after = cpu_seconds(lab_json)
    return {
        name: round(after[name] - before[name], 2) for name in after if after[name] - before[name] >= 0.05
    }


@contextlib.asynccontextmanager
async def _connections(url: str, context: ssl.SSLContext, count: int) -> AsyncIterator[list[Connection]]:
    opened = [await Connection.open(url, context) for _ in range(count)]
    try:
        yield opened
    finally:
        for connection in opened:
            await connection.close()


def _client(lab_json: dict[str, Any], sae: dict[str, Any]) -> ssl.SSLContext:
    return client_context(lab_json["ca"]["gateway"], sae["cert"], sae["key"])


def _url(lab_json: dict[str, Any], sae: dict[str, Any]) -> str:
    url: str = next(g["url"] for g in lab_json["gateways"] if g["id"] == sae["gateway"])
    return url


@contextlib.asynccontextmanager
async def _stub() -> AsyncIterator[tuple[str, ssl.SSLContext]]:
    with tempfile.TemporaryDirectory(prefix="keymesh-stub-") as name:
        folder = Path(name)
        pki = Pki.create("stub")
        roots = pki.save(folder / "roots")
        server = pki.gateway_server("stub").save(folder, "server")
        client = pki.sae("stub").save(folder, "client")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "benchmarks.stub",
            str(roots["sae"]),
            str(server.cert),
            str(server.key),
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            port = int(await process.stdout.readline())
            context = client_context(str(roots["gateway"]), str(client.cert), str(client.key))
            yield f"https://127.0.0.1:{port}", context
        finally:
            process.terminate()
            await process.wait()


def _milliseconds(name: str, outcome: Outcome, floor: Outcome, goal: str) -> list[Row]:
    return [
        row(
            f"{name} p{percent}",
            1e3 * percentile(outcome.times_s, percent),
            "ms",
            floor=1e3 * percentile(floor.times_s, percent),
            goal=goal,
        )
        for percent in (50, 99)
    ]


def _ab(url: str, path: str, lab_json: dict[str, Any], sae: dict[str, Any]) -> float | None:
    """Requests per second as ``ab`` sees them; None where ``ab`` is not installed."""
    program = shutil.which("ab")
    if program is None:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as pem:
        pem.write(Path(sae["cert"]).read_text() + Path(sae["key"]).read_text())
        pem.flush()
        command = [
            program,
            "-q",
            "-k",
            "-c",
            str(CONNECTIONS),
            "-t",
            str(int(SECONDS)),
            "-n",
            "1000000",
            "-E",
            pem.name,
            url + path,
        ]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    failed = re.search(r"Non-2xx responses:\s+(\d+)", text)
    if failed:
        raise RuntimeError(f"{failed[1]} requests failed under ab")
    found = re.search(r"Requests per second:\s+([0-9.]+)", text)
    return float(found[1]) if found else None


def _checked(outcome: Outcome, what: str) -> Outcome:
    if outcome.failures or not outcome.times_s:
        raise RuntimeError(f"{what}: answers that were not 200: {outcome.failures}")
    return outcome


async def _filled(lab_json: dict[str, Any], stub: tuple[str, ssl.SSLContext]) -> list[Row]:
    first = lab_json["saes"][0]
    other = next(s for s in lab_json["saes"] if s["node"] != first["node"] and s["id"].startswith("sae-z"))
    enc = f"/api/v1/keys/{other['id']}/enc_keys"
    dec = f"/api/v1/keys/{first['id']}/dec_keys?key_ID="
    master, slave = _url(lab_json, first), _url(lab_json, other)
    rows: list[Row] = []
    async with (
        _connections(master, _client(lab_json, first), CONNECTIONS) as masters,
        _connections(slave, _client(lab_json, other), CONNECTIONS) as slaves,
        _connections(*stub, CONNECTIONS) as bare,
        _connections(*stub, CONNECTIONS) as bare_slaves,
    ):
        floor = _checked(await fetch_repeatedly(bare[:1], enc, duration_s=SECONDS / 2), "stub")
        drawn: list[str] = []
        enc_times, dec_times = Outcome(), Outcome()
        while len(drawn) < 2_000:
            begun = time.perf_counter()
            status, body = await masters[0].get(enc)
            if status != 200:
                raise RuntimeError(f"enc_keys answered {status}: {body!r}")
            enc_times.times_s.append(time.perf_counter() - begun)
            drawn.append(json.loads(body)["keys"][0]["key_ID"])
        for key_id in drawn:
            begun = time.perf_counter()
            status, _ = await slaves[0].get(dec + key_id)
            if status != 200:
                raise RuntimeError(f"dec_keys answered {status}")
            dec_times.times_s.append(time.perf_counter() - begun)
        rows += _milliseconds(
            "enc_keys, one key, reserve filled", enc_times, floor, "p50 <= 1.5 ms, p99 <= 8 ms"
        )
        rows += _milliseconds("dec_keys, one key", dec_times, floor, "p50 <= 1.5 ms, p99 <= 8 ms")

        stub_pairs, _ = await fetch_pairs(bare, bare_slaves, enc, dec, duration_s=SECONDS)
        before = cpu_seconds(lab_json)
        pairs, differing = await fetch_pairs(masters, slaves, enc, dec, duration_s=SECONDS)
        if differing:
            raise RuntimeError(f"{differing} keys differ between their ends")
        rows.append(
            row(
                "enc+dec pairs, 16 connections",
                len(_checked(pairs, "pairs").times_s) / pairs.elapsed_s,
                "1/s",
                floor=len(stub_pairs.times_s) / stub_pairs.elapsed_s,
                goal=">= 1.0 x floor",
            )
        )
        rows[-1]["cpu"] = spent(lab_json, before)

        stub_calls = await fetch_repeatedly(bare, enc, duration_s=SECONDS)
        before = cpu_seconds(lab_json)
        per_second = await asyncio.to_thread(_ab, master, enc, lab_json, first)
        generator = "ab"
        if per_second is None:
            calls = _checked(await fetch_repeatedly(masters, enc, duration_s=SECONDS), "calls")
            per_second, generator = (
                len(calls.times_s) / calls.elapsed_s,
                "the Python generator; ab is not installed",
            )
        rows.append(
            row(
                f"enc_keys calls, 16 connections ({generator})",
                per_second,
                "1/s",
                floor=len(stub_calls.times_s) / stub_calls.elapsed_s,
                goal=">= 6000 /s (ab)",
            )
        )
        rows[-1]["cpu"] = spent(lab_json, before)

        before = cpu_seconds(lab_json)
        many = _checked(
            await fetch_repeatedly(masters[:4], enc + "?number=128", duration_s=SECONDS, most=400),
            "number=128",
        )
        rows.append(
            row("keys, number=128", 128 * len(many.times_s) / many.elapsed_s, "1/s", goal=">= 120000 /s")
        )
        rows[-1]["cpu"] = spent(lab_json, before)
    return rows


async def _on_demand(lab_json: dict[str, Any], stub: tuple[str, ssl.SSLContext]) -> list[Row]:
    """Every request finds the reserve empty: the lab of this run fills none ahead."""
    first = lab_json["saes"][0]
    rows: list[Row] = []
    async with _connections(*stub, 1) as bare:
        floor = _checked(await fetch_repeatedly(bare, "/", duration_s=SECONDS / 2), "stub")
    for hops, prefix in ((1, "sae-y"), (2, "sae-z")):
        other = next(s for s in lab_json["saes"] if s["id"].startswith(prefix))
        async with _connections(_url(lab_json, first), _client(lab_json, first), 1) as one:
            outcome = _checked(
                await fetch_repeatedly(
                    one, f"/api/v1/keys/{other['id']}/enc_keys", duration_s=SECONDS, most=300
                ),
                "on demand",
            )
        rows.append(
            row(
                f"enc_keys on demand, reserve empty, {hops} hop(s), p50",
                1e3 * statistics.median(outcome.times_s),
                "ms",
                floor=1e3 * statistics.median(floor.times_s),
                goal="round trip + 5 ms",
            )
        )
    return rows


def run() -> list[Row]:
    """Measure and return the rows."""

    async def filled() -> list[Row]:
        with lab("metro") as lab_json:
            async with _stub() as stub:
                return await _filled(lab_json, stub)

    async def on_demand() -> list[Row]:
        with lab(str(Path(__file__).with_name("metro-on-demand.yaml"))) as lab_json:
            async with _stub() as stub:
                return await _on_demand(lab_json, stub)

    return uvloop.run(filled()) + uvloop.run(on_demand())


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
