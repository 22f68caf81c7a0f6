"""One slow element of a batch costs the others nothing: the batch ends before its caller gives up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.node import keyplane
from mesh.node.services.keys import KeyDeliveryService
from mesh.v1 import keys_pb2 as pb
from tests.fakes.key_network import LINE, KeyNetwork

TIMEOUT_S = 5.0
MARGIN_S = 2.0
"""In place of the node's own: more than a busy machine sleeps through."""


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[KeyNetwork]:
    """a - b - c with empty reserves."""
    network = KeyNetwork(tmp_path, LINE)
    assert network.config.request_timeout_s > TIMEOUT_S
    await network.start()
    yield network
    await network.stop()


@pytest.mark.parametrize("cut", [("deposit",), ("confirm", "query")], ids=["hand-over", "establish"])
async def test_keys_drawn_for_others_are_answered_although_one_element_waits_for_a_dead_target(
    line: KeyNetwork, cut: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyplane, "_ANSWER_MARGIN_S", MARGIN_S)
    for slave in ("sae-b", "sae-c"):
        await line.get("sae-a", slave)
    quick = pb.KeyRequest(master_sae_id="sae-a", slave_sae_id="sae-b", number=1, size_bytes=32)
    slow = pb.KeyRequest(master_sae_id="sae-a", slave_sae_id="sae-c", number=128, size_bytes=32)
    if "deposit" in cut:
        slow.additional_slave_sae_ids.append("sae-b")
    line.on_call = lambda kind, own, peer, _message: not (kind in cut and "kme-c" in (own, peer))
    service = KeyDeliveryService(line.plane("kme-a"), staleness_s=lambda: 0.0, admit=lambda: None)
    batch = pb.DeliverRequest(
        batch_id=1, timeout_ms=int(TIMEOUT_S * 1000), get_keys=pb.GetKeysRequest(requests=[quick, slow])
    )
    began_s = asyncio.get_running_loop().time()
    answer = await service._deliver(batch, None)
    assert asyncio.get_running_loop().time() - began_s < TIMEOUT_S
    assert [result.WhichOneof("result") for result in answer.results] == ["keys", "failure"]
    key = answer.results[0].keys.keys[0]
    assert (await line.redeem("sae-b", "sae-a", [key.key_id])).keys == [(key.key_id, key.value)]
