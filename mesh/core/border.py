"""What becomes of a key that crosses a border: two machines, one per direction, as tables.

Owns the association-safety rules of ETSI GS QKD 020 V1.1.1 (and protocol 6): nothing is released before
the far end acknowledged, whoever may hold a key is told to void it, a voided key never comes back, what
nobody waits for is voided. *Outbound* is a key that we hand to a peer, *inbound* one that a peer hands
to us. A move returns the next state and what is to be done about it, in the same transaction; an illegal
move raises and changes nothing. No I/O, no clock; ``mesh.node.border`` does what the actions say.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Generic, TypeVar

from mesh.errors import PeerError


class Outbound(StrEnum):
    """Where an outbound key stands."""

    QUEUED = "queued"
    """No request with it ever left."""
    POSTED = "posted"
    """A request may have left; the peer may hold the key."""
    ACCEPTED = "accepted"
    """The peer answered 202 and owes an ack."""
    RELAYED = "relayed"
    """Acked for every target; its owner was told and may have released it."""
    RECALLING = "recalling"
    """The peer does not have it any more; its owner is asked to take it back."""
    VOIDING = "voiding"
    """Not ours any more; the peer is asked to void it until it says so."""
    VOIDED = "voided"
    """Neither end has it: a tombstone."""
    DROPPED = "dropped"
    """The peer never had it: a tombstone."""
    UNRESOLVED = "unresolved"
    """Refused here for ever; the peer never said that it voided it."""


class OutboundEvent(StrEnum):
    """What may happen to an outbound key."""

    LEASED = "leased"
    TAKEN = "taken"
    """The request was answered 202 (or 200)."""
    REFUSED_CLEAN = "refused-clean"
    """400 or 401 to the only request that ever left: the peer holds nothing."""
    REFUSED = "refused"
    """400 or 401 after a request whose fate is unknown."""
    ACK_RELAYED = "ack-relayed"
    """Now acked for every target."""
    ACK_FAILED = "ack-failed"
    ACK_VOIDED = "ack-voided"
    ACK_NOT_PRESENT = "ack-not-present"
    ACK_VOID_FAILED = "ack-void-failed"
    ACK_VOID_KEPT = "ack-void-kept"
    """The peer cannot void it, and its owner wants to know rather than that we try on."""
    GIVE_UP = "give-up"
    """Nobody waits for it: too late, or its owner does not want it."""
    WITHDRAWN = "withdrawn"
    """Its owner wants it voided, and to know whether that was possible."""
    PEER_VOID = "peer-void"
    RECALLED = "recalled"
    """Its owner has taken it back."""
    RECALLED_AS_ASKED = "recalled-as-asked"
    """The same, after the peer itself had asked for the void."""
    NOT_RECALLED = "not-recalled"
    EXHAUSTED = "exhausted"
    """The last request to void it failed."""


class Inbound(StrEnum):
    """Where an inbound key stands."""

    HELD = "held"
    """Durable here; on its way to its targets."""
    RELAYED = "relayed"
    """Every target's key manager holds it."""
    FAILING = "failing"
    """It could not reach all targets, and the peer is told so; those that may have it must void it."""
    FAILED = "failed"
    """No target has it (or one handed it out before its void came): a tombstone."""
    VOIDING = "voiding"
    """The targets must void it."""
    RECALLING = "recalling"
    """A target's side does not have it any more; the peer is asked to void it."""
    DISPUTED = "disputed"
    """The peer did not take our ``relayed``, or its yes was lost; its answer to a void decides."""
    VOIDED = "voided"
    """No target has it: a tombstone. The peer is told, unless the void was its own."""


