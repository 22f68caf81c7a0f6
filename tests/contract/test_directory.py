"""One suite for every directory: the static file and real etcd show the same face."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.directory.document import DocumentKeeper, encode_body, sign
from mesh.directory.etcd_directory import EtcdDirectory, document_key, publish_document
from mesh.directory.port import Directory, LinkLevel, MarksCopy, NodeLevels, NodeRecord
from mesh.directory.static import StaticDirectory
from mesh.errors import CallerError
from tests.etcd_fixture import DOMAIN, OPERATOR, eventually, running_etcd

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
RECORD = NodeRecord("kme-a", "127.0.0.1:7001", software_version="1", started_at_s=1.5)


def signed(serial: int, home: str = "kme-a", nodes: tuple[str, ...] = ("kme-a", "kme-b")) -> bytes:
    source: dict[str, Any] = {
        "format": "keymesh-network/1",
        "serial": serial,
        "domain": DOMAIN,
        "nodes": {kme_id: {} for kme_id in nodes},
        "saes": {"sae-a": home},
    }
    return sign(encode_body(source), KEY)


class World:
    """A directory under test and the means to change what stands behind it."""

    def __init__(self, directory: Directory, put_document: Callable[[bytes], Awaitable[None]]) -> None:
        self.directory = directory
        self.put_document = put_document


@pytest.fixture(params=["static", pytest.param("etcd", marks=pytest.mark.slow)])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    keeper = DocumentKeeper(DOMAIN, operator_key=KEY.public_key())
    if request.param == "static":
        path, document = tmp_path / "directory.yaml", tmp_path / "network.signed"
        document.write_bytes(signed(1))
        path.write_text("format: keymesh-directory/1\nnodes: {}\ndocument: network.signed\n")

        async def write(data: bytes) -> None:
            document.write_bytes(data)

        static = StaticDirectory(path, keeper, poll_s=0.02)
        await static.start()
        yield World(static, write)
        await static.stop()
        return
    async with running_etcd(tmp_path) as etcd:
        operator = etcd.client(OPERATOR)
        await publish_document(operator, signed(1))

        async def put(data: bytes) -> None:
            await operator.put(document_key(DOMAIN), data)

        directory = EtcdDirectory(etcd.client("kme-a"), DOMAIN, keeper, lease_s=3)
        await directory.start()
        yield World(directory, put)
        await directory.stop()


async def test_the_document_is_there_after_the_start(world: World) -> None:
    assert world.directory.document is not None
    assert world.directory.document.home("sae-a") == "kme-a"


async def test_a_higher_serial_is_taken_up_and_listeners_hear_of_it(world: World) -> None:
    heard = asyncio.Event()
    end = world.directory.subscribe(heard.set)
    await world.put_document(signed(2, home="kme-b"))
    async with asyncio.timeout(60):
        await heard.wait()
    end()
    await eventually(lambda: world.directory.document is not None and world.directory.document.serial == 2)


async def test_lower_forged_and_broken_documents_change_nothing(world: World) -> None:
    await world.put_document(signed(5))
    await eventually(lambda: world.directory.document is not None and world.directory.document.serial == 5)
    forged = sign(signed(9).partition(b"\n\n")[2], Ed25519PrivateKey.from_private_bytes(bytes(32)))
    for data in (signed(4, home="kme-b"), forged, b"{}", b""):
        await world.put_document(data)
        await asyncio.sleep(0.1)
        assert world.directory.document is not None
        assert (world.directory.document.serial, world.directory.document.home("sae-a")) == (5, "kme-a")
    await world.put_document(signed(6))
    await eventually(lambda: world.directory.document is not None and world.directory.document.serial == 6)


async def test_a_published_record_is_seen_and_the_newest_wins(world: World) -> None:
    directory = world.directory
    assert directory.address("kme-a") is None
    await directory.publish_node(RECORD)
    await eventually(lambda: directory.peers().get("kme-a") == RECORD)
    assert directory.address("kme-a") == "127.0.0.1:7001"
    await directory.publish_node(NodeRecord("kme-a", "127.0.0.1:7002"))
    await eventually(lambda: directory.address("kme-a") == "127.0.0.1:7002")


async def test_published_levels_and_marks_are_seen(world: World) -> None:
    levels = NodeLevels("kme-a", {"kme-b": LinkLevel(10, 100, is_up=False)}, {"kme-b": 4096})
    marks = MarksCopy("ab" * 16, {"lane/kme-b/out": 65536})
    await world.directory.publish_levels(levels)
    await world.directory.publish_marks("kme-a", marks)
    await eventually(lambda: world.directory.levels.get("kme-a") == levels)
    await eventually(lambda: world.directory.marks("kme-a") == marks)
    assert world.directory.marks("kme-b") is None


async def test_what_is_withdrawn_vanishes_until_it_is_published_again_and_the_marks_stay(
    world: World,
) -> None:
    directory = world.directory
    marks = MarksCopy("ab" * 16, {"lane/kme-b/out": 65536})
    await directory.publish_marks("kme-a", marks)
    for _ in range(2):
        await directory.publish_node(RECORD)
        await directory.publish_levels(NodeLevels("kme-a", {}, {"kme-b": 1}))
        await eventually(lambda: "kme-a" in directory.peers() and "kme-a" in directory.levels)
        await directory.withdraw()
        await eventually(lambda: "kme-a" not in directory.peers() and "kme-a" not in directory.levels)
    assert directory.marks("kme-a") == marks


async def test_nodes_that_the_document_does_not_know_are_not_there(world: World) -> None:
    await world.directory.publish_node(RECORD)
    await eventually(lambda: "kme-a" in world.directory.peers())
    await world.put_document(signed(2, home="kme-b", nodes=("kme-b",)))
    await eventually(lambda: "kme-a" not in world.directory.peers())
    assert world.directory.address("kme-a") is None


async def test_a_record_without_a_usable_address_is_refused(world: World) -> None:
    for address in ("", "host", "host:0", "host:99999", ":1", "host:1x"):
        with pytest.raises(CallerError):
            await world.directory.publish_node(NodeRecord("kme-a", address))


async def test_a_directory_that_answers_is_fresh(world: World) -> None:
    await asyncio.sleep(0.1)
    assert 0 <= world.directory.staleness_s() < 5
