"""keymesh among other owners' key managers that misbehave: no key lost, none astray, and all ends agree.

Every test has an association of its own, so that what takes long runs beside the rest. What keymesh says
is read as strictly as the standard allows; a complaint of a peer about it fails the last test.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest

from tests.independent020 import messages as m
from tests.independent020.certificates import Papers, Root
from tests.independent020.messages import Keys, Names, Void
from tests.independent020.peer import (
    FAILED,
    KEPT,
    RELAYED,
    VOIDED,
    VOIDING,
    Kms,
    Part,
    Plan,
    Reply,
    fresh,
    relay,
    until,
)
from tests.independent020.troubles import TROUBLES, Released, merging, silent
from tests.independent020.world import World

pytestmark = pytest.mark.slow
PATIENCE_S = 8.0
AT_ONCE = 6
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What our application got, and under which names."""

    names: Names
    status: int
    keys: dict[str, bytes]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, private_proofs: Path) -> Iterator[World]:
    # Several play at once: what should succeed must not run out of time on a slow machine.
    found = World(tmp_path_factory.mktemp("world"), private_proofs, request_timeout_s=PATIENCE_S)
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def begun(world: World) -> dict[str, asyncio.Future[None]]:
    """What takes longest."""
    return {name: world.start(play(world)) for name, play in LONG.items()}


@pytest.fixture(scope="module")
def played(world: World, begun: object) -> dict[str, asyncio.Future[Outcome]]:
    """Every trouble of a receiving peer, some at a time."""
    room = asyncio.Semaphore(AT_ONCE)

    async def play(trouble: str) -> Outcome:
        target = "near-" + "".join(letter if letter.isalnum() else "-" for letter in trouble)
        world.near.plans[target] = TROUBLES[trouble][0]()
        async with room:
            status, keys = await world.enc("own-a", target, number=3)
        await world.settled(world.near, target)
        return Outcome(Names.of("own-a", target), status, keys)

    return {trouble: world.start(play(trouble)) for trouble in TROUBLES}


# --- keymesh hands keys over ---------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", TROUBLES)
def test_handing_keys_to_a_peer_that(
    world: World, played: dict[str, asyncio.Future[Outcome]], trouble: str
) -> None:
    outcome = world.run(_result(played[trouble]))
    world.run(world.check_outbound(world.near, outcome.names, outcome.keys))
    released = TROUBLES[trouble][1]
    if released is not Released.EITHER:
        assert (outcome.status, len(outcome.keys)) == ((200, 3) if released is Released.YES else (503, 0))


async def _result(future: asyncio.Future[T]) -> T:
    return await future


def test_one_request_acks_several(world: World) -> None:
    async def play() -> None:
        world.near.plans["near-merged"] = Plan(say=merging(3))
        got = await asyncio.gather(*(world.enc("own-a", "near-merged", number=2) for _ in range(3)))
        keys = {one: value for status, found in got for one, value in found.items() if status == 200}
        assert len(keys) == 6
        await world.settled(world.near, "near-merged")
        await world.check_outbound(world.near, Names.of("own-a", "near-merged"), keys)

    world.run(play())


def test_several_targets_are_acked_one_by_one(world: World) -> None:
    targets = ("near-each-1", "near-each-2", "near-each-3")
    names = Names.of("own-a", *targets)
    asked: list[asyncio.Future[tuple[int, dict[str, bytes]]]] = []

    async def each(kms: Kms, keys: Keys) -> None:
        for target in targets:
            assert not asked[0].done()
            await kms.ack(keys.callback or "", (m.RELAYED, keys.values, Names.of("own-a", target)))
            await asyncio.sleep(0.1)

    async def play() -> None:
        world.near.plans[targets[0]] = Plan(say=each)
        asked.append(asyncio.ensure_future(world.enc("own-a", *targets, number=2)))
        status, keys = await asked[0]
        assert status == 200
        await world.settled(world.near, *targets)
        await world.check_outbound(world.near, names, keys)

    world.run(play())


