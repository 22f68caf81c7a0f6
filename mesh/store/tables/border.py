"""Keys that cross borders: exchanges, their keys, what is to be posted, carried and reported (protocol 6).

States are words of ``mesh.core.border``; what may follow what is decided there. Nothing here is deleted
while it is under way; tombstones go when their exchange is forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from mesh.errors import CallerError
from mesh.store.tables.base import Row, Table

ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class ExchangeRow:
    """Keys that came, or go, together.

    Attributes:
        is_outbound: we hand them to ``peer``; else it hands them to us.
        callback: inbound: where results go; empty for a request that waits for them.
        owner: outbound: who is told the outcome ("deposit", "transit", "local").
        source: outbound: the KME whose sealed message asked for it; else empty.
        source_job: id of that message, or of the inbound exchange in transit.
        extension: JSON object to pass on, empty for none.
        give_up_ms: when nobody waits any more, milliseconds since 1970.
        settled_s: since when nothing is under way about any of its keys; 0 while something is.
    """

    exchange_id: bytes
    is_outbound: bool
    peer: str
    initiator: str
    targets: tuple[str, ...]
    callback: str
    owner: str
    source: str
    source_job: bytes
    extension: bytes
    give_up_ms: int
    created_s: int
    settled_s: int = 0


@dataclass(frozen=True, slots=True)
class BorderKeyRow:
    """One key in one direction at one peer.

    Attributes:
        acked: outbound: targets whose ack ``relayed`` came.
        void_callback: where the peer wants to hear of the void that it asked for.
        is_void_asked: it asked.
        is_peer_void: the peer itself has voided it, or says that it never had it.
        is_kept: a target could not void it (while a void is under way).
        revivals: how often it came back from a tombstone.
        value_mac: inbound: what a repeated request's bytes are compared with once ``value`` is wiped.
    """

    is_outbound: bool
    peer: str
    key_id: bytes
    exchange_id: bytes
    state: str
    value: bytes = field(repr=False)
    extension: bytes = b""
    acked: tuple[str, ...] = ()
    void_callback: str = ""
    is_void_asked: bool = False
    is_peer_void: bool = False
    is_kept: bool = False
    revivals: int = 0
    value_mac: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class PostRow:
    """One request for a gateway to perform: ``kind`` "keys", "ack" or "void"."""

    job_id: bytes
    kind: str
    exchange_id: bytes
    peer: str
    url: str
    status: str
    initiator: str
    targets: tuple[str, ...]
    key_ids: tuple[bytes, ...]
    give_up_ms: int


@dataclass(frozen=True, slots=True)
class CarryRow:
    """One place where the keys of an inbound exchange go: a KME, or a further peer."""

    exchange_id: bytes
    place: str
    targets: tuple[str, ...]
    state: str


@dataclass(frozen=True, slots=True)
class CallRow:
    """A sealed message about border keys: wanted, then (with a job id) under way."""

    call_id: int
    purpose: str
    exchange_id: bytes
    kme: str
    key_ids: tuple[bytes, ...]
    job_id: bytes | None


@dataclass(frozen=True, slots=True)
class ReportRow:
    """A sealed message that is answered once each of its keys is voided or kept."""

    source: str
    job_id: bytes
    open_ids: tuple[bytes, ...]
    kept_ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class BufferRow:
    """A foreign key that is acked and not handed out yet."""

    master: str
    slave: str
    key_id: bytes
    value: bytes = field(repr=False)
    grade: str
    border: str
    expires_at_s: int


_EXCHANGE = (
    "exchange_id, is_outbound, peer, initiator, targets, callback, owner, source, source_job, extension,"
    " give_up_ms, created_s, settled_s"
)
_KEY = (
    "is_outbound, peer, key_id, exchange_id, state, value, extension, acked, void_callback, is_void_asked,"
    " is_peer_void, is_kept, revivals, value_mac"
)
_POST = "job_id, kind, exchange_id, peer, url, status, initiator, targets, key_ids, give_up_ms"
_CALL = "call_id, purpose, exchange_id, kme, key_ids, job_id"


class Border(Table):
    """All that is durable about border keys."""

    # exchanges

    def put_exchange(self, row: ExchangeRow) -> None:
        """Store a new exchange."""
        self._run(
            f"INSERT INTO border_exchanges ({_EXCHANGE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row.exchange_id,
            int(row.is_outbound),
            row.peer,
            row.initiator,
            _names(row.targets),
            row.callback,
            row.owner,
            row.source,
            row.source_job,
            row.extension,
            row.give_up_ms,
            row.created_s,
            row.settled_s,
        )

    def set_settled(self, exchange_id: bytes, settled_s: int) -> None:
        """Since when nothing is under way about the exchange; 0: something is."""
        self._run("UPDATE border_exchanges SET settled_s = ? WHERE exchange_id = ?", settled_s, exchange_id)

    def wipe_extensions(self, exchange_id: bytes) -> None:
        """Those of an exchange and of its keys are not passed on any more."""
        for table in ("border_exchanges", "border_keys"):
            self._run(f"UPDATE {table} SET extension = x'' WHERE exchange_id = ?", exchange_id)

    def set_callback(self, exchange_id: bytes, callback: str) -> None:
        """Where the results of an exchange go from now on."""
        self._run("UPDATE border_exchanges SET callback = ? WHERE exchange_id = ?", callback, exchange_id)

    def exchange(self, exchange_id: bytes) -> ExchangeRow:
        """The exchange.

        Raises:
            CallerError: no such exchange.
        """
        row = self._row(f"SELECT {_EXCHANGE} FROM border_exchanges WHERE exchange_id = ?", exchange_id)
        if row is None:
            raise CallerError("no such exchange", facts={"exchange": exchange_id.hex()})
        return _exchange(row)

    def exchanges_for(self, source: str, source_job: bytes) -> list[ExchangeRow]:
        """Exchanges that one message, export or inbound exchange asked for."""
        rows = self._rows(
            f"SELECT {_EXCHANGE} FROM border_exchanges WHERE source_job = ? AND source = ? ORDER BY rowid",
            source_job,
            source,
        )
        return [_exchange(row) for row in rows]

    def unsettled(self, owner: str) -> list[ExchangeRow]:
        """Outbound exchanges of one owner about which something is under way."""
        rows = self._rows(
            f"SELECT {_EXCHANGE} FROM border_exchanges WHERE settled_s = 0 AND is_outbound = 1 AND owner = ?",
            owner,
        )
        return [_exchange(row) for row in rows]

    def overdue(self, now_ms: int, *, is_outbound: bool, states: Collection[str]) -> list[ExchangeRow]:
        """Exchanges past their time with keys in one of these states."""
        marks = ", ".join("?" * len(states))
        rows = self._rows(
            f"SELECT {_EXCHANGE} FROM border_exchanges AS e WHERE settled_s = 0 AND is_outbound = ?"
            " AND give_up_ms <= ? AND EXISTS (SELECT 1 FROM border_keys AS k"
            f" WHERE k.exchange_id = e.exchange_id AND k.state IN ({marks}))",
            int(is_outbound),
            now_ms,
            *states,
        )
        return [_exchange(row) for row in rows]

    def forget_settled(self, peer: str, settled_before_s: int, keys: int) -> int:
        """Forget old exchanges with a peer, tombstones included; returns how many of its keys.

        The halves of a key in transit go together, once both are that old: what is left of one half
        could neither be voided nor recalled.

        Args:
            keys: enough; the oldest go first.
        """
        rows = self._rows(
            "SELECT exchange_id, owner, source_job FROM border_exchanges"
            " WHERE peer = ? AND settled_s > 0 AND settled_s < ? ORDER BY settled_s LIMIT ?",
            peer,
            settled_before_s,
            keys,
        )
        count = 0
        for root in dict.fromkeys(row[2] if row[1] == "transit" else row[0] for row in rows):
            count += self._forget_family(root, peer, settled_before_s)
            if count >= keys:
                break
        return count

    def _forget_family(self, root: bytes, peer: str, settled_before_s: int) -> int:
        family = self._rows(
            "SELECT exchange_id, peer, settled_s FROM border_exchanges WHERE exchange_id = ?1"
            " UNION ALL SELECT exchange_id, peer, settled_s FROM border_exchanges"
            " WHERE source_job = ?1 AND owner = 'transit'",
            root,
        )
        for one, _, settled_s in family:
            if not 0 < settled_s < settled_before_s or self.posts_of(one) or self.calls_of(one):
                return 0
        count = 0
        for one, of_peer, _ in family:
            deleted = self._run("DELETE FROM border_keys WHERE exchange_id = ?", one)
            count += deleted if of_peer == peer else 0
            self._run("DELETE FROM border_carries WHERE exchange_id = ?", one)
            self._run("DELETE FROM border_exchanges WHERE exchange_id = ?", one)
        return count

    # keys

    def put_key(self, row: BorderKeyRow) -> None:
        """Store a new key; its (direction, peer, key_ID) must be free.

        Raises:
            CallerError: it is taken, by a tombstone too.
        """
        if self.key(row.key_id, row.peer, is_outbound=row.is_outbound) is not None:
            raise CallerError("this key_ID is taken at the border", facts={"key_id": row.key_id.hex()})
        self._run(
            f"INSERT INTO border_keys ({_KEY}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            int(row.is_outbound),
            row.peer,
            row.key_id,
            row.exchange_id,
            row.state,
            row.value,
            row.extension,
            _names(row.acked),
            row.void_callback,
            int(row.is_void_asked),
            int(row.is_peer_void),
            int(row.is_kept),
            row.revivals,
            row.value_mac,
        )

    def save_key(self, row: BorderKeyRow) -> None:
        """Store a key's changed state, value and flags."""
        self._run(
            "UPDATE border_keys SET state = ?, value = ?, acked = ?, void_callback = ?, is_void_asked = ?,"
            " is_peer_void = ?, is_kept = ?, revivals = ? WHERE is_outbound = ? AND peer = ? AND key_id = ?",
            row.state,
            row.value,
            _names(row.acked),
            row.void_callback,
            int(row.is_void_asked),
            int(row.is_peer_void),
            int(row.is_kept),
            row.revivals,
            int(row.is_outbound),
            row.peer,
            row.key_id,
        )

    def key(self, key_id: bytes, peer: str, *, is_outbound: bool) -> BorderKeyRow | None:
        """The key in one direction at one peer, None if unknown."""
        row = self._row(
            f"SELECT {_KEY} FROM border_keys WHERE is_outbound = ? AND peer = ? AND key_id = ?",
            int(is_outbound),
            peer,
            key_id,
        )
        return _key(row) if row else None

    def everywhere(self, key_id: bytes) -> list[BorderKeyRow]:
        """The key in all directions and at all peers."""
        return [_key(row) for row in self._rows(f"SELECT {_KEY} FROM border_keys WHERE key_id = ?", key_id)]

    def keys(self, exchange_id: bytes) -> list[BorderKeyRow]:
        """The keys of an exchange, in the order they were put."""
        rows = self._rows(
            f"SELECT {_KEY} FROM border_keys WHERE exchange_id = ? ORDER BY rowid",
            exchange_id,
        )
        return [_key(row) for row in rows]

    def keys_of(self, peer: str, initiator: str, targets: Sequence[str]) -> list[BorderKeyRow]:
        """All keys of one association at one peer, both directions."""
        columns = ", ".join(f"k.{name.strip()}" for name in _KEY.split(","))
        rows = self._rows(
            f"SELECT {columns} FROM border_keys AS k JOIN border_exchanges AS e USING (exchange_id)"
            " WHERE e.peer = ? AND e.initiator = ? AND e.targets = ?",
            peer,
            initiator,
            _names(targets),
        )
        return [_key(row) for row in rows]

    def count_states(self) -> dict[tuple[bool, str, str], int]:
        """How many keys are in which state, by (is_outbound, peer, state); triggers keep the numbers."""
        rows = self._rows("SELECT is_outbound, peer, state, count FROM border_counts WHERE count > 0")
        return {(bool(row[0]), row[1], row[2]): row[3] for row in rows}

    def count_of(self, peer: str) -> dict[tuple[bool, str], int]:
        """The same of one peer, by (is_outbound, state)."""
        rows = self._rows("SELECT is_outbound, state, count FROM border_counts WHERE peer = ?", peer)
        return {(bool(row[0]), row[1]): row[2] for row in rows}

    # requests to post

    def put_post(self, row: PostRow) -> None:
        """Store a request."""
        self._run(
            f"INSERT INTO border_posts ({_POST}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row.job_id,
            row.kind,
            row.exchange_id,
            row.peer,
            row.url,
            row.status,
            row.initiator,
            _names(row.targets),
            b"".join(row.key_ids),
            row.give_up_ms,
        )

    def posts(self) -> list[PostRow]:
        """All requests, in the order they were put."""
        return [_post(row) for row in self._rows(f"SELECT {_POST} FROM border_posts ORDER BY rowid")]

    def posts_of(self, exchange_id: bytes) -> list[PostRow]:
        """Requests of an exchange, in the order they were put."""
        rows = self._rows(
            f"SELECT {_POST} FROM border_posts WHERE exchange_id = ? ORDER BY rowid", exchange_id
        )
        return [_post(row) for row in rows]

    def overdue_posts(self, now_ms: int) -> list[PostRow]:
        """Requests past their time."""
        return [
            _post(row)
            for row in self._rows(f"SELECT {_POST} FROM border_posts WHERE give_up_ms <= ?", now_ms)
        ]

    def post(self, job_id: bytes) -> PostRow | None:
        """The request, None once it is done."""
        row = self._row(f"SELECT {_POST} FROM border_posts WHERE job_id = ?", job_id)
        return _post(row) if row else None

    def narrow_post(self, job_id: bytes, key_ids: Sequence[bytes]) -> None:
        """Leave only these keys in a request; none ends it."""
        if key_ids:
            self._run("UPDATE border_posts SET key_ids = ? WHERE job_id = ?", b"".join(key_ids), job_id)
        else:
            self.delete_post(job_id)

    def delete_post(self, job_id: bytes) -> None:
        """A request is done."""
        self._run("DELETE FROM border_posts WHERE job_id = ?", job_id)

    # carrying inbound keys on

    def put_carry(self, row: CarryRow) -> None:
        """Store a place, or its changed state."""
        self._run(
            "INSERT OR REPLACE INTO border_carries VALUES (?, ?, ?, ?)",
            row.exchange_id,
            row.place,
            _names(row.targets),
            row.state,
        )

    def carries(self, exchange_id: bytes) -> list[CarryRow]:
        """The places of an inbound exchange."""
        rows = self._rows(
            "SELECT exchange_id, place, targets, state FROM border_carries WHERE exchange_id = ?",
            exchange_id,
        )
        return [CarryRow(row[0], row[1], _texts(row[2]), row[3]) for row in rows]

    # sealed messages

    def put_call(self, purpose: str, exchange_id: bytes, kme: str, key_ids: Sequence[bytes]) -> CallRow:
        """Note that a sealed message must go out."""
        row = self._row(
            "INSERT INTO border_calls (purpose, exchange_id, kme, key_ids, job_id)"
            " VALUES (?, ?, ?, ?, NULL) RETURNING call_id",
            purpose,
            exchange_id,
            kme,
            b"".join(key_ids),
        )
        return CallRow(0 if row is None else row[0], purpose, exchange_id, kme, tuple(key_ids), None)

    def submit_call(self, call_id: int, job_id: bytes) -> None:
        """The message is sealed and durable."""
        self._run("UPDATE border_calls SET job_id = ? WHERE call_id = ?", job_id, call_id)

    def call(self, call_id: int) -> CallRow | None:
        """The message, None once it is answered."""
        row = self._row(f"SELECT {_CALL} FROM border_calls WHERE call_id = ?", call_id)
        return _call(row) if row else None

    def call_of(self, job_id: bytes) -> CallRow | None:
        """The message that a job delivers."""
        row = self._row(f"SELECT {_CALL} FROM border_calls WHERE job_id = ?", job_id)
        return _call(row) if row else None

    def calls(self) -> list[CallRow]:
        """All messages wanted or under way."""
        return [_call(row) for row in self._rows(f"SELECT {_CALL} FROM border_calls ORDER BY call_id")]

    def calls_of(self, exchange_id: bytes) -> list[CallRow]:
        """Messages about an exchange."""
        rows = self._rows(
            f"SELECT {_CALL} FROM border_calls WHERE exchange_id = ? ORDER BY call_id", exchange_id
        )
        return [_call(row) for row in rows]

    def delete_call(self, call_id: int) -> None:
        """The message is answered."""
        self._run("DELETE FROM border_calls WHERE call_id = ?", call_id)

    # reports

    def put_report(self, row: ReportRow) -> None:
        """Store a report that is owed, or what is left of it; one without open keys goes."""
        if not row.open_ids:
            self._run("DELETE FROM border_reports WHERE source = ? AND job_id = ?", row.source, row.job_id)
            return
        self._run(
            "INSERT OR REPLACE INTO border_reports VALUES (?, ?, ?, ?)",
            row.source,
            row.job_id,
            b"".join(row.open_ids),
            b"".join(row.kept_ids),
        )

    def reports(self, source: str) -> list[ReportRow]:
        """Reports that are owed to a KME."""
        rows = self._rows(
            "SELECT source, job_id, open_ids, kept_ids FROM border_reports WHERE source = ?", source
        )
        return [ReportRow(row[0], row[1], _ids(row[2]), _ids(row[3])) for row in rows]

    # buffers

    def put_buffered(self, rows: Iterable[BufferRow]) -> None:
        """Store acked foreign keys."""
        for row in rows:
            self._run(
                "INSERT INTO foreign_buffer VALUES (?, ?, ?, ?, ?, ?, ?)",
                row.master,
                row.slave,
                row.key_id,
                row.value,
                row.grade,
                row.border,
                row.expires_at_s,
            )

    def take_buffered(self, key_ids: Iterable[bytes]) -> None:
        """Take keys out of the buffer, all or none.

        Raises:
            CallerError: one is not there any more.
        """
        for key_id in key_ids:
            if not self._run("DELETE FROM foreign_buffer WHERE key_id = ?", key_id):
                raise CallerError("no such buffered key", facts={"key_id": key_id.hex()})

    def forget_buffered(self, key_ids: Iterable[bytes]) -> None:
        """Take out whichever of these keys are still in the buffer."""
        for key_id in key_ids:
            self._run("DELETE FROM foreign_buffer WHERE key_id = ?", key_id)

    def buffered(self) -> list[BufferRow]:
        """All buffered keys, oldest first."""
        rows = self._rows(
            "SELECT master, slave, key_id, value, grade, border, expires_at_s FROM foreign_buffer"
            " ORDER BY rowid"
        )
        return [BufferRow(*row) for row in rows]


