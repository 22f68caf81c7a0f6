"""Labs and bare servers to measure against, driven over the REST interface as encryptors do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from benchmarks.load import Connection, Outcome, client_context
from benchmarks.rows import Cpu, Meter, own_cpu
from mesh.pki.authority import Pki

KEYMESH = Path(sys.executable).with_name("keymesh")


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


def cpu_seconds(lab_json: dict[str, Any]) -> Cpu:
    """Processor seconds so far of each node, hub and gateway of a lab, and of this process."""
    ticks = os.sysconf("SC_CLK_TCK")
    seconds = own_cpu()
    for process in [*lab_json["nodes"], *lab_json["hubs"], *lab_json["gateways"]]:
        with contextlib.suppress(FileNotFoundError):
            fields = Path(f"/proc/{process['pid']}/stat").read_text().rpartition(")")[2].split()
            seconds[process["id"]] = (int(fields[11]) + int(fields[12])) / ticks
    return seconds


def lab_meter(lab_json: dict[str, Any]) -> Meter:
    """Counts the processor seconds of a lab's processes, and of this one, from now on."""
    return Meter(lambda: cpu_seconds(lab_json))


@contextlib.asynccontextmanager
async def connections(url: str, context: ssl.SSLContext, count: int) -> AsyncIterator[list[Connection]]:
    """``count`` keep-alive connections."""
    opened = [await Connection.open(url, context) for _ in range(count)]
    try:
        yield opened
    finally:
        for connection in opened:
            await connection.close()


def sae_context(lab_json: dict[str, Any], sae: dict[str, Any]) -> ssl.SSLContext:
    """TLS as this SAE."""
    return client_context(lab_json["ca"]["gateway"], sae["cert"], sae["key"])


def gateway_url(lab_json: dict[str, Any], sae: dict[str, Any]) -> str:
    """Base URL of the gateway of an SAE."""
    return str(next(g["url"] for g in lab_json["gateways"] if g["id"] == sae["gateway"]))


@contextlib.asynccontextmanager
async def tls_stub() -> AsyncIterator[tuple[str, ssl.SSLContext]]:
    """A bare server of the same API: its URL, and TLS towards it."""
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


def resident_mb(pid: int) -> float:
    """Memory of a process that is resident, in megabytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def checked(outcome: Outcome, what: str) -> Outcome:
    """The outcome, if all of it is 200.

    Raises:
        RuntimeError: it is not.
    """
    if outcome.failures or not outcome.times_s:
        raise RuntimeError(f"{what}: answers that were not 200: {outcome.failures}")
    return outcome