def test_the_bytes_and_names_of_a_request_are_the_same_however_often_it_comes(world: World) -> None:
    async def play() -> None:
        resets = [Reply(is_reset=True, is_heeded=False)] * 2 + [Reply(503), Reply(is_cut=True)]
        world.near.plans["near-often"] = Plan(keys=iter(resets))
        assert (await world.enc("own-a", "near-often", number=2))[0] == 200
        first, *more = world.near.heard(m.KEYS, "near-often")
        assert more
        assert all(one == first for one in more)

    world.run(play())


def test_a_key_that_our_application_has_is_not_voided(world: World) -> None:
    names = Names.of("own-a", "near-kept")

    async def play() -> None:
        status, keys = await world.enc("own-a", "near-kept", number=2)
        assert status == 200
        first, second = keys
        await world.near.void(names, [first])
        assert await world.void_word(world.near, first) == m.FAILED_TO_VOID
        assert world.near.give(second, "near-kept") == keys[second]
        await world.check_outbound(world.near, names, keys)

    world.run(play())


def test_another_peer_cannot_speak_about_keys_of_this_one(world: World) -> None:
    names = Names.of("own-a", "near-other")

    async def meddle(kms: Kms, keys: Keys) -> None:
        for word in (m.RELAYED, m.FAILED, m.VOIDED, m.NOT_PRESENT):
            answer = await world.third.post(m.ACK, [m.ack_document(word, keys.values, keys.names)])
            assert (answer.status, answer.problem()[0]) == (400, "key-not-present")
        void = m.void_document(keys.names, list(keys.values), world.third.callback)
        await world.third.post(m.VOID, void)
        await asyncio.sleep(0.2)
        await relay(kms, keys)

    async def play() -> None:
        world.near.plans["near-other"] = Plan(say=meddle)
        status, keys = await world.enc("own-a", "near-other", number=2)
        assert status == 200
        await world.settled(world.near, "near-other")
        await world.check_outbound(world.near, names, keys)

    world.run(play())


def test_connections_torn_down_before_the_body_was_read(world: World) -> None:
    async def play() -> None:
        rough = world.kms["rough"]
        rough.unread = iter([True, True, True])
        status, keys = await world.enc("own-a", "rough-1", number=2)
        assert status == 200
        await world.check_outbound(rough, Names.of("own-a", "rough-1"), keys)

    world.run(play())


def test_redirects_are_not_followed(world: World) -> None:
    """Neither to another peer, nor to another place at the same one (that would be a complaint)."""
    near, third = world.near.url + "/moved", world.third.url + m.KEYS

    async def play() -> None:
        places = [(301, near), (302, third), (307, near), (308, third)]
        moved = [Reply(status, is_heeded=False, location=place) for status, place in places]
        world.near.plans["near-moved"] = Plan(keys=iter(moved))
        assert (await world.enc("own-a", "near-moved"))[0] == 200
        assert len(world.near.heard(m.KEYS, "near-moved")) == len(moved) + 1
        assert world.third.heard(m.KEYS, "near-moved") == world.near.complaints == []

    world.run(play())


# --- keymesh takes keys in -----------------------------------------------------------------------------


def hand_over(world: World, names: Names, count: int = 2, size: int = 32) -> dict[str, bytes]:
    """Keys from near, handed over honestly."""
    values = fresh(count, size)
    assert world.run(world.near.hand_over(names, values)).status == 202
    return values


def settle(world: World, names: Names, *states: str, kms: Kms | None = None) -> None:
    """Waits until what was handed over is in one of these states at the peer, and checks all ends."""
    kms = kms or world.near
    mine = [one for one, key in kms.lent.items() if key.names == names]
    assert mine
    world.run(world.lent(kms, mine, *states))
    world.run(world.check_inbound(kms, names))


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 8192), (3, 33), (48, 32)])
def test_keys_of_a_peer_reach_their_target_only_and_once(world: World, count: int, size: int) -> None:
    names = Names.of(f"near-give-{count}-{size}", "own-b")
    hand_over(world, names, count, size)
    settle(world, names, RELAYED)


def test_several_targets_get_the_same(world: World) -> None:
    names = Names.of("near-many", "own-a", "own-b")
    hand_over(world, names)
    settle(world, names, RELAYED)


