"""What all tables share: three ways to run a statement, and the marks that moved."""

from __future__ import annotations

from typing import Any, TypeAlias

import apsw

Value: TypeAlias = "int | str | bytes | None"
Mark: TypeAlias = "tuple[int, ...]"
Row: TypeAlias = "tuple[Any, ...]"
Files: TypeAlias = "list[str]"


class MovedMarks:
    """Marks moved by the change that runs now; the store publishes them after its commit.

    ``values`` maps a mark's name to its new value, None once it no longer exists.
    """

    def __init__(self) -> None:
        self.values: dict[str, Mark | None] = {}
        self.incarnation: bytes | None = None

    def take(self) -> tuple[dict[str, Mark | None], bytes | None]:
        """Return what moved and start empty again."""
        taken = (self.values, self.incarnation)
        self.values, self.incarnation = {}, None
        return taken


class Table:
    """Base of the tables: statements on the store's one connection."""

    def __init__(self, database: apsw.Connection, moved: MovedMarks) -> None:
        self._database = database
        self._moved = moved

    def _run(self, sql: str, *values: Value) -> int:
        """Execute and return the number of rows changed."""
        self._database.execute(sql, values)
        return self._database.changes()

    def _row(self, sql: str, *values: Value) -> Row | None:
        """The first row or None."""
        row: Row | None = self._database.execute(sql, values).fetchone()
        return row

    def _rows(self, sql: str, *values: Value) -> list[Row]:
        """All rows."""
        return self._database.execute(sql, values).fetchall()
