"""One transaction's moves of border keys, and all that follows from them in the same transaction.

A move (``mesh.core.border``) names actions; what they need (acks and voids to post, messages to seal,
owners to tell) is gathered and written by ``settle``, once, grouped by exchange. What happens in memory
afterwards is collected in ``After``. Nothing here awaits, and nothing is done twice: posts are derived
from the states of their keys, so that a request never outlives its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from mesh.core.border import (
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
from mesh.core.border_rules import MAX_KEYS, AckStatus, Association, PostKind
from mesh.node.border.ports import KEYS_PATH, VOID_PATH, After, LedgerPorts, peer_of_place
from mesh.node.deposits import void_stored
from mesh.node.keyports import AlarmPort
from mesh.store.tables import BorderKeyRow, ExchangeRow, PostRow, ReportRow, Tables

MAX_REVIVALS = 8
OPEN_OUTBOUND = (Outbound.QUEUED, Outbound.POSTED, Outbound.ACCEPTED)
_HELD_OUTBOUND = (Outbound.RELAYED, Outbound.RECALLING)

_AckKey = tuple[bytes, str, AckStatus, str, tuple[str, ...]]


class Ledger:
    """Moves keys within one change of the store; call ``settle`` at the end of it."""

    def __init__(self, tables: Tables, ports: LedgerPorts, after: After) -> None:
        self.tables = tables
        self._border = tables.border
        self._ports = ports
        self.after = after
        self._exchanges: dict[bytes, ExchangeRow] = {}
        self._touched: dict[bytes, None] = {}
        self._acks: dict[_AckKey, list[bytes]] = {}
        self._void_targets: dict[bytes, list[bytes]] = {}
        self._recalls: dict[bytes, list[bytes]] = {}
        self._told: dict[tuple[str, bytes, str], bytes] = {}
        self._steps: list[Callable[[], None]] = []

    def exchange(self, exchange_id: bytes) -> ExchangeRow:
        """The exchange, read once."""
        found = self._exchanges.get(exchange_id)
        if found is None:
            found = self._exchanges[exchange_id] = self._border.exchange(exchange_id)
        return found

    def redirect(self, exchange_id: bytes, callback: str) -> None:
        """The results of an inbound exchange go elsewhere from now on."""
        exchange = self.exchange(exchange_id)
        if exchange.callback != callback:
            self._border.set_callback(exchange_id, callback)
            self._exchanges[exchange_id] = replace(exchange, callback=callback)

    # outbound

    def outbound(self, key: BorderKeyRow, event: OutboundEvent) -> BorderKeyRow:
        """Moves an outbound key.

        Raises:
            PeerError: the move is illegal; nothing changed.
        """
        before = Outbound(key.state)
        state, actions = OUTBOUND.move(before, event)
        if before in (Outbound.VOIDED, Outbound.DROPPED, Outbound.UNRESOLVED) and state is Outbound.VOIDING:
            if key.revivals >= MAX_REVIVALS:
                return key
            key = replace(key, revivals=key.revivals + 1, is_peer_void=False)
        if state is Outbound.VOIDING and before is not state:
            # From here it counts which targets are voided.
            key = replace(key, acked=())
        key = replace(key, state=state)
        self._touched[key.exchange_id] = None
        for action in actions:
            key = self._act_outbound(key, action, event)
        self._border.save_key(key)
        if state is Outbound.VOIDING and before is not state and self._is_gone(key.peer):
            return self.outbound(key, OutboundEvent.EXHAUSTED)
        return key

    def _is_gone(self, peer: str) -> bool:
        """Whether a peer is not configured any more: nobody can be asked to void anything."""
        return self._ports.config.peer(peer) is None

    def _act_outbound(self, key: BorderKeyRow, action: Action, event: OutboundEvent) -> BorderKeyRow:
        if action is Action.WIPE:
            return replace(key, value=b"")
        if action in (Action.TELL_RELAYED, Action.TELL_FAILED):
            self._owe_tell(self.exchange(key.exchange_id))
        elif action is Action.RECALL:
            self._recalls.setdefault(key.exchange_id, []).append(key.key_id)
        elif action in (Action.ANSWER_VOIDED, Action.ANSWER_VOID_FAILED):
            return self._answer_void(key, action)
        elif action in (Action.REPORT_VOIDED, Action.REPORT_KEPT):
            self._report_outbound(key, is_kept=action is Action.REPORT_KEPT)
        elif action is Action.ALARM:
            self._alarm(key, event)
        return key

    # inbound

    def inbound(self, key: BorderKeyRow, event: InboundEvent) -> BorderKeyRow:
        """Moves an inbound key.

        Raises:
            PeerError: the move is illegal; nothing changed.
        """
        before = Inbound(key.state)
        state, actions = INBOUND.move(before, event)
        asked = key.is_void_asked
        key = replace(key, state=state)
        self._touched[key.exchange_id] = None
        for action in actions:
            if action is not Action.ALARM or not asked:
                key = self._act_inbound(key, action, event)
        self._border.save_key(key)
        if state in (Inbound.RECALLING, Inbound.DISPUTED) and before is not state and self._is_gone(key.peer):
            return self.inbound(key, InboundEvent.EXHAUSTED)
        return key

    def _act_inbound(self, key: BorderKeyRow, action: Action, event: InboundEvent) -> BorderKeyRow:
        exchange = self.exchange(key.exchange_id)
        if action is Action.WIPE:
            return replace(key, value=b"")
        if action is Action.ACK_RELAYED:
            self.ack(exchange, exchange.callback, AckStatus.RELAYED, [key.key_id])
        elif action is Action.ACK_FAILED:
            self.ack(exchange, exchange.callback, AckStatus.FAILED, [key.key_id])
        elif action is Action.VOID_TARGETS:
            self._void_targets.setdefault(key.exchange_id, []).append(key.key_id)
            return replace(key, is_kept=False)
        elif action in (Action.ANSWER_VOIDED, Action.ANSWER_VOID_FAILED):
            return self._answer_void(key, action)
        elif action in (Action.REPORT_VOIDED, Action.REPORT_KEPT):
            self._report_inbound(key, is_kept=action is Action.REPORT_KEPT)
        elif action is Action.ALARM:
            self._alarm(key, event)
        return key

    def carried(self, key: BorderKeyRow, place: str, *, is_held: bool, is_clean: bool = False) -> None:
        """One place of an inbound key has answered.

        Args:
            is_held: it holds the key durably.
            is_clean: if not: it certainly does not.
        """
        if key.state != Inbound.HELD:
            return
        places = [carry.place for carry in self._border.carries(key.exchange_id)]
        if not is_held:
            is_alone = is_clean and len(places) == 1
            event = InboundEvent.NOT_CARRIED_CLEAN if is_alone else InboundEvent.NOT_CARRIED
            self.inbound(key, event)
            return
        key = replace(key, acked=tuple(dict.fromkeys((*key.acked, place))))
        if set(places) <= set(key.acked):
            self.inbound(key, InboundEvent.CARRIED)
        else:
            self._border.save_key(key)

    def end_carries(self, exchange_ids: Iterable[bytes]) -> None:
        """Inbound keys that did not reach all their targets in time fail."""
        for exchange_id in exchange_ids:
            for key in self._border.keys(exchange_id):
                if key.state == Inbound.HELD:
                    self.inbound(key, InboundEvent.NOT_CARRIED)

    def place_voided(self, key: BorderKeyRow, *, is_kept: bool) -> None:
        """One place has answered whether it voided an inbound key."""
        if is_kept:
            key = replace(key, is_kept=True)
            self._border.save_key(key)
        self._targets_settled(key)

    def _targets_settled(self, key: BorderKeyRow) -> None:
        """Goes on once no place owes the void of this key any more."""
        if key.state not in (Inbound.VOIDING, Inbound.FAILING):
            return
        calls = self._border.calls_of(key.exchange_id)
        if any(call.purpose == "void" and key.key_id in call.key_ids for call in calls):
            return
        for carry in self._border.carries(key.exchange_id):
            further = peer_of_place(carry.place)
            onward = None if further is None else self._border.key(key.key_id, further, is_outbound=True)
            if onward is not None and onward.state in (Outbound.VOIDING, Outbound.RECALLING):
                return
        event = InboundEvent.TARGETS_KEPT if key.is_kept else InboundEvent.TARGETS_VOIDED
        self.inbound(key, event)

    # what both have

    def ack(self, exchange: ExchangeRow, url: str, status: AckStatus, key_ids: Sequence[bytes]) -> None:
        """An ack to the peer; without a URL to whoever waits for it in a synchronous request."""
        self.ack_as(exchange, url, status, key_ids, Association(exchange.initiator, exchange.targets))

    def ack_as(
        self,
        exchange: ExchangeRow,
        url: str,
        status: AckStatus,
        key_ids: Sequence[bytes],
        association: Association,
    ) -> None:
        """The same, with the association that the peer named."""
        group = (exchange.exchange_id, url, status, association.initiator, association.targets)
        self._acks.setdefault(group, []).extend(key_ids)

    def _answer_void(self, key: BorderKeyRow, action: Action) -> BorderKeyRow:
        if key.is_void_asked:
            status = AckStatus.VOIDED if action is Action.ANSWER_VOIDED else AckStatus.FAILED_TO_VOID
            self.ack(self.exchange(key.exchange_id), key.void_callback, status, [key.key_id])
        return replace(key, is_void_asked=False, void_callback="")

    def _alarm(self, key: BorderKeyRow, event: InboundEvent | OutboundEvent) -> None:
        alarms = self._ports.alarms
        if event in (InboundEvent.EXHAUSTED, OutboundEvent.EXHAUSTED):
            self.after.steps.append(lambda: raise_void_alarm(alarms, key.peer))
            return
        self.after.steps.append(
            lambda: alarms.raise_alarm(
                f"border/{key.peer}/contradiction",
                "warning",
                f"the peer's words about a key do not fit: {event.value}, now {key.state}",
                "look at both key managers' logs for this key_ID; it is not handed out any more here",
            )
        )

    # reports: to whoever asked for a void

    def has_reporter(self, key: BorderKeyRow) -> bool:
        """Whether somebody waits to learn if an outbound key could be voided."""
        exchange = self.exchange(key.exchange_id)
        if exchange.owner == "transit":
            return self._inbound_of(exchange, key.key_id) is not None
        return any(key.key_id in report.open_ids for report in self._border.reports(exchange.source))

    def _inbound_of(self, exchange: ExchangeRow, key_id: bytes) -> BorderKeyRow | None:
        """The inbound side of a key in transit through this node, while its targets are being voided."""
        inbound = self.exchange(exchange.source_job)
        key = self._border.key(key_id, inbound.peer, is_outbound=False)
        return key if key is not None and key.state in (Inbound.VOIDING, Inbound.FAILING) else None

    def _report_outbound(self, key: BorderKeyRow, *, is_kept: bool) -> None:
        exchange = self.exchange(key.exchange_id)
        if exchange.owner == "transit":
            # After this move is saved: the inbound side looks at the state of this one.
            self._later(lambda: self._report_transit(exchange, key.key_id, is_kept=is_kept))
        elif exchange.owner == "deposit":
            self._report(exchange.source, key.key_id, is_kept=is_kept)

    def _report_transit(self, exchange: ExchangeRow, key_id: bytes, *, is_kept: bool) -> None:
        inbound = self._inbound_of(exchange, key_id)
        if inbound is not None:
            self.place_voided(inbound, is_kept=is_kept)

    def _report_inbound(self, key: BorderKeyRow, *, is_kept: bool) -> None:
        """To a further KME of ours, or to the outbound side at this node, that recalled the key."""
        for carry in self._border.carries(key.exchange_id):
            further = peer_of_place(carry.place)
            if further is None:
                self._report(carry.place, key.key_id, is_kept=is_kept)
                continue
            onward = self._border.key(key.key_id, further, is_outbound=True)
            if onward is not None and onward.state == Outbound.RECALLING:
                self.recalled(onward, is_back=not is_kept)

    def recalled(self, key: BorderKeyRow, *, is_back: bool) -> BorderKeyRow:
        """The owner of an outbound key has answered a recall."""
        if not is_back:
            return self.outbound(key, OutboundEvent.NOT_RECALLED)
        return self.outbound(
            key, OutboundEvent.RECALLED_AS_ASKED if key.is_peer_void else OutboundEvent.RECALLED
        )

    def _report(self, source: str, key_id: bytes, *, is_kept: bool) -> None:
        for report in self._border.reports(source):
            if key_id not in report.open_ids:
                continue
            left = tuple(one for one in report.open_ids if one != key_id)
            kept = (*report.kept_ids, key_id) if is_kept else report.kept_ids
            self._border.put_report(ReportRow(source, report.job_id, left, kept))
            if not left:
                self._ports.resolve(self.tables, self.after, source, report.job_id, kept)

    # settling

    def _later(self, step: Callable[[], None]) -> None:
        self._steps.append(step)

    def settle(self) -> None:
        """Does what the moves asked for, until nothing is left; then writes posts."""
        while self._steps or self._void_targets or self._recalls or self._told:
            while self._steps:
                self._steps.pop(0)()
            for exchange_id in list(self._void_targets):
                self._do_void_targets(self.exchange(exchange_id), self._void_targets.pop(exchange_id))
            for exchange_id in list(self._recalls):
                self._do_recalls(self.exchange(exchange_id), self._recalls.pop(exchange_id))
            for owner in list(self._told):
                self._tell(self.exchange(self._told.pop(owner)))
        self._write_acks()
        for exchange_id in self._touched:
            self._prune(self.exchange(exchange_id))

    def _do_void_targets(self, exchange: ExchangeRow, key_ids: list[bytes]) -> None:
        border = self._border
        for carry in border.carries(exchange.exchange_id):
            if carry.state == "failed":
                continue
            further = peer_of_place(carry.place)
            if further is not None:
                for key_id in key_ids:
                    onward = border.key(key_id, further, is_outbound=True)
                    if onward is not None:
                        self.outbound(onward, OutboundEvent.WITHDRAWN)
            elif carry.place == self._ports.own_id:
                self._void_here(exchange, key_ids)
            else:
                self._void_there(exchange, carry.place, key_ids)
        for key_id in key_ids:
            key = border.key(key_id, exchange.peer, is_outbound=False)
            if key is not None:
                self._targets_settled(key)

    def _void_here(self, exchange: ExchangeRow, key_ids: Iterable[bytes]) -> None:
        expires_at_s = int(self._ports.now_s() + self._ports.config.keep_s)
        for key_id in void_stored(self.tables, exchange.initiator, key_ids, expires_at_s):
            key = self._border.key(key_id, exchange.peer, is_outbound=False)
            if key is not None:
                self._border.save_key(replace(key, is_kept=True))

    def _void_there(self, exchange: ExchangeRow, kme: str, key_ids: Sequence[bytes]) -> None:
        """By a sealed message; what has not even left yet is taken off its way instead."""
        border = self._border
        unsent: set[bytes] = set()
        for call in border.calls_of(exchange.exchange_id):
            if call.purpose == "carry" and call.kme == kme and call.job_id is None:
                unsent |= set(call.key_ids) & set(key_ids)
                border.delete_call(call.call_id)
                left = [key_id for key_id in call.key_ids if key_id not in unsent]
                if left:
                    self.call("carry", exchange.exchange_id, kme, left)
        sent = [key_id for key_id in key_ids if key_id not in unsent]
        if sent:
            self.call("void", exchange.exchange_id, kme, sent)

    def call(self, purpose: str, exchange_id: bytes, kme: str, key_ids: Sequence[bytes]) -> None:
        """A sealed message is wanted."""
        row = self._border.put_call(purpose, exchange_id, kme, key_ids)
        self.after.steps.append(self._ports.call_added(self.tables, row))

    def _do_recalls(self, exchange: ExchangeRow, key_ids: list[bytes]) -> None:
        if exchange.owner == "deposit":
            self.call("recall", exchange.exchange_id, exchange.source, key_ids)
            return
        for key_id in key_ids:
            if exchange.owner == "transit":
                inbound = self._border.key(key_id, self.exchange(exchange.source_job).peer, is_outbound=False)
                if inbound is not None:
                    self.inbound(inbound, InboundEvent.RECALL)
                continue
            key = self._border.key(key_id, exchange.peer, is_outbound=True)
            if key is not None and key.state == Outbound.RECALLING:
                self.recalled(
                    key,
                    is_back=self._ports.take_back(self.tables, self.after, key_id, border=self._ports.own_id),
                )

    def _owe_tell(self, exchange: ExchangeRow) -> None:
        """An owner is told once about all that it asked for, in transit once per peer."""
        peer = exchange.peer if exchange.owner == "transit" else ""
        self._told[exchange.owner, exchange.source_job, peer] = exchange.exchange_id

    def _tell(self, exchange: ExchangeRow) -> None:
        """Tells the owner once every key of what it asked for has an outcome."""
        if exchange.owner == "transit":
            self._tell_transit(exchange)
            return
        keys = [
            key
            for one in self._border.exchanges_for(exchange.source, exchange.source_job)
            for key in self._border.keys(one.exchange_id)
        ]
        if any(key.state in OPEN_OUTBOUND for key in keys):
            return
        failed = list(dict.fromkeys(key.key_id for key in keys if key.state not in _HELD_OUTBOUND))
        unwanted = {key.key_id for key in keys}
        if exchange.owner == "deposit":
            self._ports.resolve(self.tables, self.after, exchange.source, exchange.source_job, failed)
            # What one peer did not take, neither another one nor a slave homed here may keep (4.9).
            unwanted = set(failed)
            for key_id in failed:
                self.tables.keystore.void(exchange.initiator, key_id)
        elif self._ports.tell_local(self.tables, self.after, exchange.source_job, failed) and not failed:
            return
        # A relayed nobody waits for becomes a void (protocol 6.2).
        for key in keys:
            if key.key_id in unwanted and key.state in _HELD_OUTBOUND:
                self.outbound(key, OutboundEvent.GIVE_UP)

    def _tell_transit(self, exchange: ExchangeRow) -> None:
        inbound_exchange = self.exchange(exchange.source_job)
        for key in self._border.keys(exchange.exchange_id):
            if key.state in OPEN_OUTBOUND:
                continue
            inbound = self._border.key(key.key_id, inbound_exchange.peer, is_outbound=False)
            if inbound is not None:
                place = "020/" + exchange.peer
                self.carried(inbound, place, is_held=key.state in _HELD_OUTBOUND, is_clean=True)

    # posts

    def _write_acks(self) -> None:
        now_ms = int(self._ports.now_s() * 1000)
        for (exchange_id, url, status, initiator, targets), key_ids in self._acks.items():
            exchange = self.exchange(exchange_id)
            unique = list(dict.fromkeys(key_ids))
            if not url:
                self.after.steps.append(
                    lambda peer=exchange.peer, ids=unique, what=status: self._ports.answered(  # type: ignore[misc]  # bound now
                        peer, ids, what
                    )
                )
                continue
            self._supersede(exchange_id, unique)
            give_up_ms = now_ms + int(self._ports.config.ack_give_up_s * 1000)
            for at in range(0, len(unique), MAX_KEYS):
                self._put_post(
                    PostKind.ACK,
                    exchange,
                    url,
                    Association(initiator, targets),
                    unique[at : at + MAX_KEYS],
                    give_up_ms=give_up_ms,
                    status=status.value,
                )
        self._acks.clear()

    def _supersede(self, exchange_id: bytes, key_ids: Iterable[bytes]) -> None:
        """An older ack about the same key would contradict the newer one."""
        newer = set(key_ids)
        for post in self._border.posts_of(exchange_id):
            if post.kind == PostKind.ACK:
                self._narrow(post, [key_id for key_id in post.key_ids if key_id not in newer])

    def post_keys(self, exchange: ExchangeRow) -> None:
        """The request that hands an outbound exchange over."""
        peer = self._ports.config.peer(exchange.peer)
        url = "" if peer is None else peer.url + KEYS_PATH
        key_ids = [key.key_id for key in self._border.keys(exchange.exchange_id)]
        association = Association(exchange.initiator, exchange.targets)
        self._put_post(PostKind.KEYS, exchange, url, association, key_ids, give_up_ms=exchange.give_up_ms)

    def _prune(self, exchange: ExchangeRow) -> None:
        """Requests follow the states of their keys: none outlives its reason, none is missing."""
        keys = self._border.keys(exchange.exchange_id)
        is_settled = all(
            key.state in (SETTLED_OUTBOUND if key.is_outbound else SETTLED_INBOUND) for key in keys
        )
        if is_settled != (exchange.settled_s > 0):
            settled_s = int(self._ports.now_s()) if is_settled else 0
            self._border.set_settled(exchange.exchange_id, settled_s)
            # What is settled is kept for long, and nobody needs extensions any more.
            if is_settled and (exchange.extension or any(key.extension for key in keys)):
                self._border.wipe_extensions(exchange.exchange_id)
            self._exchanges[exchange.exchange_id] = replace(exchange, settled_s=settled_s)
        to_post = {key.key_id for key in keys if key.state in (Outbound.QUEUED, Outbound.POSTED)}
        to_void = [key.key_id for key in keys if needs_void(key)]
        asked: set[bytes] = set()
        for post in self._border.posts_of(exchange.exchange_id):
            if post.kind == PostKind.KEYS and exchange.is_outbound:
                self._narrow(post, [key_id for key_id in post.key_ids if key_id in to_post])
            elif post.kind == PostKind.VOID:
                left = [key_id for key_id in post.key_ids if key_id in to_void]
                asked.update(left)
                self._narrow(post, left)
        missing = [key_id for key_id in to_void if key_id not in asked]
        peer = self._ports.config.peer(exchange.peer)
        if not missing or peer is None:
            return
        give_up_ms = int((self._ports.now_s() + self._ports.config.void_give_up_s) * 1000)
        association = Association(exchange.initiator, exchange.targets)
        for at in range(0, len(missing), MAX_KEYS):
            part = missing[at : at + MAX_KEYS]
            url = peer.url + VOID_PATH
            self._put_post(PostKind.VOID, exchange, url, association, part, give_up_ms=give_up_ms)

    def _narrow(self, post: PostRow, left: Sequence[bytes]) -> None:
        if len(left) == len(post.key_ids):
            return
        self._border.narrow_post(post.job_id, left)
        if not left:
            self.after.steps.append(lambda: self._ports.post_gone(post.job_id))

    def _put_post(
        self,
        kind: PostKind,
        exchange: ExchangeRow,
        url: str,
        association: Association,
        key_ids: Sequence[bytes],
        *,
        give_up_ms: int,
        status: str = "",
    ) -> None:
        row = PostRow(
            self._ports.randomness(16),
            kind.value,
            exchange.exchange_id,
            exchange.peer,
            url,
            status,
            association.initiator,
            association.targets,
            tuple(key_ids),
            give_up_ms,
        )
        self._border.put_post(row)
        self.after.steps.append(lambda: self._ports.post_added(row))


def raise_void_alarm(alarms: AlarmPort, peer: str, count: int = 1) -> None:
    """Keys that a peer never voided, or that nobody can ask it about any more."""
    alarms.raise_alarm(
        f"border/{peer}/void",
        "warning",
        f"{count} keys could not be voided at {peer}; they are refused here for ever",
        "ask the operator of that key manager to void keys of these associations",
    )


def needs_void(key: BorderKeyRow) -> bool:
    """Whether the peer has still to be asked to void this key."""
    if key.is_outbound:
        return key.state == Outbound.VOIDING
    if key.state == Inbound.VOIDED:
        return not key.is_peer_void
    return key.state in (Inbound.RECALLING, Inbound.DISPUTED)
