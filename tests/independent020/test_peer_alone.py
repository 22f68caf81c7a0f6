"""The independent key manager against itself, in every trouble: else it would prove nothing about ours."""

from __future__ import annotations

import ast
import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.independent020 import messages as m
from tests.independent020.certificates import Root, client_context, server_context
from tests.independent020.messages import Names
from tests.independent020.peer import FREE, HELD, RELAYED, VOIDED, Held, Kms, Plan, Reply, fresh, until
from tests.independent020.troubles import TROUBLES, Released

NAMES = Names.of("east-a", "west-b")


@dataclass
class Two:
    east: Kms
    west: Kms

    async def agree(self, names: Names = NAMES) -> None:
        """Both ends hold the same keys under the same names, and neither holds one alone."""
        with contextlib.suppress(TimeoutError):
            await until(lambda: not self.differ(names), timeout_s=2)
        assert self.differ(names) == {}

    def differ(self, names: Names) -> dict[str, object]:
        """Keys about which the ends do not agree."""
        found: dict[str, object] = {}
        for one, lent in self.east.lent.items():
            held = self.west.held.get(one)
            if lent.state == RELAYED:
                is_so = held == Held(lent.value, names, RELAYED, void_word=held.void_word if held else "")
            else:
                is_so = lent.state in (VOIDED, FREE)
                is_so &= held is None or held.state not in (HELD, RELAYED)
            if not is_so:
                found[one] = (lent, held)
        return found


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Two]:
    roots = {name: Root(tmp_path, name) for name in ("east", "west")}
    papers = {name: root.issue(f"{name}-kms") for name, root in roots.items()}
    east, west = (
        Kms(
            own,
            server=server_context(papers[own], roots[other].file),
            client=client_context(papers[own], roots[other].file),
            tries=(0.02, 0.05, 0.1, 0.2),
        )
        for own, other in (("east", "west"), ("west", "east"))
    )
    await east.start()
    await west.start()
    east.other, west.other = west.url, east.url
    yield Two(east, west)
    await east.stop()
    await west.stop()
    assert east.complaints == west.complaints == []


# Not asked for, and therefore not looked at by this peer.
NOT_UNDERSTOOD = {"acks in the answer"}


@pytest.mark.parametrize("trouble", sorted(TROUBLES.keys() - NOT_UNDERSTOOD))
async def test_two_peers_agree_in_the_end(two: Two, trouble: str) -> None:
    plan, released = TROUBLES[trouble]
    two.west.plans["west-b"] = plan()
    values = fresh(3)
    await two.east.hand_over(NAMES, values)
    await two.east.finish(NAMES, within_s=0.5)
    await asyncio.sleep(0.4 if released is Released.EITHER else 0.0)
    await two.east.finish(NAMES, within_s=0.5)
    await two.agree()
    if released is Released.YES:
        assert len(two.east.lent_as(NAMES, RELAYED)) == len(values)
        for one, value in values.items():
            assert two.east.give(one, "east-a") == value == two.west.give(one, "west-b")
            assert two.west.give(one, "west-c") is None


async def test_acks_that_cannot_be_delivered_end_in_a_void(two: Two) -> None:
    two.east.plans["east-a"] = Plan(acks=iter([Reply(503, is_heeded=False)] * 9))
    await two.east.hand_over(NAMES, fresh(2))
    await two.east.finish(NAMES, within_s=5)
    await two.agree()
    assert len(two.east.lent_as(NAMES, VOIDED)) == 2


async def test_a_key_that_was_given_is_not_voided_and_a_voided_one_never_returns(two: Two) -> None:
    values = fresh(2)
    await two.east.hand_over(NAMES, values)
    await two.east.finish(NAMES, within_s=2)
    given, other = values
    assert two.west.give(given, "west-b") == values[given]
    await two.east.void(NAMES, [given, other])
    await two.east.finish(NAMES, within_s=2)
    assert [two.east.lent[one].state for one in (given, other)] == ["kept", VOIDED]
    again = await two.east.hand_over(NAMES, {other: values[other]})
    assert again.status == 400


async def test_a_late_request_does_not_bring_back_what_was_voided_before_it_came(two: Two) -> None:
    values = fresh(1)
    two.east.lend(NAMES, values)
    await two.east.void(NAMES, list(values))
    await two.east.finish(NAMES, within_s=2)
    await two.agree()
    assert (await two.east.hand_over(NAMES, values)).status == 400
    assert two.west.held == {}


async def test_other_bytes_or_other_names_under_a_known_key_id_are_refused(two: Two) -> None:
    values = fresh(1)
    await two.east.hand_over(NAMES, values)
    forged = dict.fromkeys(values, bytes(32))
    for names, sent in ((NAMES, forged), (Names.of("east-a", "west-c"), values)):
        answer = await two.east.post(m.KEYS, m.keys_document(names, sent, two.east.callback))
        assert answer.status == 503
        two.west.complaints.clear()
    await two.east.finish(NAMES, within_s=2)
    await two.agree()


def test_the_peer_shares_no_code_with_what_it_is_to_check() -> None:
    for name in ("certificates", "messages", "peer", "troubles"):
        tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text())
        imported = [
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        ]
        assert not [name for name in imported if name.split(".")[0] in ("gateway", "mesh")]
        assert all(name.split(".")[1] == "independent020" for name in imported if name.startswith("tests."))
