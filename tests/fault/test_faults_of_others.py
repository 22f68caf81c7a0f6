"""What went wrong in other key managers and may not here: one test for each fault that no other test names.

The rest stand beside what they concern: two roots (integration/test_rpc_server, conformance), forwarded
identities and CBC suites (conformance cl 5.1), lying hubs and probing (test_key_attacks), digests that
tell (property/test_sharing, test_tag_bound_exhaustive), key bytes in logs (test_kill_traffic).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest

from gateway.config import load_config
from mesh.core.keyid import parse
from mesh.errors import ConfigError, MeshError
from tests.conformance.wire import Wire, client_context
from tests.fakes.gateway_site import GatewayThread
from tests.fakes.key_network import HASTY, LINE, KeyNetwork
from tests.fakes.key_service import FakeNetwork
from tests.fakes.link_sites import DevicePair, Pair, send_share
from tests.fault.test_key_attacks import DIAMOND


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[KeyNetwork]:
    """a - b - c, trusted relay."""
    network = KeyNetwork(tmp_path, LINE)
    await network.start()
    yield network
    await network.stop()


async def test_a_slaves_request_asks_nobody_and_no_key_walks_back(line: KeyNetwork) -> None:
    """Elsewhere the origin returned the key inside TLS, which undid the one-time pad."""
    drawn = await line.get("sae-a", "sae-c", 3)
    for _ in range(20):
        await asyncio.sleep(0.002)
    calls, frames = len(line.calls), len(line.wire.seen)
    line.wire.cut("kme-b", "kme-c")
    line.on_call = lambda *_: False
    assert (await line.redeem("sae-c", "sae-a", [key_id for key_id, _ in drawn.keys])).keys == drawn.keys
    assert (len(line.calls), len(line.wire.seen)) == (calls, frames)


async def test_neither_frames_nor_calls_carry_a_key(line: KeyNetwork) -> None:
    """What leaves in frames is cipher or raw pad; in calls (over TLS) nothing of a key at all."""
    drawn = await line.get("sae-a", "sae-c", 4)
    shared = await line.get("sae-a", "sae-c", 2, more=["sae-b"])
    sent = b"".join(line.wire.ciphertexts)
    called = b"".join(message.SerializeToString() for _, _, _, message in line.calls)
    for _, value in [*drawn.keys, *shared.keys]:
        for at in range(0, len(value) - 8, 8):
            assert value[at : at + 8] not in sent
            assert value[at : at + 8] not in called


async def test_good_frames_are_never_refused_however_many_are_under_way(tmp_path: Path) -> None:
    """Elsewhere a replay window checked in concurrent tasks lost one frame in ten."""
    pair = Pair(tmp_path, devices=DevicePair(1 << 20), pool=4 << 20)
    await pair.start()
    count = 300

    async def flood(from_a: bool) -> None:
        site = pair.a if from_a else pair.b
        for number in range(count):
            await send_share(site, number.to_bytes(4, "big") * 32)

    async with asyncio.timeout(60):
        await asyncio.gather(flood(True), flood(False))
        for site in (pair.a, pair.b):
            await site.until(lambda site=site: len(site.shares.got) == count)  # type: ignore[misc]
    for site in (pair.a, pair.b):
        numbers = [int.from_bytes(value[:4], "big") for _, _, value in site.shares.got]
        assert all(before < after for before, after in pairwise(numbers))
        assert site.link.status().failed_tags == 0
        assert site.link.times_opened == 1
    await pair.stop()


async def test_a_forged_request_empties_nothing(line: KeyNetwork) -> None:
    """Elsewhere one forged header emptied a whole pool."""
    await line.get("sae-a", "sae-c", 2)
    burnt = [line.wire.burnt(*ends) for ends in (("kme-a", "kme-b"), ("kme-b", "kme-c"), ("kme-c", "kme-b"))]
    book = line.plane("kme-c").reserves.inbound("kme-a", 0)
    assert book is not None
    held = book.slots.held_slots
    for size in (0, 1, 15, 16, 17, 4096):
        with pytest.raises(MeshError):
            await line.redeem("sae-c", "sae-a", [os.urandom(size)])
    with pytest.raises(MeshError):
        await line.redeem("sae-c", "sae-a", [os.urandom(16) for _ in range(500)])
    assert book.slots.held_slots == held
    assert burnt == [
        line.wire.burnt(*ends) for ends in (("kme-a", "kme-b"), ("kme-b", "kme-c"), ("kme-c", "kme-b"))
    ]


async def test_shares_of_transfers_that_never_complete_do_not_stay(tmp_path: Path) -> None:
    """Elsewhere shares were kept for ever."""
    network = KeyNetwork(tmp_path, DIAMOND, config=HASTY)
    await network.start()
    try:
        network.wire.meddle = lambda _a, b, shares: None if b in ("hub-2", "hub-3") else shares
        with pytest.raises(MeshError):
            await network.get("sae-a", "sae-z")
        appender = network.plane("kme-z").appender
        assert len(appender._collector) > 0
        network.clock.offset_s += 3600
        appender.expire()
        assert len(appender._collector) == 0
    finally:
        await network.stop()


async def test_a_later_request_drops_no_key_of_an_earlier_one(line: KeyNetwork) -> None:
    first = await line.get("sae-a", "sae-c", 5)
    for _ in range(10):
        later = await line.get("sae-a", "sae-c", 50)
        await line.redeem("sae-c", "sae-a", [key_id for key_id, _ in later.keys])
    assert (await line.redeem("sae-c", "sae-a", [key_id for key_id, _ in first.keys])).keys == first.keys


async def test_a_redeem_that_races_the_end_of_its_key_happens_once_or_not_at_all(line: KeyNetwork) -> None:
    """4.7: retire and redeem meet in one transaction, whichever comes first."""
    drawn = await line.get("sae-a", "sae-c", 8)
    line.clock.offset_s += line.config.key_lifetime_s + 1
    ids = [key_id for key_id, _ in drawn.keys]

    async def redeem(key_id: bytes) -> bytes | None:
        try:
            return (await line.redeem("sae-c", "sae-a", [key_id])).keys[0][1]
        except MeshError:
            return None

    values, _ = await asyncio.gather(
        asyncio.gather(*(redeem(key_id) for key_id in ids)), line.plane("kme-a").retirer.run_once()
    )
    assert all(value in (None, key) for value, (_, key) in zip(values, drawn.keys, strict=True))
    assert [await redeem(key_id) for key_id in ids] == [None] * len(ids)


async def test_3_4_a_change_of_grade_opens_a_new_epoch_and_old_keys_stay_good(tmp_path: Path) -> None:
    """A reserve epoch has one grade: keys of the old one may not pass for the new one."""
    links = [*LINE["links"], {"between": ["kme-a", "kme-d"]}, {"between": ["kme-d", "kme-c"]}]
    nodes = {kme: {"site": kme, "operator": kme} for kme in (*LINE["nodes"], "kme-d")}
    document = {**LINE, "nodes": nodes, "links": links}
    network = KeyNetwork(tmp_path, document)
    await network.start()
    try:
        before = await network.get("sae-a", "sae-c", 2)
        grades = {"default": {"grade": "multipath(2,2)"}}
        network.set_document({**document, "serial": 2, "grades": grades}, *network.sites)
        after = await network.get("sae-a", "sae-c", 2)
        assert (before.grade, after.grade) == ("trusted-relay", "multipath(2,2)")
        epochs = [{parse(key_id).epoch for key_id, _ in one.keys} for one in (before, after)]  # type: ignore[union-attr]
        assert epochs[0].isdisjoint(epochs[1])
        for one in (before, after):
            ids = [key_id for key_id, _ in one.keys]
            assert (await network.redeem("sae-c", "sae-a", ids)).keys == one.keys
    finally:
        await network.stop()


def test_a_renewed_certificate_is_the_same_sae(tmp_path: Path) -> None:
    """Elsewhere the serial number was the identity, so that a renewal changed who one was."""
    host = GatewayThread(tmp_path)
    try:
        network = FakeNetwork({"sae-a1": "kme-a", "sae-b1": "kme-b"})
        gateways = {kme: host.start(f"gw-{kme}", network.site(kme)) for kme in ("kme-a", "kme-b")}

        def connect(sae_id: str, kme: str) -> Wire:
            context = client_context(host.roots["gateway"], *host.issue_sae(sae_id))
            return Wire(f"https://localhost:{gateways[kme].https_port}", context)

        with connect("sae-a1", "kme-a") as master:
            drawn = master.request("GET", "/api/v1/keys/sae-b1/enc_keys").json()["keys"]
        for fresh in (True, False):
            with connect("sae-b1", "kme-b") as slave:
                got = slave.request("GET", f"/api/v1/keys/sae-a1/dec_keys?key_ID={drawn[0]['key_ID']}")
                assert got.status == (200 if fresh else 400)
    finally:
        host.stop()


@pytest.mark.parametrize("line", ["trust_headers: true", "identity_header: X-SSL-CN", "debug: true"])
def test_no_switch_makes_a_header_an_identity(tmp_path: Path, line: str) -> None:
    """Elsewhere a debug switch left header authentication on: there is none to leave on."""
    path = tmp_path / "gateway.yaml"
    path.write_text(f"gateway_id: gw-a\n{line}\n")
    with pytest.raises(ConfigError, match=f"unknown field `{line.partition(':')[0]}`"):
        load_config(path)
