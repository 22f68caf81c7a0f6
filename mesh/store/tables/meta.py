"""Who this node is: named facts, serials that never fall, incarnations, peers (protocol 1.9, 5.1)."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.errors import IntegrityError
from mesh.store.tables.base import Table

INCARNATIONS_KEPT = 1000


class Meta(Table):
    """Named facts (bytes) and serials (numbers that only rise)."""

    def get(self, name: str) -> bytes | None:
        """The bytes stored under ``name``."""
        row = self._row("SELECT value FROM meta WHERE name = ?", name)
        return bytes(row[0]) if row else None

    def put(self, name: str, value: bytes) -> None:
        """Store or replace: documents, identities, the code key of a border; no key and no pad byte."""
        self._run("INSERT OR REPLACE INTO meta VALUES (?, ?)", name, value)

    def serial(self, name: str) -> int:
        """The serial's value, 0 if it never rose."""
        row = self._row("SELECT value FROM serials WHERE name = ?", name)
        return int(row[0]) if row else 0

    def raise_serial(self, name: str, value: int) -> None:
        """Set the serial to ``value``.

        Raises:
            IntegrityError: ``value`` is below what is stored; nothing changes.
        """
        if self.serial(name) > value:
            raise IntegrityError(
                "a serial never falls", facts={"serial": name, "stored": self.serial(name), "offered": value}
            )
        self._run("INSERT OR REPLACE INTO serials VALUES (?, ?)", name, value)

    def next_serial(self, name: str) -> int:
        """Raise the serial by one and return it: 1, 2, 3, ..."""
        value = self.serial(name) + 1
        self.raise_serial(name, value)
        return value


class Incarnations(Table):
    """The random ids this node took at each start, newest first (protocol 1.9)."""

    def begin(self, incarnation: bytes, *, is_proven: bool) -> None:
        """Take the id of this start (16 random bytes); prune beyond the newest 1 000.

        After an unproven start every lane is unsettled until ``lanes.settle``, and
        open outbound reserves are closed: their undrawn rest is forfeited (4.6). At the
        very first start, lanes that were only filled (couriered before) stay settled
        like lanes made later: nothing was ever sent from this directory.
        Use ``Store.begin_incarnation``, which knows ``is_proven``.
        """
        is_first = self._row("SELECT 1 FROM incarnations LIMIT 1") is None
        self._run("INSERT INTO incarnations (id) VALUES (?)", incarnation)
        self._run(
            "DELETE FROM incarnations WHERE number <= (SELECT max(number) FROM incarnations) - ?",
            INCARNATIONS_KEPT,
        )
        if not is_proven:
            self._run("UPDATE lanes SET is_settled = 0 WHERE ? = 0 OR mark > 0", int(is_first))
            self._run("UPDATE reserves SET state = 'closed' WHERE is_outbound = 1 AND state = 'open'")
        self._moved.incarnation = incarnation

    def own_incarnations(self, limit: int = INCARNATIONS_KEPT) -> list[bytes]:
        """Our own ids, newest first."""
        rows = self._rows("SELECT id FROM incarnations ORDER BY number DESC LIMIT ?", limit)
        return [bytes(row[0]) for row in rows]


@dataclass(frozen=True, slots=True)
class PeerRow:
    """What is known of a peer: its latest verified incarnation and document serial."""

    peer: str
    incarnation: bytes | None
    is_proven: bool
    document_serial: int


class Peers(Table):
    """What verified hellos and confirms told about each peer."""

    def peer(self, peer: str) -> PeerRow:
        """The row, or an empty one for a peer never seen."""
        row = self._row("SELECT incarnation, is_proven, document_serial FROM peers WHERE peer = ?", peer)
        if row is None:
            return PeerRow(peer, None, False, 0)
        return PeerRow(peer, row[0], bool(row[1]), row[2])

    def list(self) -> list[PeerRow]:
        """All peers ever seen."""
        rows = self._rows("SELECT peer, incarnation, is_proven, document_serial FROM peers ORDER BY peer")
        return [PeerRow(row[0], row[1], bool(row[2]), row[3]) for row in rows]

    def set_peer_incarnation(
        self, peer: str, incarnation: bytes, *, is_proven: bool, document_serial: int = 0
    ) -> None:
        """Record the peer's incarnation; its document serial only rises."""
        self._run(
            "INSERT INTO peers VALUES (?1, ?2, ?3, ?4) ON CONFLICT (peer) DO UPDATE SET"
            " incarnation = ?2, is_proven = ?3, document_serial = max(document_serial, ?4)",
            peer,
            incarnation,
            int(is_proven),
            document_serial,
        )
