"""Appends: runs of reserve slots and where their bytes stand (protocol 3.5, 3.6, 4.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from mesh.errors import CallerError, ErrorReason, PeerError
from mesh.store.tables.base import Files, Row, Table

_COLUMNS = (
    "reserve_id, first_slot, count, kind, file, file_offset, inline, confirm, confirm_tag,"
    " is_confirmed, created_s"
)


class AppendKind(StrEnum):
    """Slots for key_IDs, or slots for sealed messages: never both."""

    KEYS = "keys"
    SEALED = "sealed"


@dataclass(frozen=True, slots=True)
class AppendRow:
    """Slots [first_slot, first_slot + count) of a reserve.

    Their bytes stand at ``file_offset`` of reserve file ``file``, or, for small
    appends, right here in ``inline`` (``file`` is empty then): one commit instead of
    a file. ``confirm`` is the target's confirm, resent byte for byte; ``confirm_tag``
    the transfer's tag t. ``is_confirmed``: at the source, the target holds it durably.
    """

    reserve_id: int
    first_slot: int
    count: int
    kind: AppendKind
    file: str
    file_offset: int
    inline: bytes | None = field(repr=False)
    confirm: bytes | None = field(repr=False)
    confirm_tag: bytes | None = field(repr=False)
    is_confirmed: bool
    created_s: int

    @property
    def stop_slot(self) -> int:
        """One past the last slot."""
        return self.first_slot + self.count


def _append(row: Row) -> AppendRow:
    return AppendRow(*(*row[:3], AppendKind(row[3]), *row[4:9], bool(row[9]), row[10]))


class Appends(Table):
    """The appends of all reserves."""

    def put(self, append: AppendRow) -> None:
        """Add an append; its file, if any, is durable already.

        Raises:
            PeerError: it overlaps slots that are present, redeemed or retired; nothing changes.
        """
        if append.first_slot < 0 or append.count < 1 or (append.inline is None) == (append.file == ""):
            raise CallerError("an append needs at least one slot, and either a file or inline bytes")
        clash = self._row(
            "SELECT max(stop) > ?2 FROM (SELECT retired_below AS stop FROM reserves WHERE reserve_id = ?1"
            " UNION ALL SELECT * FROM (SELECT first_slot + count FROM appends"
            "  WHERE reserve_id = ?1 AND first_slot < ?3 ORDER BY first_slot DESC LIMIT 1)"
            " UNION ALL SELECT * FROM (SELECT stop FROM used_slots"
            "  WHERE reserve_id = ?1 AND start < ?3 ORDER BY start DESC LIMIT 1))",
            append.reserve_id,
            append.first_slot,
            append.stop_slot,
        )
        if clash and clash[0]:
            raise PeerError(
                "an append may not overlap slots present, redeemed or retired",
                reason=ErrorReason.PROTOCOL_VIOLATION,
                facts={
                    "reserve_id": append.reserve_id,
                    "first_slot": append.first_slot,
                    "count": append.count,
                },
            )
        self._run(
            f"INSERT INTO appends ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            append.reserve_id,
            append.first_slot,
            append.count,
            append.kind.value,
            append.file,
            append.file_offset,
            append.inline,
            append.confirm,
            append.confirm_tag,
            int(append.is_confirmed),
            append.created_s,
        )

    def find(self, reserve_id: int, slot: int) -> AppendRow | None:
        """The append that holds ``slot``, None if there is none."""
        row = self._row(
            f"SELECT {_COLUMNS} FROM appends WHERE reserve_id = ? AND first_slot <= ?"
            " ORDER BY first_slot DESC LIMIT 1",
            reserve_id,
            slot,
        )
        append = _append(row) if row else None
        return append if append is not None and slot < append.stop_slot else None

    def list(self, reserve_id: int) -> list[AppendRow]:
        """The appends of a reserve by first slot."""
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM appends WHERE reserve_id = ? ORDER BY first_slot", reserve_id
        )
        return [_append(row) for row in rows]

    def wipe_inline(self, reserve_id: int, first_slot: int, offset: int, length: int) -> None:
        """Overwrite ``length`` bytes of an append's inline bytes at ``offset`` with zeros, if it has any."""
        row = self._row(
            "SELECT inline FROM appends WHERE reserve_id = ? AND first_slot = ? AND inline IS NOT NULL",
            reserve_id,
            first_slot,
        )
        if row is None:
            return
        data = bytearray(row[0])
        stop = min(offset + length, len(data))
        data[offset:stop] = bytes(max(0, stop - offset))
        self._run(
            "UPDATE appends SET inline = ? WHERE reserve_id = ? AND first_slot = ?",
            bytes(data),
            reserve_id,
            first_slot,
        )

    def delete(self, reserve_id: int, first_slot: int) -> Files:
        """Forget one append; returns the files that nothing names any more: remove them after the commit."""
        return self._delete(reserve_id, "first_slot = ?", first_slot)

    def delete_below(self, reserve_id: int, slot: int) -> Files:
        """Forget the appends that end at or below ``slot``; returns the files that nothing names any more."""
        return self._delete(reserve_id, "first_slot + count <= ?", slot)

    def _delete(self, reserve_id: int, condition: str, slot: int) -> Files:
        rows = self._rows(
            f"DELETE FROM appends WHERE reserve_id = ? AND {condition} RETURNING file", reserve_id, slot
        )
        files = sorted({str(row[0]) for row in rows} - {""})
        return [file for file in files if not self._row("SELECT 1 FROM appends WHERE file = ?", file)]
