"""The attacks behind protocol 3 to 5, played against real key planes by somebody inside the links.

The adversary holds the node-plane TLS keys and sits on every hop: it may drop, hold back, change and
invent shares, confirms and deposits. Each test names the rule it attacks.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.core.keyid import parse
from mesh.core.network import Grade
from mesh.core.transfer import SlotKind, TransferHeader, TransferId, transfer_tag
from mesh.errors import (
    CallerError,
    ErrorReason,
    MeshError,
    NotAuthorizedError,
    PeerError,
    TagMismatchError,
    UnavailableError,
)
from mesh.node.redeem import WRONG_TAGS_PER_DAY
from mesh.v1.link_pb2 import ShareItem
from mesh.v1.peer_pb2 import (
    ConfirmRequest,
    DepositRequest,
    KeyDeposit,
    SealedMessage,
    StoredKey,
    TransferAnswer,
    VoidKeys,
)
from tests.fakes.key_network import HASTY, LINE, NO_PREFILL, KeyNetwork, until
from tests.fakes.link_wire import Delivery

DIAMOND: dict[str, Any] = {
    "format": "keymesh-network/1",
    "serial": 1,
    "domain": "diamond",
    "nodes": {
        "kme-a": {},
        "kme-z": {},
        "hub-1": {"role": "hub", "operator": "one"},
        "hub-2": {"role": "hub", "operator": "two"},
        "hub-3": {"role": "hub", "operator": "three"},
    },
    "links": [{"between": [end, hub]} for end in ("kme-a", "kme-z") for hub in ("hub-1", "hub-2", "hub-3")],
    "saes": {"sae-a": {"home": "kme-a"}, "sae-z": {"home": "kme-z"}},
    "grades": {
        "default": {"grade": "trusted-relay"},
        "pairs": [{"between": ["kme-a", "kme-z"], "grade": "dske(2,3)", "hubs": ["hub-1", "hub-2", "hub-3"]}],
    },
}


@pytest.fixture
async def line(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[KeyNetwork]:
    """a - b - c, trusted relay."""
    network = KeyNetwork(tmp_path, LINE, config=getattr(request, "param", NO_PREFILL))
    await network.start()
    yield network
    await network.stop()


@pytest.fixture
async def diamond(tmp_path: Path) -> AsyncIterator[KeyNetwork]:
    """a and z over three hubs, (2,3)."""
    network = KeyNetwork(tmp_path, DIAMOND)
    await network.start()
    yield network
    await network.stop()


def invented(**changes: Any) -> tuple[ShareItem, bytes]:
    """A transfer that somebody made up, with a tag that fits its secret."""
    fields: dict[str, Any] = {
        "transfer": TransferId("kme-a", "kme-c", 0, 0),
        "slot_count": 1,
        "kind": SlotKind.KEYS,
        "grade": Grade(),
        "routes": (("kme-a", "kme-b", "kme-c"),),
        "expires_at_s": 2_000_000_000,
    }
    header = TransferHeader(**{**fields, **changes})
    secret = os.urandom(header.length_bytes)
    encoded = header.encode()
    item = ShareItem(
        header=encoded, tag=transfer_tag(encoded, secret), route=0, hop=1, length_bytes=len(secret)
    )
    return item, secret


async def settle(network: KeyNetwork) -> None:
    """Lets what was injected run its course."""
    for _ in range(20):
        await asyncio.sleep(0.002)


def appended(network: KeyNetwork, kme: str) -> int:
    """Slots that a node took from others."""
    return sum(book.slots.held_slots for book in network.plane(kme).reserves.inbound_books())


def alarms(network: KeyNetwork, kme: str) -> str:
    """Open alarms in words."""
    return " ".join(f"{one.alarm_id} {one.message}" for one in network.sites[kme].alarms.open_alarms())


# -- 3.3: who may send what over which link ----------------------------------------------------


async def test_3_3_a_neighbour_invents_a_source(line: KeyNetwork) -> None:
    """c is b's neighbour: it may not start a transfer in a's name."""
    item, secret = invented(transfer=TransferId("kme-a", "kme-b", 0, 0), routes=(("kme-a", "kme-b"),))
    item.hop = 0
    line.wire.inject("kme-c", "kme-b", [(item, secret)])
    await settle(line)
    assert appended(line, "kme-b") == 0
    assert line.plane("kme-b").shares.dropped == 1


async def test_3_3_a_share_comes_on_another_link_than_its_route_names(line: KeyNetwork) -> None:
    item, secret = invented(transfer=TransferId("kme-c", "kme-b", 0, 0), routes=(("kme-c", "kme-b"),))
    item.hop = 0
    line.wire.inject("kme-a", "kme-b", [(item, secret)])
    await settle(line)
    assert appended(line, "kme-b") == 0


async def test_3_3_a_hub_claims_k_n_1(diamond: KeyNetwork) -> None:
    item, secret = invented(
        transfer=TransferId("kme-a", "kme-z", 0, 0), routes=(("kme-a", "hub-1", "kme-z"),)
    )
    diamond.wire.inject("hub-1", "kme-z", [(item, secret)])
    await settle(diamond)
    assert appended(diamond, "kme-z") == 0


async def test_3_3_a_hub_claims_all_routes_through_itself(diamond: KeyNetwork) -> None:
    item, secret = invented(
        transfer=TransferId("kme-a", "kme-z", 0, 0),
        grade=Grade.parse("dske(2,3)"),
        routes=(("kme-a", "hub-1", "kme-z"),) * 3,
    )
    for route in range(3):
        item.route = route
        diamond.wire.inject("hub-1", "kme-z", [(item, secret)])
    await settle(diamond)
    assert appended(diamond, "kme-z") == 0
    assert diamond.plane("kme-z").shares.dropped == 3


async def test_3_3_routes_that_share_an_operator_are_not_disjoint(tmp_path: Path) -> None:
    document = {**DIAMOND, "nodes": {**DIAMOND["nodes"], "hub-2": {"role": "hub", "operator": "one"}}}
    network = KeyNetwork(tmp_path, document)
    await network.start()
    try:
        with pytest.raises(MeshError) as caught:
            await network.get("sae-a", "sae-z")
        assert caught.value.reason == ErrorReason.GRADE_UNAVAILABLE
        item, secret = invented(
            transfer=TransferId("kme-a", "kme-z", 0, 0),
            grade=Grade.parse("dske(2,3)"),
            routes=tuple(("kme-a", f"hub-{n}", "kme-z") for n in (1, 2, 3)),
        )
        network.wire.inject("hub-1", "kme-z", [(item, secret)])
        await settle(network)
        assert network.plane("kme-z").shares.dropped == 1
    finally:
        await network.stop()


async def test_3_3_a_hub_gives_two_shares_over_its_one_link(diamond: KeyNetwork) -> None:
    """Share i only over the link of route i: one hub cannot be two."""

    def meddle(sender: str, receiver: str, shares: Delivery) -> Delivery | None:
        if receiver == "kme-z" and sender == "hub-1":
            for route in (1, 2):
                copy = ShareItem()
                copy.CopyFrom(shares[0][0])
                copy.route = route
                shares = [*shares, (copy, os.urandom(len(shares[0][1])))]
        return shares

    diamond.wire.meddle = meddle
    drawn = await diamond.get("sae-a", "sae-z")
    assert (await diamond.redeem("sae-z", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys
    assert diamond.plane("kme-z").shares.dropped == 2
    assert "culprits" not in alarms(diamond, "kme-z")


# -- (k,n): the engine for later uses -------------------------------------------------------------


async def test_k_of_n_burns_one_share_per_route_and_hop(diamond: KeyNetwork) -> None:
    drawn = await diamond.get("sae-a", "sae-z")
    assert drawn.grade == "dske(2,3)"
    assert (await diamond.redeem("sae-z", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys
    await settle(diamond)
    for hub in ("hub-1", "hub-2", "hub-3"):
        assert diamond.wire.burnt("kme-a", hub) == diamond.wire.burnt(hub, "kme-z") == 160
    # Shares 1..k are raw on the first hop: nothing is sent for them.
    first_hop = [shares[0][0].is_raw for sender, _, shares in diamond.wire.seen if sender == "kme-a"]
    assert first_hop == [True, True, False]


async def test_3_8_a_lying_hub_is_named_and_the_key_is_right(diamond: KeyNetwork) -> None:
    diamond.wire.meddle = flip("hub-2", "kme-z")
    drawn = await diamond.get("sae-a", "sae-z")
    assert (await diamond.redeem("sae-z", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys
    await settle(diamond)
    assert "culprits: kme-a-hub-2-kme-z" in alarms(diamond, "kme-z")


async def test_3_8_a_dead_hub_costs_nothing(diamond: KeyNetwork) -> None:
    diamond.wire.meddle = lambda sender, _receiver, shares: None if sender == "hub-1" else shares
    drawn = await diamond.get("sae-a", "sae-z")
    assert (await diamond.redeem("sae-z", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys


async def test_3_8_two_liars_fail_closed_and_all_are_suspects(diamond: KeyNetwork) -> None:
    lie_2, lie_3 = flip("hub-2", "kme-z"), flip("hub-3", "kme-z")
    diamond.wire.meddle = lambda a, b, shares: lie_3(a, b, lie_2(a, b, shares) or [])
    with pytest.raises(MeshError):
        await diamond.get("sae-a", "sae-z")
    assert appended(diamond, "kme-z") == 0
    assert "suspects" in alarms(diamond, "kme-z")
    assert "culprits" not in alarms(diamond, "kme-z")


def flip(sender: str, receiver: str, *, at: int = -1) -> Any:
    """A meddler that flips one bit of every share between two nodes."""

    def meddle(a: str, b: str, shares: Delivery) -> Delivery:
        if (a, b) != (sender, receiver):
            return shares
        changed = []
        for item, value in shares:
            data = bytearray(value)
            data[at] ^= 1
            changed.append((item, bytes(data)))
        return changed

    return meddle


# -- 3.2, 3.8: what is established is what was sent, or nothing -----------------------------------


@pytest.mark.parametrize("at", [0, 47, 50, 80, -1])
async def test_3_8_a_relay_flips_a_bit_and_the_secret_is_never_used(line: KeyNetwork, at: int) -> None:
    line.wire.meddle = flip("kme-b", "kme-c", at=at)
    with pytest.raises(PeerError):
        await line.get("sae-a", "sae-c")
    assert appended(line, "kme-c") == 0
    assert "suspects: kme-a-kme-b-kme-c" in alarms(line, "kme-c")
    line.wire.meddle = lambda _a, _b, shares: shares
    drawn = await line.get("sae-a", "sae-c")
    assert (await line.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys


@pytest.mark.parametrize("line", [HASTY], indirect=True)
async def test_3_2_a_relay_changes_the_tag_or_the_header(line: KeyNetwork) -> None:
    def change_tag(a: str, b: str, shares: Delivery) -> Delivery:
        for item, _ in shares if (a, b) == ("kme-b", "kme-c") else ():
            item.tag = bytes(16)
        return shares

    def relabel(a: str, b: str, shares: Delivery) -> Delivery:
        for item, _ in shares if (a, b) == ("kme-b", "kme-c") else ():
            header = TransferHeader.decode(item.header)
            moved = replace(header, transfer=replace(header.transfer, first_slot=77))
            item.header = moved.encode()
        return shares

    for meddle in (change_tag, relabel):
        line.wire.meddle = meddle
        with pytest.raises((PeerError, UnavailableError)):
            await line.get("sae-a", "sae-c")
        assert appended(line, "kme-c") == 0


# -- 3.5: no append overlaps anything --------------------------------------------------------------


@pytest.mark.parametrize("line", [HASTY], indirect=True)
async def test_3_5_a_late_frame_of_a_crashed_transfer_changes_nothing(line: KeyNetwork) -> None:
    held: list[tuple[str, str, Delivery]] = []

    def hold(a: str, b: str, shares: Delivery) -> Delivery | None:
        if (a, b) == ("kme-b", "kme-c") and not held:
            held.append((a, b, shares))
            return None
        return shares

    await line.get("sae-a", "sae-c")
    line.wire.meddle = hold
    with pytest.raises(UnavailableError):
        await line.get("sae-a", "sae-c")
    drawn = await line.get("sae-a", "sae-c")
    before = line.plane("kme-a").reserves.outbound["kme-c"].slots.held_slots
    line.wire.inject(*held[0])
    await settle(line)
    # Its confirm is for a forfeited transfer: ignored (3.6).
    assert line.plane("kme-a").reserves.outbound["kme-c"].slots.held_slots == before
    assert (await line.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys


async def test_3_5_an_overlapping_append_is_refused(line: KeyNetwork) -> None:
    """b knows everything of a (1,1) transfer it relays, so it can make another with the same slots."""
    drawn = await line.get("sae-a", "sae-c", 4)
    for first_slot, slot_count in ((0, 1), (3, 5), (0, 64)):
        item, secret = invented(transfer=TransferId("kme-a", "kme-c", 0, first_slot), slot_count=slot_count)
        line.wire.inject("kme-b", "kme-c", [(item, secret)])
    await settle(line)
    assert appended(line, "kme-c") == 4
    ids = [key_id for key_id, _ in drawn.keys]
    assert (await line.redeem("sae-c", "sae-a", ids)).keys == drawn.keys
    line.wire.inject("kme-b", "kme-c", [invented()])
    await settle(line)
    with pytest.raises(CallerError):
        await line.redeem("sae-c", "sae-a", ids)


async def test_4_6_an_old_epoch_takes_no_more_appends(line: KeyNetwork) -> None:
    await line.get("sae-a", "sae-c")
    await line.restart("kme-a", is_proven=False)
    await line.get("sae-a", "sae-c")
    before = appended(line, "kme-c")
    line.wire.inject("kme-b", "kme-c", [invented(transfer=TransferId("kme-a", "kme-c", 0, 900))])
    line.wire.inject("kme-b", "kme-c", [invented(transfer=TransferId("kme-a", "kme-c", 9, 0))])
    await settle(line)
    assert appended(line, "kme-c") == before


# -- 3.6: confirms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_first", [True, False])
async def test_4_6_forged_refusals_cost_a_few_epochs_and_not_the_pair(
    line: KeyNetwork, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    """Confirms are held back and queries answered in the target's name: each refusal costs an epoch."""
    reserves, alarm = line.plane("kme-a").reserves, "establish/kme-c/epochs"
    if not is_first:
        await line.get("sae-a", "sae-c")
    lie = TransferAnswer(state=TransferAnswer.REFUSED, reason="peer-refused", highest_epoch=4094)
    with monkeypatch.context() as attack:
        attack.setattr(line.plane("kme-c").appender, "on_query", lambda _: lie)
        line.on_call = lambda kind, *_: kind != "confirm"
        for _ in range(3):
            with pytest.raises(MeshError):
                await line.get("sae-a", "sae-c")
    line.on_call = lambda *_: True
    assert line.sites["kme-a"].alarms.is_open(alarm)
    assert reserves.next_outbound_epoch("kme-c") <= (1024 if is_first else 0) + 5
    line.clock.offset_s += 3601
    drawn = await line.get("sae-a", "sae-c")
    assert (await line.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys
    assert not line.sites["kme-a"].alarms.is_open(alarm)


async def test_3_6_confirms_are_authentic_fresh_and_the_same_bytes(line: KeyNetwork) -> None:
    await line.get("sae-a", "sae-c")
    confirm = next(message for kind, _, _, message in line.calls if kind == "confirm")
    establisher = line.plane("kme-a").establisher
    assert establisher.on_confirm(confirm) is False
    line.on_call = lambda kind, *_: kind != "confirm"
    asking = asyncio.create_task(line.get("sae-a", "sae-c"))
    await until(lambda: sum(kind == "confirm" for kind, *_ in line.calls) == 2)
    second = [message for kind, _, _, message in line.calls if kind == "confirm"][-1]
    with pytest.raises(TagMismatchError):
        establisher.on_confirm(ConfirmRequest(message=second.message, tag=bytes(16)))
    with pytest.raises(TagMismatchError):
        establisher.on_confirm(ConfirmRequest(message=second.message[:-1] + b"\1", tag=second.tag))
    await asking
    answers = [line.plane("kme-c").appender.on_query(query) for query in queries(line)]
    assert answers and all(one.confirm == second for one in answers)


def queries(network: KeyNetwork) -> list[Any]:
    """Transfer queries that were sent."""
    return [message for kind, _, _, message in network.calls if kind == "query"]


@pytest.mark.parametrize("line", [HASTY], indirect=True)
async def test_3_6_a_confirm_after_the_forfeit_is_ignored(line: KeyNetwork) -> None:
    await line.get("sae-a", "sae-c")
    line.on_call = lambda kind, *_: kind not in ("confirm", "query")
    with pytest.raises(UnavailableError):
        await line.get("sae-a", "sae-c")
    late = [message for kind, _, _, message in line.calls if kind == "confirm"][-1]
    assert line.plane("kme-a").establisher.on_confirm(late) is False
    assert line.plane("kme-a").reserves.outbound["kme-c"].slots.held_slots == 0


async def test_3_6_a_target_that_dies_between_append_and_confirm_answers_the_query(line: KeyNetwork) -> None:
    await line.get("sae-a", "sae-c")
    line.on_call = lambda kind, *_: kind not in ("confirm", "query")
    asking = asyncio.create_task(line.get("sae-a", "sae-c"))
    await until(lambda: appended(line, "kme-c") == 2)
    await line.restart("kme-c")
    line.on_call = lambda *_: True
    drawn = await asking
    assert (await line.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys


# -- 4.2, 4.3: key_IDs ----------------------------------------------------------------------------------


async def test_4_3_a_key_id_works_for_its_pair_only(line: KeyNetwork) -> None:
    key_id = (await line.get("sae-a", "sae-c")).keys[0][0]
    for slave, master in (("sae-c2", "sae-a"), ("sae-c", "sae-a2"), ("sae-c", "sae-b")):
        with pytest.raises(NotAuthorizedError):
            await line.redeem(slave, master, [key_id])
    with pytest.raises(NotAuthorizedError):
        await line.redeem("sae-c", "sae-a", [key_id], at="kme-a")
    with pytest.raises(NotAuthorizedError):
        await line.redeem("sae-a", "sae-a", [key_id])
    await line.redeem("sae-c", "sae-a", [key_id])


async def test_4_3_mutated_key_ids_and_the_order_of_answers(line: KeyNetwork) -> None:
    drawn = await line.get("sae-a", "sae-c", 2)
    good, other = drawn.keys[0][0], drawn.keys[1][0]
    for bit in range(128):
        mutated = bytearray(good)
        mutated[bit // 8] ^= 0x80 >> bit % 8
        with pytest.raises(MeshError) as caught:
            await line.redeem("sae-c", "sae-a", [bytes(mutated)])
        is_addressed = parse(bytes(mutated)) is not None
        expected = ErrorReason.NOT_AUTHORIZED if is_addressed else ErrorReason.UNKNOWN_KEY
        assert caught.value.reason == expected
    with pytest.raises(CallerError) as malformed:
        await line.redeem("sae-c", "sae-a", [b"short"])
    assert malformed.value.reason == ErrorReason.INVALID_ARGUMENT
    await line.redeem("sae-c", "sae-a", [other])
    # One 401 makes the call 401; 400 otherwise; nothing was redeemed by any of it.
    wrong = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(NotAuthorizedError):
        await line.redeem("sae-c", "sae-a", [other, wrong])
    with pytest.raises(CallerError) as unknown:
        await line.redeem("sae-c", "sae-a", [other, good])
    assert unknown.value.reason == ErrorReason.UNKNOWN_KEY
    await line.redeem("sae-c", "sae-a", [good])


async def test_4_3_probing_ends_after_the_days_budget_also_across_a_restart(line: KeyNetwork) -> None:
    key_id = (await line.get("sae-a", "sae-c")).keys[0][0]
    guesses = [key_id[:-2] + number.to_bytes(2, "big") for number in range(WRONG_TAGS_PER_DAY + 1)]
    guesses = [guess for guess in guesses if guess != key_id][:WRONG_TAGS_PER_DAY]
    for at in range(0, WRONG_TAGS_PER_DAY, 100):
        with pytest.raises(NotAuthorizedError):
            await line.redeem("sae-c", "sae-a", guesses[at : at + 100])
    with pytest.raises(NotAuthorizedError):
        await line.redeem("sae-c", "sae-a", [key_id])
    assert "wrong-tags" in alarms(line, "kme-c")
    await line.restart("kme-c")
    with pytest.raises(NotAuthorizedError):
        await line.redeem("sae-c", "sae-a", [key_id])
    line.clock.offset_s += 86_400
    await line.redeem("sae-c", "sae-a", [key_id])


async def test_4_3_absent_slots_cost_no_budget(line: KeyNetwork) -> None:
    key_id = (await line.get("sae-a", "sae-c")).keys[0][0]
    absent = bytearray(key_id)
    absent[2] ^= 1
    for _ in range(WRONG_TAGS_PER_DAY // 100 + 1):
        with pytest.raises(NotAuthorizedError):
            await line.redeem("sae-c", "sae-a", [bytes(absent)])
    await line.redeem("sae-c", "sae-a", [key_id])


# -- 4.8: deposits -----------------------------------------------------------------------------------------


def deposit_of(master: str, slave: str) -> SealedMessage:
    """A deposit of one key."""
    key = StoredKey(key_id=os.urandom(16), value=bytes(32))
    return SealedMessage(
        keys=KeyDeposit(master_sae_id=master, slave_sae_ids=[slave], keys=[key], expires_at_s=2_000_000_000)
    )


async def test_4_8_a_deposit_in_the_name_of_anothers_master_is_refused(line: KeyNetwork) -> None:
    await line.get("sae-b", "sae-c")
    answer = await line.plane("kme-b").jobs.send("kme-c", deposit_of("sae-a", "sae-c"), timeout_s=30)
    assert (answer.applied, answer.reason) == (False, ErrorReason.NOT_AUTHORIZED)
    void = SealedMessage(void_keys=VoidKeys(master_sae_id="sae-a", key_ids=[os.urandom(16)]))
    answer = await line.plane("kme-b").jobs.send("kme-c", void, timeout_s=30)
    assert not answer.applied
    assert line.store("kme-c").read(lambda tables: tables.keystore.count_held()) == 0
    answer = await line.plane("kme-b").jobs.send("kme-c", deposit_of("sae-b", "sae-c"), timeout_s=30)
    assert answer.applied


async def test_4_8_a_replayed_deposit_gets_the_same_answer_and_applies_once(line: KeyNetwork) -> None:
    # The job stays open while its answer is withheld: each copy must be answered with the same bytes.
    line.on_call = lambda kind, *_: kind != "deposit-answer"
    message = deposit_of("sae-a", "sae-c")
    sending = asyncio.create_task(line.plane("kme-a").jobs.send("kme-c", message, timeout_s=30))
    await until(lambda: sum(kind == "deposit-answer" for kind, *_ in line.calls) >= 2)
    request = next(one for kind, _, _, one in line.calls if kind == "deposit")
    answers = {one.SerializeToString() for kind, _, _, one in line.calls if kind == "deposit-answer"}
    replayed = await line.plane("kme-c").deposits.on_deposit(request)
    assert {replayed.SerializeToString()} == answers
    assert line.store("kme-c").read(lambda tables: tables.keystore.count_held()) == 1
    sent = {one.SerializeToString() for kind, _, _, one in line.calls if kind == "deposit"}
    assert len(sent) == 1
    line.on_call = lambda *_: True
    assert (await sending).applied


async def test_4_8_a_forged_deposit_moves_nothing(line: KeyNetwork) -> None:
    await line.plane("kme-a").jobs.send("kme-c", deposit_of("sae-a", "sae-c"), timeout_s=30)
    genuine = next(one for kind, _, _, one in line.calls if kind == "deposit")
    book = line.plane("kme-c").reserves.inbound("kme-a", 0)
    assert book is not None
    held = book.slots.held_sealed_slots
    forged = DepositRequest()
    forged.CopyFrom(genuine)
    forged.job_id = os.urandom(16)
    forged.first_slot += forged.slot_count
    with pytest.raises(PeerError):
        await line.plane("kme-c").deposits.on_deposit(forged)
    # The forged message named slots that are still unused: they stay usable.
    assert book.slots.held_sealed_slots == held
    answer = await line.plane("kme-a").jobs.send("kme-c", deposit_of("sae-a", "sae-c"), timeout_s=30)
    assert answer.applied


async def test_4_1_a_key_id_never_addresses_sealed_slots(line: KeyNetwork) -> None:
    await line.plane("kme-a").jobs.send("kme-c", deposit_of("sae-a", "sae-c"), timeout_s=30)
    request = next(one for kind, _, _, one in line.calls if kind == "deposit")
    from mesh.core.keyid import KeyAddress, issue

    address = KeyAddress(request.epoch, request.first_slot + request.slot_count, 32)
    with pytest.raises(NotAuthorizedError):
        await line.redeem("sae-c", "sae-a", [issue(address, "sae-a", "sae-c", bytes(16))])
    day = int(line.clock.now_s()) // 86_400
    assert line.store("kme-c").read(lambda tables: tables.wrong_tags.count("sae-c", "sae-a", day)) == 0


# -- 5.1: homes ---------------------------------------------------------------------------------


async def test_5_1_a_remapped_home_gives_the_new_home_no_old_keys(line: KeyNetwork) -> None:
    """A document (signed, or lying in a trusted directory) that moves sae-a to b: b cannot mint a's keys.

    The key_ID that a issued stays good at c while the document names a as previous home; without it, c
    refuses, since the reserve's source is not the master's home.
    """
    key_id = (await line.get("sae-a", "sae-c")).keys[0][0]
    moved = {**LINE, "serial": 2, "saes": {**LINE["saes"], "sae-a": {"home": "kme-b"}}}
    line.set_document(moved, "kme-c")
    with pytest.raises(NotAuthorizedError):
        await line.redeem("sae-c", "sae-a", [key_id])
    until_s = line.clock.now_s()
    kept = {"home": "kme-b", "previous": [{"home": "kme-a", "until_s": until_s}]}
    line.set_document({**LINE, "serial": 3, "saes": {**LINE["saes"], "sae-a": kept}}, "kme-c")
    await line.redeem("sae-c", "sae-a", [key_id])


async def test_5_1_a_corrupt_kme_draws_in_anothers_name(line: KeyNetwork) -> None:
    """b draws from its own reserve and signs with sae-a's name: c sees that b is not sae-a's home."""
    await line.get("sae-b", "sae-c")
    book = line.plane("kme-b").reserves.outbound["kme-c"]
    first = await book.assign(1, SlotKind.KEYS, draws=True)
    book.forfeit(first)
    await line.plane("kme-b").supply.draw("kme-c", "sae-b", "sae-c", 1, 32, timeout_s=30, request_id="")
    forged, _ = await line.plane("kme-b").supply.draw(
        "kme-c", "sae-a", "sae-c", 1, 32, timeout_s=30, request_id=""
    )
    with pytest.raises(NotAuthorizedError):
        await line.redeem("sae-c", "sae-a", [forged[0][0]])


# -- bounds -------------------------------------------------------------------------------------


async def test_3_9_a_source_cannot_fill_the_target_without_end(tmp_path: Path) -> None:
    network = KeyNetwork(tmp_path, LINE)
    network.config = replace(network.config, inbound_max_bytes=32 * 10)
    await network.start()
    try:
        await network.get("sae-a", "sae-c", 10)
        with pytest.raises(MeshError):
            await network.get("sae-a", "sae-c")
        assert appended(network, "kme-c") == 10
        opened = network.sites["kme-c"].alarms
        assert [alarm.alarm_id for alarm in opened.open_alarms()] == ["reserve/kme-a/full"]
        drawn = await network.get("sae-b", "sae-c")
        assert (await network.redeem("sae-c", "sae-b", [drawn.keys[0][0]])).keys == drawn.keys
        # The retire finds room, and what nobody fetched makes some.
        network.clock.offset_s += network.config.key_lifetime_s + 1
        await network.plane("kme-a").retirer.run_once()
        await network.get("sae-a", "sae-c")
        await network.get("sae-a", "sae-c")
        assert not opened.open_alarms()
    finally:
        await network.stop()


async def test_3_9_what_a_target_holds_and_its_source_gave_up_is_let_go(tmp_path: Path) -> None:
    """The way back is cut: transfer after transfer lies at the target, the source never learns of one."""
    network = KeyNetwork(tmp_path, LINE, config=replace(HASTY, request_timeout_s=2.5))
    network.config = replace(network.config, inbound_max_bytes=32 * 20)
    await network.start()
    try:
        network.on_call = lambda kind, *_: kind not in ("confirm", "query")
        for _ in range(3):
            with pytest.raises(MeshError):
                await network.get("sae-a", "sae-c", 10)
        await until(lambda: network.plane("kme-c").reserves.held_inbound_slots("kme-a") == 20)
        network.on_call = lambda *_: True
        with pytest.raises(MeshError):
            await network.get("sae-a", "sae-c")
        for _ in range(2):
            await network.plane("kme-a").retirer.run_once()
            network.clock.offset_s += network.config.key_lifetime_s + 1
        drawn = await network.get("sae-a", "sae-c", 10)
        assert (await network.redeem("sae-c", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys[:1]
    finally:
        await network.stop()
