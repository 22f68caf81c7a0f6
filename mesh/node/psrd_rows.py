"""How PSRD tables stand in the store, and what an issue or an import has made before its commit.

Owns the rows: a table is kept like a block of ingest, one row per lane, and 17 bytes of id
tell it from one. Which tables there are and when they count is ``mesh.node.psrd``'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mesh.core.psrd import TABLE_ID_BYTES, LaneSpan
from mesh.core.ranges import Range
from mesh.node.lanes import AnyEnd
from mesh.store.tables import BlockRow, BlockState, ExtentRow, LaneRow, Tables

#: Bytes of one pad file, and about a third of what issuing or importing holds in memory.
PIECE_BYTES = 4 << 20
#: Tables remembered per lane; the newest tell where a lane ends.
KEPT_TABLES = 64
FROM_HUB, TO_HUB = b"\x00", b"\x01"
LANE_NAMES = {FROM_HUB: "hub-to-client", TO_HUB: "client-to-hub"}
_ROW_ID_BYTES = TABLE_ID_BYTES + 1
_STATE_NAMES = {
    BlockState.OFFERED: "issued",
    BlockState.ACCEPTED: "imported",
    BlockState.DISCARDED: "discarded",
}


@dataclass(frozen=True, slots=True)
class TableRecord:
    """One table as this end remembers it.

    Attributes:
        table_id: 16 bytes.
        is_issued: issued here, else imported.
        state: "issued" (not known to be imported), "imported" or "discarded".
        made_at_s: seconds since 1970.
        path: of the courier file, here.
        transmit, receive: offsets on the outbound and inbound lane.
    """

    table_id: bytes
    is_issued: bool
    state: str
    made_at_s: int
    path: str
    transmit: Range
    receive: Range


@dataclass(slots=True, repr=False)
class Made:
    """What stands on disk before the commit: by direction, and the names of all pad files."""

    extents: dict[bytes, list[ExtentRow]] = field(default_factory=lambda: {FROM_HUB: [], TO_HUB: []})
    roots: dict[bytes, bytes] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)


def is_table(row: BlockRow) -> bool:
    """Whether a block row is a couriered table's, or a hole that one left."""
    return len(row.block_id) == _ROW_ID_BYTES


def records_of(transmit: Sequence[BlockRow], receive: Sequence[BlockRow]) -> list[TableRecord]:
    """Tables from the rows of both lanes, oldest first."""
    others = {row.block_id[:TABLE_ID_BYTES]: row for row in receive}
    records: list[TableRecord] = []
    for row in transmit:
        other = others.get(row.block_id[:TABLE_ID_BYTES])
        if other is None:
            continue
        said = json.loads(row.message)
        records.append(
            TableRecord(
                row.block_id[:TABLE_ID_BYTES],
                row.is_leader,
                _STATE_NAMES.get(row.state, row.state.value),
                said["made_at_s"],
                said["path"],
                Range(row.start, row.stop),
                Range(other.start, other.stop),
            )
        )
    return records


def next_span(end: AnyEnd, rows: Sequence[BlockRow], length_bytes: int) -> LaneSpan:
    """The next offsets of a lane, past tables discarded at its end."""
    filled = end.lane.filled
    previous = filled
    for row in reversed(rows):
        if row.state is not BlockState.DISCARDED or row.stop != previous:
            break
        previous = row.start
    return LaneSpan(end.lane.epoch, previous, filled, length_bytes)


def pieces(span: LaneSpan | Range) -> list[Range]:
    """A table's part of a lane, cut into pad files."""
    starts = range(span.start, span.stop, PIECE_BYTES)
    return [Range(start, min(start + PIECE_BYTES, span.stop)) for start in starts]


def put_hole(tables: Tables, lane: LaneRow, hole: Range, randomness: Callable[[int], bytes]) -> None:
    """Inside a change: remember that a discarded table left a hole."""
    row_id = randomness(_ROW_ID_BYTES)
    tables.blocks.put(
        BlockRow(row_id, lane.lane_id, hole.start, hole.stop, BlockState.DISCARDED, b"", None, False)
    )


def put_material(tables: Tables, lane: LaneRow, extents: Sequence[ExtentRow], root: bytes | None) -> None:
    """Inside a change: name the pad files, and the root with a lane's first table."""
    for extent in extents:
        tables.extents.put(ExtentRow(lane.lane_id, extent.start, extent.stop, extent.file, 0, extent.state))
    if root is not None:
        tables.lanes.set_root(lane.lane_id, root)


def prune(tables: Tables, lane: LaneRow) -> None:
    """Inside a change: forget tables used up long ago."""
    rows = [row for row in tables.blocks.list(lane.lane_id) if is_table(row)]
    for row in rows[:-KEPT_TABLES]:
        if row.state is not BlockState.OFFERED and row.stop <= lane.mark:
            tables.blocks.delete(row.block_id)
