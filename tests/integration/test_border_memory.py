"""What a border remembers, and for how long; what it says of keys that it does not hold any more."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.core.border_rules import AckStatus, Association, Peer
from mesh.errors import ErrorReason, MeshError, ShortageError
from mesh.node.border import border as border_module
from mesh.node.border.ports import Arrival
from mesh.node.border.routing import Refused
from mesh.v1.border_pb2 import LeasedJob
from tests.fakes.border_network import CAN_URL, THIRD_URL, UK_URL, TwoDomains
from tests.fakes.key_network import until

PAIR = Association("can-a", ("uk-b",))
CALLBACK = CAN_URL + "/kmapi/v1/ext_keys/ack"


@asynccontextmanager
async def joined(root: Path, **changes: Any) -> AsyncIterator[TwoDomains]:
    both = TwoDomains(root, **changes)
    await both.start()
    try:
        yield both
    finally:
        await both.stop()


def fresh() -> Arrival:
    return Arrival(os.urandom(16), os.urandom(32))


async def hand_over(both: TwoDomains, *keys: Arrival, pair: Association = PAIR) -> None:
    """As if can-z posted keys to uk-x."""
    await both.border("uk-x").import_keys("can-z", pair, keys, callback=CALLBACK, extension=b"{}")


def heard(both: TwoDomains) -> list[tuple[AckStatus, bytes]]:
    """Notes what uk-x acks to can-z, in place of can-z."""
    said: list[tuple[AckStatus, bytes]] = []

    async def note(job: LeasedJob) -> int:
        for one in job.post_acks.acks:
            said.extend((list(AckStatus)[one.status - 1], key_id) for key_id in one.key_ids)
        return 200

    both.meddle = lambda kme, job: note(job) if kme == "uk-x" and job.HasField("post_acks") else None
    return said


async def test_keys_that_have_crossed_do_not_count_against_those_under_way(tmp_path: Path) -> None:
    few = {"max_open_keys": 3, "max_settled_keys": 5}
    async with joined(tmp_path, can_changes=few, uk_changes=few) as both:
        for _ in range(8):
            await both.can.get("can-a", "uk-b")
            await until(lambda: both.states("uk-x").keys() == {"in:relayed"})
        # The oldest are forgotten for the newest.
        assert both.states("can-z") == {"out:relayed": 5}
        assert both.states("uk-x") == {"in:relayed": 5}
        # A void of keys that never were needs no room among those under way either.
        ids = [os.urandom(16) for _ in range(5)]
        await both.border("uk-x").void_keys("can-z", PAIR, ids, is_all=False, callback=CALLBACK)
        assert both.states("uk-x").keys() == {"in:voided"}


async def test_no_more_keys_are_under_way_with_a_peer_than_may_be_each_way(tmp_path: Path) -> None:
    async with joined(tmp_path, uk_changes={"max_open_keys": 2}, can_changes={"max_open_keys": 2}) as both:
        await both.can.get("can-a", "uk-b")  # slots for sealed messages are there
        await both.uk.stop("uk-z")
        await both.disconnect("uk-x")
        await hand_over(both, fresh(), fresh())
        with pytest.raises(ShortageError) as busy:
            await hand_over(both, fresh())
        assert busy.value.reason is ErrorReason.BUSY
        # What leaves is bounded for itself, and whoever asks hears so at once.
        await both.disconnect("can-z")
        asking = [asyncio.create_task(both.can.get("can-a", "uk-b")) for _ in range(2)]
        await until(lambda: both.states("can-z").get("out:queued") == 2)
        for master, reason in (("can-a", ErrorReason.PEER_REFUSED), ("can-z1", ErrorReason.BUSY)):
            with pytest.raises(MeshError) as refused:
                await both.can.get(master, "uk-b")
            assert refused.value.reason is reason
        await asyncio.gather(*asking, return_exceptions=True)


async def test_what_settled_is_remembered_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(border_module, "_FORGET_EVERY_S", 0.0)
    async with joined(tmp_path, uk_changes={"keep_s": 1000.0}) as both:
        key = fresh()
        heard(both)
        await hand_over(both, key)
        await until(lambda: both.states("uk-x") == {"in:relayed": 1})
        both.uk.clock.offset_s += 900
        await both.border("uk-x").void_keys("can-z", PAIR, [key.key_id], is_all=False, callback=CALLBACK)
        await until(lambda: both.states("uk-x") == {"in:voided": 1})
        both.uk.clock.offset_s += 900  # 1800 s after it came, 900 s after it was voided
        await asyncio.sleep(1.2)
        assert both.states("uk-x") == {"in:voided": 1}
        both.uk.clock.offset_s += 200
        await until(lambda: both.states("uk-x") == {})


async def test_the_same_key_is_welcome_for_as_long_as_it_is_remembered(tmp_path: Path) -> None:
    """Its bytes are gone as soon as its target has them."""
    async with joined(tmp_path) as both:
        key = replace(fresh(), extension=b'{"E32473_a":1}')
        said = heard(both)
        await hand_over(both, key)
        await until(lambda: said == [(AckStatus.RELAYED, key.key_id)])
        (row,) = both.border("uk-x").read(lambda tables: tables.border.everywhere(key.key_id))
        assert (row.value, row.extension) == (b"", b"")
        exchange = both.border("uk-x").read(lambda tables: tables.border.exchange(row.exchange_id))
        assert exchange.extension == b""
        await both.restart("uk-x")
        both.uk.clock.offset_s += 3600
        await hand_over(both, key)
        await until(lambda: said == [(AckStatus.RELAYED, key.key_id)] * 2)
        for other, pair in (
            (replace(key, value=os.urandom(32)), PAIR),
            (replace(key, value=key.value[:-1]), PAIR),
            (key, Association("can-a", ("uk-b2",))),
        ):
            with pytest.raises(Refused) as refused:
                await hand_over(both, other, pair=pair)
            assert refused.value.facts["is_held"] == "true"
        assert (await both.uk.redeem("uk-b", "can-a", [key.key_id])).keys == [(key.key_id, key.value)]


async def test_a_key_whose_target_is_away_is_acked_failed_in_time(tmp_path: Path) -> None:
    async with joined(tmp_path, uk_changes={"carry_timeout_s": 0.5}) as both:
        said = heard(both)
        await hand_over(both, fresh())
        await until(lambda: len(said) == 1)
        await both.uk.stop("uk-z")
        key = fresh()
        await hand_over(both, key)
        await until(lambda: said[1:] == [(AckStatus.FAILED, key.key_id)], timeout_s=10)
        # It comes again, and hears the same; it is not taken.
        await hand_over(both, key)
        await until(lambda: said[1:] == [(AckStatus.FAILED, key.key_id)] * 2)
        await both.border("uk-x").void_keys("can-z", PAIR, [key.key_id], is_all=False, callback=CALLBACK)
        assert both.states("uk-x") == {"in:relayed": 1, "in:voiding": 1}
        # Only once the target has answered is it said to be voided.
        await both.uk.restart("uk-z")
        await until(lambda: said[3:] == [(AckStatus.VOIDED, key.key_id)], timeout_s=30)
        with pytest.raises(MeshError):
            await both.uk.redeem("uk-b", "can-a", [key.key_id])


async def test_nothing_is_said_about_the_keys_of_another_peer(tmp_path: Path) -> None:
    """400 and 401 tell a peer the truth about its own keys, and nothing about others'."""
    async with joined(tmp_path) as both:
        border, near = both.border("can-z"), Arrival(os.urandom(16), bytes(32))
        pair = Association("uk-b", ("can-b",))
        await border.import_keys("uk-x", pair, [near], callback="https://uk-x.test/ack", extension=b"")
        assert border.holds("uk-x", [near.key_id])
        assert not border.holds("third-p", [near.key_id])
        for peer, url, is_held in (
            ("uk-x", "https://uk-x.test/x", True),
            ("third-p", THIRD_URL + "/x", False),
        ):
            with pytest.raises(Refused) as refused:
                await border.import_keys(
                    peer, Association("nobody", ("can-b",)), [near], callback=url, extension=b""
                )
            assert ("is_held" in refused.value.facts) is is_held