def test_a_request_that_comes_again_changes_nothing(world: World) -> None:
    names = Names.of("near-again", "own-b")

    async def play() -> None:
        values = fresh(2)
        world.near.lend(names, values)
        document = m.keys_document(names, values, world.near.callback)
        answers = await asyncio.gather(*(world.near.post(m.KEYS, document) for _ in range(4)))
        assert {answer.status for answer in answers} == {202}
        await world.lent(world.near, values, RELAYED)
        await world.check_inbound(world.near, names)
        # The bytes are gone here; a keyed hash tells that they are the same.
        said = len(world.near.heard(m.ACK, names.initiator))
        assert (await world.near.post(m.KEYS, document)).status == 202
        await until(lambda: len(world.near.heard(m.ACK, names.initiator)) > said)
        for one in values:
            assert (await world.dec("own-b", names.initiator, one))[0] == 400

    world.run(play())


def test_part_of_a_request_may_come_again_with_new_keys(world: World) -> None:
    names = Names.of("near-overlap", "own-b")
    first = hand_over(world, names)
    second = fresh(1)
    assert world.run(world.near.hand_over(names, {**first, **second})).status == 202
    settle(world, names, RELAYED)


@pytest.mark.parametrize("other", ["bytes", "target", "initiator", "more targets"])
def test_another_key_under_a_known_key_id_is_refused_and_overwrites_nothing(world: World, other: str) -> None:
    names = Names.of(f"near-known-{other[:4]}", "own-b")
    values = hand_over(world, names)
    forged = {
        "bytes": (names, {one: bytes(32) for one in values}),
        "target": (Names.of(names.initiator, "own-c"), values),
        "initiator": (Names.of("near-somebody", "own-b"), values),
        "more targets": (Names.of(names.initiator, "own-b", "own-c"), values),
    }[other]
    answer = world.run(world.near.post(m.KEYS, m.keys_document(*forged, world.near.callback)))
    # 400 would say that nothing is held.
    assert answer.status == 503
    settle(world, names, RELAYED)


def test_another_peer_cannot_hand_over_the_same_key_id(world: World) -> None:
    names = Names.of("near-first", "own-b")
    values = hand_over(world, names)
    theirs = Names.of("third-second", "own-b")
    document = m.keys_document(theirs, values, world.third.callback)
    assert world.run(world.third.post(m.KEYS, document)).status == 503
    settle(world, names, RELAYED)
    for one in values:
        assert world.run(world.dec("own-b", "third-second", one))[1] == {}


def test_one_bad_key_and_none_is_taken(world: World) -> None:
    names = Names.of("near-all-or-none", "own-b")
    good, bad = fresh(3), fresh(1)
    document = m.keys_document(names, {**good, **bad}, world.near.callback)
    document["keys"][-1]["value"] = "no base64"
    answer = world.run(world.near.post(m.KEYS, document))
    assert answer.status == 400
    # Nothing is held: the same key_ids are welcome under other names.
    assert world.run(world.near.hand_over(Names.of("near-reused", "own-a"), good)).status == 202
    settle(world, Names.of("near-reused", "own-a"), RELAYED)


def test_synchronous_requests_are_answered_with_their_acks(world: World) -> None:
    names = Names.of("near-at-once", "own-b")

    async def play() -> None:
        versions = await world.near.get(m.VERSIONS)
        assert "synchronous_mode" in versions.document["capabilities"]
        values = fresh(3)
        world.near.lend(names, values)
        answer = await world.near.post(m.KEYS, m.keys_document(names, values, None))
        assert answer.status == 200
        assert {one["ack_status"] for one in answer.document} == {m.RELAYED}
        for ack in m.read_acks(answer.document):
            for one in ack.key_ids:
                world.near.lent[one].state = RELAYED
        first, *others = values
        await world.near.post(m.VOID, m.void_document(names, others, world.near.callback))
        voided = await world.near.post(m.VOID, m.void_document(names, others, None))
        assert {one["ack_status"] for one in voided.document} == {m.VOIDED}
        for one in others:
            world.near.lent[one].state = VOIDED
        await world.check_inbound(world.near, names)
        assert not any(first in str(document) for document in world.near.heard(m.ACK, names.initiator))

    world.run(play())


