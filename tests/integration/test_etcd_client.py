"""The etcd client against real etcd: TLS, users, tokens, endpoints, watches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from mesh.directory.etcd import (
    Change,
    Changes,
    CompactedError,
    EtcdClient,
    EtcdTls,
    LeaseGoneError,
    prefix_end,
)
from mesh.directory.etcd_setup import node_user, set_up_auth
from mesh.errors import ConfigError, ErrorReason, UnavailableError
from tests.etcd_fixture import DOMAIN, OPERATOR, PASSWORD, EtcdCluster, running_etcd

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

KEY = b"/keymesh/toronto/x"


async def next_change(stream: AsyncGenerator[Changes, None]) -> Changes:
    async with asyncio.timeout(60):
        async for batch in stream:
            if batch.changes:
                return batch
    raise AssertionError("the watch ended")


async def put_somehow(client: EtcdClient, value: bytes) -> None:
    """Puts the value once the members have a leader."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(UnavailableError):
                await client.put(KEY, value)
                return
            await asyncio.sleep(0.1)


async def test_entries_are_written_listed_replaced_and_deleted(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd:
        client = etcd.client(OPERATOR)
        assert await client.get(KEY) is None
        for number in range(1100):  # more than two pages
            await client.put(b"/keymesh/toronto/many/%04d" % number, b"v")
        entries, revision = await client.range(b"/keymesh/toronto/many/")
        assert len(entries) == 1100
        assert [e.key for e in entries] == sorted(e.key for e in entries)
        assert revision == entries[-1].mod_revision
        assert await client.replace(KEY, b"one", mod_revision=0)
        assert not await client.replace(KEY, b"two", mod_revision=0)
        held = await client.get(KEY)
        assert held is not None
        assert await client.replace(KEY, b"two", mod_revision=held.mod_revision)
        assert await client.delete(KEY) == 1
        assert (await client.status()).version.startswith("3.")
        assert len(await client.members()) == 1


async def test_users_passwords_and_permissions(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd:
        node = etcd.client("kme-a")
        await node.put(b"/keymesh/toronto/nodes/kme-a", b"mine")
        for key in (b"/keymesh/toronto/nodes/kme-b", b"/keymesh/toronto/document", b"/elsewhere"):
            with pytest.raises(ConfigError):
                await node.put(key, b"x")
        with pytest.raises(ConfigError):
            await node.range(b"/other/")
        async with EtcdClient(etcd.endpoints, tls=etcd.tls, username="kme-a", password="wrong") as wrong:
            with pytest.raises(ConfigError, match="password"):
                await wrong.get(KEY)


async def test_setting_up_may_be_repeated_and_adds_who_is_new(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd:
        users = [node_user(DOMAIN, kme_id, PASSWORD) for kme_id in ("kme-a", "kme-new")]
        await set_up_auth(etcd.client("root"), root_password="another", users=users)
        await etcd.client("kme-new").put(b"/keymesh/toronto/nodes/kme-new", b"mine")
        await etcd.client("root").get(KEY)  # its password stayed


async def test_a_client_without_certificate_or_with_another_ca_gets_nothing(tmp_path: Path) -> None:
    async with running_etcd(tmp_path, auth=False) as etcd:
        for tls in (EtcdTls(etcd.tls.ca), EtcdTls(etcd.pki.roots["sae"].pem, etcd.tls.cert, etcd.tls.key)):
            async with EtcdClient(etcd.endpoints, tls=tls, timeout_s=1.0) as client:
                with pytest.raises(UnavailableError) as caught:
                    await client.get(KEY)
                assert caught.value.reason is ErrorReason.DIRECTORY_UNAVAILABLE


async def test_a_token_that_ended_is_renewed_without_anybody_noticing(tmp_path: Path) -> None:
    async with running_etcd(tmp_path, options=("--auth-token-ttl=1",)) as etcd:
        client = etcd.client(OPERATOR)
        await client.put(KEY, b"1")
        await asyncio.sleep(2.5)
        await client.put(KEY, b"2")
        other = etcd.client("kme-a")
        await other.get(KEY)
        # A restart forgets all tokens.
        etcd.kill()
        etcd.start()
        await etcd.wait_ready(user=OPERATOR)
        held = await other.get(KEY)
        assert held is not None
        assert held.value == b"2"


async def test_a_watch_takes_a_new_token(tmp_path: Path) -> None:
    # etcd refuses a watch with an old one as "permission denied", whatever the user may do.
    async with running_etcd(tmp_path, options=("--auth-token-ttl=1",)) as etcd:
        client = etcd.client(OPERATOR)
        revision = await client.put(KEY, b"1")
        await asyncio.sleep(3.0)
        async with contextlib.aclosing(client.watch(KEY, revision)) as stream:
            assert (await next_change(stream)).changes == (Change(KEY, b"1"),)
        with pytest.raises(ConfigError, match="may not read"):
            async with contextlib.aclosing(etcd.client("kme-a").watch(b"/other/", 1)) as stream:
                await next_change(stream)


async def test_leases_expire_are_renewed_and_are_missed_when_gone(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd:
        client = etcd.client(OPERATOR)
        lease = await client.grant(5)
        await client.put(KEY, b"leased", lease=lease)
        for _ in range(3):
            await asyncio.sleep(2)
            assert await client.keep_alive(lease) == 5
        assert await client.get(KEY) is not None
        async with asyncio.timeout(60):
            while await client.get(KEY) is not None:  # noqa: ASYNC110 - asks another process
                await asyncio.sleep(0.2)
        assert await client.keep_alive(lease) == 0
        with pytest.raises(LeaseGoneError):
            await client.put(KEY, b"late", lease=lease)


async def test_a_watch_delivers_in_order_resumes_and_says_when_history_is_gone(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd:
        client = etcd.client(OPERATOR)
        first = await client.put(KEY, b"1")
        await client.put(KEY, b"2")
        last = await client.put(KEY, b"3")
        async with contextlib.aclosing(client.watch(KEY, first)) as stream:
            batch = await next_change(stream)
            assert [c.value for c in batch.changes] == [b"1", b"2", b"3"]
            assert batch.last_revision == last
            await client.delete(KEY)
            assert (await next_change(stream)).changes == (Change(KEY, None),)
        async with contextlib.aclosing(client.watch(KEY, last)) as stream:
            assert (await next_change(stream)).changes[0] == Change(KEY, b"3")
        root = etcd.client("root")
        await root.compact(last + 1)
        with pytest.raises(CompactedError):
            async with contextlib.aclosing(client.watch(KEY, first)) as stream:
                await next_change(stream)


async def test_a_silent_member_is_found_out_by_the_heartbeat(tmp_path: Path) -> None:
    async with running_etcd(tmp_path) as etcd:
        client = etcd.client(OPERATOR, timeout_s=3.0, heartbeat_s=2.0)
        async with contextlib.aclosing(client.watch(KEY, 1)) as stream:
            beats = 0
            async for batch in stream:
                beats += not batch.changes
                if beats == 2:
                    etcd.freeze()
                    break
            with pytest.raises(UnavailableError):
                async with asyncio.timeout(60):
                    async for _ in stream:
                        pass
        with pytest.raises(UnavailableError):
            await client.get(KEY)
        etcd.thaw()
        await etcd.wait_ready(user=OPERATOR)


async def test_any_endpoint_will_do_and_a_lost_one_is_left(tmp_path: Path) -> None:
    async with running_etcd(tmp_path, size=3) as etcd:
        dead = "https://127.0.0.1:1"
        client = etcd.client(OPERATOR, endpoints=[dead, *etcd.endpoints], timeout_s=3.0)
        await put_somehow(client, b"1")
        assert client.endpoint != "127.0.0.1:1"
        for index in range(3):
            await _killed_and_back(etcd, index, client)


async def _killed_and_back(etcd: EtcdCluster, index: int, client: EtcdClient) -> None:
    etcd.kill(index)
    await put_somehow(client, b"without %d" % index)
    held = await client.get(KEY)
    assert held is not None
    assert held.value == b"without %d" % index
    etcd.start(index)
    await etcd.wait_ready(user=OPERATOR, index=index)


async def test_a_member_without_quorum_ends_its_watches(tmp_path: Path) -> None:
    async with running_etcd(tmp_path, size=3) as etcd:
        client = etcd.client(OPERATOR, endpoints=[etcd.members[0].endpoint], heartbeat_s=2.0)
        await put_somehow(client, b"1")
        async with contextlib.aclosing(client.watch(KEY, 1)) as stream:
            await next_change(stream)
            etcd.kill(1)
            etcd.kill(2)
            with pytest.raises(UnavailableError):
                async with asyncio.timeout(60):
                    async for _ in stream:
                        pass


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:2379", "127.0.0.1", "https://:1", "https://h:x", "h:70000", ""]
)
async def test_malformed_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoints"):
        EtcdClient([endpoint], tls=EtcdTls(b""))


async def test_no_endpoint_and_no_password_are_refused() -> None:
    with pytest.raises(ConfigError):
        EtcdClient([], tls=EtcdTls(b""))
    with pytest.raises(ConfigError):
        EtcdClient(["h:1"], tls=EtcdTls(b""), username="u")


def test_a_prefix_ends_where_the_next_begins() -> None:
    assert prefix_end(b"/a/") == b"/a0"
    assert prefix_end(b"a\xff") == b"b"
    assert prefix_end(b"\xff") == b"\x00"
