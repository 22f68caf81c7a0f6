"""A node that was told to stop serves nobody: not masters, not slaves, not other nodes (invariant 4)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.errors import ErrorReason, MeshError, RolledBackError
from mesh.node.services.peer import PeerService
from mesh.v1.keys_pb2 import StatusRequest
from mesh.v1.peer_pb2 import ConfirmRequest, DepositRequest, TransferQuery
from tests.fakes.key_network import LINE, KeyNetwork


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[KeyNetwork]:
    """a - b - c with empty reserves."""
    network = KeyNetwork(tmp_path, LINE)
    await network.start()
    yield network
    await network.stop()


async def test_a_rolled_back_node_draws_and_redeems_nothing(line: KeyNetwork) -> None:
    drawn = await line.get("sae-a", "sae-c")
    burnt = line.wire.burnt("kme-a", "kme-b")
    for kme in ("kme-a", "kme-c"):
        line.plane(kme).stopped_by = lambda: RolledBackError("this disk is old")
    with pytest.raises(MeshError) as caught:
        await line.redeem("sae-c", "sae-a", [drawn.keys[0][0]])
    assert caught.value.reason is ErrorReason.ROLLED_BACK
    with pytest.raises(MeshError) as caught:
        await line.get("sae-a", "sae-c")
    assert caught.value.reason is ErrorReason.ROLLED_BACK
    with pytest.raises(RolledBackError):
        line.plane("kme-a").status(StatusRequest(caller_sae_id="sae-a", peer_sae_id="sae-c"))
    assert line.wire.burnt("kme-a", "kme-b") == burnt
    for kme in ("kme-a", "kme-c"):
        line.plane(kme).stopped_by = lambda: None
    redeemed = await line.redeem("sae-c", "sae-a", [drawn.keys[0][0]])
    assert redeemed.keys == drawn.keys


async def test_other_nodes_are_refused_too(line: KeyNetwork) -> None:
    plane = line.plane("kme-c")
    plane.stopped_by = lambda: RolledBackError("this disk is old")
    service = PeerService(plane)
    with pytest.raises(RolledBackError):
        await service.Confirm(ConfirmRequest(), None)
    with pytest.raises(RolledBackError):
        await service.QueryTransfer(TransferQuery(), None)
    with pytest.raises(RolledBackError):
        await service.Deposit(DepositRequest(), None)
