"""``stack``: two sites with gateways, either over the fake key service or a whole lab.

The same tests run against both. ``real`` starts ``keymesh lab up --network metro`` once per session, or
uses the running lab whose directory ``KEYMESH_LAB_DIR`` names; it carries the ``slow`` mark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.wire import Received, Wire, client_context
from tests.fakes.gateway_site import GatewayThread
from tests.fakes.key_service import FakeNetwork

LAB_START_TIMEOUT_S = 150


@dataclass(frozen=True)
class Sae:
    """An application: its ID, the base URL of its own gateway, its credentials."""

    sae_id: str
    url: str
    cert: Path
    key: Path
    gateway_ca: Path

    def connect(self, *, url: str | None = None) -> Wire:
        """A new mutual TLS connection, to the own gateway unless told otherwise."""
        return Wire(url or self.url, client_context(self.gateway_ca, self.cert, self.key))

    def ask(self, verb: str, target: str, body: Any = None, **options: Any) -> Received:
        """One request on a connection of its own; a ``body`` that is not bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with self.connect() as wire:
            return wire.request(verb, target, data, **options)

    def enc(self, slave: Sae, **members: Any) -> Received:
        """POST enc_keys with these members."""
        return self.ask("POST", f"/api/v1/keys/{slave.sae_id}/enc_keys", members)

    def dec(self, master: Sae, *key_ids: str) -> Received:
        """POST dec_keys for these IDs."""
        body = {"key_IDs": [{"key_ID": key_id} for key_id in key_ids]}
        return self.ask("POST", f"/api/v1/keys/{master.sae_id}/dec_keys", body)


@dataclass(frozen=True)
class Stack:
    """Two sites: ``master`` and ``neighbour`` at site A, ``slave`` and ``third`` at site B."""

    master: Sae
    slave: Sae
    third: Sae
    neighbour: Sae
    ops_url: str
    is_real: bool
    kme_ids: tuple[str, str] = ("", "")
    other_roots: dict[str, tuple[Path, Path]] = field(default_factory=dict)

    def draw(self, **members: Any) -> list[dict[str, str]]:
        """Keys for (master, slave) that nobody has fetched yet."""
        received = self.master.enc(self.slave, **members)
        assert received.status == 200, received
        keys: list[dict[str, str]] = received.json()["keys"]
        return keys


@pytest.fixture(
    scope="session", params=["fake", pytest.param("real", marks=[pytest.mark.slow, pytest.mark.timeout(500)])]
)
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The system under test, once per session and kind."""
    build = _fake_stack if request.param == "fake" else _real_stack
    yield from build(tmp_path_factory.mktemp(f"stack-{request.param}"))


def _fake_stack(directory: Path) -> Iterator[Stack]:
    homes = {"sae-a1": "kme-a", "sae-a2": "kme-a", "sae-b1": "kme-b", "sae-b2": "kme-b"}
    network = FakeNetwork(homes)
    host = GatewayThread(directory)
    try:
        gateways = {kme: host.start(f"gw-{kme}", network.site(kme)) for kme in ("kme-a", "kme-b")}
        saes = {
            sae_id: Sae(
                sae_id,
                f"https://localhost:{gateways[kme].https_port}",
                *host.issue_sae(sae_id),
                host.roots["gateway"],
            )
            for sae_id, kme in homes.items()
        }
        node = host.pki.node("kme-a").save(directory, "node-kme-a")
        yield Stack(
            master=saes["sae-a1"],
            neighbour=saes["sae-a2"],
            slave=saes["sae-b1"],
            third=saes["sae-b2"],
            ops_url=f"http://127.0.0.1:{gateways['kme-a'].http_port}",
            is_real=False,
            kme_ids=("kme-a", "kme-b"),
            other_roots={"node": (node.cert, node.key)},
        )
    finally:
        host.stop()


def _real_stack(directory: Path) -> Iterator[Stack]:
    running = os.environ.get("KEYMESH_LAB_DIR")
    if running:
        yield _read_lab(Path(running))
        return
    keymesh = Path(sys.executable).with_name("keymesh")
    if not keymesh.exists():
        pytest.skip("the keymesh command is not installed here")
    lab = directory / "lab"
    up = [str(keymesh), "lab", "up", "--network", "metro", "--dir", str(lab), "--detach"]
    started = subprocess.run(up, capture_output=True, text=True, timeout=LAB_START_TIMEOUT_S, check=False)
    if started.returncode != 0:
        pytest.fail(f"keymesh lab up failed:\n{started.stdout}{started.stderr}", pytrace=False)
    try:
        yield _read_lab(lab)
    finally:
        subprocess.run([str(keymesh), "lab", "down", "--dir", str(lab)], timeout=60, check=True)


def _read_lab(directory: Path) -> Stack:
    lab = json.loads((directory / "lab.json").read_text())
    gateways = {gateway["id"]: gateway for gateway in lab["gateways"]}
    members = [
        (
            sae["node"],
            Sae(
                sae["id"],
                gateways[sae["gateway"]]["url"],
                Path(sae["cert"]),
                Path(sae["key"]),
                Path(lab["ca"]["gateway"]),
            ),
        )
        for sae in lab["saes"]
    ]
    site_a, master = members[0]
    neighbour = next(sae for node, sae in members[1:] if node == site_a)
    far = [node for node, _ in members if node != site_a]
    site_b = next(node for node in reversed(far) if far.count(node) > 1)
    slave, third = [sae for node, sae in members if node == site_b][:2]
    node = next(node for node in lab["nodes"] if node["id"] == site_a)
    stack = Stack(
        master=master,
        neighbour=neighbour,
        slave=slave,
        third=third,
        ops_url=f"http://{gateways[lab['saes'][0]['gateway']]['http'].removeprefix('http://')}",
        is_real=True,
        kme_ids=(site_a, site_b),
        other_roots={"node": (Path(node["cert"]), Path(node["key"]))},
    )
    deadline = time.monotonic() + 90
    while stack.master.ask("GET", f"/api/v1/keys/{slave.sae_id}/status").status != 200:
        assert time.monotonic() < deadline, "the lab's gateway does not answer a status request"
        time.sleep(0.2)
    return stack
