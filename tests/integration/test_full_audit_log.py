"""An audit log that cannot be written: no key is spent that could not be recorded and answered.

The kernel refuses the writes, by the limit on the size of a file: as on a full disk, and on any machine.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from gateway.app import Gateway
from mesh.errors import ErrorReason, UnavailableError
from mesh.node.services.keys import KeyDeliveryService
from mesh.ops.audit import AuditLog
from mesh.v1.keys_pb2 import GetKeysByIdRequest, GetKeysRequest, KeyByIdRequest, KeyRequest
from tests.conformance.wire import Received, Wire, client_context
from tests.fakes.gateway_site import GatewayThread
from tests.fakes.key_network import LINE, KeyNetwork
from tests.fakes.key_service import FakeNetwork

_MANY_BYTES = 32 * 1024 * 1024


@contextmanager
def full(log: Path) -> Iterator[None]:
    """The log, and nothing else that the process has open, can grow no more."""
    os.truncate(log, _MANY_BYTES)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MANY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_dec_keys_refused_while_the_disk_was_full_succeeds_afterwards(tmp_path: Path) -> None:
    network = FakeNetwork({"sae-a": "kme-a", "sae-b": "kme-b"})
    host = GatewayThread(tmp_path)

    def ask(gateway: Gateway, sae: str, target: str) -> Received:
        context = client_context(host.roots["gateway"], *host.issue_sae(sae))
        with Wire(f"https://localhost:{gateway.https_port}", context) as wire:
            return wire.request("GET", f"/api/v1/keys/{target}")

    def readiness() -> str:
        try:
            with urlopen(f"http://127.0.0.1:{gateways[1].http_port}/readyz", timeout=5) as answer:
                return str(answer.read())
        except HTTPError as error:
            return str(error.read())

    try:
        gateways = [host.start("gw-a", network.site("kme-a")), host.start("gw-b", network.site("kme-b"))]
        ids = [key["key_ID"] for key in ask(gateways[0], "sae-a", "sae-b/enc_keys?number=4").json()["keys"]]
        fetches = [f"sae-a/dec_keys?key_ID={key_id}" for key_id in ids]
        log = tmp_path / "gw-b.audit.log"
        with full(log):
            refused = [ask(gateways[1], "sae-b", fetch) for fetch in fetches]
            assert [one.status for one in refused] == [503] * 4
            assert {"reason": "disk-full"} in refused[-1].json()["details"]
            assert ask(gateways[1], "sae-b", "sae-a/enc_keys").status == 503
            assert "audit log" in readiness()
        assert "audit log" not in readiness()
        # What was under way when the disk ran full is spent: nothing had said so before.
        assert [ask(gateways[1], "sae-b", fetch).status for fetch in fetches] == [400, 200, 200, 200]
        assert [method for method, _ in network.calls].count("enc_keys") == 1
        events = [json.loads(line)["event"] for line in log.read_bytes().rpartition(b"\0")[2].splitlines()]
        assert events == ["audit_resumed", *["dec_keys"] * 4]
    finally:
        host.stop()


async def test_a_node_draws_and_redeems_nothing_that_it_cannot_record(tmp_path: Path) -> None:
    network = KeyNetwork(tmp_path, LINE)
    await network.start()
    log = tmp_path / "audit.jsonl"
    try:
        with AuditLog(log) as audit:
            service = KeyDeliveryService(
                network.plane("kme-c"), staleness_s=lambda: 0.0, admit=lambda: None, audit=audit
            )
            ids = [key_id for key_id, _ in (await network.get("sae-a", "sae-c", 3)).keys]
            drawing = GetKeysRequest(
                requests=[KeyRequest(master_sae_id="sae-c", slave_sae_id="sae-a", number=1)]
            )
            fetching = [
                GetKeysByIdRequest(
                    requests=[KeyByIdRequest(slave_sae_id="sae-c", master_sae_id="sae-a", key_ids=[key_id])]
                )
                for key_id in ids
            ]
            with full(log):
                for batch in fetching:
                    with pytest.raises(UnavailableError) as caught:
                        await service.GetKeysById(batch, None)
                    assert caught.value.reason is ErrorReason.DISK_FULL
                with pytest.raises(UnavailableError):
                    await service.GetKeys(drawing, None)
            assert "kme-a" not in network.plane("kme-c").reserves.outbound
            answers = [(await service.GetKeysById(batch, None)).results[0] for batch in fetching]
            assert [answer.HasField("keys") for answer in answers] == [False, True, True]
            assert (await service.GetKeys(drawing, None)).results[0].HasField("keys")
    finally:
        await network.stop()
