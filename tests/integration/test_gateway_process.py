"""The gateway as a process: ``gateway.main`` over MeshClient, gRPC and mutual TLS to a fake node."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import yaml

from mesh.lab.ground import free_ports
from mesh.pki.authority import Pki
from mesh.rpc.server import RpcServer
from tests.conformance.wire import Wire, client_context
from tests.fakes.key_node import start_key_node
from tests.fakes.key_service import FakeNetwork

pytestmark = pytest.mark.slow
RUN = "import sys; from gateway.main import main; sys.exit(main(sys.argv[1]))"
ENC = "/api/v1/keys/sae-b1/enc_keys"


class NodeThread:
    """A fake node on an event loop of its own."""

    def __init__(self, network: FakeNetwork, pki: Pki, directory: Path, port: int) -> None:
        self._network, self._pki, self._directory, self.port = network, pki, directory, port
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server: RpcServer | None = None

    def start(self) -> None:
        self._server, _ = self._run(
            start_key_node(
                self._network.site("kme-a"),
                pki=self._pki,
                directory=self._directory,
                kme_id="kme-a",
                address=f"127.0.0.1:{self.port}",
            )
        )

    def stop(self) -> None:
        if self._server is not None:
            self._run(self._server.stop(0))
            self._server = None

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)


@dataclass
class Running:
    """A gateway process and its surroundings."""

    process: subprocess.Popen[str]
    node: NodeThread
    network: FakeNetwork
    directory: Path
    https_port: int
    http_port: int

    def connect(self) -> Wire:
        files = [self.directory / name for name in ("gateway-ca.pem", "sae-a1.pem", "sae-a1.key")]
        return Wire(f"https://localhost:{self.https_port}", client_context(*files))

    def is_ready(self) -> bool:
        try:
            return bool(urlopen(f"http://127.0.0.1:{self.http_port}/readyz").status == 200)
        except HTTPError as error:
            return error.code != 503
        except OSError:
            return False

    def wait_ready(self, is_ready: bool = True) -> None:
        deadline = time.monotonic() + 60
        while self.is_ready() is not is_ready:
            assert time.monotonic() < deadline, self.log()
            assert self.process.poll() is None, self.log()
            time.sleep(0.05)

    def log(self) -> str:
        return (self.directory / "gateway.log").read_text()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    pki = Pki.create("metro")
    pki.save(tmp_path)
    pki.gateway_server("gw").save(tmp_path, "gw")
    pki.gateway_client("gw").save(tmp_path, "gw-node")
    pki.sae("sae-a1").save(tmp_path, "sae-a1")
    network = FakeNetwork({"sae-a1": "kme-a", "sae-b1": "kme-b"})
    node_port, https_port, http_port = free_ports(3)
    node = NodeThread(network, pki, tmp_path, node_port)
    node.start()
    config = tmp_path / "gateway.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "gateway_id": "gw",
                "domain_id": "metro",
                "listen": {"https": f"127.0.0.1:{https_port}", "http": f"127.0.0.1:{http_port}"},
                "node": {"address": f"127.0.0.1:{node.port}", "kme_id": "kme-a"},
                "node_tls": {"ca": "node-ca.pem", "cert": "gw-node.pem", "key": "gw-node.key"},
                "tls": {"ca": "sae-ca.pem", "cert": "gw.pem", "key": "gw.key"},
                "sae_mapping": {"table_file": "table.yaml"},
                "audit_log": "audit.log",
                "limits": {"request_timeout_s": 3.0},
                "log": {"file": "gateway.log"},
            }
        )
    )
    (tmp_path / "table.yaml").write_text("version: 1\n")
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(config)],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    )
    found = Running(process, node, network, tmp_path, https_port, http_port)
    try:
        found.wait_ready()
        yield found
    finally:
        process.kill()
        process.communicate()
        node.stop()


def test_keys_travel_and_sigterm_ends_with_success(running: Running) -> None:
    with running.connect() as wire:
        received = wire.request("POST", ENC, b'{"number":3}')
        assert received.status == 200
        assert len(received.json()["keys"]) == 3
        assert wire.request("GET", "/api/v1/keys/sae-b1/status").json()["target_KME_ID"] == "kme-b"
        assert ("enc_keys", received.headers["x-request-id"]) in running.network.calls
        running.process.send_signal(signal.SIGTERM)
        assert wire.is_closed_by_peer()
    assert running.process.wait(30) == 0
    keys = [key["key"] for key in received.json()["keys"]]
    assert not [
        key for key in keys if key in running.log() or key in (running.directory / "audit.log").read_text()
    ]


def test_a_node_that_goes_and_comes_back(running: Running) -> None:
    with running.connect() as wire:
        assert wire.request("GET", ENC).status == 200
        running.node.stop()
        running.wait_ready(False)
        started = time.monotonic()
        received = wire.request("GET", ENC)
        assert time.monotonic() - started < 10
        assert received.status == 503
        assert received.headers["retry-after"]
        assert received.json()["details"][0]["reason"] in ("peer-unreachable", "deadline-exceeded")
        running.node.start()
        running.wait_ready()
        assert wire.request("GET", ENC).status == 200


def test_sighup_reads_the_mapping_again(running: Running) -> None:
    running.network.homes["renamed"] = "kme-a"
    with running.connect() as wire:
        row = "{sae_id: renamed, subject: 'CN=sae-a1,OU=sae,O=keymesh'}"
        (running.directory / "table.yaml").write_text(f"version: 1\nentries: [{row}]\n")
        running.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 30
        while wire.request("GET", "/api/v1/keys/sae-b1/status").json()["master_SAE_ID"] != "renamed":
            assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gateway_id: gw\n", "missing required field `domain_id`"),
        ("gateway_id: [\n", "not valid YAML"),
        (None, "cannot read the file"),
    ],
)
def test_a_bad_configuration_is_refused_in_words(tmp_path: Path, text: str | None, words: str) -> None:
    config = tmp_path / "gateway.yaml"
    if text is not None:
        config.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(config)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert str(config) in done.stderr
    assert "Traceback" not in done.stderr
