"""The key store: keys whose ID is not ours to choose (protocol 4.9, architecture 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from mesh.errors import CallerError, ErrorReason
from mesh.store.tables.base import Table


class KeyState(StrEnum):
    """Held: bytes are here. Delivered and void are tombstones without bytes."""

    HELD = "held"
    DELIVERED = "delivered"
    VOID = "void"


@dataclass(frozen=True, slots=True)
class StoredKeyRow:
    """One key for (master, key_id): secret ``value`` (empty in tombstones), slaves with a delivered flag."""

    master: str
    key_id: bytes
    value: bytes = field(repr=False)
    expires_at_s: int
    origin_domain: str
    grade: str
    slaves: dict[str, bool]
    state: KeyState = KeyState.HELD


class Keystore(Table):
    """Stored keys, indexed by (master, key_id)."""

    def put_stored_keys(self, keys: Iterable[StoredKeyRow]) -> None:
        """Store new keys, all or none.

        Raises:
            CallerError: a (master, key_id) is taken, by a tombstone too; nothing changes.
        """
        for key in keys:
            if self._row("SELECT 1 FROM stored_keys WHERE master = ? AND key_id = ?", key.master, key.key_id):
                raise CallerError("this key_ID is taken", facts={"key_id": key.key_id.hex()})
            self._run(
                "INSERT INTO stored_keys VALUES (?, ?, ?, ?, ?, ?, ?)",
                key.master,
                key.key_id,
                key.value,
                key.expires_at_s,
                key.origin_domain,
                key.grade,
                key.state.value,
            )
            for slave, is_delivered in key.slaves.items():
                self._run(
                    "INSERT INTO stored_key_slaves VALUES (?, ?, ?, ?)",
                    key.master,
                    key.key_id,
                    slave,
                    int(is_delivered),
                )

    def stored_key(self, master: str, key_id: bytes) -> StoredKeyRow | None:
        """The key or its tombstone, None if unknown."""
        row = self._row(
            "SELECT value, expires_at_s, origin_domain, grade, state FROM stored_keys"
            " WHERE master = ? AND key_id = ?",
            master,
            key_id,
        )
        if row is None:
            return None
        slaves = self._rows(
            "SELECT slave, is_delivered FROM stored_key_slaves WHERE master = ? AND key_id = ?",
            master,
            key_id,
        )
        return StoredKeyRow(
            master,
            key_id,
            row[0],
            row[1],
            row[2],
            row[3],
            {slave: bool(is_delivered) for slave, is_delivered in slaves},
            KeyState(row[4]),
        )

    def mark_delivered(self, master: str, key_id: bytes, slave: str) -> bytes:
        """Deliver the key to ``slave``, once; after the last slave the bytes are wiped.

        Returns:
            the key's bytes: hand them out only after the commit.

        Raises:
            CallerError: (unknown-key) no such key for this slave, delivered already, or void.
        """
        key = self.stored_key(master, key_id)
        if key is None or key.state is not KeyState.HELD or key.slaves.get(slave) is not False:
            raise CallerError("no such key", reason=ErrorReason.UNKNOWN_KEY, facts={"key_id": key_id.hex()})
        self._run(
            "UPDATE stored_key_slaves SET is_delivered = 1 WHERE master = ? AND key_id = ? AND slave = ?",
            master,
            key_id,
            slave,
        )
        if all(is_delivered or other == slave for other, is_delivered in key.slaves.items()):
            self._bury(master, key_id, KeyState.DELIVERED)
        return key.value

    def void(self, master: str, key_id: bytes) -> bool:
        """Wipe a held key and leave a tombstone; False if it was not held."""
        key = self.stored_key(master, key_id)
        if key is None or key.state is not KeyState.HELD:
            return False
        self._bury(master, key_id, KeyState.VOID)
        return True

    def bury_unknown(self, key: StoredKeyRow) -> None:
        """Leave a tombstone for a key that never came: a void may overtake it."""
        self.put_stored_keys(
            [
                StoredKeyRow(
                    key.master,
                    key.key_id,
                    b"",
                    key.expires_at_s,
                    key.origin_domain,
                    key.grade,
                    {},
                    KeyState.VOID,
                )
            ]
        )

    def expire(self, now_s: int) -> Sequence[tuple[str, bytes]]:
        """Wipe the held keys that expired at or before ``now_s``; returns their (master, key_id)."""
        rows = self._rows(
            "UPDATE stored_keys SET state = 'void', value = x'' WHERE expires_at_s <= ? AND state = 'held'"
            " RETURNING master, key_id",
            now_s,
        )
        return [(row[0], row[1]) for row in rows]

    def forget_tombstones(self, expired_before_s: int) -> int:
        """Drop tombstones of keys that expired before then; returns how many."""
        rows = self._rows(
            "DELETE FROM stored_keys WHERE expires_at_s < ? AND state != 'held' RETURNING master, key_id",
            expired_before_s,
        )
        for master, key_id in rows:
            self._run("DELETE FROM stored_key_slaves WHERE master = ? AND key_id = ?", master, key_id)
        return len(rows)

    def count_held(self, master: str | None = None) -> int:
        """How many keys are held, of one master if given."""
        row = self._row(
            "SELECT count(*) FROM stored_keys WHERE state = 'held' AND (?1 IS NULL OR master = ?1)", master
        )
        return int(row[0]) if row else 0

    def _bury(self, master: str, key_id: bytes, state: KeyState) -> None:
        self._run(
            "UPDATE stored_keys SET state = ?, value = x'' WHERE master = ? AND key_id = ?",
            state.value,
            master,
            key_id,
        )
