"""Ways in which a key manager that is handed keys may behave, by name; each makes a fresh ``Plan``.

``RELEASED`` says whether the sender may end up with the keys released: yes, no, or either.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from enum import Enum
from itertools import chain, repeat

from tests.independent020 import messages as m
from tests.independent020.messages import Keys, Names, Void
from tests.independent020.peer import VOIDED, Kms, Part, Plan, Reply, relay, until

UNHEEDED_503 = Reply(503, is_heeded=False)


class Released(Enum):
    """What the sender may do with the keys in the end."""

    YES = "yes"
    NO = "no"
    EITHER = "either"


def _callback(keys: Keys) -> str:
    assert keys.callback is not None
    return keys.callback


# what is said, and when


async def _late(kms: Kms, keys: Keys) -> None:
    await asyncio.sleep(0.3)
    await relay(kms, keys)


async def _thrice(kms: Kms, keys: Keys) -> None:
    part = (m.RELAYED, list(keys.values), keys.names)
    await kms.ack(_callback(keys), part, part)
    await relay(kms, keys)


async def _split(kms: Kms, keys: Keys) -> None:
    for one in reversed(list(keys.values)):
        await kms.ack(_callback(keys), (m.RELAYED, [one], keys.names))


async def _containers(kms: Kms, keys: Keys) -> None:
    await kms.ack(_callback(keys), *((m.RELAYED, [one], keys.names) for one in keys.values))


async def silent(_kms: Kms, _keys: Keys) -> None:
    """It says nothing."""


async def _some(kms: Kms, keys: Keys) -> None:
    """Nothing is ever said about the first key."""
    await kms.ack(_callback(keys), (m.RELAYED, list(keys.values)[1:], keys.names))


async def _mixed(kms: Kms, keys: Keys) -> None:
    first, *rest = keys.values
    await kms.ack(_callback(keys), (m.FAILED, [first], keys.names), (m.RELAYED, rest, keys.names))


async def _failed(kms: Kms, keys: Keys) -> None:
    await kms.ack(_callback(keys), (m.FAILED, keys.values, keys.names))


async def _contradictory(kms: Kms, keys: Keys) -> None:
    """Failed, and then relayed after all, in one request."""
    answer = await kms.post(
        _callback(keys),
        [m.ack_document(word, keys.values, keys.names) for word in (m.FAILED, m.RELAYED)],
    )
    assert answer.status == 200


async def _recanting(kms: Kms, keys: Keys) -> None:
    """Relayed, and then failed, although the keys are there and stay usable."""
    await relay(kms, keys)
    await asyncio.sleep(0.3)
    await kms.post(_callback(keys), [m.ack_document(m.FAILED, keys.values, keys.names)])


async def _disowning(kms: Kms, keys: Keys) -> None:
    """It never had them, it says, and holds them all the same."""
    await kms.post(_callback(keys), [m.ack_document(m.NOT_PRESENT, keys.values, keys.names)])


async def _unasked_voided(kms: Kms, keys: Keys) -> None:
    for one in keys.values:
        kms.held[one].state = VOIDED
    await kms.post(_callback(keys), [m.ack_document(m.VOIDED, keys.values, keys.names)])


async def _boasting(kms: Kms, keys: Keys) -> None:
    """Acks that name a key that never was: refused as a whole, and then said properly."""
    ids = [*keys.values, str(uuid.uuid4())]
    answer = await kms.post(_callback(keys), [m.ack_document(m.RELAYED, ids, keys.names)])
    assert (answer.status, answer.problem()[0]) == (400, "key-not-present")
    await relay(kms, keys)


async def _misnaming(kms: Kms, keys: Keys) -> None:
    """Acks under other names do not count; without better ones the keys are not released."""
    for names in (
        Names(keys.names.initiator, frozenset({"another"})),
        Names("another", keys.names.targets),
        Names(keys.names.initiator, keys.names.targets | {"another"}),
    ):
        answer = await kms.post(_callback(keys), [m.ack_document(m.RELAYED, keys.values, names)])
        assert (answer.status, answer.problem()[0]) == (400, "key-not-present")


async def _tardy(kms: Kms, keys: Keys) -> None:
    """Relayed, once the sender has given up already."""
    await until(lambda: any(kms.heard(m.VOID, one) for one in keys.values), timeout_s=20)
    await relay(kms, keys)


async def _voiding(kms: Kms, keys: Keys) -> None:
    """Instead of an ack it wants all voided."""
    for one in keys.values:
        kms.held[one].state = VOIDED
    await kms.void(keys.names, list(keys.values))


async def _relayed_and_voiding(kms: Kms, keys: Keys) -> None:
    """Relayed, and at once a void: whoever is first wins, at both ends."""
    await relay(kms, keys)
    await kms.void(keys.names, list(keys.values))
    await until(lambda: all(kms.held[one].void_word for one in keys.values))
    for one in keys.values:
        if kms.held[one].void_word != m.FAILED_TO_VOID:
            kms.held[one].state = VOIDED


def merging(count: int) -> Callable[[Kms, Keys], Awaitable[None]]:
    """Acks for several requests in one."""
    waiting: dict[tuple[str, ...], Keys] = {}

    async def say(kms: Kms, keys: Keys) -> None:
        waiting[tuple(keys.values)] = keys
        if len(waiting) == count:
            parts: list[Part] = [(m.RELAYED, one.values, one.names) for one in waiting.values()]
            await kms.ack(_callback(keys), *parts)

    return say


# what is said about voids


def _void_silent_once() -> Callable[[Kms, Void, list[Part]], Awaitable[None]]:
    asked = [0]

    async def say(kms: Kms, void: Void, parts: list[Part]) -> None:
        asked[0] += 1
        if asked[0] > 1 and void.callback is not None:
            await kms.ack(void.callback, *parts)

    return say


TROUBLES: dict[str, tuple[Callable[[], Plan], Released]] = {
    "honest": (Plan, Released.YES),
    "acks late": (lambda: Plan(say=_late), Released.YES),
    "acks thrice": (lambda: Plan(say=_thrice), Released.YES),
    "acks split": (lambda: Plan(say=_split), Released.YES),
    "acks in containers": (lambda: Plan(say=_containers), Released.YES),
    "acks before the answer": (lambda: Plan(keys=iter([Reply(is_early=True)])), Released.YES),
    "acks never": (lambda: Plan(say=silent), Released.NO),
    "acks for some only": (lambda: Plan(say=_some), Released.NO),
    "acks mixed": (lambda: Plan(say=_mixed), Released.NO),
    "acks failed": (lambda: Plan(say=_failed), Released.NO),
    "acks failed, then relayed": (lambda: Plan(say=_contradictory), Released.NO),
    "acks relayed, then failed": (lambda: Plan(say=_recanting), Released.EITHER),
    "acks not present": (lambda: Plan(say=_disowning), Released.NO),
    "acks voided unasked": (lambda: Plan(say=_unasked_voided), Released.NO),
    "acks with an unknown id": (lambda: Plan(say=_boasting), Released.YES),
    "acks under other names": (lambda: Plan(say=_misnaming), Released.NO),
    "acks relayed once nobody waits": (
        lambda: Plan(say=_tardy, voids=iter([UNHEEDED_503] * 2)),
        Released.NO,
    ),
    "acks in the answer": (lambda: Plan(keys=iter([Reply(is_instant=True)]), say=silent), Released.YES),
    "nonsense in the answer": (lambda: Plan(keys=iter([Reply(document={"keys": 1})])), Released.YES),
    "void instead of an ack": (lambda: Plan(say=_voiding), Released.NO),
    "void after relayed": (lambda: Plan(say=_relayed_and_voiding), Released.EITHER),
    "reset after the body": (lambda: Plan(keys=iter([Reply(is_reset=True)])), Released.YES),
    "reset, nothing stored": (
        lambda: Plan(keys=iter([Reply(is_reset=True, is_heeded=False)])),
        Released.YES,
    ),
    "half an answer": (lambda: Plan(keys=iter([Reply(is_cut=True)])), Released.YES),
    "reset for ever": (lambda: Plan(keys=repeat(Reply(is_reset=True)), say=silent), Released.NO),
    "408 once": (lambda: Plan(keys=iter([Reply(408, is_heeded=False)])), Released.YES),
    "408 although stored": (lambda: Plan(keys=iter([Reply(408)])), Released.YES),
    "503 once": (lambda: Plan(keys=iter([UNHEEDED_503])), Released.YES),
    "503 although stored": (lambda: Plan(keys=repeat(Reply(503)), say=silent), Released.NO),
    "503 for ever": (lambda: Plan(keys=repeat(UNHEEDED_503)), Released.NO),
    "400, nothing stored": (lambda: Plan(keys=repeat(Reply(400, is_heeded=False))), Released.NO),
    "401, nothing stored": (lambda: Plan(keys=repeat(Reply(401, is_heeded=False))), Released.NO),
    "stored and reset, then 400": (
        lambda: Plan(keys=chain([Reply(is_reset=True)], repeat(Reply(400, is_heeded=False))), say=silent),
        Released.NO,
    ),
    "500 once": (lambda: Plan(keys=iter([Reply(500, is_heeded=False)])), Released.YES),
    "redirect": (
        lambda: Plan(keys=repeat(Reply(307, is_heeded=False, location="https://localhost:1/elsewhere"))),
        Released.NO,
    ),
    "voids 503, reset, 408 first": (
        lambda: Plan(
            say=silent,
            voids=iter([UNHEEDED_503, Reply(is_reset=True, is_heeded=False), Reply(408, is_heeded=False)]),
        ),
        Released.NO,
    ),
    "voids done but the answer lost": (
        lambda: Plan(say=silent, voids=iter([Reply(is_reset=True)])),
        Released.NO,
    ),
    "voids not acked at first": (
        lambda: Plan(say=silent, say_void=_void_silent_once()),
        Released.NO,
    ),
}
"""What two honest ends get over, whichever of them is ours."""
