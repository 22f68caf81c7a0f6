"""Draining a border's gateway: both interfaces at once, within ``drain_s`` whatever hangs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from mesh.client.border import BorderClient, Job
from mesh.pki.authority import Pki
from tests.conformance.wire import Wire, client_context
from tests.fakes.gateway_site import GatewayThread
from tests.fakes.key_service import FakeKeyService, FakeNetwork
from tests.unit.test_etsi020_schema import ext_keys

DRAIN_S = 4.0


class StuckKeys(FakeKeyService):
    """A key service that never answers."""

    def __init__(self, entered: threading.Barrier) -> None:
        super().__init__(FakeNetwork({"sae-a1": "kme-a", "sae-b1": "kme-b"}), "kme-a")
        self._entered = entered

    async def get_keys(self, *_: Any, **__: Any) -> Any:
        await asyncio.to_thread(self._entered.wait, 30)
        await asyncio.Event().wait()


class StuckBorder:
    """A border service with nothing to post, which never answers."""

    def __init__(self, entered: threading.Barrier) -> None:
        self._entered = entered

    async def lease_jobs(self, **_: Any) -> AsyncIterator[Job]:
        await asyncio.Event().wait()
        yield cast("Job", None)

    async def import_keys(self, *_: Any, **__: Any) -> Any:
        await asyncio.to_thread(self._entered.wait, 30)
        await asyncio.Event().wait()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[GatewayThread]:
    thread = GatewayThread(tmp_path)
    yield thread
    thread.stop()


def test_both_interfaces_drain_at_once_and_cut_off_what_hangs(host: GatewayThread, tmp_path: Path) -> None:
    """What kills a pod waits for one ``drain_s``; a synchronous request may be held for longer than that."""
    entered = threading.Barrier(3)
    foreign = Pki.create("foreign")
    (tmp_path / "foreign").mkdir()
    root = foreign.save(tmp_path / "foreign")["border"]
    peer = foreign.border("uk-x").save(tmp_path / "foreign", "uk-x")
    host.pki.border("kme-a").save(tmp_path, "border")
    gateway = host.start(
        "gw",
        StuckKeys(entered),
        border=cast("BorderClient", StuckBorder(entered)),
        limits={"drain_s": DRAIN_S},
        etsi020={
            "listen": "127.0.0.1:0",
            "cert": "border.pem",
            "key": "border.key",
            "peers": [
                {
                    "kme_id": "uk-x",
                    "url": "https://localhost:1",
                    "ca": str(root),
                    "names": ["uk-x.border.foreign.keymesh.internal"],
                }
            ],
        },
    )
    sae = client_context(host.roots["gateway"], *host.issue_sae("sae-a1"))
    kme = client_context(host.roots["border"], peer.cert, peer.key)
    body = ext_keys(ack_callback_url=None)
    head = f"POST /kmapi/v1/ext_keys HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with (
        Wire(f"https://localhost:{gateway.https_port}", sae) as draws,
        Wire(f"https://localhost:{gateway.etsi020_port}", kme) as posts,
    ):
        draws.send(b"GET /api/v1/keys/sae-b1/enc_keys HTTP/1.1\r\nHost: x\r\n\r\n")
        posts.send(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        entered.wait(30)
        began_s = time.monotonic()
        host.run(gateway.stop())
        assert DRAIN_S * 0.9 < time.monotonic() - began_s < DRAIN_S * 1.8
        assert draws.is_closed_by_peer()
        assert posts.is_closed_by_peer()
