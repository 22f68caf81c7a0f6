"""Keys of foreign key managers taken in, and keys handed on to them: exchanges and what starts them.

Owns idempotence by key_ID (the same key again is welcome, anything else under its key_ID is not), loops
(a key_ID that was here another way), tombstones, and that all keys of a request are stored or none.
"""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Iterable, Sequence

from mesh.core.border import HOLDING_INBOUND, HOLDING_OUTBOUND, Inbound, InboundEvent, Outbound
from mesh.core.border_rules import Association, BorderConfig, Peer, Problem, portions
from mesh.errors import ErrorReason, ShortageError
from mesh.node.border.ledger import Ledger
from mesh.node.border.ports import Arrival, DocumentPort, peer_of_place
from mesh.node.border.routing import Refused
from mesh.node.keyports import Surroundings
from mesh.store.tables import BorderKeyRow, CarryRow, ExchangeRow, KeyState, StoredKeyRow, Tables

GRADE = "etsi020"


class Exchanges:
    """Starts exchanges; each method runs within one change of the store."""

    def __init__(
        self, around: Surroundings, *, config: BorderConfig, document: DocumentPort, lifetime_s: float
    ) -> None:
        self._around = around
        self._config = config
        self._document = document
        self._lifetime_s = lifetime_s
        self._remembered: Counter[str] = Counter()

    def count(self, tables: Tables) -> None:
        """Counts what is remembered of each peer: at start-up, and when old things were forgotten."""
        self._remembered.clear()
        for (_, peer, _), number in tables.border.count_states().items():
            self._remembered[peer] += number

    @property
    def remembers(self) -> bool:
        """Whether anything is remembered of any peer."""
        return self._remembered.total() > 0

    def check_room(self, peer: str, count: int) -> None:
        """Bounds what one peer may make us remember.

        Raises:
            ShortageError: BUSY.
        """
        if self._remembered[peer] + count > self._config.max_open_keys:
            raise ShortageError(
                "too many keys of this peer are remembered here", reason=ErrorReason.BUSY, retry_after_s=30.0
            )
        self._remembered[peer] += count

    def begin(
        self,
        ledger: Ledger,
        peer: str,
        association: Association,
        *,
        is_outbound: bool,
        give_up_ms: int,
        callback: str = "",
        owner: str = "",
        source: str = "",
        source_job: bytes = b"",
        extension: bytes = b"",
    ) -> ExchangeRow:
        """A new exchange without keys."""
        exchange = ExchangeRow(
            exchange_id=self._around.randomness(16),
            is_outbound=is_outbound,
            peer=peer,
            initiator=association.initiator,
            targets=association.targets,
            callback=callback,
            owner=owner,
            source=source,
            source_job=source_job,
            extension=extension,
            give_up_ms=give_up_ms,
            created_s=int(self._around.now_s()),
        )
        ledger.tables.border.put_exchange(exchange)
        return exchange

    def import_keys(
        self,
        ledger: Ledger,
        peer: Peer,
        association: Association,
        keys: Sequence[Arrival],
        *,
        callback: str,
        extension: bytes,
        places: dict[str, list[str]] | Refused,
    ) -> None:
        """Stores all keys, or none.

        Args:
            places: from ``places``, or its refusal: whether that may be answered 400 depends on
                what is held already.

        Raises:
            Refused: with ``is_held`` when some key of the request is held from before.
        """
        border = ledger.tables.border
        known = {key.key_id: border.everywhere(key.key_id) for key in keys}
        is_held = any(_is_holding(row) for rows in known.values() for row in rows)
        if isinstance(places, Refused):
            raise places.holding() if is_held else places
        for key in keys:
            if not 0 < len(key.value) <= self._config.max_key_bytes:
                raise Refused(
                    Problem.MALFORMED,
                    f"a key must have 1 to {self._config.max_key_bytes} bytes",
                    is_held=is_held,
                    field="keys.value",
                )
        fresh: list[Arrival] = []
        for key in keys:
            rows = known[key.key_id]
            own = next((row for row in rows if not row.is_outbound and row.peer == peer.kme_id), None)
            if own is None and rows:
                raise Refused(
                    Problem.LOOP,
                    "a key_id came here another way before",
                    is_held=is_held,
                    field="keys.key_id",
                )
            if own is None:
                fresh.append(key)
                continue
            _check_repeated(ledger, own, association, key, is_held=is_held)
            # The latest request says where its results go; without a URL somebody waits for them.
            ledger.redirect(own.exchange_id, callback)
            ledger.inbound(own, InboundEvent.REPEATED)
        if fresh:
            self.check_room(peer.kme_id, len(fresh))
            for part in portions(fresh, [len(key.value) for key in fresh]):
                self._store(
                    ledger, peer, association, part, callback=callback, extension=extension, places=places
                )

    def _store(
        self,
        ledger: Ledger,
        peer: Peer,
        association: Association,
        keys: Sequence[Arrival],
        *,
        callback: str,
        extension: bytes,
        places: dict[str, list[str]],
    ) -> None:
        border = ledger.tables.border
        exchange = self.begin(
            ledger,
            peer.kme_id,
            association,
            is_outbound=False,
            give_up_ms=int((self._around.now_s() + self._config.carry_timeout_s) * 1000),
            callback=callback,
            extension=extension,
        )
        rows = [
            BorderKeyRow(
                False, peer.kme_id, key.key_id, exchange.exchange_id, Inbound.HELD, key.value, key.extension
            )
            for key in keys
        ]
        for row in rows:
            border.put_key(row)
        for place, targets in places.items():
            border.put_carry(CarryRow(exchange.exchange_id, place, tuple(targets), "open"))
        for place, targets in places.items():
            onward = peer_of_place(place)
            if onward is not None:
                self.export(
                    ledger,
                    onward,
                    Association(association.initiator, tuple(targets)),
                    [Arrival(row.key_id, row.value, row.extension) for row in rows],
                    owner="transit",
                    source=self._around.own_id,
                    source_job=exchange.exchange_id,
                    extension=extension,
                    give_up_ms=exchange.give_up_ms,
                )
            elif place == self._around.own_id:
                self._keep_here(ledger, exchange, rows, targets)
            else:
                ledger.call("carry", exchange.exchange_id, place, [row.key_id for row in rows])

    def _keep_here(
        self, ledger: Ledger, exchange: ExchangeRow, rows: Sequence[BorderKeyRow], targets: Sequence[str]
    ) -> None:
        tables = ledger.tables
        for row in rows:
            stored = tables.keystore.stored_key(exchange.initiator, row.key_id)
            if stored is not None:
                is_void = stored.state is KeyState.VOID
                raise Refused(
                    Problem.VOIDED if is_void else Problem.HELD,
                    "a key_id was used here before",
                    is_held=not is_void,
                    field="keys.key_id",
                )
        document = self._document()
        origin = document.foreign_for(exchange.initiator)
        expires_at_s = int(exchange.created_s + self._lifetime_s)
        tables.keystore.put_stored_keys(
            StoredKeyRow(
                exchange.initiator,
                row.key_id,
                row.value,
                expires_at_s,
                "" if origin is None else origin.domain,
                GRADE,
                dict.fromkeys(targets, False),
            )
            for row in rows
        )
        for row in rows:
            ledger.carried(row, self._around.own_id, is_held=True)

    def export(
        self,
        ledger: Ledger,
        onward: str,
        association: Association,
        keys: Sequence[Arrival],
        *,
        owner: str,
        source: str,
        source_job: bytes,
        extension: bytes,
        give_up_ms: int,
        state: Outbound = Outbound.QUEUED,
    ) -> None:
        """Hands keys to a peer: exchange, keys and request in this change.

        Raises:
            CallerError: a key_ID was handed to this peer before.
        """
        border = ledger.tables.border
        for part in portions(keys, [len(key.value) for key in keys]):
            exchange = self.begin(
                ledger,
                onward,
                association,
                is_outbound=True,
                give_up_ms=give_up_ms,
                owner=owner,
                source=source,
                source_job=source_job,
                extension=extension,
            )
            for key in part:
                border.put_key(
                    BorderKeyRow(
                        True, onward, key.key_id, exchange.exchange_id, state, key.value, key.extension
                    )
                )
            ledger.post_keys(exchange)

    def holds(self, tables: Tables, key_ids: Iterable[bytes]) -> bool:
        """Whether anything is held for any of these keys, from whomever."""
        return any(_is_holding(row) for key_id in key_ids for row in tables.border.everywhere(key_id))


def _is_holding(row: BorderKeyRow) -> bool:
    return row.state in (HOLDING_OUTBOUND if row.is_outbound else HOLDING_INBOUND)


def _check_repeated(
    ledger: Ledger, row: BorderKeyRow, association: Association, key: Arrival, *, is_held: bool
) -> None:
    """The same key again is welcome; anything else under its key_ID is not.

    Raises:
        Refused: HELD or VOIDED.
    """
    if row.state in (Inbound.VOIDED, Inbound.VOIDING, Inbound.RECALLING, Inbound.DISPUTED):
        raise Refused(
            Problem.VOIDED, "a key_id was voided: use fresh keys", is_held=is_held, field="keys.key_id"
        )
    exchange = ledger.exchange(row.exchange_id)
    is_same = (exchange.initiator, exchange.targets) == (association.initiator, association.targets)
    # Once the bytes are gone from here nobody can say that they are the same.
    is_known_failed = row.state in (Inbound.FAILED, Inbound.FAILING)
    if not is_same or not (is_known_failed or hmac.compare_digest(row.value, key.value)):
        raise Refused(
            Problem.HELD,
            "a key_id is held with other bytes or another association",
            is_held=is_held,
            field="keys.key_id",
        )
