"""Hubs in a real network: keys over three hubs, and everything a hub may not do (3.3, 3.9)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from mesh.client import operator
from mesh.client import psrd as psrd_client
from mesh.core.identity import Identity, Role
from mesh.core.network_parse import parse_document
from mesh.core.policy import Rate
from mesh.core.transfer import TransferHeader
from mesh.errors import ConfigError, ErrorReason, MeshError, NotAuthorizedError
from mesh.hub.policy import HubRule, RulePolicy
from mesh.node import node
from mesh.node.config import LinkSection
from mesh.ops.tls import TlsFiles
from mesh.rpc.channels import ChannelPool
from mesh.rpc.roles import ADMITTED
from mesh.rpc.status import error_from_rpc
from mesh.v1 import admin_pb2, keys_pb2, keys_pb2_grpc, peer_pb2, peer_pb2_grpc
from tests.fakes.hub_network import DOMAIN, NODES, HubNetwork, document
from tests.fakes.link_sites import DeviceEnd, DevicePair

pytestmark = pytest.mark.slow


async def until(check: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(timeout_s):
        while not check():  # noqa: ASYNC110 - conditions are anything a test can see
            await asyncio.sleep(0.02)


@pytest.fixture
async def ocean(tmp_path: Path) -> AsyncIterator[HubNetwork]:
    """kme-a, kme-b and three hubs, supplied by courier, all links open."""
    network = HubNetwork(tmp_path)
    for hub in network.hubs:
        for kme in NODES:
            await network.supply(hub, kme)
    await network.start()
    await network.until_open()
    yield network
    await network.stop()


async def test_keys_across_hubs_without_any_qkd_link(ocean: HubNetwork) -> None:
    drawn = await ocean.draw("sae-a", "sae-b", number=3)
    assert drawn.grade == "dske(2,3)"
    redeemed = await ocean.redeem("sae-b", "sae-a", drawn)
    assert redeemed.keys == drawn.keys
    back = await ocean.draw("sae-b", "sae-a")
    assert (await ocean.redeem("sae-a", "sae-b", back)).keys == back.keys


async def test_a_hub_sees_its_own_shares_and_nothing_else(ocean: HubNetwork) -> None:
    """What reaches each hub: shares of one route, none of them or of their headers holding the key."""
    seen: dict[str, list[tuple[int, bytes, bytes]]] = {hub: [] for hub in ocean.hubs}
    for hub in ocean.hubs:
        handler = ocean.node(hub).links.handler

        def spy(came_from: str, shares: Any, *, hub: str = hub, real: Any = handler.on_shares) -> None:
            seen[hub] += [(item.route, item.header, value) for item, value in shares]
            real(came_from, shares)

        handler.on_shares = spy  # type: ignore[method-assign]
    drawn = await ocean.draw("sae-a", "sae-b", number=2)
    await ocean.redeem("sae-b", "sae-a", drawn)
    assert all(seen.values())
    for hub, shares in seen.items():
        for route, header, value in shares:
            routes = TransferHeader.decode(header).routes
            assert routes[route] == ("kme-a", hub, "kme-b")
            assert [one[1] for one in routes].count(hub) == 1
            for _, key in drawn.keys:
                assert key not in value
                assert key not in header
    for one, other in combinations(seen, 2):
        assert not {value for *_, value in seen[one]} & {value for *_, value in seen[other]}


# --- what a hub may not do ---------------------------------------------------------------


async def test_a_hub_serves_neither_keys_nor_ends_of_reserves(ocean: HubNetwork) -> None:
    """KeyDelivery and Peer are not there at all, whoever asks."""
    assert {"mesh.v1.Admin", "mesh.v1.Link"} <= set(ocean.node("hub-1").server._services)
    assert not {"mesh.v1.KeyDelivery", "mesh.v1.Peer"} & set(ocean.node("hub-1").server._services)
    pki = ocean.root / "pki"
    ocean.pki.gateway_client("gw").save(pki, "gw")
    files = TlsFiles(pki / "node-ca.pem", pki / "gw.pem", pki / "gw.key", None)
    pool = ChannelPool(files, frozenset({Role.GATEWAY}))
    channel = pool.channel(ocean.grpc["hub-1"], Identity(DOMAIN, Role.HUB, "hub-1"))
    with pytest.raises(grpc.RpcError) as caught:
        await keys_pb2_grpc.KeyDeliveryStub(channel).GetKeys(keys_pb2.GetKeysRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await pool.close()


async def test_a_hub_cannot_confirm_query_or_deposit(ocean: HubNetwork) -> None:
    """Its certificate's role is refused wherever a route ends, before the service looks at anything.

    It may only say that it dropped a share, of a transfer whose route it is on.
    """
    admitted = {method for method, roles in ADMITTED.items() if Role.HUB in roles}
    assert {method for method in admitted if "/mesh.v1.Peer/" in method} == {"/mesh.v1.Peer/ReportRoutes"}
    pki = ocean.root / "pki"
    files = TlsFiles(pki / "node-ca.pem", pki / "hub-1.pem", pki / "hub-1.key", None)
    pool = ChannelPool(files, frozenset({Role.HUB}))
    channel = pool.channel(ocean.grpc["kme-a"], Identity(DOMAIN, Role.NODE, "kme-a"))
    stub = peer_pb2_grpc.PeerStub(channel)
    for call in (
        stub.Confirm(peer_pb2.ConfirmRequest(), timeout=5),
        stub.QueryTransfer(peer_pb2.TransferQuery(), timeout=5),
        stub.Deposit(peer_pb2.DepositRequest(), timeout=5),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            await call
        assert error_from_rpc(caught.value).reason is ErrorReason.NOT_AUTHORIZED
    await pool.close()


def test_a_document_cannot_make_a_hub_a_home_an_end_or_a_relay() -> None:
    def changed(**changes: Any) -> dict[str, Any]:
        return {**document(("hub-1", "hub-2", "hub-3"), "dske(2,3)"), **changes}

    with pytest.raises(ConfigError, match="hub-1 is a hub; SAEs are homed at nodes"):
        parse_document(changed(saes={"sae-x": {"home": "hub-1"}}))
    with pytest.raises(ConfigError, match="a pair joins two nodes"):
        parse_document(changed(grades={"pairs": [{"between": ["hub-1", "kme-a"], "grade": "trusted-relay"}]}))
    pair = {"between": ["kme-a", "kme-b"], "grade": "trusted-relay", "via": ["hub-1"]}
    with pytest.raises(ConfigError, match="hub-1 is a hub; name it under hubs"):
        parse_document(changed(grades={"pairs": [pair]}))


async def test_no_route_ends_at_a_hub_and_only_granted_ones_pass(ocean: HubNetwork) -> None:
    """Shares for the hub itself, of an invented source, of another grade: dropped, nothing is spent."""
    from dataclasses import replace

    from mesh.core.network import Grade
    from mesh.core.transfer import SlotKind, TransferId
    from mesh.v1.link_pb2 import ShareItem

    hub = ocean.node("hub-1")
    router: Any = hub.links.handler
    routes = tuple(("kme-a", one, "kme-b") for one in ocean.hubs)
    good = TransferHeader(
        TransferId("kme-a", "kme-b", 1, 0), 1, SlotKind.KEYS, Grade.parse("dske(2,3)"), routes, 2**33
    )

    def share(header: TransferHeader, route: int = 0, hop: int = 0) -> list[tuple[ShareItem, bytes]]:
        item = ShareItem(
            header=header.encode(), tag=bytes(16), route=route, hop=hop, length_bytes=header.length_bytes
        )
        return [(item, bytes(header.length_bytes))]

    def usable() -> list[int]:
        return [link.lanes.tx.lane.usable_bytes for link in hub.links.links.values()]

    before = usable()
    for_hub, for_x = TransferId("kme-a", "hub-1", 1, 0), TransferId("kme-a", "kme-x", 1, 0)
    bad = [
        ("kme-a", share(replace(good, transfer=for_hub, routes=(("kme-a", "hub-1"),), grade=Grade()))),
        ("kme-b", share(good)),
        ("kme-a", share(good, route=1)),
        ("kme-a", share(good, hop=1)),
        ("kme-a", share(replace(good, grade=Grade.parse("dske(1,1)"), routes=routes[:1]))),
        ("kme-a", share(replace(good, grade=Grade(), routes=routes[:1]))),
        ("kme-a", share(replace(good, transfer=for_x, routes=tuple((*r[:2], "kme-x") for r in routes)))),
    ]
    for number, (came_from, shares) in enumerate(bad, start=1):
        router.on_shares(came_from, shares)
        assert router.dropped == number
    # Had one of them been queued, it would be sent before the good one.
    router.on_shares("kme-a", share(good))
    assert router.dropped == len(bad)
    await until(lambda: sum(usable()) == sum(before) - 32 - good.length_bytes)


async def test_policy_is_asked_before_second_leg_pad_is_spent(tmp_path: Path) -> None:
    network = HubNetwork(tmp_path, hubs=("hub-1",), grade="dske(1,1)")
    network.policies["hub-1"] = RulePolicy((HubRule(("kme-a",), ("kme-b",), rate=Rate(1, 200)),))
    for kme in NODES:
        await network.supply("hub-1", kme)
    await network.start()
    try:
        await network.until_open()
        drawn = await network.draw("sae-a", "sae-b")
        await network.redeem("sae-b", "sae-a", drawn)
        link = network.node("hub-1").links.link("kme-b")
        assert link is not None
        before = link.lanes.tx.lane.usable_bytes
        with pytest.raises(MeshError):
            await network.draw("sae-a", "sae-b", number=4)
        with pytest.raises(MeshError):
            await network.draw("sae-b", "sae-a")
        assert link.lanes.tx.lane.usable_bytes == before
        refused = network.node("hub-1").metrics.render().decode()
        assert 'keymesh_hub_shares_refused_total{reason="quota-exceeded",source="kme-a"}' in refused
        assert 'keymesh_hub_shares_refused_total{reason="not-authorized",source="kme-b"}' in refused
    finally:
        await network.stop()


# --- supply by a device ------------------------------------------------------------------


async def test_a_qkd_link_may_feed_a_hubs_lanes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``links[].device`` at a hub and at one client; couriers supply the other."""
    network = HubNetwork(tmp_path, hubs=("hub-1",), grade="dske(1,1)")
    await network.supply("hub-1", "kme-b")
    pair = DevicePair(budget_bytes=4 << 20)
    ends = {"device-of-hub-1": pair.leader, "device-of-kme-a": pair.follower}
    for own, peer in (("hub-1", "kme-a"), ("kme-a", "hub-1")):
        config = yaml.safe_load(network.path(own).read_text())
        (link,) = (link for link in config["links"] if link["peer"] == peer)
        link["device"] = {
            **config["tls"],
            "url": "https://localhost",
            "sae_id": f"device-of-{own}",
        }
        network.path(own).write_text(yaml.safe_dump(config))

    def build_source(section: LinkSection) -> DeviceEnd | None:
        return None if section.device is None else ends[section.device.sae_id]

    monkeypatch.setattr(node, "build_source", build_source)
    await network.start()
    try:
        await network.until_open()
        for master, slave in (("sae-a", "sae-b"), ("sae-b", "sae-a")):
            drawn = await network.draw(master, slave)
            assert drawn.grade == "dske(1,1)"
            assert (await network.redeem(slave, master, drawn)).keys == drawn.keys
        assert pair.made_bytes > 0
    finally:
        await network.stop()