# acks of keymesh that do not arrive


ACK_TROUBLES: dict[str, list[Reply]] = {
    "503 twice": [Reply(503, is_heeded=False)] * 2,
    "408": [Reply(408, is_heeded=False)],
    "500": [Reply(500, is_heeded=False)],
    "reset": [Reply(is_reset=True, is_heeded=False)],
    "heeded, the answer lost": [Reply(is_reset=True), Reply(is_cut=True)],
    "heeded, but 503": [Reply(503)],
    "401 once": [Reply(401, is_heeded=False)],
    "redirect": [Reply(308, is_heeded=False, location="https://localhost:1" + m.ACK)],
}


@pytest.mark.parametrize("trouble", ACK_TROUBLES)
def test_an_ack_that_does_not_arrive_is_said_again(world: World, trouble: str) -> None:
    names = Names.of("near-ack-" + "".join(one for one in trouble if one.isalnum()), "own-b")
    world.near.plans[names.initiator] = Plan(acks=iter(ACK_TROUBLES[trouble]))
    hand_over(world, names)
    settle(world, names, RELAYED)


def test_an_ack_for_a_key_that_the_peer_does_not_know_ends_in_a_void(world: World) -> None:
    names = Names.of("near-forgetful", "own-b")

    async def play() -> None:
        values = fresh(3)
        known = dict(list(values.items())[1:])
        world.near.lend(names, known)
        answer = await world.near.post(m.KEYS, m.keys_document(names, values, world.near.callback))
        assert answer.status == 202
        await world.lent(world.near, known, RELAYED)
        (unknown,) = values.keys() - known.keys()
        await until(
            lambda: any(unknown in one["key_ids"] for one in world.near.heard(m.VOID, names.initiator))
        )
        await world.settled(world.near, names.initiator)
        assert (await world.dec("own-b", names.initiator, unknown))[1] == {}
        await world.check_inbound(world.near, names)

    world.run(play())


def test_a_key_that_the_peers_application_has_is_not_lost_with_the_answer_to_our_ack(world: World) -> None:
    """The first ack is heard and its answer lost; of the second the peer says that it knows no such key."""
    names = Names.of("near-spent", "own-b")
    replies = [Reply(is_reset=True), *[Reply(400, is_heeded=False)] * 4]
    world.near.plans[names.initiator] = Plan(acks=iter(replies))
    values = hand_over(world, names)
    world.run(world.lent(world.near, values, RELAYED))
    given, other = values
    assert world.near.give(given, names.initiator) == values[given]
    world.run(until(lambda: len(world.near.heard(m.VOID, names.initiator)) >= 2))
    world.run(world.lent(world.near, [other], VOIDED))
    world.run(world.settled(world.near, names.initiator))
    assert world.run(world.dec("own-b", names.initiator, given)) == (200, {given: values[given]})
    assert world.run(world.dec("own-b", names.initiator, other))[1] == {}


# voids of a peer


def test_void_before_the_key(world: World) -> None:
    names = Names.of("near-void-before", "own-b")
    values = fresh(2)
    world.near.lend(names, values)
    assert world.run(world.near.void(names, list(values))).status == 202
    world.run(world.lent(world.near, values, VOIDED))
    late = world.run(world.near.post(m.KEYS, m.keys_document(names, values, world.near.callback)))
    assert late.status == 400
    settle(world, names, VOIDED)


def test_void_beside_the_key(world: World) -> None:
    """Whichever is first, both ends end alike; only 400 and 202 tell the truth."""

    async def play(names: Names) -> None:
        values = fresh(2)
        world.near.lend(names, values)
        keys = m.keys_document(names, values, world.near.callback)
        posted, _ = await asyncio.gather(world.near.post(m.KEYS, keys), world.near.void(names, list(values)))
        assert posted.status in (202, 400)
        await world.lent(world.near, values, VOIDED)

    for index in range(4):
        names = Names.of(f"near-void-beside-{index}", "own-b")
        world.run(play(names))
        settle(world, names, VOIDED)


