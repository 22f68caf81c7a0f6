"""MeshClient against a hand-written node over real mTLS."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import grpc
import pytest

from mesh.client import (
    CallerError,
    ConfigError,
    DeliveredKey,
    ErrorReason,
    KeyStatus,
    MeshClient,
    MeshError,
    NotAuthorizedError,
    PeerError,
    ReserveLevel,
    ShortageError,
    UnavailableError,
)
from mesh.errors import NOTHING_HAPPENED
from mesh.node.services.streamed import StreamedDelivery
from mesh.ops.logging import request_id
from mesh.ops.tls import TlsFiles
from mesh.pki.authority import Pki
from mesh.rpc.identity import Identity, Role
from mesh.rpc.server import RpcServer
from mesh.rpc.status import failure_from
from mesh.v1 import keys_pb2, keys_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass
class FakeNode(StreamedDelivery):
    """Hands out numbered keys once each; fails for SAEs named after the failure."""

    handed_out: dict[bytes, bytes] = field(default_factory=dict)
    rpcs: int = 0
    seen: list[keys_pb2.KeyRequest] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: int = 0

    async def GetStatus(self, request: keys_pb2.StatusRequest, context: Context) -> keys_pb2.StatusResponse:
        if request.peer_sae_id == "nobody":
            raise CallerError("peer is not known", reason=ErrorReason.UNKNOWN_SAE)
        return keys_pb2.StatusResponse(
            source_kme_id="kme-a",
            target_kme_id=request_id.get(),
            key_size_bits=256,
            min_key_size_bits=8,
            max_key_size_bits=65536,
            stored_key_count=5,
            max_key_count=9,
            max_key_per_request=128,
            max_sae_id_count=8,
            grade="dske(2,3)",
            directory_staleness_s=1.5,
        )

    async def GetKeys(self, request: keys_pb2.GetKeysRequest, context: Context) -> keys_pb2.GetKeysResponse:
        self.rpcs += 1
        self.seen += request.requests
        if any(one.slave_sae_id == "slow" for one in request.requests):
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if any(one.slave_sae_id == "crash" for one in request.requests):
            raise ValueError("bug")
        return keys_pb2.GetKeysResponse(results=[self._draw(one) for one in request.requests])

    async def GetKeysById(
        self, request: keys_pb2.GetKeysByIdRequest, context: Context
    ) -> keys_pb2.GetKeysByIdResponse:
        return keys_pb2.GetKeysByIdResponse(results=[self._redeem(one) for one in request.requests])

    async def WatchLevels(
        self, request: keys_pb2.WatchLevelsRequest, context: Context
    ) -> AsyncIterator[keys_pb2.Level]:
        for epoch in (1, 2):
            yield keys_pb2.Level(peer_kme_id=request.peer_kme_id, epoch=epoch, outbound_bytes=32)
        raise UnavailableError("stopping", reason=ErrorReason.SHUTTING_DOWN)

    def _draw(self, one: keys_pb2.KeyRequest) -> keys_pb2.KeyResult:
        match one.slave_sae_id:
            case "empty":
                error = ShortageError("no material", retry_after_s=3, facts={"peer": "kme-b"})
                return keys_pb2.KeyResult(failure=failure_from(error))
            case "nothing":
                return keys_pb2.KeyResult()
            case "badid":
                return keys_pb2.KeyResult(keys=keys_pb2.Keys(keys=[keys_pb2.Key(key_id=b"x", value=b"y")]))
        keys = []
        for _ in range(one.number):
            key_id = len(self.handed_out).to_bytes(16, "big")
            self.handed_out[key_id] = key_id[::-1] * ((one.size_bytes or 32) // 16)
            keys.append(keys_pb2.Key(key_id=key_id, value=self.handed_out[key_id]))
        return keys_pb2.KeyResult(keys=keys_pb2.Keys(keys=keys, grade="trusted-relay"))

    def _redeem(self, one: keys_pb2.KeyByIdRequest) -> keys_pb2.KeyResult:
        if any(key_id not in self.handed_out for key_id in one.key_ids):
            error = CallerError("key is not known", reason=ErrorReason.UNKNOWN_KEY)
            return keys_pb2.KeyResult(failure=failure_from(error))
        keys = [keys_pb2.Key(key_id=key_id, value=self.handed_out.pop(key_id)) for key_id in one.key_ids]
        return keys_pb2.KeyResult(keys=keys_pb2.Keys(keys=keys, grade="trusted-relay"))


class Site:
    """A fake node and the files of its callers."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.pki = Pki.create("metro")
        self.roots = self.pki.save(directory)
        self.node = FakeNode()
        self.address = ""
        self._clients: list[MeshClient] = []
        self._server: RpcServer | None = None

    async def start(self) -> None:
        files = self.pki.node("kme-a").save(self.dir, "node")
        self._server = RpcServer(
            Identity("metro", Role.NODE, "kme-a"), TlsFiles(self.roots["node"], files.cert, files.key)
        )
        self._server.add(keys_pb2_grpc.add_KeyDeliveryServicer_to_server, self.node)
        port = await self._server.start(self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"

    async def stop(self) -> None:
        assert self._server is not None
        await self._server.stop(0)

    def client(self, *, role: Role = Role.GATEWAY, kme_id: str = "kme-a") -> MeshClient:
        files = self.pki.member(role, "gw-a").save(self.dir, role.value)
        client = MeshClient.connect(
            self.address,
            domain_id="metro",
            kme_id=kme_id,
            tls=TlsFiles(self.roots["node"], files.cert, files.key),
        )
        self._clients.append(client)
        return client

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        await self.stop()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    await made.start()
    yield made
    await made.close()


async def until(is_so: Callable[[], bool]) -> None:
    """Lets the loop turn until something is so; the test's own time limit bounds it."""
    while not is_so():  # noqa: ASYNC110 - the fake node's state has no event
        await asyncio.sleep(0.001)


async def test_draw_and_redeem(site: Site) -> None:
    client = site.client()
    drawn = await client.get_keys(
        "sae-a", "sae-b", number=2, size_bytes=64, additional_slaves=["sae-c"], request_id="r1"
    )
    assert drawn.grade == "trusted-relay"
    assert [(key.key_id, len(key.value)) for key in drawn.keys] == [(UUID(int=0), 64), (UUID(int=1), 64)]
    request = site.node.seen[0]
    assert (request.master_sae_id, request.slave_sae_id, request.request_id) == ("sae-a", "sae-b", "r1")
    assert list(request.additional_slave_sae_ids) == ["sae-c"]
    redeemed = await client.get_keys_by_id("sae-b", "sae-a", [key.key_id for key in drawn.keys])
    assert [key.value for key in redeemed.keys] == [key.value for key in drawn.keys]
    with pytest.raises(CallerError) as caught:
        await client.get_keys_by_id("sae-b", "sae-a", [drawn.keys[0].key_id])
    assert caught.value.reason is ErrorReason.UNKNOWN_KEY


async def test_status(site: Site) -> None:
    client = site.client()
    assert await client.get_status("sae-a", "sae-b", request_id="r-1") == KeyStatus(
        "kme-a", "r-1", 256, 8, 65536, 5, 9, 128, 8, "dske(2,3)", 1.5
    )
    with pytest.raises(CallerError) as caught:
        await client.get_status("sae-a", "nobody")
    assert caught.value.reason is ErrorReason.UNKNOWN_SAE


async def test_levels_until_the_stream_ends(site: Site) -> None:
    levels: list[ReserveLevel] = []
    with pytest.raises(UnavailableError) as caught:
        async for level in site.client().watch_levels("kme-b"):
            levels.append(level)
    assert caught.value.reason is ErrorReason.SHUTTING_DOWN
    assert [(level.peer_kme_id, level.epoch, level.outbound_bytes) for level in levels] == [
        ("kme-b", 1, 32),
        ("kme-b", 2, 32),
    ]


async def test_many_callers_share_few_rpcs_and_no_key_comes_twice(site: Site) -> None:
    client = site.client()
    answers = await asyncio.gather(*(client.get_keys(f"m{number}", "sae-b") for number in range(400)))
    keys = [key.key_id for answer in answers for key in answer.keys]
    assert len(set(keys)) == 400
    assert site.node.rpcs <= 4


async def test_failures_are_typed_and_touch_nobody_else(site: Site) -> None:
    client = site.client()
    results = await asyncio.gather(
        *(client.get_keys("sae-a", slave) for slave in ("sae-b", "empty", "nothing", "badid", "sae-c")),
        return_exceptions=True,
    )
    assert [type(result).__name__ for result in results] == [
        "DeliveredKeys",
        "ShortageError",
        "PeerError",
        "PeerError",
        "DeliveredKeys",
    ]
    shortage = results[1]
    assert isinstance(shortage, ShortageError)
    assert (shortage.retry_after_s, shortage.facts) == (3.0, {"peer": "kme-b"})
    with pytest.raises(MeshError) as caught:
        await client.get_keys("sae-a", "crash")
    assert caught.value.reason is ErrorReason.INTERNAL
    assert "bug" not in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.get_keys("a", "b", number=0),
        lambda client: client.get_keys("a", "b", number=65_536),
        lambda client: client.get_keys("a", "b", size_bytes=0),
        lambda client: client.get_keys("a", "b", size_bytes=8193),
        lambda client: client.get_keys("a\ud800", "b"),
        lambda client: client.get_keys(7, "b"),
        lambda client: client.get_keys_by_id("a", "b", []),
    ],
)
async def test_wrong_arguments_never_leave(site: Site, call: Callable[[MeshClient], Any]) -> None:
    with pytest.raises(CallerError):
        await call(site.client())
    assert site.node.rpcs == 0