def _names(names: Iterable[str]) -> str:
    return json.dumps(list(names), separators=(",", ":"))


def _texts(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))


def _ids(joined: bytes) -> tuple[bytes, ...]:
    return tuple(joined[at : at + ID_BYTES] for at in range(0, len(joined), ID_BYTES))


def _exchange(row: Row) -> ExchangeRow:
    return ExchangeRow(row[0], bool(row[1]), row[2], row[3], _texts(row[4]), *row[5:])


def _key(row: Row) -> BorderKeyRow:
    is_outbound, peer, key_id, exchange_id, state, value, extension, acked, callback, *rest = row
    *flags, revivals, value_mac = rest
    asked, voided, kept = (bool(flag) for flag in flags)
    return BorderKeyRow(
        bool(is_outbound),
        peer,
        key_id,
        exchange_id,
        state,
        value,
        extension,
        _texts(acked),
        callback,
        asked,
        voided,
        kept,
        revivals,
        value_mac,
    )


def _post(row: Row) -> PostRow:
    job_id, kind, exchange_id, peer, url, status, initiator, targets, key_ids, give_up_ms = row
    return PostRow(
        job_id,
        kind,
        exchange_id,
        peer,
        url,
        status,
        initiator,
        _texts(targets),
        _ids(key_ids),
        give_up_ms,
    )


def _call(row: Row) -> CallRow:
    return CallRow(row[0], row[1], row[2], row[3], _ids(row[4]), row[5])
