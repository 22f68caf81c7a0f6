"""Reserves and their three marks, none of which ever falls (protocol 3.5, 4.5 to 4.7)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mesh.errors import CallerError, IntegrityError
from mesh.store.tables.base import Files, Row, Table

_COLUMNS = (
    "reserve_id, source, target, epoch, grade, is_outbound, assign_mark, draw_mark, retired_below, state"
)


class ReserveState(StrEnum):
    """A closed reserve is not drawn from nor appended to; redeems go on."""

    OPEN = "open"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class ReserveRow:
    """One reserve epoch; all marks count slots from 0."""

    reserve_id: int
    source: str
    target: str
    epoch: int
    grade: str
    is_outbound: bool
    assign_mark: int
    draw_mark: int
    retired_below: int
    state: ReserveState


def _reserve(row: Row) -> ReserveRow:
    return ReserveRow(*(*row[:5], bool(row[5]), *row[6:9], ReserveState(row[9])))


class Reserves(Table):
    """The reserves this node is source or target of."""

    def open(self, source: str, target: str, epoch: int, grade: str, *, is_outbound: bool) -> ReserveRow:
        """Begin an epoch, which must be higher than any this pair ever had here.

        Raises:
            IntegrityError: the epoch is not higher; nothing changes.
        """
        highest = self.highest_epoch(source, target)
        if epoch <= highest:
            raise IntegrityError(
                "a reserve epoch is never used again",
                facts={"source": source, "target": target, "epoch": epoch, "highest": highest},
            )
        self._run("INSERT OR REPLACE INTO reserve_epochs VALUES (?, ?, ?)", source, target, epoch)
        self._run(
            "INSERT INTO reserves (source, target, epoch, grade, is_outbound, assign_mark, draw_mark,"
            " retired_below, state) VALUES (?, ?, ?, ?, ?, 0, 0, 0, 'open')",
            source,
            target,
            epoch,
            grade,
            int(is_outbound),
        )
        return self.get(self._database.last_insert_rowid())

    def highest_epoch(self, source: str, target: str) -> int:
        """The highest epoch this pair ever had here, deleted ones included; -1 if none."""
        row = self._row("SELECT highest FROM reserve_epochs WHERE source = ? AND target = ?", source, target)
        return int(row[0]) if row else -1

    def get(self, reserve_id: int) -> ReserveRow:
        """The reserve by number.

        Raises:
            CallerError: no such reserve.
        """
        row = self._row(f"SELECT {_COLUMNS} FROM reserves WHERE reserve_id = ?", reserve_id)
        if row is None:
            raise CallerError("no such reserve", facts={"reserve_id": reserve_id})
        return _reserve(row)

    def find(self, source: str, target: str, epoch: int) -> ReserveRow | None:
        """The reserve of that pair and epoch, None if unknown."""
        row = self._row(
            f"SELECT {_COLUMNS} FROM reserves WHERE source = ? AND target = ? AND epoch = ?",
            source,
            target,
            epoch,
        )
        return _reserve(row) if row else None

    def list(self) -> list[ReserveRow]:
        """All reserves by pair and epoch."""
        rows = self._rows(f"SELECT {_COLUMNS} FROM reserves ORDER BY source, target, epoch")
        return [_reserve(row) for row in rows]

    def set_assign_mark(self, reserve_id: int, mark: int) -> None:
        """Move the assign mark up to ``mark`` slots.

        Raises:
            IntegrityError: it would fall; nothing changes.
        """
        self._set_mark(self.get(reserve_id), "assign", mark)

    def set_draw_mark(self, reserve_id: int, mark: int) -> None:
        """Move the draw mark up to ``mark`` slots.

        Raises:
            IntegrityError: it would fall, or pass the assign mark; nothing changes.
        """
        reserve = self.get(reserve_id)
        if mark > reserve.assign_mark:
            raise IntegrityError(
                "the draw mark never passes the assign mark",
                facts={"reserve_id": reserve_id, "mark": mark, "assign_mark": reserve.assign_mark},
            )
        self._set_mark(reserve, "draw", mark)

    def set_retired_below(self, reserve_id: int, slot: int) -> None:
        """Raise the slot below which everything is wiped and forgotten; a lower one changes nothing."""
        self._run(
            "UPDATE reserves SET retired_below = max(retired_below, ?) WHERE reserve_id = ?", slot, reserve_id
        )

    def close(self, reserve_id: int) -> None:
        """Close for good; idempotent."""
        self._run("UPDATE reserves SET state = 'closed' WHERE reserve_id = ?", reserve_id)

    def delete(self, reserve_id: int) -> Files:
        """Forget a closed reserve with all that belongs to it; its epoch stays taken.

        Returns:
            its files: remove them after the commit.

        Raises:
            CallerError: it is not closed.
        """
        reserve = self.get(reserve_id)
        if reserve.state is not ReserveState.CLOSED:
            raise CallerError("close a reserve before deleting it", facts={"reserve_id": reserve_id})
        files = self._rows(
            "SELECT DISTINCT file FROM appends WHERE reserve_id = ? AND file != ''", reserve_id
        )
        for table in ("appends", "used_slots", "draw_times", "reserves"):
            self._run(f"DELETE FROM {table} WHERE reserve_id = ?", reserve_id)
        for kind in ("assign", "draw"):
            self._moved.values[mark_name(reserve, kind)] = None
        return [row[0] for row in files]

    def _set_mark(self, reserve: ReserveRow, kind: str, mark: int) -> None:
        stored = reserve.assign_mark if kind == "assign" else reserve.draw_mark
        if mark < stored:
            raise IntegrityError(
                f"the {kind} mark never falls",
                facts={"reserve_id": reserve.reserve_id, "mark": mark, "stored": stored},
            )
        self._run(f"UPDATE reserves SET {kind}_mark = ? WHERE reserve_id = ?", mark, reserve.reserve_id)
        self._moved.values[mark_name(reserve, kind)] = (mark,)


def mark_name(reserve: ReserveRow, kind: str) -> str:
    """The name of the reserve's assign or draw mark in the proof copy; its mark there is (slots,)."""
    return f"{kind}/{reserve.source}/{reserve.target}/{reserve.epoch}"
