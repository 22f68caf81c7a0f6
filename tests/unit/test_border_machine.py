"""What becomes of a key at a border: the two tables, played at random against the safety rules of 020."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.border import (
    HOLDING_INBOUND,
    HOLDING_OUTBOUND,
    INBOUND,
    OUTBOUND,
    SETTLED_INBOUND,
    SETTLED_OUTBOUND,
    Action,
    Inbound,
    InboundEvent,
    Outbound,
    OutboundEvent,
)
from mesh.core.border_rules import (
    MAX_EXCHANGE_BYTES,
    MAX_PAUSE_S,
    Association,
    Peer,
    Verdict,
    judge,
    pause_s,
    portions,
)
from mesh.errors import CallerError, PeerError

_OUT = st.lists(st.sampled_from(list(OutboundEvent)), max_size=12)
_IN = st.lists(st.sampled_from(list(InboundEvent)), max_size=12)


def played_out(
    events: Iterable[OutboundEvent],
) -> list[tuple[Outbound, OutboundEvent, Outbound, set[Action]]]:
    state, moves = Outbound.QUEUED, []
    for event in events:
        if OUTBOUND.allows(state, event):
            following, actions = OUTBOUND.move(state, event)
            moves.append((state, event, following, set(actions)))
            state = following
    return moves


@given(_OUT)
def test_an_outbound_key_is_released_only_by_an_ack_and_wiped_when_it_is_not(
    events: list[OutboundEvent],
) -> None:
    told = 0
    for before, event, after, actions in played_out(events):
        if Action.TELL_RELAYED in actions:
            assert event is OutboundEvent.ACK_RELAYED
        # The owner is told one thing, once; what it must not release is wiped in the same move.
        told += len(actions & {Action.TELL_RELAYED, Action.TELL_FAILED})
        assert (Action.TELL_FAILED in actions) <= (Action.WIPE in actions)
        assert not (before is not Outbound.QUEUED and after is Outbound.QUEUED)
        # What the peer may hold is given up only through a void, a proof, or for the operator.
        if after is Outbound.DROPPED and before is not Outbound.DROPPED:
            assert before is Outbound.QUEUED or event is OutboundEvent.REFUSED_CLEAN
    assert told <= 1


@given(_IN)
def test_an_inbound_tombstone_never_holds_a_key_again(events: list[InboundEvent]) -> None:
    state, is_gone = Inbound.HELD, False
    for event in events:
        if not INBOUND.allows(state, event):
            continue
        state, actions = INBOUND.move(state, event)
        is_gone = is_gone or state in (Inbound.FAILED, Inbound.VOIDED, Inbound.FAILING)
        if is_gone and state is Inbound.RELAYED:
            # Only where a target handed it out before it could be voided, which is said and alarmed.
            assert event is InboundEvent.TARGETS_KEPT
            is_gone = False
        if is_gone:
            assert Action.ACK_RELAYED not in actions
        assert state is not Inbound.HELD or not is_gone


def test_a_lost_ack_voids_nothing_here_before_the_peer_has() -> None:
    assert INBOUND.move(Inbound.RELAYED, InboundEvent.ACK_LOST) == (Inbound.DISPUTED, ())
    assert INBOUND.move(Inbound.DISPUTED, InboundEvent.PEER_KEPT) == (Inbound.RELAYED, ())
    for answer in (InboundEvent.PEER_VOIDED, InboundEvent.PEER_VOID, InboundEvent.EXHAUSTED):
        state, actions = INBOUND.move(Inbound.DISPUTED, answer)
        assert (state, Action.VOID_TARGETS in actions) == (Inbound.VOIDING, True)


def test_nothing_may_be_said_to_be_unheld_while_a_peer_may_hold_it() -> None:
    gone_inbound, gone_outbound = SETTLED_INBOUND - HOLDING_INBOUND, SETTLED_OUTBOUND - HOLDING_OUTBOUND
    assert gone_inbound == {Inbound.FAILED, Inbound.VOIDED}
    assert gone_outbound == {Outbound.VOIDED, Outbound.DROPPED, Outbound.UNRESOLVED}


def test_an_illegal_move_raises() -> None:
    with pytest.raises(PeerError):
        OUTBOUND.move(Outbound.QUEUED, OutboundEvent.ACK_RELAYED)
    with pytest.raises(PeerError):
        INBOUND.move(Inbound.VOIDED, InboundEvent.REPEATED)


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        *((status, "taken") for status in (200, 202)),
        *((status, "refused") for status in (400, 401)),
        *((status, "retry") for status in (302, 404, 408, 503, None)),
    ],
)
def test_only_400_and_401_refuse(status: int | None, verdict: str) -> None:
    assert judge(status) is Verdict(verdict)


def test_callbacks_lie_at_the_configured_peer() -> None:
    peer = Peer("uk-x", "https://kme:8443", ("uk-",))
    assert peer.admits_callback("https://kme:8443/kmapi/v1/ext_keys/ack")
    for url in (
        "https://kme:84430/x",
        "https://kme:8443@evil/x",
        "https://kme:8443.evil/x",
        "http://kme:8443/x",
        "https://kme:8443",
        "https://kme:8443/\\evil",
        "https://kme:8443/x#y",
        "https://kme:8443/" + "x" * 1024,
    ):
        assert not peer.admits_callback(url), url


def test_retries_and_portions_are_bounded() -> None:
    assert [pause_s(n) for n in (1, 2, 3)] == [0.1, 0.2, 0.4]
    assert pause_s(10_000, chance=0.999) <= 1.25 * MAX_PAUSE_S
    assert pause_s(1, retry_after_s=1e9) == MAX_PAUSE_S
    sizes = [MAX_EXCHANGE_BYTES // 2] * 5 + [1] * 2000
    parts = list(portions(range(len(sizes)), sizes))
    assert [one for part in parts for one in part] == list(range(len(sizes)))
    assert all(len(part) <= 1024 and sum(sizes[i] for i in part) <= MAX_EXCHANGE_BYTES for part in parts)


def test_an_association_is_a_set_of_targets() -> None:
    assert Association.of("a", ["c", "b", "c"]) == Association("a", ("b", "c"))
    for targets in ([], ["a"]):
        with pytest.raises(CallerError):
            Association.of("a", targets)
