"""What foreign key managers say and want about keys under way: acks and voids.

Owns who an ack counts for (this peer, this association, target by target) and that a void is answered
for every key_ID it names, one that never came included, which leaves a tombstone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from mesh.core.border import INBOUND, OUTBOUND, Inbound, InboundEvent, Outbound, OutboundEvent
from mesh.core.border_rules import ACK_EVENTS, AckStatus, Association, Peer, Problem
from mesh.node.border.exchanges import Exchanges
from mesh.node.border.ledger import OPEN_OUTBOUND, Ledger
from mesh.node.border.ports import Ack
from mesh.node.border.routing import Refused
from mesh.store.tables import BorderKeyRow


class Settlements:
    """Applies acks and voids; each method runs within one change of the store.

    Args:
        heard: told of each key that a peer acked, once that is durable: peer, status, exchange.
    """

    def __init__(
        self,
        exchanges: Exchanges,
        *,
        now_s: Callable[[], float],
        heard: Callable[[str, AckStatus, bytes], None],
    ) -> None:
        self._exchanges = exchanges
        self._heard = heard
        self._now_s = now_s

    def apply_acks(
        self, ledger: Ledger, peer: Peer, acks: Sequence[Ack], *, skips_unknown: bool = False
    ) -> None:
        """Applies all containers in order, or none.

        Args:
            skips_unknown: leave out what is not known here instead of refusing.

        Raises:
            Refused: NOT_PRESENT, with the key_IDs that are not of this peer and association.
        """
        unknown: list[bytes] = []
        for ack in acks:
            for key_id in ack.key_ids:
                if not self._apply_ack(ledger, peer, ack, key_id):
                    unknown.append(key_id)
        if unknown and not skips_unknown:
            raise Refused(
                Problem.NOT_PRESENT,
                "acks name keys that are not under way with this key manager",
                key_ids=",".join(key_id.hex() for key_id in dict.fromkeys(unknown)),
            )

    def _apply_ack(self, ledger: Ledger, peer: Peer, ack: Ack, key_id: bytes) -> bool:
        border = ledger.tables.border
        key = border.key(key_id, peer.kme_id, is_outbound=True)
        if key is None:
            return self._apply_void_ack(ledger, peer, ack, key_id)
        exchange = ledger.exchange(key.exchange_id)
        is_ours = ack.association.initiator == exchange.initiator
        if not is_ours or not set(ack.association.targets) <= set(exchange.targets):
            return False
        state = Outbound(key.state)
        if not OUTBOUND.allows(state, OutboundEvent.ACK_RELAYED):
            return False
        ledger.after.steps.append(partial(self._heard, peer.kme_id, ack.status, key.exchange_id))
        targets = ack.association.targets
        counts = (ack.status is AckStatus.RELAYED and state in OPEN_OUTBOUND) or (
            ack.status in (AckStatus.VOIDED, AckStatus.KEY_NOT_PRESENT) and state is Outbound.VOIDING
        )
        if counts:
            # Acks may come target by target.
            key = replace(key, acked=tuple(sorted({*key.acked, *targets})))
            if key.acked != exchange.targets:
                border.save_key(key)
                return True
        ledger.outbound(key, self._ack_event(ledger, key, ack.status))
        return True

    @staticmethod
    def _ack_event(ledger: Ledger, key: BorderKeyRow, status: AckStatus) -> OutboundEvent:
        if status is AckStatus.RELAYED:
            return OutboundEvent.ACK_RELAYED
        if status is AckStatus.FAILED_TO_VOID and key.state == Outbound.VOIDING and ledger.has_reporter(key):
            return OutboundEvent.ACK_VOID_KEPT
        return ACK_EVENTS[status]

    @staticmethod
    def _apply_void_ack(ledger: Ledger, peer: Peer, ack: Ack, key_id: bytes) -> bool:
        """An ack to a void that we asked for, about a key that the peer once handed to us."""
        key = ledger.tables.border.key(key_id, peer.kme_id, is_outbound=False)
        if key is None or ack.status in (AckStatus.RELAYED, AckStatus.FAILED):
            return False
        if ledger.exchange(key.exchange_id).initiator != ack.association.initiator:
            return False
        event = InboundEvent.PEER_VOIDED
        if ack.status is AckStatus.FAILED_TO_VOID:
            event = InboundEvent.PEER_KEPT
        else:
            key = replace(key, is_peer_void=True)
        if INBOUND.allows(Inbound(key.state), event):
            ledger.inbound(key, event)
        return True

    def void(
        self,
        ledger: Ledger,
        peer: Peer,
        association: Association,
        key_ids: Sequence[bytes],
        *,
        is_all: bool,
        callback: str,
    ) -> list[bytes]:
        """Voids keys that the peer handed to us, or we to it; returns those that will be acked."""
        border = ledger.tables.border
        if is_all:
            every = border.keys_of(peer.kme_id, association.initiator, association.targets)
            for one in every:
                self._void_key(ledger, one, callback)
            return [one.key_id for one in every]
        missing: list[bytes] = []
        for key_id in dict.fromkeys(key_ids):
            known = border.key(key_id, peer.kme_id, is_outbound=True)
            row = known or border.key(key_id, peer.kme_id, is_outbound=False)
            if row is None:
                missing.append(key_id)
                continue
            exchange = ledger.exchange(row.exchange_id)
            if (exchange.initiator, exchange.targets) == (association.initiator, association.targets):
                self._void_key(ledger, row, callback)
            else:
                # Held for others than the peer says: neither voided nor absent.
                ledger.ack_as(exchange, callback, AckStatus.FAILED_TO_VOID, [key_id], association)
        if missing:
            self._exchanges.bound_memory(ledger.tables, peer.kme_id, len(missing))
            self._bury(ledger, peer, association, missing, callback)
        return list(dict.fromkeys(key_ids))

    @staticmethod
    def _void_key(ledger: Ledger, row: BorderKeyRow, callback: str) -> None:
        row = replace(row, is_void_asked=True, void_callback=callback, is_peer_void=True)
        if row.is_outbound:
            ledger.outbound(row, OutboundEvent.PEER_VOID)
        else:
            ledger.inbound(row, InboundEvent.PEER_VOID)

    def _bury(
        self, ledger: Ledger, peer: Peer, association: Association, key_ids: Iterable[bytes], callback: str
    ) -> None:
        """A late request must not bring back what was voided before it came."""
        border = ledger.tables.border
        exchange = self._exchanges.begin(
            ledger,
            peer.kme_id,
            association,
            is_outbound=False,
            give_up_ms=int(self._now_s() * 1000),
            is_settled=True,
        )
        buried = list(key_ids)
        for key_id in buried:
            border.put_key(
                BorderKeyRow(
                    False, peer.kme_id, key_id, exchange.exchange_id, Inbound.VOIDED, b"", is_peer_void=True
                )
            )
        ledger.ack(exchange, callback, AckStatus.KEY_NOT_PRESENT, buried)