def test_void_after_the_key(world: World) -> None:
    names = Names.of("near-void-after", "own-b")
    values = hand_over(world, names, 3)
    world.run(world.lent(world.near, values, RELAYED))
    first, *others = values
    world.run(world.near.void(names, others))
    world.run(world.lent(world.near, others, VOIDED))
    assert world.near.lent[first].state == RELAYED
    again = world.run(world.near.post(m.KEYS, m.keys_document(names, values, world.near.callback)))
    assert again.status == 503  # the first is held
    settle(world, names, RELAYED, VOIDED)


def test_void_after_the_application_got_it(world: World) -> None:
    names = Names.of("near-void-late", "own-b")
    values = hand_over(world, names)
    world.run(world.lent(world.near, values, RELAYED))
    first, second = values
    assert world.run(world.dec("own-b", names.initiator, first)) == (200, {first: values[first]})
    world.run(world.near.void(names, [first, second]))
    world.run(world.lent(world.near, [first], KEPT))
    world.run(world.lent(world.near, [second], VOIDED))


def test_void_all(world: World) -> None:
    names, others = Names.of("near-void-all", "own-b"), Names.of("near-void-all", "own-b", "own-a")
    values, spared = hand_over(world, names), hand_over(world, others)
    world.run(world.lent(world.near, [*values, *spared], RELAYED))
    document = m.void_document(names, [], world.near.callback)
    unsure = world.run(world.near.post(m.VOID, document))
    assert (unsure.status, unsure.problem()[0]) == (400, "no-key-ids-or-confirmation")
    for one in values:
        world.near.lent[one].state = VOIDING
    sure = world.run(world.near.post(m.VOID, document | {"all_confirmation": True}))
    assert sure.status == 202
    settle(world, names, VOIDED)
    settle(world, others, RELAYED)


def test_void_under_other_names_or_by_another_peer_voids_nothing(world: World) -> None:
    names = Names.of("near-void-names", "own-b")
    values = hand_over(world, names)
    world.run(world.lent(world.near, values, RELAYED))
    for kms, wrong in (
        (world.near, Names.of("near-void-names", "own-c")),
        (world.near, Names.of("near-else", "own-b")),
        (world.third, names),
    ):
        world.run(kms.post(m.VOID, m.void_document(wrong, list(values), kms.callback)))
        world.run(asyncio.sleep(0.1))
    settle(world, names, RELAYED)


# requests that break off, come late, or are too large


