"""What a node may serve as it starts, after a start without proof, and after a rollback."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.client.operator import reset_link
from mesh.directory.port import NodeRecord
from mesh.directory.static import StaticDirectory
from mesh.errors import ErrorReason, MeshError, NotAuthorizedError, RolledBackError
from mesh.node.keyplane import DeliveredKeys
from tests.fakes.hub_network import HubNetwork

pytestmark = pytest.mark.slow


@pytest.fixture
async def network(tmp_path: Path) -> AsyncIterator[HubNetwork]:
    """kme-a and kme-b behind one hub."""
    network = HubNetwork(tmp_path, hubs=("hub-1",), grade="dske(1,1)")
    for kme in ("kme-a", "kme-b"):
        await network.supply("hub-1", kme)
    await network.start()
    await network.until_open()
    yield network
    await network.stop()


def forget_proof(network: HubNetwork, one: str) -> None:
    """As after a reboot: tmpfs is empty."""
    path = network.node(one).store.proof_path
    if path is not None:
        path.unlink()


async def refused(network: HubNetwork, slave: str, master: str, keys: DeliveredKeys) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await network.redeem(slave, master, keys)
    return caught.value


async def test_nobody_is_admitted_before_the_reserves_are_read(
    network: HubNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key_ID asked for too early would be answered as unknown, which loses an acknowledged key."""
    keys = await network.draw("sae-a", "sae-b")
    await network.stop("kme-b")
    may_go_on = asyncio.Event()
    start = StaticDirectory.start

    async def slow_start(directory: StaticDirectory) -> None:
        await may_go_on.wait()
        await start(directory)

    monkeypatch.setattr(StaticDirectory, "start", slow_start)
    starting = asyncio.create_task(network.start("kme-b"))
    await asyncio.sleep(0.3)
    host, _, port = network.grpc["kme-b"].rpartition(":")
    with pytest.raises(OSError, match=r"[Cc]onnect"):
        await asyncio.open_connection(host, int(port))
    may_go_on.set()
    await starting
    assert (await network.redeem("sae-b", "sae-a", keys)).keys == keys.keys


async def test_a_start_without_proof_hands_nothing_out_before_a_neighbour_has_spoken(
    network: HubNetwork,
) -> None:
    """It may be an older disk: then its keys were redeemed already."""
    keys = await network.draw("sae-a", "sae-b")
    forget_proof(network, "kme-b")
    await network.stop("hub-1", "kme-b")
    await network.start("kme-b")
    node = network.node("kme-b")
    assert not node.is_proven
    error = await refused(network, "sae-b", "sae-a", keys)
    assert error.reason is ErrorReason.PEER_UNREACHABLE
    assert "waits for a neighbour" in error.message
    assert any("waits for a neighbour" in text for text in node.missing())
    await network.start("hub-1")
    await network.until_open()
    assert node.missing() == []
    assert (await network.redeem("sae-b", "sae-a", keys)).keys == keys.keys


async def test_a_proven_start_serves_alone(network: HubNetwork) -> None:
    keys = await network.draw("sae-a", "sae-b")
    await network.stop("hub-1", "kme-b")
    await network.start("kme-b")
    if network.node("kme-b").is_proven:
        assert (await network.redeem("sae-b", "sae-a", keys)).keys == keys.keys


async def test_keys_of_a_rolled_back_disk_are_void_once_its_link_is_reset(network: HubNetwork) -> None:
    """The operator goes on with the restored disk: what it holds may have been handed out before."""
    first, second = await network.draw("sae-a", "sae-b"), await network.draw("sae-a", "sae-b")
    await network.stop("kme-b")
    data = Path(network.config("kme-b").data_dir)
    shutil.copytree(data, network.root / "snapshot")
    await network.start("kme-b")
    await network.until_open()
    assert (await network.redeem("sae-b", "sae-a", first)).keys == first.keys
    await network.stop("kme-b")
    shutil.rmtree(data)
    shutil.copytree(network.root / "snapshot", data)
    await network.start("kme-b")
    node = network.node("kme-b")
    async with asyncio.timeout(60):
        while node.links.refusal is None:  # noqa: ASYNC110 - a refusal has no event
            await asyncio.sleep(0.02)
    for keys in (first, second):
        assert (await refused(network, "sae-b", "sae-a", keys)).reason is ErrorReason.ROLLED_BACK
    await network.stop("kme-b")
    await network.start("kme-b")
    node = network.node("kme-b")
    (alarm,) = [one for one in node.alarms.open_alarms() if one.needs_operator]
    assert alarm.alarm_id == "link/hub-1/rolled-back"
    assert "not on this disk" in alarm.message, "a restart forgets neither the refusal nor why"
    for one, peer in (("kme-b", "hub-1"), ("hub-1", "kme-b")):
        await asyncio.to_thread(reset_link, network.target(one), peer)
    assert node.missing() == []
    assert not any(one.needs_operator for one in node.alarms.open_alarms())
    for keys in (first, second):
        assert isinstance(await refused(network, "sae-b", "sae-a", keys), NotAuthorizedError)


async def test_a_refused_node_takes_its_record_out_of_the_directory(network: HubNetwork) -> None:
    """It may be a copy of a node that runs elsewhere, whom the others must reach."""
    node = network.node("kme-b")
    own = network.http["kme-b"]
    await node.directory.publish_node(NodeRecord("kme-b", own))
    node.links.refusal = RolledBackError("this disk is old")
    await node.publisher.publish()
    assert node.directory.address("kme-b") == network.grpc["kme-b"]
    await node.publisher.publish()
    assert node.directory.marks("kme-b") is not None
    node.links.refusal = None
    await node.publisher.publish()
    assert node.directory.address("kme-b") == network.grpc["kme-b"]
