"""Keys of foreign key managers taken in, and keys handed on to them: exchanges and what starts them.

Owns idempotence by key_ID (the same key again is welcome, anything else under its key_ID is not), loops
(a key_ID that was here another way), tombstones, and that all keys of a request are stored or none.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from mesh.core.border import (
    HOLDING_INBOUND,
    HOLDING_OUTBOUND,
    SETTLED_INBOUND,
    SETTLED_OUTBOUND,
    Inbound,
    InboundEvent,
    Outbound,
)
from mesh.core.border_rules import Association, BorderConfig, Peer, Problem, portions
from mesh.errors import ErrorReason, ShortageError
from mesh.node.border.ledger import Ledger
from mesh.node.border.ports import Arrival, DocumentPort, peer_of_place
from mesh.node.border.routing import Refused
from mesh.node.keyports import Surroundings
from mesh.store.tables import BorderKeyRow, CarryRow, ExchangeRow, KeyState, StoredKeyRow, Tables

Counts = dict[tuple[bool, str], int]

GRADE = "etsi020"
_SETTLED = {True: SETTLED_OUTBOUND, False: SETTLED_INBOUND}
_MAC_KEY, _MAC_BYTES = "border_mac_key", 16


class Exchanges:
    """Starts exchanges; each method runs within one change of the store."""

    def __init__(
        self, around: Surroundings, *, config: BorderConfig, document: DocumentPort, lifetime_s: float
    ) -> None:
        self._around = around
        self._config = config
        self._document = document
        self._lifetime_s = lifetime_s

    def has_room(self, tables: Tables, peers: Iterable[str], count: int) -> bool:
        """Whether so many more keys may be under way towards each of these peers."""
        return all(self._room(tables.border.count_of(peer), is_outbound=True) >= count for peer in peers)

    def _room(self, counts: Counts, *, is_outbound: bool) -> int:
        ours = [(state, number) for (way, state), number in counts.items() if way is is_outbound]
        unsettled = sum(number for state, number in ours if state not in _SETTLED[is_outbound])
        return self._config.max_open_keys - unsettled

    def check_room(self, tables: Tables, peer: str, count: int, *, is_outbound: bool) -> None:
        """Bounds what is under way with one peer, each direction for itself, and what is remembered.

        Raises:
            ShortageError: BUSY.
        """
        counts = tables.border.count_of(peer)
        if self._room(counts, is_outbound=is_outbound) < count:
            raise ShortageError(
                "too many keys are under way with this peer", reason=ErrorReason.BUSY, retry_after_s=30.0
            )
        self._bound(tables, peer, counts, count)

    def bound_memory(self, tables: Tables, peer: str, count: int) -> None:
        """Forgets the oldest settled keys of a peer where so many more would be too many."""
        self._bound(tables, peer, tables.border.count_of(peer), count)

    def _bound(self, tables: Tables, peer: str, counts: Counts, count: int) -> None:
        settled = sum(number for (way, state), number in counts.items() if state in _SETTLED[way])
        if (excess := settled + count - self._config.max_settled_keys) > 0:
            tables.border.forget_settled(peer, int(self._around.now_s()) + 1, excess)

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
        is_settled: bool = False,
    ) -> ExchangeRow:
        """A new exchange without keys."""
        created_s = int(self._around.now_s())
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
            created_s=created_s,
            settled_s=created_s if is_settled else 0,
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
        # Of other peers' keys no answer tells anything.
        is_held = any(_is_holding(row, peer.kme_id) for rows in known.values() for row in rows)
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
            self._check_repeated(ledger, own, association, key, is_held=is_held)
            # The latest request says where its results go; without a URL somebody waits for them.
            ledger.redirect(own.exchange_id, callback)
            ledger.inbound(own, InboundEvent.REPEATED)
        if fresh:
            self.check_room(ledger.tables, peer.kme_id, len(fresh), is_outbound=False)
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
                False,
                peer.kme_id,
                key.key_id,
                exchange.exchange_id,
                Inbound.HELD,
                key.value,
                key.extension,
                value_mac=self._mac(ledger.tables, key),
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
            ShortageError: BUSY.
        """
        border = ledger.tables.border
        self.check_room(ledger.tables, onward, len(keys), is_outbound=True)
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

    def holds(self, tables: Tables, peer: str, key_ids: Iterable[bytes]) -> bool:
        """Whether anything is held from, or for, this peer under any of these key_IDs."""
        return any(_is_holding(row, peer) for key_id in key_ids for row in tables.border.everywhere(key_id))

    def _check_repeated(
        self, ledger: Ledger, row: BorderKeyRow, association: Association, key: Arrival, *, is_held: bool
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
        if not is_same or not hmac.compare_digest(row.value_mac, self._mac(ledger.tables, key)):
            raise Refused(
                Problem.HELD,
                "a key_id is held with other bytes or another association",
                is_held=is_held,
                field="keys.key_id",
            )

    def _mac(self, tables: Tables, key: Arrival) -> bytes:
        """What a request that comes again is compared with once the bytes are gone.

        A row alone tells nothing: the key of the code is a fact of its own, made at the first use.
        """
        secret = tables.meta.get(_MAC_KEY)
        if secret is None:
            secret = self._around.randomness(32)
            tables.meta.put(_MAC_KEY, secret)
        return hashlib.blake2b(key.key_id + key.value, key=secret, digest_size=_MAC_BYTES).digest()


def _is_holding(row: BorderKeyRow, peer: str) -> bool:
    return row.peer == peer and row.state in (HOLDING_OUTBOUND if row.is_outbound else HOLDING_INBOUND)