# --- supply through the admin service ----------------------------------------------------


async def test_supply_while_everything_runs(tmp_path: Path) -> None:
    network = HubNetwork(tmp_path, hubs=("hub-1",), grade="dske(1,1)")
    await network.start()
    hub, kme = network.target("hub-1"), network.target("kme-a")
    courier = tmp_path / "one.psrd"
    phrase = tmp_path / "phrase"
    phrase.write_text("a long phrase\n")
    told: list[tuple[int, int]] = []

    def issue(path: Path) -> admin_pb2.PsrdTable:
        return psrd_client.issue(
            hub,
            admin_pb2.IssuePsrdRequest(
                peer_kme_id="kme-a",
                to_client_bytes=300_000,
                from_client_bytes=200_000,
                path=str(path),
                passphrase_file=str(phrase),
                random_source="/dev/urandom",
            ),
            lambda done, total: told.append((done, total)),
        )

    def take(path: Path, **more: Any) -> admin_pb2.PsrdTable:
        return psrd_client.take(
            kme,
            admin_pb2.ImportPsrdRequest(
                peer_kme_id="hub-1", path=str(path), passphrase_file=str(phrase), **more
            ),
            lambda done, total: told.append((done, total)),
        )

    try:
        table = await asyncio.to_thread(issue, courier)
        assert told[-1] == (500_000, 500_000)
        assert (table.state, table.is_issued, table.transmit_stop) == ("issued", True, 300_000)
        with pytest.raises(MeshError, match="exists already"):
            await asyncio.to_thread(issue, courier)
        phrase.write_text("another phrase\n")
        with pytest.raises(NotAuthorizedError, match="passphrase"):
            await asyncio.to_thread(take, courier)
        phrase.write_text("a long phrase\n")
        imported = await asyncio.to_thread(lambda: take(courier, wipe_courier_file=True))
        assert imported.table_id == table.table_id
        assert not courier.exists()
        await until(lambda: network.node("hub-1").links.links["kme-a"].is_open)
        status = await asyncio.to_thread(psrd_client.status, hub)
        levels = {link.peer_kme_id: link for link in status.links}
        assert levels["kme-a"].tables[0].state == "imported"
        assert levels["kme-a"].transmit.usable_bytes == 300_000 - 64
        assert not levels["kme-b"].tables
        with pytest.raises(MeshError, match="names no link"):
            await asyncio.to_thread(psrd_client.discard, hub, "kme-z", bytes(16))
        await asyncio.to_thread(issue, tmp_path / "two.psrd")
        status = await asyncio.to_thread(psrd_client.status, hub)
        second = next(link for link in status.links if link.peer_kme_id == "kme-a").tables[-1]
        await asyncio.to_thread(psrd_client.discard, hub, "kme-a", second.table_id)
        answer = await asyncio.to_thread(operator.ask, hub, "status")
        assert isinstance(answer, admin_pb2.NodeStatus)
        assert answer.role == "hub"
    finally:
        await network.stop()


