"""Hubs that attack: everything one hub of a (2,3) pair can do with what it is given (protocol 3).

The hub holds its own lanes, so its frames are in order for the links; it changes what is in them. Each
test ends the same way: keys are right at both ends, nothing was appended but what was drawn, and what
is pending is bounded.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.core import collector
from mesh.core.keyid import parse
from mesh.core.network import Grade
from mesh.core.transfer import SLOT_BYTES, SlotKind, TransferHeader, TransferId
from mesh.errors import ErrorReason, MeshError
from mesh.v1.link_pb2 import ShareItem
from tests.fakes.key_network import HASTY, NO_PREFILL, KeyNetwork, until
from tests.fakes.link_wire import Delivery
from tests.fault.test_key_attacks import DIAMOND, alarms, appended, flip, invented, settle

HUBS = ("hub-1", "hub-2", "hub-3")
ROUTES = tuple(("kme-a", hub, "kme-z") for hub in HUBS)
GRADE = Grade.parse("dske(2,3)")


@pytest.fixture
async def net(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[KeyNetwork]:
    """a and z over three hubs, (2,3)."""
    network = KeyNetwork(tmp_path, DIAMOND, config=getattr(request, "param", NO_PREFILL))
    await network.start()
    yield network
    await network.stop()


class Taken:
    """What one hub was about to send to the target, kept for the test to send as it likes."""

    def __init__(self, network: KeyNetwork, hub: str, *, passes: bool = False) -> None:
        self._network = network
        self._hub = hub
        self._passes = passes
        self.frames: list[Delivery] = []
        network.wire.meddle = self._meddle

    def _meddle(self, sender: str, receiver: str, shares: Delivery) -> Delivery | None:
        if (sender, receiver) != (self._hub, "kme-z"):
            return shares
        self.frames.append(shares)
        return shares if self._passes else None

    def let_go(self) -> None:
        """From now on the hub is honest."""
        self._network.wire.meddle = lambda _a, _b, shares: shares

    async def send(self, *frames: Delivery) -> None:
        """The hub sends these."""
        for shares in frames:
            self._network.wire.inject(self._hub, "kme-z", shares)
        await settle(self._network)


async def key(network: KeyNetwork, number: int = 1) -> None:
    """Keys for sae-a are the keys for sae-z."""
    drawn = await network.get("sae-a", "sae-z", number)
    redeemed = await network.redeem("sae-z", "sae-a", [key_id for key_id, _ in drawn.keys])
    assert redeemed.keys == drawn.keys
    assert drawn.grade == redeemed.grade == "dske(2,3)"


def pending(network: KeyNetwork) -> int:
    """Transfers whose shares the target keeps."""
    return len(network.plane("kme-z").appender._collector)


def pending_bytes(network: KeyNetwork) -> int:
    """Bytes of such shares that came over the first hub's link."""
    return network.plane("kme-z").appender._collector._bytes.get("hub-1", 0)


# -- what it was given, changed -------------------------------------------------------------------


@pytest.mark.parametrize("hub", HUBS)
async def test_one_flipped_bit_anywhere_is_named_and_harmless(net: KeyNetwork, hub: str) -> None:
    """Sharing is linear: a hub knows by what it shifts the secret, and its tag key, and gains nothing."""
    for at in (0, 47, 48, 79, 80, 95, 96, -1):  # of u, confirm key, tag part, key part: first and last
        net.wire.meddle = flip(hub, "kme-z", at=at)
        await key(net)
        await until(lambda: f"culprits: kme-a-{hub}-kme-z" in alarms(net, "kme-z"))
        assert net.sites["kme-z"].alarms.clear(f"route/{hub}/lied")
    assert "culprits" not in alarms(net, "kme-z")


async def test_shares_swapped_between_two_transfers(net: KeyNetwork) -> None:
    """Each under the other's header: neither fits, both keys come from the two honest hubs."""
    taken = Taken(net, "hub-3")
    await key(net)
    await key(net)
    first, second = (frame[0] for frame in taken.frames)
    await taken.send([(first[0], second[1])], [(second[0], first[1])])
    assert "culprits: kme-a-hub-3-kme-z" in alarms(net, "kme-z")
    assert "culprits: kme-a-hub-1" not in alarms(net, "kme-z") + alarms(net, "kme-a")
    taken.let_go()
    await key(net)
    assert appended(net, "kme-z") == 0


