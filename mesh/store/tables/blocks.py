"""Blocks of device keys, offered and answered, resent byte for byte (protocol 2.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from mesh.errors import CallerError, IntegrityError
from mesh.store.tables.base import Row, Table, Value

_COLUMNS = "block_id, lane_id, start, stop, state, message, answer, is_leader"


class BlockState(StrEnum):
    """Where a block stands; discarded and quarantined blocks leave a hole in the lane."""

    OFFERED = "offered"
    ACCEPTED = "accepted"
    DISCARDED = "discarded"
    QUARANTINED = "quarantined"


_MOVES: dict[BlockState, frozenset[BlockState]] = {
    BlockState.OFFERED: frozenset({BlockState.ACCEPTED, BlockState.DISCARDED, BlockState.QUARANTINED}),
    BlockState.ACCEPTED: frozenset({BlockState.DISCARDED, BlockState.QUARANTINED}),
    BlockState.DISCARDED: frozenset(),
    BlockState.QUARANTINED: frozenset({BlockState.DISCARDED}),
}


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One block: lane offsets [start, stop), the offer as sent, the answer as sent."""

    block_id: bytes
    lane_id: int
    start: int
    stop: int
    state: BlockState
    message: bytes = field(repr=False)
    answer: bytes | None = field(repr=False)
    is_leader: bool


def _block(row: Row) -> BlockRow:
    return BlockRow(row[0], row[1], row[2], row[3], BlockState(row[4]), row[5], row[6], bool(row[7]))


class Blocks(Table):
    """The blocks of all lanes."""

    def put(self, block: BlockRow) -> None:
        """Store a new block.

        Raises:
            IntegrityError: it overlaps another block of its lane.
        """
        if not 0 <= block.start < block.stop:
            raise CallerError("a block needs offsets 0 <= start < stop")
        before = self._row(
            "SELECT stop FROM blocks WHERE lane_id = ? AND start < ? ORDER BY start DESC LIMIT 1",
            block.lane_id,
            block.stop,
        )
        if before and before[0] > block.start:
            raise IntegrityError(
                "blocks of a lane never overlap", facts={"lane_id": block.lane_id, "start": block.start}
            )
        self._run(
            f"INSERT INTO blocks ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            block.block_id,
            block.lane_id,
            block.start,
            block.stop,
            block.state.value,
            block.message,
            block.answer,
            int(block.is_leader),
        )

    def get(self, block_id: bytes) -> BlockRow | None:
        """The block, None if unknown."""
        row = self._row(f"SELECT {_COLUMNS} FROM blocks WHERE block_id = ?", block_id)
        return _block(row) if row else None

    def list(
        self, lane_id: int | None = None, state: BlockState | None = None, *, below: int | None = None
    ) -> list[BlockRow]:
        """Blocks by lane and start, of one lane and state, and ending at or below an offset, if given."""
        conditions, values = ["1"], list[Value]()
        if lane_id is not None:
            conditions.append("lane_id = ?")
            values.append(lane_id)
        if state is not None:
            conditions.append("state = ?")
            values.append(state.value)
        if below is not None:
            # The first half is implied by the second; the index is by start.
            conditions.append("start < ? AND stop <= ?")
            values += [below, below]
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM blocks WHERE {' AND '.join(conditions)} ORDER BY lane_id, start", *values
        )
        return [_block(row) for row in rows]

    def set_state(self, block_id: bytes, state: BlockState, *, answer: bytes | None = None) -> None:
        """Move a block to ``state`` (the same state again is allowed), keeping ``answer`` if given.

        Raises:
            CallerError: unknown block.
            IntegrityError: the move is not legal; nothing changes.
        """
        block = self.get(block_id)
        if block is None:
            raise CallerError("no such block", facts={"block_id": block_id.hex()})
        if state is not block.state and state not in _MOVES[block.state]:
            raise IntegrityError(
                "illegal move of a block",
                facts={"block_id": block_id.hex(), "from": block.state.value, "to": state.value},
            )
        self._run(
            "UPDATE blocks SET state = ?, answer = coalesce(?, answer) WHERE block_id = ?",
            state.value,
            answer,
            block_id,
        )

    def delete(self, block_id: bytes) -> None:
        """Forget a block; its extents are not touched."""
        self._run("DELETE FROM blocks WHERE block_id = ?", block_id)

    def delete_below(self, lane_id: int, offset: int) -> int:
        """Forget the blocks of a lane that end at or below ``offset``; returns how many."""
        return self._run("DELETE FROM blocks WHERE lane_id = ? AND stop <= ?", lane_id, offset)
