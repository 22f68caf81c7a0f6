"""What other KMEs of ours seal for this node about keys that cross borders (protocol 4.8, 6).

Owns who may export, void and recall: keys are exported for a master whose home (or previous border) is
the message's source, and only that source may void them; only the border that has a key may recall it.
An export's keys are redeemed and its exchange is stored in the transaction that applies the message.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from mesh.core.border import InboundEvent, Outbound, OutboundEvent
from mesh.core.border_rules import MAX_KEYS, Association
from mesh.errors import ErrorReason, MeshError
from mesh.node.border.exchanges import Exchanges
from mesh.node.border.ledger import Ledger
from mesh.node.border.ports import After, Arrival, DocumentPort, LedgerPorts
from mesh.node.border.routing import Refused, Routing
from mesh.node.deposits import Applied, InboundDeposits, Outcome, void_stored
from mesh.node.keyports import Surroundings
from mesh.node.redeem import Redeemer
from mesh.store.tables import BorderKeyRow, ReportRow, Tables
from mesh.v1.peer_pb2 import ExportKeys, KeyDeposit, RecallKeys, VoidKeys

_MAX_GIVE_UP_S = 600.0

_LOG = logging.getLogger("keymesh.border")


class BorderMessages:
    """The sealed messages that a border (and where its keys come from) takes.

    Args:
        first_state: where a new outbound key starts: posted, if a gateway takes it at once.
    """

    def __init__(
        self,
        around: Surroundings,
        *,
        ports: LedgerPorts,
        document: DocumentPort,
        routing: Routing,
        exchanges: Exchanges,
        deposits: InboundDeposits,
        redeemer: Redeemer,
        first_state: Callable[[], Outbound],
    ) -> None:
        self._around = around
        self._ports = ports
        self._document = document
        self._routing = routing
        self._exchanges = exchanges
        self._deposits = deposits
        self._redeemer = redeemer
        self._first_state = first_state

    # keys to hand over

    def prepare_export(self, source: str, job_id: bytes, export: ExportKeys) -> Applied:
        """Keys that the source drew towards this border for one foreign slave."""
        refusal = self._deposits.may_name(source, export.master_sae_id)
        if refusal is not None:
            return _refusing(refusal)
        try:
            document = self._document()
            if document.home(export.master_sae_id) is None:
                return _refusing(ErrorReason.NOT_AUTHORIZED)
            places = self._routing.onward([export.slave_sae_id])
            redemption = self._redeemer.prepare(
                document, export.slave_sae_id, export.master_sae_id, export.key_ids
            )
        except MeshError as exc:
            _LOG.warning("export refused", extra={"source": source, "cause": str(exc)})
            return _refusing(_reason(exc))
        keys = [Arrival(key_id, value) for key_id, value in redemption.keys]

        def start(ledger: Ledger) -> Outcome:
            if not self._exchanges.has_room(ledger.tables, places, len(keys)):
                return Outcome(ErrorReason.BUSY)
            redemption.use(ledger.tables)
            self._start(
                ledger,
                (source, job_id),
                (export.master_sae_id, places),
                keys,
                extension=b"",
                give_up_s=export.give_up_s,
            )
            return Outcome(is_pending=True)

        return self._applied(start, told=redemption.settled)

    def prepare_keys(self, source: str, job_id: bytes, deposit: KeyDeposit) -> Applied | None:
        """Keys with their bytes: in transit, or for several slaves of which some are foreign."""
        document = self._document()
        own = self._around.own_id
        foreign = [sae for sae in deposit.slave_sae_ids if document.border_for(sae) == own]
        if not foreign:
            return None
        refusal = self._deposits.may_name(source, deposit.master_sae_id)
        ids = [key.key_id for key in deposit.keys]
        is_shaped = 0 < len(set(ids)) == len(ids) <= MAX_KEYS and all(len(key_id) == 16 for key_id in ids)
        if not is_shaped:
            refusal = ErrorReason.INVALID_ARGUMENT
        if refusal is not None:
            return _refusing(refusal)
        try:
            places = self._routing.onward(foreign)
        except Refused as exc:
            _LOG.warning("keys cannot be handed on", extra={"source": source, "cause": str(exc)})
            return _refusing(_reason(exc))
        here = [sae for sae in deposit.slave_sae_ids if document.home(sae) == own]
        local = self._deposits.prepare_keys(source, deposit) if here else None
        keys = [Arrival(key.key_id, key.value, key.extension) for key in deposit.keys]
        extension = deposit.extension_optional

        def start(ledger: Ledger) -> Outcome:
            tables = ledger.tables
            if any(tables.border.everywhere(key.key_id) for key in keys):
                return Outcome(ErrorReason.INVALID_ARGUMENT)  # it was here before: a loop
            stored = [tables.keystore.stored_key(deposit.master_sae_id, key.key_id) for key in keys]
            if any(row is not None for row in stored):
                return Outcome(ErrorReason.INVALID_ARGUMENT)  # void, even before it came
            if not self._exchanges.has_room(tables, places, len(keys)):
                return Outcome(ErrorReason.BUSY)
            if local is not None:
                outcome = local.change(tables)
                if outcome.reason is not None:
                    return outcome
            self._start(
                ledger,
                (source, job_id),
                (deposit.master_sae_id, places),
                keys,
                extension=extension,
                give_up_s=deposit.give_up_s,
            )
            return Outcome(is_pending=True)

        return self._applied(start)

    def _start(
        self,
        ledger: Ledger,
        owner: tuple[str, bytes],
        association: tuple[str, dict[str, list[str]]],
        keys: Sequence[Arrival],
        *,
        extension: bytes,
        give_up_s: float,
    ) -> None:
        (source, job_id), (master, places) = owner, association
        give_up_ms = int((self._around.now_s() + min(max(give_up_s, 0.1), _MAX_GIVE_UP_S)) * 1000)
        for peer, targets in places.items():
            self._exchanges.export(
                ledger,
                peer,
                Association.of(master, targets),
                keys,
                owner="deposit",
                source=source,
                source_job=job_id,
                extension=extension,
                give_up_ms=give_up_ms,
                state=self._first_state(),
            )

    # keys to void, keys to take back

    def prepare_void(self, source: str, job_id: bytes, void: VoidKeys) -> Applied | None:
        """Keys of which some were handed to this border by the source; None if none was."""
        if len(void.key_ids) > MAX_KEYS or any(len(key_id) != 16 for key_id in void.key_ids):
            return _refusing(ErrorReason.INVALID_ARGUMENT)

        def mine(tables: Tables, key_id: bytes) -> list[BorderKeyRow]:
            return [
                row
                for row in tables.border.everywhere(key_id)
                if row.is_outbound and self._is_owner(tables, row, source, void.master_sae_id)
            ]

        if not self._ports.read(lambda tables: any(mine(tables, key_id) for key_id in void.key_ids)):
            return None
        event = OutboundEvent.WITHDRAWN if void.reports else OutboundEvent.GIVE_UP

        def start(ledger: Ledger) -> Outcome:
            tables = ledger.tables
            crossing = {key_id: rows for key_id in void.key_ids if (rows := mine(tables, key_id))}
            master = void.master_sae_id
            stored = [
                key_id
                for key_id in void.key_ids
                if key_id not in crossing or tables.keystore.stored_key(master, key_id) is not None
            ]
            expires_at_s = int(self._around.now_s() + self._ports.config.keep_s)
            kept = void_stored(tables, master, stored, expires_at_s)
            if void.reports:
                tables.border.put_report(ReportRow(source, job_id, tuple(crossing), tuple(kept)))
            for rows in crossing.values():
                for row in rows:
                    ledger.outbound(row, event)
            ledger.settle()
            if void.reports and _is_owed(tables, source, job_id):
                return Outcome(is_pending=True)
            stuck = [
                key_id
                for key_id in crossing
                if any(row.state == Outbound.UNRESOLVED for row in mine(tables, key_id))
            ]
            return Outcome(failed=(*kept, *stuck))

        return self._applied(start)

    @staticmethod
    def _is_owner(tables: Tables, row: BorderKeyRow, source: str, master: str) -> bool:
        exchange = tables.border.exchange(row.exchange_id)
        return (exchange.owner, exchange.source, exchange.initiator) == ("deposit", source, master)

    def prepare_recall(self, source: str, job_id: bytes, recall: RecallKeys) -> Applied:
        """Keys that a border, to which we gave them, wants taken back."""
        if len(recall.key_ids) > MAX_KEYS or any(len(key_id) != 16 for key_id in recall.key_ids):
            return _refusing(ErrorReason.INVALID_ARGUMENT)

        def start(ledger: Ledger) -> Outcome:
            tables = ledger.tables
            transit = {
                key_id: row
                for key_id in recall.key_ids
                for row in tables.border.everywhere(key_id)
                if not row.is_outbound and _went_to(tables, row, source)
            }
            kept = [
                key_id
                for key_id in recall.key_ids
                if key_id not in transit
                and not self._ports.take_back(tables, ledger.after, key_id, border=source)
            ]
            tables.border.put_report(ReportRow(source, job_id, tuple(transit), tuple(kept)))
            for row in transit.values():
                ledger.inbound(row, InboundEvent.RECALL)
            ledger.settle()
            if _is_owed(tables, source, job_id):
                return Outcome(is_pending=True)
            return Outcome(failed=tuple(kept))

        return self._applied(start)

    # how they are applied

    def _applied(
        self, start: Callable[[Ledger], Outcome], *, told: Callable[[bool], None] = lambda _: None
    ) -> Applied:
        after = After()

        def settled(is_durable: bool) -> None:
            told(is_durable)
            if not is_durable:
                after.revert()

        def change(tables: Tables) -> Outcome:
            ledger = Ledger(tables, self._ports, after)
            outcome = start(ledger)
            ledger.settle()
            return outcome

        return Applied(change, after.run, settled=settled)


def _refusing(reason: ErrorReason) -> Applied:
    return Applied(lambda tables: Outcome(reason), lambda: None)


def _reason(error: MeshError) -> ErrorReason:
    return ErrorReason.NO_ROUTE if isinstance(error, Refused) else error.reason


def _is_owed(tables: Tables, source: str, job_id: bytes) -> bool:
    return any(one.job_id == job_id for one in tables.border.reports(source))


def _went_to(tables: Tables, row: BorderKeyRow, place: str) -> bool:
    return any(carry.place == place for carry in tables.border.carries(row.exchange_id))