async def test_a_search_that_takes_long_goes_on_beside_everything_else(
    net: KeyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A liar is first; one subset a slice: the third and right one is tried after the last share came."""
    monkeypatch.setattr(collector, "_SLICE_BYTES", 1)
    loop = asyncio.get_running_loop()

    def meddle(sender: str, receiver: str, shares: Delivery) -> Delivery | None:
        if receiver != "kme-z" or sender == "hub-1":
            return flip("hub-1", "kme-z")(sender, receiver, shares)  # type: ignore[no-any-return]
        loop.call_later(0.05, lambda: net.wire.inject(sender, receiver, shares))
        return None

    net.wire.meddle = meddle
    await key(net, 2)
    await until(lambda: "culprits: kme-a-hub-1-kme-z" in alarms(net, "kme-z"))
    assert pending(net) == 0


def relabelled(item: ShareItem, **changes: Any) -> ShareItem:
    """A share item with another header."""
    copy = ShareItem()
    copy.CopyFrom(item)
    copy.header = replace(TransferHeader.decode(item.header), **changes).encode()
    return copy


async def test_a_wrong_header_cannot_spoil_the_honest_shares(net: KeyNetwork) -> None:
    """The tag covers the header, and shares of other headers are kept apart."""
    cases: list[dict[str, Any]] = [
        {"kind": SlotKind.SEALED},
        {"expires_at_s": 2**40},
        {"transfer": TransferId("kme-a", "kme-z", 0, 1 << 20)},
        {"transfer": TransferId("kme-a", "kme-z", 7, 0)},
        {"routes": (ROUTES[0], ROUTES[2], ROUTES[1])},
        {"grade": Grade.parse("dske(3,3)")},
        {"grade": Grade.parse("dske(1,3)")},
        {"grade": Grade(), "routes": ROUTES[:1]},
    ]
    for changes in cases:

        def meddle(
            sender: str, receiver: str, shares: Delivery, changes: dict[str, Any] = changes
        ) -> Delivery:
            if (sender, receiver) != ("hub-1", "kme-z"):
                return shares
            return [(relabelled(item, **changes), value) for item, value in shares]

        net.wire.meddle = meddle
        await key(net, 2)
        await settle(net)
        assert appended(net, "kme-z") == 0
    assert "culprits" not in alarms(net, "kme-z")


@pytest.mark.parametrize("grade", ["dske(3,3)", "dske(2,3)"], ids=["refused", "pending"])
async def test_a_wrong_header_that_comes_first_cannot_end_the_transfer(net: KeyNetwork, grade: str) -> None:
    """Asked before the honest shares are there, the target does not take one share's word for all."""
    loop = asyncio.get_running_loop()
    changes = {"grade": Grade.parse(grade), "kind": SlotKind.SEALED}

    def meddle(sender: str, receiver: str, shares: Delivery) -> Delivery | None:
        if receiver != "kme-z":
            return shares
        if sender == "hub-1":
            return [(relabelled(item, **changes), value) for item, value in shares]
        loop.call_later(0.7, lambda: net.wire.inject(sender, receiver, shares))
        return None

    net.wire.meddle = meddle
    await key(net)
    assert "query" in [kind for kind, *_ in net.calls]


async def test_a_wrong_header_cannot_hide_what_was_appended(net: KeyNetwork) -> None:
    """The confirm is lost and the source asks; the liar's group still waits for a second share."""
    await key(net)
    net.on_call = lambda kind, *_: kind != "confirm"

    def meddle(sender: str, receiver: str, shares: Delivery) -> Delivery:
        if (sender, receiver) != ("hub-1", "kme-z"):
            return shares
        return [(relabelled(item, kind=SlotKind.SEALED), value) for item, value in shares]

    net.wire.meddle = meddle
    async with asyncio.timeout(15):
        await key(net)


async def test_k_of_1_a_replay_during_the_append_costs_no_epoch(tmp_path: Path) -> None:
    """Every share verifies by itself, also one that comes again when all have been and are forgotten."""
    pair = {"between": ["kme-a", "kme-z"], "grade": "dske(1,3)", "hubs": list(HUBS)}
    network = KeyNetwork(tmp_path, {**DIAMOND, "grades": {"pairs": [pair]}})
    await network.start()
    try:
        await network.get("sae-a", "sae-z")
        commit = network.store("kme-z").commit

        async def slow(change: Any) -> Any:
            await asyncio.sleep(0.8)  # the source asks meanwhile
            return await commit(change)

        network.store("kme-z").commit = slow  # type: ignore[method-assign]
        network.wire.meddle = lambda _sender, _receiver, shares: [*shares, *shares]
        drawn = await network.get("sae-a", "sae-z")
        address = parse(drawn.keys[0][0])
        assert address is not None
        assert address.epoch == 0
    finally:
        await network.stop()


async def test_another_tag_cannot_spoil_the_honest_shares(net: KeyNetwork) -> None:
    def meddle(sender: str, receiver: str, shares: Delivery) -> Delivery:
        if (sender, receiver) != ("hub-2", "kme-z"):
            return shares
        for item, _ in shares:
            item.tag = os.urandom(16)
        return shares

    net.wire.meddle = meddle
    await key(net)
    assert appended(net, "kme-z") == 0


# -- what it was given, again, late, or in another order ------------------------------------------


async def test_replays_change_nothing_at_any_time(net: KeyNetwork) -> None:
    """At once, after the confirm, after the redeem, after a restart of the target."""
    taken = Taken(net, "hub-1", passes=True)
    drawn = await net.get("sae-a", "sae-z", 3)
    await taken.send(*taken.frames, *taken.frames)
    assert appended(net, "kme-z") == 3
    assert (await net.redeem("sae-z", "sae-a", [key_id for key_id, _ in drawn.keys])).keys == drawn.keys
    await taken.send(*taken.frames)
    await net.restart("kme-z")
    await taken.send(*taken.frames)
    assert appended(net, "kme-z") == 0
    assert pending(net) <= 1
    with pytest.raises(MeshError):
        await net.redeem("sae-z", "sae-a", [drawn.keys[0][0]])
    taken.let_go()
    await key(net)


async def test_order_does_not_matter(net: KeyNetwork) -> None:
    """A hub that sends the newest share first: late ones are compared, nobody is blamed."""
    taken = Taken(net, "hub-2")
    for _ in range(5):
        await key(net)
    await taken.send(*reversed(taken.frames))
    assert "culprits" not in alarms(net, "kme-z")
    assert pending(net) == 0
    taken.let_go()
    await key(net)


async def test_frames_held_back_cost_no_key_and_are_named_as_silence(net: KeyNetwork) -> None:
    """k others are enough at once. After the wait the hub is named; what it then sends is stale."""
    taken = Taken(net, "hub-1")
    await key(net)
    assert pending(net) == 1
    net.clock.offset_s += 60
    net.plane("kme-z").appender.expire()
    assert "silent: kme-a-hub-1-kme-z" in alarms(net, "kme-z")
    assert pending(net) == 0
    await taken.send(*taken.frames)
    assert appended(net, "kme-z") == 0
    taken.let_go()
    await key(net)


async def test_a_hub_is_not_silent_when_the_source_sent_it_nothing(net: KeyNetwork) -> None:
    """Its link is closed at the source, which knows; the target is told so in the header."""
    net.wire.planes["kme-a"].ends["hub-3"].is_open = False
    await key(net)
    net.clock.offset_s += 60
    net.plane("kme-z").appender.expire()
    assert "silent" not in alarms(net, "kme-z")


@pytest.mark.parametrize("net", [HASTY], indirect=True)
async def test_two_hubs_that_hold_back_are_a_shortage_and_their_stale_shares_no_key(net: KeyNetwork) -> None:
    """Fewer than k came: the slots are forfeited. All shares come later, and nothing is drawn."""
    kept: list[tuple[str, Delivery]] = []

    def meddle(sender: str, receiver: str, shares: Delivery) -> Delivery | None:
        if receiver == "kme-z" and sender in HUBS[:2]:
            kept.append((sender, shares))
            return None
        return shares

    net.wire.meddle = meddle
    with pytest.raises(MeshError) as caught:
        await net.get("sae-a", "sae-z")
    assert caught.value.reason in {ErrorReason.GRADE_UNAVAILABLE, ErrorReason.DEADLINE_EXCEEDED}
    net.wire.meddle = lambda _a, _b, shares: shares
    for sender, shares in kept:
        net.wire.inject(sender, "kme-z", shares)
    await settle(net)
    # The target may well append what was sent to it; the source never draws what it has forfeited.
    assert all(book.slots.held_slots == 0 for book in net.plane("kme-a").reserves.outbound.values())
    await key(net)


# -- what it was never given ----------------------------------------------------------------------


async def test_invented_transfers_are_dropped(net: KeyNetwork) -> None:
    """k, n, routes and who may be a source come from the target's own document (3.3)."""
    here = TransferId("kme-a", "kme-z", 0, 0)
    cases: list[dict[str, Any]] = [
        {"transfer": here, "grade": Grade(), "routes": ROUTES[:1]},
        {"transfer": here, "grade": Grade.parse("dske(1,1)"), "routes": ROUTES[:1]},
        {"transfer": here, "grade": Grade.parse("dske(1,3)"), "routes": ROUTES},
        {"transfer": TransferId("kme-x", "kme-z", 0, 0), "routes": (("kme-x", "hub-1", "kme-z"),)},
        {"transfer": TransferId("hub-1", "kme-z", 0, 0), "routes": (("hub-1", "kme-z"),)},
        {"transfer": TransferId("hub-2", "kme-z", 0, 0), "routes": (("hub-2", "hub-1", "kme-z"),)},
    ]
    for number, changes in enumerate(cases, 1):
        item, secret = invented(**changes)
        item.hop = len(changes["routes"][0]) - 2
        net.wire.inject("hub-1", "kme-z", [(item, secret)])
        await settle(net)
        assert net.plane("kme-z").shares.dropped == number
        assert appended(net, "kme-z") == pending(net) == 0
    await key(net)


async def test_one_hub_invents_a_whole_transfer_but_has_one_share_of_it(net: KeyNetwork) -> None:
    """The right grade and routes, a tag that fits its own secret; k - 1 shares never verify."""
    item, secret = invented(transfer=TransferId("kme-a", "kme-z", 0, 0), grade=GRADE, routes=ROUTES)
    for route in (0, 1, 2, 0):
        copy = ShareItem()
        copy.CopyFrom(item)
        copy.route = route
        net.wire.inject("hub-1", "kme-z", [(copy, secret)])
    await settle(net)
    assert net.plane("kme-z").shares.dropped == 2
    assert pending(net) == 1
    assert appended(net, "kme-z") == 0
    await key(net)
    net.clock.offset_s += 60
    net.plane("kme-z").appender.expire()
    assert "hub" not in alarms(net, "kme-z")  # alone it cannot frame the others as silent


def never_sent(slots: int) -> Callable[[int], tuple[ShareItem, bytes]]:
    """Makes shares of transfers that never were, by number."""
    value = os.urandom(80 + slots * SLOT_BYTES)

    def one(number: int) -> tuple[ShareItem, bytes]:
        transfer = TransferId("kme-a", "kme-z", 0, (1 << 30) + number * slots)
        header = TransferHeader(transfer, slots, SlotKind.KEYS, GRADE, ROUTES, 2_000_000_000).encode()
        return ShareItem(header=header, tag=bytes(16), route=0, hop=1, length_bytes=len(value)), value

    return one


@pytest.mark.parametrize(("count", "slots"), [(6000, 1), (200, 20_000)], ids=["many", "large"])
async def test_a_flood_pushes_out_its_own_shares_only(net: KeyNetwork, count: int, slots: int) -> None:
    """Bounded per incoming link in number and bytes; honest shares of other hubs stay."""
    taken = Taken(net, "hub-2")
    drawn = await net.get("sae-a", "sae-z")
    make = never_sent(slots)
    for number in range(count):
        net.plane("kme-z").shares.on_shares("hub-1", [make(number)])
    assert pending(net) <= 4096 + 1
    assert pending_bytes(net) <= 64 << 20
    await taken.send(*taken.frames)  # the late, honest one is still compared
    assert "culprits" not in alarms(net, "kme-z")
    assert (await net.redeem("sae-z", "sae-a", [drawn.keys[0][0]])).keys == drawn.keys
    taken.let_go()
    await key(net)
    net.clock.offset_s += 60
    net.plane("kme-z").appender.expire()
    assert pending(net) == pending_bytes(net) == 0


# -- what it all costs ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 64])
async def test_exact_accounting_of_pre_shared_data(net: KeyNetwork, number: int) -> None:
    """2 n (M + 32) bytes: M = 80 + 48 a key, 32 for the frame's tag; one transfer for the whole batch."""
    drawn = await net.get("sae-a", "sae-z", number)
    await net.redeem("sae-z", "sae-a", [key_id for key_id, _ in drawn.keys])
    await settle(net)
    leg = 32 + 80 + SLOT_BYTES * number
    for hub in HUBS:
        assert net.wire.burnt("kme-a", hub) == net.wire.burnt(hub, "kme-z") == leg
        assert net.wire.burnt("kme-z", hub) == net.wire.burnt(hub, "kme-a") == 0
    assert 6 * leg == {1: 960, 64: 19_104}[number]


async def test_a_mixed_set_of_hubs_and_a_qkd_path(tmp_path: Path) -> None:
    """Two hubs and a trusted relay, any two of the three: each may lie or be silent."""
    pair = {"between": ["kme-a", "kme-z"], "grade": "multipath(2,3)", "hubs": ["hub-1", "hub-2"]}
    document = {
        **DIAMOND,
        "nodes": {**DIAMOND["nodes"], "kme-b": {"operator": "city"}},
        "links": [*DIAMOND["links"], {"between": ["kme-a", "kme-b"]}, {"between": ["kme-b", "kme-z"]}],
        "grades": {"pairs": [pair]},
    }
    network = KeyNetwork(tmp_path, document)
    await network.start()
    try:
        for middle in ("hub-1", "hub-2", "kme-b"):
            network.wire.meddle = flip(middle, "kme-z")
            drawn = await network.get("sae-a", "sae-z", 2)
            assert drawn.grade == "multipath(2,3)"
            ids = [key_id for key_id, _ in drawn.keys]
            assert (await network.redeem("sae-z", "sae-a", ids)).keys == drawn.keys
            await until(lambda name=middle: f"culprits: kme-a-{name}-kme-z" in alarms(network, "kme-z"))  # type: ignore[misc]
        assert network.wire.burnt("kme-a", "hub-3") == 0
    finally:
        await network.stop()
