"""Lanes: one row per link and direction, with the mark that never falls (protocol 1.1, 1.5)."""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.errors import CallerError, IntegrityError
from mesh.store.tables.base import Files, Row, Table

_COLUMNS = "lane_id, peer, is_outbound, epoch, mark, root, is_settled"


@dataclass(frozen=True, slots=True)
class LaneRow:
    """A lane's current epoch.

    ``root`` is the 32 secret bytes of 1.5, None until known. ``is_settled`` is False
    from an unproven start until a verified hello has moved this end beyond all that
    the peer may have seen: a restart before that is not proven either.
    """

    lane_id: int
    peer: str
    is_outbound: bool
    epoch: int
    mark: int
    root: bytes | None = field(repr=False)
    is_settled: bool


def mark_name(peer: str, is_outbound: bool) -> str:
    """The lane's name in the proof copy; its mark there is (epoch, mark)."""
    return f"lane/{peer}/{'out' if is_outbound else 'in'}"


def _lane(row: Row) -> LaneRow:
    return LaneRow(row[0], row[1], bool(row[2]), row[3], row[4], row[5], bool(row[6]))


class Lanes(Table):
    """The lanes of this node."""

    def lane(self, peer: str, is_outbound: bool) -> LaneRow | None:
        """The lane's current epoch, None if this link never had one."""
        row = self._row(
            f"SELECT {_COLUMNS} FROM lanes WHERE peer = ? AND is_outbound = ?", peer, int(is_outbound)
        )
        return _lane(row) if row else None

    def get(self, lane_id: int) -> LaneRow:
        """The lane by number.

        Raises:
            CallerError: no such lane.
        """
        row = self._row(f"SELECT {_COLUMNS} FROM lanes WHERE lane_id = ?", lane_id)
        if row is None:
            raise CallerError("no such lane", facts={"lane_id": lane_id})
        return _lane(row)

    def list(self) -> list[LaneRow]:
        """All lanes."""
        return [_lane(row) for row in self._rows(f"SELECT {_COLUMNS} FROM lanes ORDER BY lane_id")]

    def put_lane(self, peer: str, is_outbound: bool, *, epoch: int = 1) -> LaneRow:
        """Return the lane, created with mark 0 in ``epoch`` if the link has none."""
        lane = self.lane(peer, is_outbound)
        return lane if lane is not None else self._create(peer, is_outbound, epoch)

    def reset_lane(self, peer: str, is_outbound: bool, epoch: int) -> tuple[LaneRow, Files]:
        """Throw the lane away and begin ``epoch``, which must be higher than any before.

        Returns:
            the new lane (a new ``lane_id``, mark 0, no root, no material) and the pad
            files that nothing names any more: remove them after the commit.

        Raises:
            IntegrityError: the epoch is not higher; nothing changes.
        """
        files: Files = []
        lane = self.lane(peer, is_outbound)
        if lane is not None:
            if epoch <= lane.epoch:
                raise IntegrityError(
                    "a lane epoch is never used again",
                    facts={"peer": peer, "epoch": epoch, "stored": lane.epoch},
                )
            files = [
                row[0]
                for row in self._rows("SELECT DISTINCT file FROM extents WHERE lane_id = ?", lane.lane_id)
            ]
            for table in ("extents", "blocks", "lanes"):
                self._run(f"DELETE FROM {table} WHERE lane_id = ?", lane.lane_id)
        return self._create(peer, is_outbound, epoch), files

    def set_mark(self, lane_id: int, mark: int) -> None:
        """Move the mark (bytes from the start of the epoch) up to ``mark``.

        Raises:
            IntegrityError: the mark would fall; nothing changes.
        """
        lane = self.get(lane_id)
        if mark < lane.mark:
            raise IntegrityError(
                "a lane mark never falls", facts={"peer": lane.peer, "mark": mark, "stored": lane.mark}
            )
        self._run("UPDATE lanes SET mark = ? WHERE lane_id = ?", mark, lane_id)
        self._moved.values[mark_name(lane.peer, lane.is_outbound)] = (lane.epoch, mark)

    def set_root(self, lane_id: int, root: bytes) -> None:
        """Store the lane's root, 32 bytes, once.

        Raises:
            IntegrityError: it has another root already.
        """
        lane = self.get(lane_id)
        if lane.root not in (None, root):
            raise IntegrityError("a lane has one root", facts={"peer": lane.peer})
        self._run("UPDATE lanes SET root = ? WHERE lane_id = ?", root, lane_id)

    def settle(self, lane_id: int) -> None:
        """A verified hello has moved this end where 1.10 demands: later restarts may count as proven."""
        self._run("UPDATE lanes SET is_settled = 1 WHERE lane_id = ?", lane_id)

    def _create(self, peer: str, is_outbound: bool, epoch: int) -> LaneRow:
        self._run(
            "INSERT INTO lanes (peer, is_outbound, epoch, mark, root, is_settled)"
            " VALUES (?, ?, ?, 0, NULL, 1)",
            peer,
            int(is_outbound),
            epoch,
        )
        lane = LaneRow(self._database.last_insert_rowid(), peer, is_outbound, epoch, 0, None, True)
        self._moved.values[mark_name(peer, is_outbound)] = (epoch, 0)
        return lane
