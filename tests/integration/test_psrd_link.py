"""Links fed by courier: from the hub's issue to shares that flow, counted in bytes."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.core.lane import ROOT_BYTES
from mesh.errors import (
    CallerError,
    ConfigError,
    ErrorReason,
    IntegrityError,
    MeshError,
    ShortageError,
    UnavailableError,
)
from mesh.node import psrd, psrd_rows
from mesh.node.psrd_courier import ImportOrder, IssueOrder
from mesh.node.psrd_desk import PsrdDesk
from mesh.sources import randomness
from mesh.sources.randomness import SystemRandom
from mesh.store import failpoints
from mesh.store.files import OsFiles
from mesh.v1.admin_pb2 import IssuePsrdRequest
from tests.fakes.courier_pair import POOL, TABLE, CourierPair, fed, tables_of
from tests.fakes.link_sites import Site, proof_folder, send_share

HELLO = 32


@pytest.fixture(params=[("hub-1", "kme-a"), ("hub-1", "a-client")], ids=["hub-dials", "client-dials"])
async def pair(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[CourierPair]:
    """Hub and client, started, without material; both may be the dialler."""
    with proof_folder() as proof:
        pair = CourierPair(tmp_path, hub=request.param[0], client=request.param[1], proof=proof)
        await pair.start()
        yield pair
        await pair.stop()


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[CourierPair]:
    """Hub (dialling) and client, started, without material."""
    with proof_folder() as proof:
        pair = CourierPair(tmp_path, proof=proof)
        await pair.start()
        yield pair
        await pair.stop()


def levels(site: Site) -> tuple[int, int]:
    """Usable bytes outbound and inbound."""
    return site.link.lanes.tx.lane.usable_bytes, site.link.lanes.rx.lane.usable_bytes


async def test_a_table_opens_the_link_and_shares_flow_both_ways(pair: CourierPair) -> None:
    await pair.bring("one.psrd", down=TABLE, up=2 * TABLE)
    await pair.until_open()
    for writer, reader in ((pair.hub, pair.client), (pair.client, pair.hub)):
        tx, rx = writer.link.lanes.tx, reader.link.lanes.rx
        assert tx.root == rx.root is not None
        assert tx.material.read(4096, tx.lane.filled) == rx.material.read(4096, rx.lane.filled)
        await send_share(writer, b"share" * 10)
        await reader.until(lambda reader=reader: bool(reader.shares.got))  # type: ignore[misc]
        assert reader.shares.got[0][2] == b"share" * 10


async def test_every_byte_of_a_table_is_accounted_for(one: CourierPair) -> None:
    """PSRD accounting: root, one hello, then 32 + n for each frame; nothing else is burnt."""
    await one.bring("one.psrd")
    await one.until_open()
    assert levels(one.hub)[0] == TABLE - ROOT_BYTES - HELLO
    assert levels(one.client)[0] == TABLE - ROOT_BYTES - HELLO
    await send_share(one.hub, bytes(100))
    await one.client.until(lambda: bool(one.client.shares.got))
    assert levels(one.hub)[0] == levels(one.client)[1] == TABLE - ROOT_BYTES - HELLO - 32 - 100
    assert one.uses["hub"].spent("hello", "data") == HELLO + 132
    assert one.uses["client"].spent("hello", "data") == HELLO


async def test_the_hub_writes_nothing_before_it_hears_that_the_client_has_the_table(one: CourierPair) -> None:
    """Protocol 2.1 for couriers: no byte is used while the file is on its way."""
    path = await one.issue("one.psrd")
    # The issue makes both ends greet again: they have, and no hello followed.
    await one.until(lambda: any(stream.theirs is not None for stream in one.hub.link.streams))
    assert one.uses["hub"].ranges == []
    assert tables_of(one.hub).waiting_bytes == TABLE
    assert one.hub.link.lanes.tx.lane.usable_bytes == 0
    await one.take(path)
    await one.until_open()
    assert tables_of(one.hub).waiting_bytes == 0
    assert tables_of(one.hub).records()[0].state == "imported"


async def test_resupply_while_running(pair: CourierPair) -> None:
    await pair.bring("one.psrd")
    await pair.until_open()
    before = levels(pair.hub), levels(pair.client)
    path = await pair.issue("two.psrd")
    assert levels(pair.hub)[1] == before[0][1] + TABLE
    opened = pair.hub.shares.opened
    await pair.until(lambda: tables_of(pair.client).waiting_bytes == TABLE)
    await pair.take(path)
    assert tables_of(pair.client).waiting_bytes == 0
    # Each end tells the other in a frame of its own: 32 bytes.
    after = before[0][0] + TABLE - 32, before[0][1] + TABLE - 32
    await pair.until(lambda: levels(pair.hub) == after)
    assert levels(pair.client) == (before[1][0] + TABLE - 32, before[1][1] + TABLE - 32)
    assert pair.hub.shares.opened == opened
    await pair.until(lambda: [one.state for one in tables_of(pair.hub).records()] == ["imported"] * 2)


async def test_emptied_lanes_come_back_with_the_next_table(pair: CourierPair) -> None:
    await pair.bring("one.psrd", down=8192, up=8192)
    await pair.until_open()
    for site in (pair.hub, pair.client):
        lane = site.link.lanes.tx.lane
        await pair.until(lambda lane=lane: lane.mark >= 8192 - 64)  # type: ignore[misc]
    pair.hub.link.lanes.tx.lane.jump(8192 - 16)
    pair.client.link.lanes.tx.lane.jump(8192 - 16)
    await pair.until(lambda: not pair.hub.link.is_open)
    await pair.bring("two.psrd")
    await pair.until_open()
    await send_share(pair.hub, bytes(100))
    await pair.client.until(lambda: bool(pair.client.shares.got))


@pytest.mark.parametrize("role", ["hub", "client"])
async def test_tables_survive_restarts_of_either_end(pair: CourierPair, role: str) -> None:
    path = await pair.issue("one.psrd")
    await pair.restart(role)
    await pair.take(path)
    await pair.until_open()
    await pair.restart(role)
    await pair.until_open()
    await send_share(pair.hub, bytes(10))
    await pair.client.until(lambda: bool(pair.client.shares.got))
    assert len(tables_of(pair.hub).records()) == len(tables_of(pair.client).records()) == 1
    await pair.bring("two.psrd")
    await pair.until(lambda: tables_of(pair.hub).waiting_bytes == 0)


async def test_an_unproven_restart_of_the_hub_does_not_forfeit_the_waiting_table(tmp_path: Path) -> None:
    pair = CourierPair(tmp_path)  # no tmpfs: no restart is proven
    await pair.start()
    path = await pair.issue("one.psrd", down=4 * TABLE, up=4 * TABLE)
    await pair.restart("hub")
    await pair.take(path)
    await pair.until_open()
    window = pair.hub.link.settings.limits.window_bytes + pair.hub.link.settings.limits.stride_bytes
    assert levels(pair.hub)[0] >= 4 * TABLE - window - 4096
    await pair.stop()


# --- refusals ----------------------------------------------------------------------------


async def refused(pair: CourierPair, path: Path, match: str) -> MeshError:
    """The client refuses the file and nothing of it stays."""
    client = pair.client
    files = client.store.pads.list()
    before = (levels(client), client.link.lanes.tx.lane.filled, client.link.lanes.rx.lane.filled)
    with pytest.raises(MeshError, match=match) as caught:
        await pair.take(path)
    assert client.store.pads.list() == files
    assert before == (levels(client), client.link.lanes.tx.lane.filled, client.link.lanes.rx.lane.filled)
    return caught.value


async def test_a_second_import_is_refused(one: CourierPair) -> None:
    path = await one.issue("one.psrd")
    await one.take(path)
    await refused(one, path, "imported already")


async def test_files_out_of_order_are_refused(one: CourierPair) -> None:
    first = await one.issue("one.psrd")
    second = await one.issue("two.psrd")
    await refused(one, second, "an earlier file of this hub is missing")
    await one.take(first)
    await one.take(second)
    await one.until_open()


async def test_files_for_others_are_refused(one: CourierPair, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = CourierPair(tmp_path / "other", hub="hub-2")
    await other.start()
    await refused(one, await other.issue("two.psrd"), "wrong hub")
    await other.stop()
    (tmp_path / "third").mkdir()
    third = CourierPair(tmp_path / "third", client="kme-b")
    await third.start()
    await refused(one, await third.issue("three.psrd"), "wrong client")
    await third.stop()


async def test_damaged_files_are_refused(one: CourierPair) -> None:
    path = await one.issue("one.psrd")
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    await refused(one, path, "truncated")
    path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    error = await refused(one, path, "altered")
    assert isinstance(error, IntegrityError)
    path.write_bytes(data)
    await one.take(path)
    await one.until_open()
    await refused(one, one.couriers / "none", "no such courier file")


async def test_a_full_disk_leaves_nothing_half_done(
    one: CourierPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psrd_rows, "PIECE_BYTES", 8192)
    path = await one.issue("one.psrd")
    passages = 0

    def fill_up() -> None:
        nonlocal passages
        passages += 1
        if passages == 5:
            raise OSError(errno.ENOSPC, "no space left on device")

    failpoints.arm("pads.create.before_sync", fill_up)
    try:
        error = await refused(one, path, "disk")
        assert error.reason is ErrorReason.DISK_FULL
        passages = 0
        with pytest.raises(UnavailableError, match="disk"):
            await one.issue("two.psrd")
    finally:
        failpoints.disarm_all()
    assert sorted(file.name for file in one.couriers.iterdir()) == ["one.psrd"]
    assert len(tables_of(one.hub).records()) == 1
    await one.take(path)
    await one.until_open()


async def test_too_little_room_is_refused_before_anything_is_written(one: CourierPair) -> None:
    path = await one.issue("one.psrd")
    one.client.store.pads.free_bytes = lambda: 1 << 20  # type: ignore[method-assign]
    error = await refused(one, path, "too little room")
    assert error.reason is ErrorReason.DISK_FULL


async def test_the_pool_cap_holds_for_couriers_too(one: CourierPair) -> None:
    with pytest.raises(CallerError, match="more than the link's pool") as caught:
        await one.issue("big.psrd", down=POOL + 1)
    assert caught.value.reason is ErrorReason.LIMIT_EXCEEDED
    with pytest.raises(CallerError, match="at least"):
        await one.issue("small.psrd", up=100)
    await one.issue("one.psrd", down=POOL - 4096)
    with pytest.raises(CallerError, match="more than the link's pool"):
        await one.issue("two.psrd", down=8192)


async def test_courier_files_never_replace_anything(one: CourierPair) -> None:
    (one.couriers / "one.psrd").write_text("mine")
    with pytest.raises(CallerError, match="exists already"):
        await one.issue("one.psrd")
    tables = tables_of(one.hub)
    with pytest.raises(CallerError, match="must be absolute"):
        await tables.issue(IssueOrder(TABLE, TABLE, Path("relative")), SystemRandom(), now_s=0)


async def test_only_one_end_of_a_link_issues(one: CourierPair) -> None:
    await one.bring("one.psrd")
    with pytest.raises(CallerError, match="only one end of a link issues"):
        await tables_of(one.client).issue(
            IssueOrder(TABLE, TABLE, one.couriers / "back.psrd"), SystemRandom(), now_s=0
        )
    with pytest.raises(CallerError, match="wrong client"):
        await tables_of(one.hub).take(ImportOrder(one.couriers / "one.psrd"))


async def test_wiping_upon_request(one: CourierPair) -> None:
    path = await one.issue("one.psrd")
    assert path.stat().st_mode & 0o777 == 0o600
    await one.take(path, wipe=True)
    assert not path.exists()
    await one.until_open()


async def test_a_file_that_cannot_be_wiped_is_imported_all_the_same(pair: CourierPair) -> None:
    path = await pair.issue("one.psrd")
    stick = pair.couriers / "stick.psrd"
    stick.symlink_to(path)  # opened for reading, refused for writing
    with pytest.raises(UnavailableError, match=r"the table is imported; .* could not be wiped"):
        await pair.take(stick, wipe=True)
    assert path.exists()
    await pair.until_open()


async def test_a_table_whose_file_gets_no_name_is_issued_all_the_same(
    pair: CourierPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(OsFiles, "rename", refuse)
    with pytest.raises(UnavailableError, match=r"the table is issued, .* by hand"):
        await pair.issue("one.psrd")
    monkeypatch.undo()
    (pair.couriers / "one.psrd.partial").rename(pair.couriers / "one.psrd")
    await pair.take(pair.couriers / "one.psrd")
    await pair.until_open()


async def test_a_stalled_device_holds_up_neither_the_loop_nor_the_link_for_long(
    one: CourierPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(randomness, "_STALL_S", 0.5)
    device = one.root / "device"
    os.mkfifo(device)
    keeper = os.open(device, os.O_RDWR | os.O_NONBLOCK)
    desk = PsrdDesk({one.client.name: one.hub.link}, asyncio.create_task)
    order = IssuePsrdRequest(
        peer_kme_id=one.client.name,
        to_client_bytes=TABLE,
        from_client_bytes=TABLE,
        path=str(one.couriers / "one.psrd"),
        random_source=str(device),
    )

    async def issue() -> None:
        async for _ in desk.issue(order):
            pass

    issuing = asyncio.create_task(issue())
    await one.until(fed(one.hub).lock.locked)
    async with asyncio.timeout(5):
        await one.hub.plane.reset_link(one.client.name)
    with pytest.raises(UnavailableError, match="gave nothing"):
        await issuing
    os.close(keeper)
    order.random_source, order.passphrase_file = "os", str(device)
    with pytest.raises(ConfigError, match="not a regular file"):
        await issue()
    assert list(one.couriers.iterdir()) == []


# --- crashes -----------------------------------------------------------------------------


async def test_a_crash_between_commit_and_name_is_finished_at_the_next_start(
    one: CourierPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(psrd, "name_courier", crash)
    with pytest.raises(asyncio.CancelledError):
        await one.issue("one.psrd")
    monkeypatch.undo()
    assert [file.name for file in one.couriers.iterdir()] == ["one.psrd.partial"]
    await one.restart("hub")
    path = one.couriers / "one.psrd"
    await one.until(path.exists)
    await one.take(path)
    await one.until_open()


async def test_a_crash_before_the_commit_leaves_nothing_issued(one: CourierPair) -> None:
    def crash() -> None:
        raise asyncio.CancelledError

    failpoints.arm("pads.create.after", crash)
    try:
        with pytest.raises(asyncio.CancelledError):
            await one.issue("one.psrd")
    finally:
        failpoints.disarm_all()
    await one.restart("hub")
    assert one.hub.store.pads.list() == []
    assert tables_of(one.hub).records() == []
    assert one.hub.link.lanes.tx.lane.filled == 0
    await one.bring("one.psrd")
    await one.until_open()


# --- lost couriers, rollbacks ------------------------------------------------------------


async def test_a_lost_courier_is_discarded_and_leaves_a_hole_at_both_ends(one: CourierPair) -> None:
    await one.bring("one.psrd")
    await one.until_open()
    lost = await one.issue("lost.psrd")
    tables = tables_of(one.hub)
    record = tables.records()[-1]
    await tables.discard(record.table_id)
    assert tables.waiting_bytes == 0
    assert tables.records()[-1].state == "discarded"
    await one.bring("three.psrd")
    await one.until(lambda: tables.records()[-1].state == "imported")
    for site in (one.hub, one.client):
        assert [(hole.start, hole.stop) for hole in site.link.lanes.tx.lane.holes] == [(TABLE, 2 * TABLE)]
    await refused(one, lost, "imported already")
    total = levels(one.hub)[0]
    await one.restart("hub")
    await one.until_open()
    while levels(one.hub)[0] > total - TABLE:
        await send_share(one.hub, bytes(4096))
    with pytest.raises(CallerError, match="not the last table"):
        await tables_of(one.hub).discard(record.table_id)


async def test_the_first_table_of_an_epoch_is_not_discarded_but_reset(one: CourierPair) -> None:
    await one.issue("one.psrd")
    tables = tables_of(one.hub)
    with pytest.raises(CallerError, match="reset the link"):
        await tables.discard(tables.records()[0].table_id)
    await one.hub.plane.reset_link(one.client.name)
    assert tables.records() == []
    assert one.hub.store.pads.list() == []
    path = await one.issue("two.psrd")
    await one.take(path)
    assert one.client.link.lanes.tx.lane.epoch == 2
    await one.until_open()


async def test_a_file_of_an_earlier_epoch_is_refused_after_a_reset(one: CourierPair) -> None:
    old = await one.issue("old.psrd")
    await one.hub.plane.reset_link(one.client.name)
    await one.client.plane.reset_link(one.hub.name)
    await refused(one, old, "epoch is older")


async def test_a_hub_restored_from_before_an_issue_stops(one: CourierPair) -> None:
    """The client tells, authenticated, that it holds tables the hub does not know: a rollback."""
    await one.bring("one.psrd")
    await one.until_open()
    await one.hub.crash()
    shutil.copytree(one.root / "hub-1", one.root / "snapshot")
    one.hub = one.make("hub")
    await one.hub.plane.start()
    await one.bring("two.psrd")
    await one.until(lambda: tables_of(one.hub).waiting_bytes == 0)
    await one.hub.crash()
    shutil.rmtree(one.root / "hub-1")
    (one.root / "snapshot").rename(one.root / "hub-1")
    one.hub = one.make("hub")
    await one.hub.plane.start()
    await one.until(lambda: one.hub.plane.refusal is not None)
    assert any(alarm.needs_operator for alarm in one.hub.alarms.open_alarms())


async def test_a_client_that_lost_a_table_is_refused(one: CourierPair) -> None:
    await one.bring("one.psrd")
    await one.until_open()
    await one.bring("two.psrd")
    await one.until(lambda: tables_of(one.hub).waiting_bytes == 0)
    with pytest.raises(MeshError, match="lacks tables that it had") as caught:
        tables_of(one.hub).on_filled(TABLE)
    assert caught.value.reason is ErrorReason.PEER_REFUSED


async def test_a_forged_greeting_costs_the_hub_only_hellos(tmp_path: Path) -> None:
    """Someone says in clear that the client has material: hellos are burnt, 32 bytes each, no data."""
    from mesh.v1.link_pb2 import LinkMessage

    pair = CourierPair(tmp_path)

    def forge(stream: object, data: bytes, from_dialler: bool) -> list[bytes]:
        message = LinkMessage.FromString(data)
        if not from_dialler and message.HasField("greeting"):
            message.greeting.receive_is_new = False
            return [message.SerializeToString()]
        return [data]

    pair.wire.tamper = forge
    await pair.start()
    await pair.issue("one.psrd", down=4 * TABLE)
    fed(pair.hub).link.close_streams(UnavailableError("again"))
    await pair.until(lambda: len(pair.uses["hub"].ranges) >= 1)
    assert {what for *_, what in pair.uses["hub"].ranges} == {"hello"}
    with pytest.raises((UnavailableError, ShortageError)):
        await pair.hub.link.ready(32, timeout_s=0.1)
    await pair.stop()


# --- levels ------------------------------------------------------------------------------


async def test_levels_rates_and_the_low_water_alarm(one: CourierPair) -> None:
    await one.bring("one.psrd")
    await one.until_open()
    ingest = fed(one.hub)
    ingest.look()
    assert ingest.transmit.low_water_bytes == TABLE // 8
    assert ingest.transmit.seconds_to_empty == math.inf
    assert not one.hub.alarms.is_open("psrd/kme-a/low")
    while levels(one.hub)[0] > 6000:
        await send_share(one.hub, bytes(3000))
    ingest.look()
    assert ingest.transmit.use.bytes_per_s > 0
    assert 0 < ingest.transmit.seconds_to_empty < 1e6
    assert one.hub.alarms.is_open("psrd/kme-a/low")
    path = await one.issue("two.psrd")
    assert "waits for its import" in one.hub.alarms.open_alarms()[0].message
    await one.take(path)
    await one.until(lambda: not one.hub.alarms.is_open("psrd/kme-a/low"))


async def test_a_client_that_imported_a_discarded_table_is_told_to_reset(one: CourierPair) -> None:
    await one.bring("one.psrd")
    await one.until_open()
    found = await one.issue("found.psrd")
    tables = tables_of(one.hub)
    await tables.discard(tables.records()[-1].table_id)
    await one.take(found)
    await one.until(lambda: one.hub.alarms.is_open("link/kme-a/peer-refused"))
    assert "discarded here" in one.hub.link.last_error