def test_a_request_that_breaks_off_leaves_nothing(world: World) -> None:
    names = Names.of("near-torn", "own-b")
    values = fresh(2)
    body = json.dumps(m.keys_document(names, values, world.near.callback)).encode()
    for sent in (0, 1, len(body) // 2, len(body) - 1):
        assert world.run(world.raw(m.KEYS, body, sent=sent)) == 0
    for one in values:
        assert world.run(world.dec("own-b", names.initiator, one))[1] == {}
    other = Names.of("near-torn-2", "own-a")
    assert world.run(world.near.hand_over(other, values)).status == 202
    settle(world, other, RELAYED)


def test_a_request_whose_sender_is_gone_before_the_answer_may_count_and_is_repeated(world: World) -> None:
    names = Names.of("near-gone", "own-b")
    values = fresh(2)
    body = json.dumps(m.keys_document(names, values, world.near.callback)).encode()
    assert world.run(world.raw(m.KEYS, body)) == 0
    assert world.run(world.near.hand_over(names, values)).status == 202
    settle(world, names, RELAYED)


def test_a_body_that_does_not_come_in_time_is_answered_408_and_leaves_nothing(world: World) -> None:
    names = Names.of("near-slow", "own-b")
    values = fresh(1)
    body = json.dumps(m.keys_document(names, values, world.near.callback)).encode()
    assert world.run(world.raw(m.KEYS, body, sent=len(body) - 1, wait_s=5)) == 408
    assert world.run(world.near.hand_over(names, values)).status == 202
    settle(world, names, RELAYED)


def test_a_body_over_the_limit_is_refused_and_leaves_nothing(world: World) -> None:
    names = Names.of("near-large", "own-b")
    values = fresh(1)
    document = m.keys_document(names, values, world.near.callback, comment="x" * (2 << 20))
    answer = world.run(world.near.post(m.KEYS, document))
    assert answer.status in (0, 413)
    assert world.run(world.near.hand_over(names, values)).status == 202
    settle(world, names, RELAYED)


# who may speak, and for whom


def test_callbacks_lie_at_the_peer_and_nowhere_else(world: World) -> None:
    names = Names.of("near-callback", "own-b")
    near, third = world.near.url, world.third.url
    port = near.rsplit(":", 1)[1]
    for callback in (
        third + m.ACK,
        near.replace("https:", "http:") + m.ACK,
        f"https://localhost:{port}@{third.removeprefix('https://')}{m.ACK}",
        f"https://localhost:{port}.example{m.ACK}",
        f"https://127.0.0.1:{port}{m.ACK}",
        near,
        near + m.ACK + "#x",
        "https://localhost" + m.ACK,
        "file:///etc/passwd",
        "",
    ):
        values = fresh(1)
        for path, document in (
            (m.KEYS, m.keys_document(names, values, callback)),
            (m.VOID, m.void_document(names, list(values), callback)),
        ):
            answer = world.run(world.near.post(path, document))
            assert (answer.status, answer.problem()[0]) == (400, "invalid-parameter"), callback
        assert world.run(world.near.hand_over(names, values)).status == 202
    assert world.third.heard(m.ACK, names.initiator) == []
    settle(world, names, RELAYED)


@pytest.mark.parametrize("initiator", ["third-a", "own-a", "nobody", "nea", "near"])
def test_a_peer_may_name_its_own_initiators_only(world: World, initiator: str) -> None:
    names, values = Names.of(initiator, "own-b"), fresh(1)
    answer = world.run(world.near.post(m.KEYS, m.keys_document(names, values, world.near.callback)))
    assert (answer.status, answer.problem()[0]) == (401, "unauthorized")
    for one in values:
        assert world.run(world.dec("own-b", initiator, one))[1] == {}
    right = Names.of(f"near-instead-{initiator}", "own-b")
    assert world.run(world.near.hand_over(right, values)).status == 202
    settle(world, right, RELAYED)


@pytest.mark.parametrize(
    ("targets", "detail"),
    [
        (["own-x"], "target_sae_id_not_recognized"),
        (["own-b", "nobody"], "target_sae_id_not_recognized"),
        (["near-b"], "invalid_routing"),
        (["own-b", "near-b"], "invalid_routing"),
        (["third-b", "near-b"], "invalid_routing"),
    ],
)
def test_unknown_targets_and_what_would_go_straight_back(
    world: World, targets: list[str], detail: str
) -> None:
    names, values = Names.of("near-lost", *targets), fresh(1)
    answer = world.run(world.near.post(m.KEYS, m.keys_document(names, values, world.near.callback)))
    suffix, details = answer.problem()
    assert (answer.status, suffix, list(details)) == (400, "key-routing-error", [detail])
    for kms in (world.near, world.third):
        assert not [one for one in values if kms.heard(m.KEYS, one)]
    right = Names.of(f"near-found-{'-'.join(targets)}", "own-b")
    assert world.run(world.near.hand_over(right, values)).status == 202
    settle(world, right, RELAYED)


def test_certificates_decide_who_speaks(world: World) -> None:
    stranger = Root(world.directory, "stranger").issue("near-kme", "stranger-near")

    async def ask(papers: Papers | None) -> int:
        connector = aiohttp.TCPConnector(ssl=world.context(papers))
        async with aiohttp.ClientSession(connector=connector) as session:
            names, values = Names.of("near-forged", "own-b"), fresh(1)
            document = m.keys_document(names, values, world.third.callback)
            try:
                async with session.post(world.site.url020 + m.KEYS, json=document) as response:
                    return response.status
            except (aiohttp.ClientError, OSError):
                return 0
            finally:
                for one in values:
                    assert (await world.dec("own-b", "near-forged", one))[1] == {}

    assert world.run(ask(None)) == 0
    assert world.run(ask(stranger)) == 0
    assert world.run(ask(world.wrong)) == 401
    # Another peer's root does not speak for this one.
    assert world.run(ask(world.roots["third"].issue("near-kme", "third-near"))) == 401
    assert world.run(ask(world.papers["third"])) == 401


# --- through us, from one peer to another --------------------------------------------------------------


def test_in_transit_every_end_ends_alike(world: World) -> None:
    names = Names.of("near-through", "third-b")
    values = hand_over(world, names)
    world.run(world.lent(world.near, values, RELAYED))
    for one, value in values.items():
        assert world.third.held[one].names == names
        assert world.third.give(one, "third-b") == value == world.near.give(one, names.initiator)


@pytest.mark.parametrize("is_acked", [False, True])
def test_void_in_transit(world: World, is_acked: bool) -> None:
    names = Names.of(f"near-between-{is_acked}", f"third-between-{is_acked}")
    world.third.plans[next(iter(names.targets))] = Plan() if is_acked else Plan(say=silent)
    values = hand_over(world, names)
    world.run(until(lambda: set(values) <= world.third.held.keys()))
    if is_acked:
        world.run(world.lent(world.near, values, RELAYED))
    world.run(world.near.void(names, list(values)))
    world.run(world.lent(world.near, values, VOIDED))
    assert {world.third.held[one].state for one in values} == {VOIDED}


def test_in_transit_a_target_that_has_it_keeps_it(world: World) -> None:
    names = Names.of("near-too-late", "third-too-late")
    values = hand_over(world, names)
    world.run(world.lent(world.near, values, RELAYED))
    first, second = values
    assert world.third.give(first, "third-too-late") == values[first]
    world.run(world.near.void(names, list(values)))
    world.run(world.lent(world.near, [first], KEPT))
    world.run(world.lent(world.near, [second], VOIDED))
    assert [world.third.held[one].state for one in values] == [RELAYED, VOIDED]


def test_in_transit_a_failure_further_on_is_told_and_leaves_nothing(world: World) -> None:
    names = Names.of("near-failing", "own-b", "third-failing")
    world.third.plans["third-failing"] = Plan(keys=repeat(Reply(400, is_heeded=False)))
    values = hand_over(world, names)
    world.run(world.lent(world.near, values, FAILED))
    for one in values:
        assert world.run(world.dec("own-b", names.initiator, one))[1] == {}
    world.run(world.near.finish(names, within_s=1))
    assert {world.near.lent[one].state for one in values} == {VOIDED}


def test_extensions_pass_unchanged_and_mandatory_ones_are_refused(world: World) -> None:
    names, values = Names.of("near-extended", "third-extended"), fresh(1)
    extension = {"E32473_hybrid": {"deep": [1, 2.5, None, "ü", True]}, "E32473_b": "x"}
    document = m.keys_document(names, values, world.near.callback)
    document["keys"][0]["extension"] = {"E32473_key": [1]}
    refused = world.run(world.near.post(m.KEYS, document | {"extension_mandatory": extension}))
    assert (refused.status, refused.problem()[0]) == (503, "unsupported-mandatory-extension")
    world.near.lend(names, values)
    assert world.run(world.near.post(m.KEYS, document | {"extension_optional": extension})).status == 202
    world.run(world.lent(world.near, values, RELAYED))
    (heard,) = world.third.heard(m.KEYS, names.initiator)
    assert heard["extension_optional"] == extension
    assert heard["keys"][0]["extension"] == {"E32473_key": [1]}


# --- what takes its time, begun at once ------------------------------------------------------------------

LONG: dict[str, Callable[[World], Coroutine[Any, Any, None]]] = {}


def long(play: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[World], Coroutine[Any, Any, None]]:
    """Runs beside everything else."""
    LONG[play.__name__] = play
    return play


@long
async def one_target_of_several_without_an_ack_and_nobody_keeps_the_key(world: World) -> None:
    targets = ("near-some-1", "near-some-2", "third-some-3")

    async def some(kms: Kms, keys: Keys) -> None:
        await kms.ack(keys.callback or "", (m.RELAYED, keys.values, Names.of("own-a", targets[0])))

    world.near.plans[targets[0]] = Plan(say=some)
    assert await world.enc("own-a", *targets, "own-b") == (503, {})
    for kms in (world.near, world.third):
        await world.settled(kms, *targets)
        assert kms.of(*targets)
        assert {key.state for key in kms.of(*targets).values()} == {VOIDED}


@long
async def an_answer_that_does_not_come_in_time_leaves_no_key_at_one_end(world: World) -> None:
    world.near.plans["near-hang"] = Plan(keys=repeat(Reply(wait_s=PATIENCE_S + 2)), say=silent)
    assert await world.enc("own-a", "near-hang", number=2) == (503, {})
    await until(lambda: {key.state for key in world.near.of("near-hang").values()} == {VOIDED}, timeout_s=60)


@long
async def a_peer_that_cannot_void_is_asked_for_a_while_and_then_no_more(world: World) -> None:
    """Our application never gets the key, whatever the peer's has done with it."""

    async def refuse(kms: Kms, void: Void, _parts: list[Part]) -> None:
        for one in void.key_ids:
            kms.held[one].state = RELAYED
        assert void.callback is not None
        await kms.ack(void.callback, (m.FAILED_TO_VOID, void.key_ids, void.names))

    world.near.plans["near-stubborn"] = Plan(say=silent, say_void=refuse)
    assert await world.enc("own-a", "near-stubborn") == (503, {})
    given_up = re.compile(r'^keymesh_border_keys\{[^}]*near-kme[^}]*"unresolved"[^}]*\} 1\.0$', re.MULTILINE)
    async with asyncio.timeout(120):
        while not given_up.search(await asyncio.to_thread(world.site.metrics, "node")):  # noqa: ASYNC110 - another process
            await asyncio.sleep(1)
    asked = len(world.near.heard(m.VOID, "near-stubborn"))
    assert asked > 3
    await asyncio.sleep(2)
    assert len(world.near.heard(m.VOID, "near-stubborn")) == asked


@long
async def an_ack_that_never_arrives_ends_in_a_void(world: World) -> None:
    names = Names.of("near-deaf", "own-b")
    world.near.plans[names.initiator] = Plan(acks=repeat(Reply(503, is_heeded=False)))
    values = fresh(2)
    await world.near.hand_over(names, values)
    await until(lambda: world.near.heard(m.VOID, names.initiator), timeout_s=60)
    world.near.plans[names.initiator] = Plan()
    await world.lent(world.near, values, VOIDED)
    await world.check_inbound(world.near, names)


@long
async def nothing_is_sent_to_who_only_listens_at_a_peers_address(world: World) -> None:
    assert await world.enc("own-a", "sound-1") == (503, {})
    assert world.kms["sound"].log == []


@pytest.mark.parametrize("name", LONG)
def test_that(world: World, begun: dict[str, asyncio.Future[None]], name: str) -> None:
    world.run(_result(begun[name]))


# --- processes that die ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gateway", "node"])
def test_a_process_killed_in_the_middle_leaves_no_key_at_one_end(world: World, kind: str) -> None:
    target, initiator = f"near-kill-{kind}", f"near-killed-{kind}"
    world.near.plans[target] = Plan(say=silent)
    world.near.plans[initiator] = Plan(acks=iter([Reply(503, is_heeded=False)] * 2))
    asking = world.start(world.enc("own-a", target, number=2))
    names = Names.of(initiator, "own-b")
    values = hand_over(world, names)
    world.run(until(lambda: world.near.of(target)))
    world.site.kill(kind)
    world.site.launch(kind)
    world.site.wait_ready(kind)
    assert world.run(_given(asking)) == {}
    world.run(world.lent(world.near, values, RELAYED, VOIDED))
    settle(world, names, RELAYED, VOIDED)
    world.run(until(lambda: {key.state for key in world.near.of(target).values()} == {VOIDED}, timeout_s=15))


async def _given(asking: asyncio.Future[tuple[int, dict[str, bytes]]]) -> dict[str, bytes]:
    try:
        return (await asking)[1]
    except (aiohttp.ClientError, OSError):
        return {}


def test_nobody_complains(world: World) -> None:
    assert {name: kms.complaints for name, kms in world.kms.items() if kms.complaints} == {}
