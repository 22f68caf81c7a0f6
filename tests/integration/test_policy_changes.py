"""A change of policy over reserves that are full: not one key more of the old grade (protocol 3.4).

What was drawn before stays redeemable; where the new grade cannot be had the request fails with its reason.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.core.border_rules import BufferSpec
from mesh.errors import ErrorReason, ShortageError
from mesh.v1.keys_pb2 import StatusRequest
from mesh.v1.peer_pb2 import SealedMessage, VoidKeys
from tests.fakes.border_network import TwoDomains, can_document
from tests.fakes.key_network import NO_PREFILL, KeyNetwork, until
from tests.fault.test_key_attacks import DIAMOND

_FILL_BYTES = 64 * 1024


def _document(serial: int, grade: str) -> dict[str, Any]:
    """Two ends with three hubs and one relay in between."""
    pair = {"between": ["kme-a", "kme-z"], "grade": grade}
    if grade.startswith("dske"):
        pair["hubs"] = ["hub-1", "hub-2", "hub-3"]
    relay = [{"between": ["kme-a", "kme-m"]}, {"between": ["kme-m", "kme-z"]}]
    return {
        **DIAMOND,
        "serial": serial,
        "nodes": {**DIAMOND["nodes"], "kme-m": {}},
        "links": [*DIAMOND["links"], *relay],
        "grades": {"default": {"grade": "trusted-relay"}, "pairs": [pair]},
    }


def _cut_hubs(network: KeyNetwork) -> None:
    for hub in ("hub-1", "hub-2"):
        network.wire.cut("kme-a", hub)


def _level_bytes(network: KeyNetwork) -> int:
    book = network.plane("kme-a").reserves.outbound.get("kme-z")
    return 0 if book is None else book.level_bytes


@pytest.fixture
async def filled(tmp_path: Path) -> AsyncIterator[KeyNetwork]:
    """The reserve of a towards z is full of relayed keys."""
    config = replace(
        NO_PREFILL,
        prefill=True,
        high_water_bytes=_FILL_BYTES,
        low_water_bytes=_FILL_BYTES - 16 * 1024,
        request_timeout_s=8.0,
    )
    network = KeyNetwork(tmp_path, _document(1, "trusted-relay"), config=config)
    await network.start()
    await until(lambda: _level_bytes(network) >= _FILL_BYTES)
    yield network
    await network.stop()


async def test_the_next_key_has_the_new_grade_and_older_ones_stay_good(filled: KeyNetwork) -> None:
    older = await filled.get("sae-a", "sae-z", 3)
    assert older.grade == "trusted-relay"
    filled.set_document(_document(2, "dske(2,3)"))
    newer = await filled.get("sae-a", "sae-z")
    assert newer.grade == "dske(2,3)"
    for delivered in (newer, older):
        ids = [key_id for key_id, _ in delivered.keys]
        assert (await filled.redeem("sae-z", "sae-a", ids)).keys == delivered.keys


async def test_a_grade_that_cannot_be_had_fails_the_request_and_not_one_old_key_is_drawn(
    filled: KeyNetwork,
) -> None:
    older = await filled.get("sae-a", "sae-z")
    _cut_hubs(filled)
    filled.set_document(_document(2, "dske(2,3)"))
    with pytest.raises(ShortageError) as caught:
        await filled.get("sae-a", "sae-z")
    assert caught.value.reason is ErrorReason.GRADE_UNAVAILABLE
    status = filled.plane("kme-a").status(StatusRequest(caller_sae_id="sae-a", peer_sae_id="sae-z"))
    assert (status.grade, status.stored_key_count) == ("dske(2,3)", 0)
    assert (await filled.redeem("sae-z", "sae-a", [older.keys[0][0]])).keys == older.keys


async def test_a_policy_that_flips_back_begins_anew_and_the_old_epochs_are_retired(
    filled: KeyNetwork,
) -> None:
    older = await filled.get("sae-a", "sae-z")
    _cut_hubs(filled)
    filled.set_document(_document(2, "dske(2,3)"))
    with pytest.raises(ShortageError):
        await filled.get("sae-a", "sae-z")
    filled.set_document(_document(3, "trusted-relay"))
    newer = await filled.get("sae-a", "sae-z")
    assert newer.grade == "trusted-relay"
    ids = [key_id for key_id, _ in [*older.keys, *newer.keys]]
    assert (await filled.redeem("sae-z", "sae-a", ids)).keys == [*older.keys, *newer.keys]
    plane = filled.plane("kme-a")
    assert len(plane.reserves.old_epochs("kme-z")) == 2
    filled.clock.offset_s += filled.config.key_lifetime_s + 1
    await plane.retirer.run_once()
    assert not plane.reserves.old_epochs("kme-z")
    assert [book.epoch for book in filled.plane("kme-z").reserves.inbound_books("kme-a")] == [2]


async def test_nothing_is_sealed_with_slots_of_the_old_grade(filled: KeyNetwork) -> None:
    """A deposit holds keys: what is sealed with less than the pair's grade has that grade."""
    message = SealedMessage(void_keys=VoidKeys(master_sae_id="sae-a", key_ids=[bytes(16)]))
    jobs = filled.plane("kme-a").jobs
    assert (await jobs.send("kme-z", message, timeout_s=30.0)).applied
    assert filled.plane("kme-a").reserves.outbound["kme-z"].slots.sealed_slots
    _cut_hubs(filled)
    filled.set_document(_document(2, "dske(2,3)"))
    with pytest.raises(ShortageError) as caught:
        await jobs.send("kme-z", message, timeout_s=20.0)
    assert caught.value.reason is ErrorReason.GRADE_UNAVAILABLE


async def test_keys_kept_ready_for_a_foreign_slave_are_dropped_with_their_grade(tmp_path: Path) -> None:
    both = TwoDomains(tmp_path, buffers=[BufferSpec("can-a", "uk-b", 4, 32)])
    await both.start()
    try:
        buffers = both.can.plane("can-x").foreign.buffers
        await until(lambda: buffers.level("can-a", "uk-b") == 4)
        grades = {"default": {"grade": "trusted-relay"}}
        pair = {"between": ["can-x", "can-z"], "grade": "multipath(2,2)"}
        document = {**can_document(), "serial": 2, "grades": {**grades, "pairs": [pair]}}
        both.can.set_document(document)
        with pytest.raises(ShortageError) as caught:
            await both.can.get("can-a", "uk-b")
        assert caught.value.reason is ErrorReason.GRADE_UNAVAILABLE
        both.can.clock.offset_s += 11
        await until(lambda: buffers.level("can-a", "uk-b") == 0)
    finally:
        await both.stop()
