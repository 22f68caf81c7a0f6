"""Extents: which lane offsets stand in which pad file, and whether they may be used (protocol 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mesh.errors import CallerError, IntegrityError
from mesh.store.tables.base import Files, Row, Table, Value

_COLUMNS = "lane_id, start, stop, file, file_offset, state"


class ExtentState(StrEnum):
    """Synced here; usable once the other end is known to have synced it too."""

    SYNCED = "synced"
    USABLE = "usable"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class ExtentRow:
    """Lane offsets [start, stop) stand at ``file_offset`` of pad file ``file``."""

    lane_id: int
    start: int
    stop: int
    file: str
    file_offset: int = 0
    state: ExtentState = ExtentState.SYNCED


def _extent(row: Row) -> ExtentRow:
    return ExtentRow(row[0], row[1], row[2], row[3], row[4], ExtentState(row[5]))


class Extents(Table):
    """The material of all lanes."""

    def put(self, extent: ExtentRow) -> None:
        """Add an extent whose file is durable already.

        Raises:
            IntegrityError: it overlaps another extent of its lane.
        """
        if not 0 <= extent.start < extent.stop:
            raise CallerError("an extent needs offsets 0 <= start < stop")
        before = self._row(
            "SELECT stop FROM extents WHERE lane_id = ? AND start < ? ORDER BY start DESC LIMIT 1",
            extent.lane_id,
            extent.stop,
        )
        if before and before[0] > extent.start:
            raise IntegrityError(
                "extents of a lane never overlap", facts={"lane_id": extent.lane_id, "start": extent.start}
            )
        self._run(
            f"INSERT INTO extents ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)",
            extent.lane_id,
            extent.start,
            extent.stop,
            extent.file,
            extent.file_offset,
            extent.state.value,
        )

    def list(self, lane_id: int | None = None) -> list[ExtentRow]:
        """Extents by lane and start, of one lane if given."""
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM extents WHERE ?1 IS NULL OR lane_id = ?1 ORDER BY lane_id, start",
            lane_id,
        )
        return [_extent(row) for row in rows]

    def set_state(self, lane_id: int, start: int, state: ExtentState) -> None:
        """Set the state of the extent that begins at ``start``.

        Raises:
            CallerError: no such extent.
        """
        changed = self._run(
            "UPDATE extents SET state = ? WHERE lane_id = ? AND start = ?", state.value, lane_id, start
        )
        if not changed:
            raise CallerError("no such extent", facts={"lane_id": lane_id, "start": start})

    def delete(self, lane_id: int, start: int) -> Files:
        """Forget one extent; returns the files that nothing names any more."""
        return self._delete("lane_id = ? AND start = ?", lane_id, start)

    def delete_below(self, lane_id: int, offset: int) -> Files:
        """Forget the extents that end at or below ``offset``; returns the files that nothing names any more.

        Remove those files after the commit.
        """
        return self._delete("lane_id = ? AND stop <= ?", lane_id, offset)

    def _delete(self, condition: str, *values: Value) -> Files:
        rows = self._rows(f"DELETE FROM extents WHERE {condition} RETURNING file", *values)
        files = sorted({str(row[0]) for row in rows})
        return [file for file in files if not self._row("SELECT 1 FROM extents WHERE file = ?", file)]
