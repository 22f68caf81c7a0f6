"""The plain HTTP port, and a process from its start to its end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from mesh.errors import ConfigError
from mesh.ops.http import OpsServer, split_host_port
from mesh.ops.metrics import Metrics


async def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"http://127.0.0.1:{port}{path}") as answer,
    ):
        return answer.status, await answer.text()


async def test_health_readiness_and_metrics() -> None:
    metrics = Metrics()
    metrics.counter("keys_drawn", "Keys drawn.", ["peer"]).labels("kme-b").inc(3)
    missing: list[str] = ["directory"]
    server = OpsServer(metrics, lambda: missing)
    port = await server.start("127.0.0.1", 0)
    try:
        assert await get(port, "/healthz") == (200, "ok\n")
        assert await get(port, "/readyz") == (503, '{"ready":false,"missing":["directory"]}')
        missing.clear()
        assert await get(port, "/readyz") == (200, '{"ready":true,"missing":[]}')
        status, text = await get(port, "/metrics")
        assert status == 200
        assert 'keymesh_keys_drawn_total{peer="kme-b"} 3.0' in text
        assert "process_resident_memory_bytes" in text
        assert (await get(port, "/other"))[0] == 404
        assert (await get(port, "/healthz", "POST"))[0] == 405
        with pytest.raises(ConfigError, match=r"listen\.http"):
            await OpsServer(metrics, lambda: ()).start("127.0.0.1", port)
    finally:
        await server.stop()
        await server.stop()


def test_metrics_may_be_asked_for_twice_but_not_as_another_kind() -> None:
    metrics = Metrics(with_process=False)
    assert metrics.gauge("x", "x") is metrics.gauge("x", "x")
    with pytest.raises(TypeError, match="already"):
        metrics.counter("x", "x")


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:x", "host:65536", "host:-1"])
def test_addresses_are_checked(text: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        split_host_port(text)


def test_addresses_split() -> None:
    assert split_host_port("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_host_port("[::1]:443") == ("::1", 443)


PROGRAM = """
import asyncio, os, resource, sys
from pathlib import Path
from mesh.errors import ConfigError, ShortageError
from mesh.ops.logging import setup_logging
from mesh.ops.runtime import run

async def main(stop):
    kind = sys.argv[1]
    if kind == "config":
        raise ConfigError("listen.grpc: wrong")
    if kind == "mesh":
        async with asyncio.TaskGroup() as group:
            group.create_task(short())
    if kind == "bug":
        raise ValueError("secret-0123")
    umask = os.umask(0o077)
    print(oct(umask), resource.getrlimit(resource.RLIMIT_CORE), type(asyncio.get_running_loop()).__module__)
    sys.stdout.flush()
    await stop.wait()
    if kind == "stuck":
        print("stopping", flush=True)
        await asyncio.sleep(60)

async def short():
    raise ShortageError("no material")

setup_logging()
sys.exit(run(main, name="test"))
"""


def start(kind: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        ("config", 2, "keymesh: test: listen.grpc: wrong"),
        ("mesh", 1, "keymesh: test: no material"),
        ("bug", 70, "keymesh: test: internal error, see the log"),
    ],
)
def test_failures_end_in_one_line_and_a_status(kind: str, status: int, words: str) -> None:
    process = start(kind)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert words in errors.splitlines()
    assert "Traceback" not in errors
    assert "secret-0123" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_wish_to_stop(number: signal.Signals) -> None:
    process = start("serve")
    assert process.stdout is not None
    assert process.stdout.readline().split() == ["0o77", "(0,", "0)", "uvloop"]
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert '"event":"stopped"' in errors


@pytest.mark.slow
def test_a_second_signal_is_an_order() -> None:
    process = start("stuck")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 1