async def test_keys_of_a_peer_that_is_not_configured_any_more_are_given_up_with_an_alarm(
    tmp_path: Path,
) -> None:
    async with joined(tmp_path) as both:
        await both.disconnect("can-z")
        asking = asyncio.create_task(both.can.get("can-a", "uk-b"))
        await until(lambda: both.states("can-z") == {"out:queued": 1})
        both.connect("can-z")
        both.after = lambda _kme, _job, _status: 503
        await until(lambda: both.states("can-z") == {"out:posted": 1})
        border = both.can.configs["can-z"].border
        assert border is not None
        both.can.configs["can-z"] = replace(both.can.configs["can-z"], border=replace(border, peers=()))
        await both.restart("can-z")
        await until(lambda: both.states("can-z") == {"out:unresolved": 1}, timeout_s=30)
        await asyncio.gather(asking, return_exceptions=True)
        assert both.can.sites["can-z"].alarms.is_open("border/uk-x/void")


async def test_prefixes_that_cover_our_own_saes_are_reported(tmp_path: Path) -> None:
    both = TwoDomains(tmp_path)
    border = both.can.configs["can-z"].border
    assert border is not None
    wide = replace(border, peers=(Peer("uk-x", UK_URL, ("uk-", "can-")), *border.peers[1:]))
    both.can.configs["can-z"] = replace(both.can.configs["can-z"], border=wide)
    await both.start()
    try:
        alarms = both.can.sites["can-z"].alarms
        await until(lambda: alarms.is_open("border/uk-x/prefixes"))
        assert not alarms.is_open("border/third-p/prefixes")
        # It is not heard for them in any case.
        with pytest.raises(Refused):
            await both.border("can-z").import_keys(
                "uk-x", Association("can-a", ("can-b",)), [fresh()], callback=UK_URL + "/x", extension=b""
            )
    finally:
        await both.stop()


async def test_one_step_of_the_upkeep_that_fails_again_and_again_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with joined(tmp_path, uk_changes={"carry_timeout_s": 0.2}) as both:
        said = heard(both)

        def fail() -> None:
            raise RuntimeError("nobody expected this")

        monkeypatch.setattr(both.border("uk-x")._posts.board, "expire", fail)
        with caplog.at_level(logging.ERROR):
            await until(lambda: "nobody expected this" in caplog.text)
        await both.uk.stop("uk-z")
        await hand_over(both, fresh())
        await until(lambda: [status for status, _ in said] == [AckStatus.FAILED], timeout_s=10)