async def test_a_cancelled_callers_key_is_spent(site: Site) -> None:
    client = site.client()
    task = asyncio.ensure_future(client.get_keys("sae-a", "slow"))
    await until(lambda: site.node.rpcs == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    site.node.gate.set()
    await until(lambda: len(site.node.handed_out) == 1)
    assert site.node.cancelled == 0
    # The next call gets the next key, not the one that nobody took.
    assert (await client.get_keys("sae-a", "sae-b")).keys[0].key_id == UUID(int=1)


async def test_deadline(site: Site) -> None:
    client = site.client()
    await client.get_keys("sae-a", "sae-b")  # connects
    late = asyncio.ensure_future(client.get_keys("sae-a", "slow", timeout_s=2))
    await until(lambda: site.node.rpcs == 2)
    with pytest.raises(UnavailableError) as caught:
        await late
    assert caught.value.reason is ErrorReason.DEADLINE_EXCEEDED
    assert "outcome" not in caught.value.facts
    await until(lambda: site.node.cancelled == 1)


async def test_one_slow_pair_does_not_stop_the_others(site: Site) -> None:
    client = site.client()
    slow = [asyncio.ensure_future(client.get_keys(f"m{number}", "slow")) for number in range(2)]
    await until(lambda: site.node.rpcs >= 1)
    slow.append(asyncio.ensure_future(client.get_keys("m9", "slow")))
    await until(lambda: site.node.rpcs >= 2)
    answers = await asyncio.gather(*(client.get_keys("sae-a", "sae-b", timeout_s=30) for _ in range(20)))
    assert len(answers) == 20
    assert not any(task.done() for task in slow)
    site.node.gate.set()
    await asyncio.gather(*slow)


async def test_a_fault_in_one_batch_leaves_the_others_their_stream(site: Site) -> None:
    client = site.client()
    slow = asyncio.ensure_future(client.get_keys("sae-a", "slow"))
    await until(lambda: site.node.rpcs == 1)
    with pytest.raises(MeshError) as caught:
        await client.get_keys("sae-a", "crash")
    assert caught.value.reason is ErrorReason.INTERNAL
    site.node.gate.set()
    assert len((await slow).keys) == 1


async def test_a_stopping_node_answers_what_it_began_and_begins_no_more(site: Site) -> None:
    client = site.client()
    slow = asyncio.ensure_future(client.get_keys("sae-a", "slow"))
    await until(lambda: site.node.rpcs == 1)

    def refuse(_: object) -> None:
        raise UnavailableError("stopping", reason=ErrorReason.SHUTTING_DOWN)

    site.node.readmit = refuse
    with pytest.raises(UnavailableError) as caught:
        await client.get_keys("sae-a", "sae-b")
    assert caught.value.reason is ErrorReason.SHUTTING_DOWN
    assert site.node.rpcs == 1
    site.node.gate.set()
    assert len((await slow).keys) == 1


async def test_a_node_that_dies_with_a_request_leaves_its_outcome_open(site: Site) -> None:
    client = site.client()
    slow = asyncio.ensure_future(client.get_keys("sae-a", "slow"))
    await until(lambda: site.node.rpcs == 1)
    await site.stop()
    with pytest.raises(MeshError) as caught:
        await slow
    assert "outcome" not in caught.value.facts


async def test_node_away_and_back(site: Site) -> None:
    client = site.client()
    await client.get_keys("sae-a", "sae-b")
    await site.stop()
    for _ in range(2):
        with pytest.raises(UnavailableError) as caught:
            await client.get_keys("sae-a", "sae-b")
        assert caught.value.reason is ErrorReason.PEER_UNREACHABLE
    assert caught.value.facts == NOTHING_HAPPENED, "no connection: nobody was asked"
    await site.start()

    async def again() -> bool:
        try:
            await client.get_keys("sae-a", "sae-b")
        except UnavailableError:
            return False
        return True

    while not await again():  # noqa: ASYNC110 - the channel's own back-off is what is waited for
        await asyncio.sleep(0.05)


async def test_another_nodes_certificate_is_refused(site: Site) -> None:
    with pytest.raises(UnavailableError, match="someone else"):
        await site.client(kme_id="kme-b").get_keys("sae-a", "sae-b")


async def test_role_and_files(site: Site) -> None:
    with pytest.raises(NotAuthorizedError):
        await site.client(role=Role.TOOL).get_keys("sae-a", "sae-b")
    with pytest.raises(ConfigError, match="for a node"):
        site.client(role=Role.NODE)
    with pytest.raises(ConfigError, match="cannot be read"):
        MeshClient.connect(
            "127.0.0.1:1",
            domain_id="metro",
            kme_id="kme-a",
            tls=TlsFiles(site.dir / "a", site.dir / "b", site.dir / "c"),
        )


async def test_closed_client(site: Site) -> None:
    client = site.client()
    waiting = asyncio.ensure_future(client.get_keys("sae-a", "slow"))
    await until(lambda: site.node.rpcs == 1)
    await client.close()
    for call in (waiting, client.get_keys("sae-a", "sae-b"), client.get_status("sae-a", "sae-b")):
        with pytest.raises(UnavailableError) as caught:
            await call
        assert caught.value.reason is ErrorReason.SHUTTING_DOWN


def test_key_bytes_stay_out_of_reprs_and_pickles() -> None:
    key = DeliveredKey(UUID(int=1).bytes, b"secret-bytes-here")
    assert key.key_id_text == str(key.key_id) == str(UUID(int=1))
    assert "secret" not in repr(key)
    assert "secret" not in repr([key])
    with pytest.raises(TypeError):
        pickle.dumps(key)
    assert issubclass(PeerError, MeshError)
