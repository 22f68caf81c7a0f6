"""Used slots (one set for keys, sealed messages, voids), draw times, wrong tags (protocol 4.3, 4.4, 4.7)."""

from __future__ import annotations

from mesh.core.ranges import Range
from mesh.errors import CallerError, ErrorReason
from mesh.store.tables.base import Table


class Slots(Table):
    """Which slots are used up, and when slots were drawn."""

    def add_used(self, reserve_id: int, start: int, stop: int) -> None:
        """Use up slots [start, stop), for good; adjacent ranges are merged.

        Raises:
            CallerError: (unknown-key) any of them is used or retired already; nothing changes.
        """
        if not 0 <= start < stop:
            raise CallerError("slots need 0 <= start < stop", facts={"start": start, "stop": stop})
        # Stored ranges are disjoint and apart, so only the last two that begin at or
        # below ``stop`` can touch or overlap: one on the right, one on the left.
        near = [
            other
            for other in self._rows(
                "SELECT * FROM (SELECT start, stop FROM used_slots WHERE reserve_id = ?1 AND start <= ?2"
                " ORDER BY start DESC LIMIT 2)"
                " UNION ALL SELECT 0, retired_below FROM reserves"
                " WHERE reserve_id = ?1 AND retired_below > ?3",
                reserve_id,
                stop,
                start,
            )
            if other[1] >= start
        ]
        if any(other_start < stop and other_stop > start for other_start, other_stop in near):
            raise CallerError(
                "slots are used once",
                reason=ErrorReason.UNKNOWN_KEY,
                facts={"reserve_id": reserve_id, "start": start, "stop": stop},
            )
        merged_start, merged_stop = start, stop
        for other_start, other_stop in near:
            self._run("DELETE FROM used_slots WHERE reserve_id = ? AND start = ?", reserve_id, other_start)
            merged_start, merged_stop = min(merged_start, other_start), max(merged_stop, other_stop)
        self._run("INSERT INTO used_slots VALUES (?, ?, ?)", reserve_id, merged_start, merged_stop)

    def used_ranges(self, reserve_id: int) -> list[Range]:
        """The used slots as sorted, disjoint, non-adjacent ranges."""
        rows = self._rows(
            "SELECT start, stop FROM used_slots WHERE reserve_id = ? ORDER BY start", reserve_id
        )
        return [Range(row[0], row[1]) for row in rows]

    def forget_used_below(self, reserve_id: int, slot: int) -> None:
        """Drop what is below ``slot``, cutting a range that crosses it.

        Only with ``reserves.set_retired_below`` in the same change: the retired mark
        then refuses what the forgotten ranges refused.
        """
        rows = self._rows(
            "DELETE FROM used_slots WHERE reserve_id = ? AND start < ? RETURNING stop", reserve_id, slot
        )
        for (stop,) in rows:
            if stop > slot:
                self._run("INSERT INTO used_slots VALUES (?, ?, ?)", reserve_id, slot, stop)

    def put_draw_time(self, reserve_id: int, slot: int, at_s: int) -> None:
        """At ``at_s`` everything below ``slot`` had been drawn; of two times the earlier stands."""
        self._run(
            "INSERT INTO draw_times VALUES (?, ?, ?)"
            " ON CONFLICT (reserve_id, slot) DO UPDATE SET at_s = min(at_s, excluded.at_s)",
            reserve_id,
            slot,
            at_s,
        )

    def draw_times(self, reserve_id: int) -> list[tuple[int, int]]:
        """(slot, at_s) by slot."""
        rows = self._rows("SELECT slot, at_s FROM draw_times WHERE reserve_id = ? ORDER BY slot", reserve_id)
        return [(row[0], row[1]) for row in rows]

    def forget_draw_times_below(self, reserve_id: int, slot: int) -> None:
        """Drop the times of slots at or below ``slot``."""
        self._run("DELETE FROM draw_times WHERE reserve_id = ? AND slot <= ?", reserve_id, slot)


class WrongTags(Table):
    """Wrong tags on held slots per (slave, master) and day (protocol 4.3)."""

    def add(self, slave: str, master: str, day: int, count: int = 1) -> int:
        """Count ``count`` more on ``day`` (days since 1970); returns the day's total."""
        self._run(
            "INSERT INTO wrong_tags VALUES (?1, ?2, ?3, ?4)"
            " ON CONFLICT (slave, master, day) DO UPDATE SET count = count + ?4",
            slave,
            master,
            day,
            count,
        )
        return self.count(slave, master, day)

    def count(self, slave: str, master: str, day: int) -> int:
        """The day's total."""
        row = self._row(
            "SELECT count FROM wrong_tags WHERE slave = ? AND master = ? AND day = ?", slave, master, day
        )
        return int(row[0]) if row else 0

    def list(self, day: int) -> list[tuple[str, str, int]]:
        """(slave, master, count) of one day."""
        rows = self._rows("SELECT slave, master, count FROM wrong_tags WHERE day = ?", day)
        return [(row[0], row[1], row[2]) for row in rows]

    def forget_before(self, day: int) -> None:
        """Drop the days before ``day``."""
        self._run("DELETE FROM wrong_tags WHERE day < ?", day)