async def test_one_dead_hub_is_no_loss_two_are_a_shortage_that_mends_itself(ocean: HubNetwork) -> None:
    await ocean.stop("hub-1")
    async with asyncio.timeout(10):  # without waiting for it: k = 2 of the n = 3 routes are up
        drawn = await ocean.draw("sae-a", "sae-b")
    assert (await ocean.redeem("sae-b", "sae-a", drawn)).keys == drawn.keys
    await ocean.stop("hub-2")
    with pytest.raises(MeshError) as caught:
        await ocean.draw("sae-a", "sae-b")
    assert caught.value.reason is ErrorReason.GRADE_UNAVAILABLE
    await ocean.start("hub-2")
    await ocean.until_open("hub-2")
    drawn = await ocean.draw("sae-a", "sae-b")
    assert (await ocean.redeem("sae-b", "sae-a", drawn)).keys == drawn.keys


async def test_exact_use_of_tables_for_a_key_and_for_a_batch(ocean: HubNetwork) -> None:
    """32 for the frame's tag, 80 for tag key and confirm key, 48 a key; on each of the six lanes the same."""

    def positions() -> list[int]:
        ends = [("kme-a", hub) for hub in ocean.hubs] + [(hub, "kme-b") for hub in ocean.hubs]
        return [ocean.node(own).links.links[peer].lanes.tx.lane.position for own, peer in ends]

    for number in (1, 64):
        before = positions()
        drawn = await ocean.draw("sae-a", "sae-b", number=number)
        assert (await ocean.redeem("sae-b", "sae-a", drawn)).keys == drawn.keys
        leg = 32 + 80 + 48 * number
        await until(lambda wanted=[one + leg for one in before]: positions() == wanted)  # type: ignore[misc]