class InboundEvent(StrEnum):
    """What may happen to an inbound key."""

    REPEATED = "repeated"
    """The peer posted it again, with the same bytes and association."""
    CARRIED = "carried"
    NOT_CARRIED = "not-carried"
    """Some target cannot be reached; others, or it, may have the key."""
    NOT_CARRIED_CLEAN = "not-carried-clean"
    """The same, and certainly no target has it."""
    PEER_VOID = "peer-void"
    ACK_LOST = "ack-lost"
    """The peer cannot be told ``relayed``, or does not know the key."""
    RECALL = "recall"
    """A target's side asks to take it back."""
    TARGETS_VOIDED = "targets-voided"
    TARGETS_KEPT = "targets-kept"
    """Some target has handed it out already."""
    PEER_VOIDED = "peer-voided"
    PEER_KEPT = "peer-kept"
    EXHAUSTED = "exhausted"
    """The last request to the peer to void it failed."""


class Action(StrEnum):
    """What a move asks for, in the transaction that records it."""

    WIPE = "wipe"
    TELL_RELAYED = "tell-relayed"
    """Tell the owner of an outbound key that it may be released."""
    TELL_FAILED = "tell-failed"
    """Tell the owner of an outbound key that it must not be released."""
    RECALL = "recall"
    VOID_TARGETS = "void-targets"
    ACK_RELAYED = "ack-relayed"
    ACK_FAILED = "ack-failed"
    ANSWER_VOIDED = "answer-voided"
    """Ack ``voided``, if the peer asked for it."""
    ANSWER_VOID_FAILED = "answer-void-failed"
    """Ack ``failed to void``, if the peer asked for it."""
    REPORT_VOIDED = "report-voided"
    """Tell whoever withdrew or recalled it, if anybody did."""
    REPORT_KEPT = "report-kept"
    ALARM = "alarm"


State = TypeVar("State", Outbound, Inbound)
Event = TypeVar("Event", OutboundEvent, InboundEvent)

_Row = tuple[Iterable[State], Iterable[Event], State | None, tuple[Action, ...]]


