"""What a gateway posts to another owner's key manager, over real TLS: to whom, and on which connections."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from gateway.config import Etsi020Settings, KeyManager
from gateway.etsi020 import client as client_module
from gateway.etsi020 import server as server_module
from gateway.etsi020.client import PeerClient
from gateway.etsi020.identity import Pins
from gateway.etsi020.server import lasting
from gateway.telemetry import PeerTelemetry
from mesh.client.border import Association, ForeignKey, Job, Outcome, PostKeys
from mesh.ops.certificates import fingerprint_of
from mesh.ops.denylist import DenyList
from mesh.ops.metrics import Metrics
from tests.independent020 import messages as m
from tests.independent020.certificates import Papers, Root, client_context, server_context
from tests.independent020.peer import Kms


@dataclass
class Near:
    """A key manager at a port of its own, and a gateway's client that is pinned to it."""

    folder: Path
    kms: Kms
    papers: Papers
    pins: Pins
    client: PeerClient

    async def post(self) -> Outcome:
        """Hands one fresh key over."""
        key = ForeignKey(uuid.uuid4(), bytes(32))
        callback = "https://localhost:1/kmapi/v1/ext_keys/ack"
        body = PostKeys(Association("own-a", ("near-b",)), (key,), callback)
        return await self.client.perform(Job(b"lease", 10.0, "near-kme", self.kms.url + m.KEYS, body, ""))

    def pinned(self, **members: Any) -> Pins:
        """Pins as a configuration would have them."""
        return Pins([key_manager(self.kms, **members)], base=self.folder)


def key_manager(kms: Kms, **members: Any) -> KeyManager:
    return KeyManager(
        **{"kme_id": "near-kme", "url": kms.url, "ca": "near-root.pem", "names": ["near-kme.example"]}
        | members
    )


@pytest.fixture
async def near(tmp_path: Path) -> AsyncIterator[Near]:
    theirs, ours = Root(tmp_path, "near"), Root(tmp_path, "own")
    papers, own = theirs.issue("near-kme"), ours.issue("own-kme")
    kms = Kms("near", server=server_context(papers, ours.file), client=client_context(papers, ours.file))
    await kms.start()
    (tmp_path / "denied").write_text("")
    settings = Etsi020Settings(
        listen="unused", cert=own.cert.name, key=own.key.name, peers=[key_manager(kms)]
    )
    found: list[Near] = []
    pins = Pins(settings.peers, base=tmp_path)
    client = PeerClient(
        settings,
        base=tmp_path,
        pins=lambda: found[0].pins if found else pins,
        deny_list=DenyList(tmp_path / "denied", interval_s=0.0),
        telemetry=PeerTelemetry(Metrics(with_process=False)),
    )
    found.append(Near(tmp_path, kms, papers, pins, client))
    client.open()
    yield found[0]
    await client.close()
    await kms.stop()


async def test_a_certificate_on_the_deny_list_gets_no_key_on_a_kept_connection_either(near: Near) -> None:
    assert (await near.post()).http_status == 202
    certificate = x509.load_pem_x509_certificate(near.papers.cert.read_bytes())
    (near.folder / "denied").write_text(fingerprint_of(certificate) + "\n")
    refused = await near.post()
    assert (refused.http_status, refused.was_sent) == (None, False)
    assert "deny list" in refused.problem
    assert len(near.kms.log) == 1
    (near.folder / "denied").write_text("# welcome again\n")
    assert (await near.post()).http_status == 202


async def test_an_expired_certificate_gets_no_key_on_a_kept_connection_either(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await near.post()).http_status == 202
    after_all_s = time.time() + 40 * 86_400
    monkeypatch.setattr(time, "time", lambda: after_all_s)
    assert (await near.post()).was_sent is False
    assert len(near.kms.log) == 1


async def test_other_pins_count_on_kept_connections_too(near: Near) -> None:
    assert (await near.post()).http_status == 202
    near.pins = near.pinned(names=["another.example"])
    assert (await near.post()).was_sent is False
    near.pins = near.pinned()
    assert (await near.post()).http_status == 202
    assert len(near.kms.log) == 2


async def test_connections_are_kept_while_nothing_changes(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    await near.post()
    monkeypatch.setattr(client_module, "client_context", None)
    assert (await near.post()).http_status == 202


async def test_background_work_goes_on_after_what_nobody_expected(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "AGAIN_S", 0.0)
    runs, is_back = 0, asyncio.Event()

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise RuntimeError("nobody expected this")
        is_back.set()
        await asyncio.Event().wait()

    with caplog.at_level(logging.ERROR):
        task = asyncio.create_task(lasting("work", work))
        async with asyncio.timeout(10):
            await is_back.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "nobody expected this" in caplog.text
