"""The directory on real etcd: restarts, compaction, outages, expiry, and an etcd that lies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.directory.document import DocumentKeeper, encode_body, sign
from mesh.directory.etcd_directory import EtcdDirectory, document_key, domain_prefix, publish_document
from mesh.directory.port import NodeLevels, NodeRecord
from mesh.directory.tool import publish_file
from mesh.errors import ConfigError, ErrorReason, MeshError
from tests.etcd_fixture import DOMAIN, OPERATOR, PASSWORD, EtcdCluster, eventually, running_etcd

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))
LEASE_S = 2


def source(serial: int, home: str = "kme-a") -> dict[str, Any]:
    nodes: dict[str, Any] = {"kme-a": {}, "kme-b": {}, "kme-c": {}}
    head = {"format": "keymesh-network/1", "serial": serial, "domain": DOMAIN}
    return {**head, "nodes": nodes, "saes": {"sae-a": home}}


def signed(serial: int, home: str = "kme-a", key: Ed25519PrivateKey = KEY) -> bytes:
    return sign(encode_body(source(serial, home)), key)


def record(kme_id: str, port: int = 7001) -> NodeRecord:
    return NodeRecord(kme_id, f"127.0.0.1:{port}")


class Refusals:
    def __init__(self) -> None:
        self.errors: list[MeshError] = []

    def __call__(self, origin: str, error: MeshError) -> None:
        self.errors.append(error)


@asynccontextmanager
async def directory(
    etcd: EtcdCluster,
    kme_id: str,
    refused: Refusals | None = None,
    trust: bool = False,
    lease_s: int = LEASE_S,
) -> AsyncIterator[EtcdDirectory]:
    keeper = DocumentKeeper(
        DOMAIN, operator_key=None if trust else KEY.public_key(), trust_directory=trust, refused=refused
    )
    client = etcd.client(kme_id, timeout_s=1.0, heartbeat_s=0.3)
    started = EtcdDirectory(client, DOMAIN, keeper, lease_s=lease_s)
    await started.start()
    try:
        yield started
    finally:
        await started.stop()


def serial(d: EtcdDirectory) -> int:
    return 0 if d.document is None else d.document.serial


async def test_two_nodes_see_each_other_and_a_stop_withdraws_at_once(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd, directory(etcd, "kme-a") as a:
        async with directory(etcd, "kme-b", lease_s=120) as b:
            await a.publish_node(record("kme-a", 1001))
            await b.publish_node(record("kme-b", 1002))
            await eventually(lambda: a.peers().keys() == {"kme-a", "kme-b"} == b.peers().keys())
        await eventually(lambda: a.peers().keys() == {"kme-a"})
        # What was known is still of use: a lease that ran out does not take the address away.
        assert a.address("kme-b") == "127.0.0.1:1002"


async def test_a_copy_that_withdraws_gives_the_original_its_place_back(tmp_path: Path) -> None:
    """A clone of a node publishes its own address first; once refused it must not stand in the way."""
    async with (
        running_etcd(tmp_path) as etcd,
        directory(etcd, "kme-b") as peer,
        directory(etcd, "kme-a", lease_s=60) as original,
        directory(etcd, "kme-a", lease_s=60) as clone,
    ):
        await original.publish_node(record("kme-a", 1001))
        await eventually(lambda: peer.address("kme-a") == "127.0.0.1:1001")
        await clone.publish_node(record("kme-a", 6666))
        await eventually(lambda: peer.address("kme-a") == "127.0.0.1:6666")
        await clone.withdraw()
        await eventually(lambda: peer.address("kme-a") == "127.0.0.1:1001")


async def test_a_node_that_died_disappears_when_its_lease_ends(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd, directory(etcd, "kme-a") as a:
        other = etcd.client("kme-b")
        lease = await other.grant(2 * LEASE_S)
        await other.put(
            domain_prefix(DOMAIN) + b"nodes/kme-b", b'{"kme_id":"kme-b","address":"h:1"}', lease=lease
        )
        await eventually(lambda: "kme-b" in a.peers())
        await eventually(lambda: "kme-b" not in a.peers())


async def test_records_outlive_their_lease_time_while_the_node_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        running_etcd(tmp_path) as etcd,
        directory(etcd, "kme-a") as a,
        directory(etcd, "kme-b", lease_s=6) as b,
    ):
        renewals: list[int] = []
        keep_alive = b._client.keep_alive

        async def counted(lease: int) -> int:
            renewals.append(await keep_alive(lease))
            return renewals[-1]

        monkeypatch.setattr(b._client, "keep_alive", counted)
        await b.publish_node(record("kme-b"))
        await eventually(lambda: "kme-b" in a.peers())
        gone: list[bool] = []
        a.subscribe(lambda: gone.append("kme-b" not in a.peers()))
        await eventually(lambda: len(renewals) == 4)  # three in the time of a lease
        assert all(renewals)
        assert not any(gone)
        assert "kme-b" in a.peers()


async def test_etcd_away_the_nodes_go_on_with_what_they_knew_and_say_how_old_it_is(tmp_path: Path) -> None:
    async with (
        running_etcd(tmp_path) as etcd,
        directory(etcd, "kme-a") as a,
        directory(etcd, "kme-b", lease_s=60) as b,
    ):
        await publish_document(etcd.client(OPERATOR), signed(1))
        await b.publish_node(record("kme-b", 1002))
        await eventually(lambda: a.address("kme-b") is not None and serial(a) == 1)
        await eventually(lambda: a.staleness_s() < 2)
        etcd.kill()
        await eventually(lambda: a.staleness_s() > 2)
        assert a.address("kme-b") == "127.0.0.1:1002"
        assert "kme-b" in a.peers()
        assert serial(a) == 1
        # Publishing while etcd is away does not fail, and the newest value goes out later.
        await b.publish_node(record("kme-b", 1003))
        await b.publish_node(record("kme-b", 1004))
        etcd.start()
        await eventually(lambda: a.address("kme-b") == "127.0.0.1:1004")
        await eventually(lambda: a.staleness_s() < 1)


async def test_a_node_starts_without_etcd_and_catches_up(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd:
        await publish_document(etcd.client(OPERATOR), signed(1))
        etcd.kill()
        async with asyncio.timeout(60), directory(etcd, "kme-a") as a:
            assert a.document is None
            assert a.staleness_s() == float("inf")
            await a.publish_node(record("kme-a"))
            etcd.start()
            await eventually(lambda: serial(a) == 1 and "kme-a" in a.peers())


async def test_compaction_while_a_node_is_cut_off_costs_it_nothing(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd, directory(etcd, "kme-a") as a:
        operator, root = etcd.client(OPERATOR), etcd.client("root")
        await publish_document(operator, signed(1))
        levels = domain_prefix(DOMAIN) + b"levels/kme-b"
        await operator.put(levels, b'{"kme_id":"kme-b"}')
        await eventually(lambda: serial(a) == 1 and "kme-b" in a.levels)
        # Cut the node off by killing etcd; the other changes are made before the node is back.
        follower = a._follower
        follower._client, real = (
            etcd.client("kme-a", endpoints=["https://127.0.0.1:1"], timeout_s=0.2),
            follower._client,
        )
        etcd.kill()
        etcd.start()
        await etcd.wait_ready(user=OPERATOR)
        await operator.delete(levels)
        await publish_document(operator, signed(2))
        for number in range(5):
            revision = await operator.put(
                levels.replace(b"kme-b", b"kme-c"), b'{"kme_id":"kme-c","reserves":{"x":%d}}' % number
            )
        await root.compact(revision)
        follower._client = real
        await eventually(lambda: serial(a) == 2)
        await eventually(lambda: a.levels == {"kme-c": NodeLevels("kme-c", reserves={"x": 4})})


async def test_the_watch_survives_compaction_under_its_feet(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd, directory(etcd, "kme-a") as a:
        operator, root = etcd.client(OPERATOR), etcd.client("root")
        for number in range(1, 4):
            await publish_document(operator, signed(number))
            held = await operator.get(document_key(DOMAIN))
            assert held is not None
            await root.compact(held.mod_revision)
            await eventually(lambda number=number: serial(a) == number)  # type: ignore[misc]


async def test_what_somebody_deleted_is_published_again(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd, directory(etcd, "kme-a") as a:
        await a.publish_node(record("kme-a"))
        await eventually(lambda: "kme-a" in a.peers())
        operator, key = etcd.client(OPERATOR), domain_prefix(DOMAIN) + b"nodes/kme-a"
        await operator.delete(key)
        async with asyncio.timeout(60):
            while await operator.get(key) is None:  # noqa: ASYNC110 - asks another process
                await asyncio.sleep(0.05)
        await eventually(lambda: "kme-a" in a.peers())


async def test_an_etcd_that_lost_its_data_is_filled_again(tmp_path: Path) -> None:
    async with running_etcd(tmp_path, auth=False) as etcd:
        keeper = DocumentKeeper(DOMAIN, operator_key=KEY.public_key())
        a = EtcdDirectory(etcd.client(None, timeout_s=1.0, heartbeat_s=0.3), DOMAIN, keeper, lease_s=LEASE_S)
        await a.start()
        await publish_document(etcd.client(None), signed(3))
        await a.publish_node(record("kme-a"))
        for number in range(20):
            await etcd.client(None).put(b"/noise", b"%d" % number)
        await eventually(lambda: "kme-a" in a.peers() and serial(a) == 3)
        etcd.kill()
        member = etcd.members[0]
        member.argv = [
            arg.replace(".etcd", ".etcd2") if arg.startswith("--data-dir") else arg for arg in member.argv
        ]
        etcd.start()
        await etcd.wait_ready()
        fresh = etcd.client(None)
        async with asyncio.timeout(60):
            while await fresh.get(domain_prefix(DOMAIN) + b"nodes/kme-a") is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert serial(a) == 3
        await a.stop()


async def test_a_lost_member_is_left_for_another(tmp_path: Path) -> None:
    async with (
        running_etcd(tmp_path, size=3) as etcd,
        directory(etcd, "kme-a") as a,
        directory(etcd, "kme-b") as b,
    ):
        await a.publish_node(record("kme-a", 1000))
        for index in range(3):
            etcd.kill(index)
            await b.publish_node(record("kme-b", 2000 + index))
            await eventually(lambda index=index: a.address("kme-b") == f"127.0.0.1:{2000 + index}")  # type: ignore[misc]
            etcd.start(index)
            await etcd.wait_ready(user=OPERATOR, index=index)  # it catches up before the next one goes


async def test_a_member_that_hangs_is_left_for_another(tmp_path: Path) -> None:
    async with (
        running_etcd(tmp_path, size=3) as etcd,
        directory(etcd, "kme-a") as a,
        directory(etcd, "kme-b") as b,
    ):
        await b.publish_node(record("kme-b", 2000))
        await eventually(lambda: "kme-b" in a.peers())
        current = a._client.endpoint
        index = next(i for i, m in enumerate(etcd.members) if m.endpoint.endswith(current))
        etcd.freeze(index)
        await b.publish_node(record("kme-b", 2001))
        await eventually(lambda: a.address("kme-b") == "127.0.0.1:2001")
        assert a._client.endpoint != current
        etcd.thaw(index)


async def test_tokens_that_end_do_not_end_the_directory(tmp_path: Path) -> None:
    async with running_etcd(tmp_path, options=("--auth-token-ttl=1",)) as etcd, directory(etcd, "kme-a") as a:
        await a.publish_node(record("kme-a", 1000))
        await eventually(lambda: a.address("kme-a") == "127.0.0.1:1000")
        await asyncio.sleep(2.5)
        await a.publish_node(record("kme-a", 1001))
        await eventually(lambda: a.address("kme-a") == "127.0.0.1:1001")
        etcd.kill()
        etcd.start()
        await a.publish_node(record("kme-a", 1002))
        await eventually(lambda: a.address("kme-a") == "127.0.0.1:1002")


# --- whoever owns etcd (protocol 5.1) -------------------------------------------------------------


async def test_protocol_5_1_etcd_cannot_move_a_home_nor_make_the_serial_fall(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refusals = Refusals()
    async with running_etcd(tmp_path) as etcd, directory(etcd, "kme-a", refusals) as a:
        attacker = etcd.client("root")
        await publish_document(attacker, signed(5))
        await eventually(lambda: serial(a) == 5)
        remapped = [
            encode_body(source(6, home="kme-c")),
            signed(6, home="kme-c", key=STRANGER),
            signed(5).replace(b'"sae-a": "kme-a"', b'"sae-a": "kme-c"'),
            signed(4, home="kme-c"),  # once honest: an old document replayed
            b"\x00" * 2_000,
        ]
        with caplog.at_level(logging.WARNING):
            for number, data in enumerate(remapped, start=1):
                await attacker.put(document_key(DOMAIN), data)
                await eventually(lambda number=number: len(refusals.errors) == number)  # type: ignore[misc]
        assert a.document is not None
        assert (serial(a), a.document.home("sae-a")) == (5, "kme-a")
        assert {error.reason for error in refusals.errors} == {ErrorReason.DOCUMENT_INVALID}
        assert sum("network document refused" in line.message for line in caplog.records) == len(remapped)
        # Deleting it takes nothing away either.
        await attacker.delete(document_key(DOMAIN))
        await attacker.put(domain_prefix(DOMAIN) + b"levels/kme-b", b'{"kme_id":"kme-b"}')
        await eventually(lambda: "kme-b" in a.levels)
        assert serial(a) == 5


async def test_records_that_lie_or_are_broken_are_ignored(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd, directory(etcd, "kme-a") as a:
        attacker = etcd.client("root")
        await publish_document(attacker, signed(1))
        prefix = domain_prefix(DOMAIN)
        junk: dict[bytes, bytes] = {
            b"nodes/kme-b": b"not json",
            b"nodes/kme-c": b'{"kme_id":"kme-b","address":"h:1"}',
            b"nodes/Kme-B": b'{"kme_id":"Kme-B","address":"h:1"}',
            b"nodes/evil": b'{"kme_id":"evil","address":"h:1"}',
            b"levels/kme-b": b'{"kme_id":"kme-b","links":{"kme-a":{"usable_bytes":"many"}}}',
            b"levels/kme-c": b'{"kme_id":"kme-c","pad":"' + b"x" * 300_000 + b'"}',
            b"marks/kme-a": b"[]",
            b"\xff\xfe": b"",
            b"surprise/kme-a": b"{}",
        }
        for name, value in junk.items():
            await attacker.put(prefix + name, value)
        await attacker.put(prefix + b"nodes/kme-a", b'{"kme_id":"kme-a","address":"h:9","later_field":1}')
        await eventually(lambda: a.address("kme-a") == "h:9")
        assert a.peers().keys() == {"kme-a"}
        assert a.levels == {}
        assert a.marks("kme-a") is None
        assert a.address("evil") is None


async def test_the_operators_tools_do_not_publish_backwards(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd:
        operator = etcd.client(OPERATOR)
        assert await publish_document(operator, signed(2)) == 2
        assert await publish_document(operator, signed(2)) == 2
        for data in (signed(1), signed(2, home="kme-c")):
            with pytest.raises(ConfigError, match="not lower"):
                await publish_document(operator, data)
        with pytest.raises(ConfigError):
            await publish_document(operator, b"junk")
        with pytest.raises(ConfigError):
            await publish_document(etcd.client("kme-a"), signed(3))  # a node may not write it
        files: dict[str, bytes | None] = {
            "signed": signed(4),
            "ca": etcd.tls.ca,
            "cert": etcd.tls.cert,
            "key": etcd.tls.key,
        }
        files["password"] = PASSWORD.encode() + b"\n"
        for name, content in files.items():
            (tmp_path / name).write_bytes(content or b"")
        published = await asyncio.to_thread(
            publish_file,
            tmp_path / "signed",
            endpoints=etcd.endpoints,
            ca=tmp_path / "ca",
            cert=tmp_path / "cert",
            key=tmp_path / "key",
            username=OPERATOR,
            password_file=tmp_path / "password",
        )
        assert published == 4


async def test_labs_take_an_unsigned_document(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd, directory(etcd, "kme-a", trust=True) as a:
        await publish_document(etcd.client(OPERATOR), encode_body(source(1)))
        await eventually(lambda: serial(a) == 1)