class Machine(Generic[State, Event]):
    """One direction's table of legal moves.

    Args:
        rows: (states, events, next state or None to stay, actions); no pair may come twice.
    """

    def __init__(self, name: str, rows: Iterable[_Row[State, Event]]) -> None:
        self._name = name
        self.moves: dict[tuple[State, Event], tuple[State, tuple[Action, ...]]] = {}
        for states, events, following, actions in rows:
            for state in states:
                for event in events:
                    if (state, event) in self.moves:
                        raise ValueError(f"{name}: {state} on {event} stands twice")
                    self.moves[state, event] = (state if following is None else following, actions)

    def move(self, state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
        """The next state, and what is to be done.

        Raises:
            PeerError: PROTOCOL_VIOLATION; the event cannot happen in this state.
        """
        found = self.moves.get((state, event))
        if found is None:
            raise PeerError(
                "a key at the border cannot do this",
                facts={"way": self._name, "state": state, "event": event},
            )
        return found

    def allows(self, state: State, event: Event) -> bool:
        """Whether the move is legal."""
        return (state, event) in self.moves


_O, _E, _A = Outbound, OutboundEvent, Action
_OPEN = (_O.POSTED, _O.ACCEPTED)
_GONE = (_O.VOIDED, _O.DROPPED)
_LATE_ACKS = (_E.ACK_FAILED, _E.ACK_VOIDED, _E.ACK_NOT_PRESENT, _E.ACK_VOID_FAILED, _E.ACK_VOID_KEPT)
_FAIL = (_A.TELL_FAILED, _A.WIPE)

OUTBOUND: Machine[Outbound, OutboundEvent] = Machine(
    "outbound",
    [
        ((_O.QUEUED,), (_E.LEASED,), _O.POSTED, ()),
        ((_O.QUEUED,), (_E.GIVE_UP,), _O.DROPPED, _FAIL),
        ((_O.QUEUED,), (_E.WITHDRAWN,), _O.DROPPED, (*_FAIL, _A.REPORT_VOIDED)),
        ((_O.QUEUED,), (_E.PEER_VOID,), _O.DROPPED, (*_FAIL, _A.ANSWER_VOIDED)),
        ((_O.POSTED,), (_E.LEASED,), None, ()),
        (_OPEN, (_E.TAKEN,), _O.ACCEPTED, ()),
        (_OPEN, (_E.REFUSED_CLEAN,), _O.DROPPED, _FAIL),
        # An earlier request may still lie somewhere, and be read later.
        (_OPEN, (_E.REFUSED,), _O.VOIDING, _FAIL),
        (_OPEN, (_E.ACK_RELAYED,), _O.RELAYED, (_A.WIPE, _A.TELL_RELAYED)),
        # Only 400 and 401 say that the peer holds nothing, so that every other failure ends in a void.
        (
            _OPEN,
            (_E.ACK_FAILED, _E.ACK_VOIDED, _E.ACK_NOT_PRESENT, _E.GIVE_UP, _E.WITHDRAWN),
            _O.VOIDING,
            _FAIL,
        ),
        (_OPEN, (_E.ACK_VOID_FAILED, _E.ACK_VOID_KEPT), None, ()),
        (_OPEN, (_E.PEER_VOID,), _O.VOIDED, (*_FAIL, _A.ANSWER_VOIDED)),
        ((_O.RELAYED,), (_E.TAKEN, _E.ACK_RELAYED, _E.ACK_VOID_FAILED, _E.ACK_VOID_KEPT), None, ()),
        # Contradictions: what was released stays, what was not is taken back.
        (
            (_O.RELAYED,),
            (_E.ACK_FAILED, _E.ACK_VOIDED, _E.ACK_NOT_PRESENT, _E.REFUSED, _E.REFUSED_CLEAN),
            _O.RECALLING,
            (_A.RECALL, _A.ALARM),
        ),
        ((_O.RELAYED,), (_E.PEER_VOID,), _O.RECALLING, (_A.RECALL,)),
        ((_O.RELAYED,), (_E.GIVE_UP, _E.WITHDRAWN), _O.VOIDING, ()),
        (
            (_O.RECALLING,),
            (*_LATE_ACKS, _E.ACK_RELAYED, _E.TAKEN, _E.REFUSED, _E.REFUSED_CLEAN, _E.PEER_VOID),
            None,
            (),
        ),
        # An owner that gives a key up has not released it: as good as taken back.
        ((_O.RECALLING,), (_E.RECALLED, _E.GIVE_UP, _E.WITHDRAWN), _O.VOIDING, ()),
        ((_O.RECALLING,), (_E.RECALLED_AS_ASKED,), _O.VOIDED, (_A.ANSWER_VOIDED, _A.REPORT_VOIDED)),
        ((_O.RECALLING,), (_E.NOT_RECALLED,), _O.RELAYED, (_A.ANSWER_VOID_FAILED,)),
        ((_O.VOIDING,), (_E.ACK_VOIDED, _E.ACK_NOT_PRESENT), _O.VOIDED, (_A.REPORT_VOIDED,)),
        ((_O.VOIDING,), (_E.ACK_VOID_KEPT,), _O.RELAYED, (_A.REPORT_KEPT,)),
        (
            (_O.VOIDING,),
            (
                *(_E.ACK_VOID_FAILED, _E.ACK_RELAYED, _E.ACK_FAILED, _E.TAKEN, _E.REFUSED),
                *(_E.GIVE_UP, _E.WITHDRAWN, _E.NOT_RECALLED),
            ),
            None,
            (),
        ),
        ((_O.VOIDING,), (_E.REFUSED_CLEAN,), _O.DROPPED, (_A.REPORT_VOIDED,)),
        ((_O.VOIDING,), (_E.PEER_VOID,), _O.VOIDED, (_A.ANSWER_VOIDED, _A.REPORT_VOIDED)),
        # The recall of a key that was given up meanwhile: the void is under way.
        ((_O.VOIDING,), (_E.RECALLED, _E.RECALLED_AS_ASKED), None, ()),
        ((_O.VOIDING,), (_E.EXHAUSTED,), _O.UNRESOLVED, (_A.REPORT_KEPT, _A.ALARM)),
        # A peer that relays, or takes, what it had given up holds it again.
        (_GONE, (_E.ACK_RELAYED, _E.TAKEN), _O.VOIDING, ()),
        (_GONE, (*_LATE_ACKS, _E.REFUSED, _E.REFUSED_CLEAN, _E.NOT_RECALLED), None, ()),
        (_GONE, (_E.RECALLED, _E.RECALLED_AS_ASKED, _E.EXHAUSTED), None, ()),
        (_GONE, (_E.PEER_VOID,), None, (_A.ANSWER_VOIDED,)),
        (_GONE, (_E.GIVE_UP, _E.WITHDRAWN), None, (_A.REPORT_VOIDED,)),
        ((_O.UNRESOLVED,), (_E.ACK_VOIDED, _E.ACK_NOT_PRESENT), _O.VOIDED, ()),
        ((_O.UNRESOLVED,), (_E.PEER_VOID,), _O.VOIDED, (_A.ANSWER_VOIDED,)),
        ((_O.UNRESOLVED,), (_E.ACK_RELAYED, _E.TAKEN), _O.VOIDING, ()),
        (
            (_O.UNRESOLVED,),
            (_E.ACK_FAILED, _E.ACK_VOID_FAILED, _E.ACK_VOID_KEPT, _E.REFUSED, _E.REFUSED_CLEAN),
            None,
            (),
        ),
        ((_O.UNRESOLVED,), (_E.GIVE_UP, _E.WITHDRAWN), None, (_A.REPORT_KEPT,)),
    ],
)

_I, _F = Inbound, InboundEvent
_CARRY = (_F.CARRIED, _F.NOT_CARRIED, _F.NOT_CARRIED_CLEAN)
_PEER_ANSWERS = (_F.PEER_VOIDED, _F.PEER_KEPT, _F.EXHAUSTED)

INBOUND: Machine[Inbound, InboundEvent] = Machine(
    "inbound",
    [
        ((_I.HELD,), (_F.REPEATED, _F.ACK_LOST), None, ()),
        ((_I.HELD,), (_F.CARRIED,), _I.RELAYED, (_A.WIPE, _A.ACK_RELAYED)),
        ((_I.HELD,), (_F.NOT_CARRIED_CLEAN,), _I.FAILED, (_A.WIPE, _A.ACK_FAILED)),
        # A target that does not answer may answer its void much later: nobody waits for that. The peer
        # voids what failed, and hears then whether a target had handed it out meanwhile.
        ((_I.HELD,), (_F.NOT_CARRIED,), _I.FAILING, (_A.WIPE, _A.VOID_TARGETS, _A.ACK_FAILED)),
        (
            (_I.HELD,),
            (_F.RECALL,),
            _I.FAILING,
            (_A.WIPE, _A.VOID_TARGETS, _A.ACK_FAILED, _A.REPORT_VOIDED),
        ),
        ((_I.HELD,), (_F.PEER_VOID,), _I.VOIDING, (_A.WIPE, _A.VOID_TARGETS)),
        ((_I.RELAYED,), (_F.REPEATED,), None, (_A.ACK_RELAYED,)),
        ((_I.RELAYED,), (*_CARRY, *_PEER_ANSWERS), None, ()),
        ((_I.RELAYED,), (_F.PEER_VOID,), _I.VOIDING, (_A.WIPE, _A.VOID_TARGETS)),
        # Its master may have the key: an ack that was heard and answered by nothing is lost, too.
        ((_I.RELAYED,), (_F.ACK_LOST,), _I.DISPUTED, ()),
        ((_I.RELAYED,), (_F.RECALL,), _I.RECALLING, (_A.WIPE,)),
        ((_I.FAILING,), (_F.TARGETS_VOIDED,), _I.FAILED, ()),
        ((_I.FAILING,), (_F.TARGETS_KEPT,), _I.FAILED, (_A.ALARM,)),
        ((_I.FAILING,), (_F.REPEATED,), None, (_A.ACK_FAILED,)),
        ((_I.FAILING,), (_F.PEER_VOID,), _I.VOIDING, ()),
        ((_I.FAILING,), (_F.RECALL,), None, (_A.REPORT_VOIDED,)),
        ((_I.FAILING,), (*_CARRY, _F.ACK_LOST), None, ()),
        ((_I.FAILED,), (_F.REPEATED,), None, (_A.ACK_FAILED,)),
        # What failed here may still be voiding further on.
        ((_I.FAILED,), (_F.PEER_VOID,), _I.VOIDING, (_A.VOID_TARGETS,)),
        ((_I.FAILED,), (_F.RECALL,), None, (_A.REPORT_VOIDED,)),
        ((_I.FAILED,), (*_CARRY, _F.ACK_LOST, _F.TARGETS_VOIDED, _F.TARGETS_KEPT), None, ()),
        ((_I.VOIDING,), (_F.TARGETS_VOIDED,), _I.VOIDED, (_A.ANSWER_VOIDED,)),
        ((_I.VOIDING,), (_F.TARGETS_KEPT,), _I.RELAYED, (_A.ANSWER_VOID_FAILED, _A.ALARM)),
        ((_I.VOIDING,), (_F.RECALL,), None, (_A.REPORT_VOIDED,)),
        ((_I.VOIDING,), (*_CARRY, *_PEER_ANSWERS, _F.PEER_VOID, _F.ACK_LOST), None, ()),
        # First the peer, then our targets: the one that asked is voiding already.
        ((_I.RECALLING,), (_F.PEER_VOIDED, _F.PEER_VOID), _I.VOIDING, (_A.VOID_TARGETS, _A.REPORT_VOIDED)),
        ((_I.RECALLING,), (_F.PEER_KEPT,), _I.RELAYED, (_A.REPORT_KEPT,)),
        ((_I.RECALLING,), (_F.EXHAUSTED,), _I.RELAYED, (_A.REPORT_KEPT, _A.ALARM)),
        ((_I.RECALLING,), (*_CARRY, _F.RECALL, _F.ACK_LOST), None, ()),
        ((_I.DISPUTED,), (_F.PEER_VOIDED, _F.PEER_VOID), _I.VOIDING, (_A.WIPE, _A.VOID_TARGETS)),
        ((_I.DISPUTED,), (_F.PEER_KEPT,), _I.RELAYED, ()),
        ((_I.DISPUTED,), (_F.EXHAUSTED,), _I.VOIDING, (_A.WIPE, _A.VOID_TARGETS)),
        ((_I.DISPUTED,), (_F.RECALL,), _I.RECALLING, (_A.WIPE,)),
        ((_I.DISPUTED,), (*_CARRY, _F.ACK_LOST), None, ()),
        ((_I.VOIDED,), (_F.PEER_VOID,), None, (_A.ANSWER_VOIDED,)),
        ((_I.VOIDED,), (_F.RECALL,), None, (_A.REPORT_VOIDED,)),
        (
            (_I.VOIDED,),
            (*_CARRY, *_PEER_ANSWERS, _F.ACK_LOST, _F.TARGETS_VOIDED, _F.TARGETS_KEPT),
            None,
            (),
        ),
    ],
)

#: Nothing is held and nothing is under way: what remains is the memory that the key_ID was used.
SETTLED_OUTBOUND = frozenset({_O.RELAYED, _O.VOIDED, _O.DROPPED, _O.UNRESOLVED})
SETTLED_INBOUND = frozenset({_I.RELAYED, _I.FAILED, _I.VOIDED})
#: Some association exists for the key: 400 and 401 would say that there is none (020 on ext_keys).
HOLDING_INBOUND = frozenset(Inbound) - {_I.FAILED, _I.VOIDED}
HOLDING_OUTBOUND = frozenset(Outbound) - {_O.VOIDED, _O.DROPPED, _O.UNRESOLVED}
