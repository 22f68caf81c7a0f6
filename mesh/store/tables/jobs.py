"""Jobs: durable work towards a peer, and the results of jobs received (protocol 4.8, 6.2)."""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.errors import CallerError
from mesh.store.tables.base import Row, Table, Value

_COLUMNS = "job_id, number, kind, peer, state, payload, result, next_try_s, attempts, context"
FINISHED = ("done", "failed")


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job: ``number`` rises per peer; ``state`` is its owner's word, "done" and "failed" are final."""

    job_id: bytes
    number: int
    kind: str
    peer: str
    state: str
    payload: bytes = field(repr=False)
    result: bytes | None = field(default=None, repr=False)
    next_try_s: int = 0
    attempts: int = 0
    context: bytes = b""
    """What its owner needs to go on with the answer; never a secret."""


def _job(row: Row) -> JobRow:
    return JobRow(*row)


class Jobs(Table):
    """Outbound jobs and inbound results."""

    def next_number(self, peer: str) -> int:
        """The number for the next job towards ``peer``: one above any ever stored."""
        name = f"job/{peer}"
        row = self._row("SELECT value FROM serials WHERE name = ?", name)
        number = int(row[0]) + 1 if row else 1
        self._run("INSERT OR REPLACE INTO serials VALUES (?, ?)", name, number)
        return number

    def put(self, job: JobRow) -> None:
        """Store a new job.

        Raises:
            CallerError: its id or its number towards this peer is taken.
        """
        if self._row(
            "SELECT 1 FROM jobs WHERE job_id = ? OR (peer = ? AND number = ?)",
            job.job_id,
            job.peer,
            job.number,
        ):
            raise CallerError("this job exists", facts={"job_id": job.job_id.hex()})
        self._run(
            f"INSERT INTO jobs ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            job.job_id,
            job.number,
            job.kind,
            job.peer,
            job.state,
            job.payload,
            job.result,
            job.next_try_s,
            job.attempts,
            job.context,
        )

    def get(self, job_id: bytes) -> JobRow | None:
        """The job, None if unknown."""
        row = self._row(f"SELECT {_COLUMNS} FROM jobs WHERE job_id = ?", job_id)
        return _job(row) if row else None

    def list(self, *, kind: str | None = None, peer: str | None = None) -> list[JobRow]:
        """Jobs by peer and number, of one kind and peer if given."""
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM jobs WHERE (?1 IS NULL OR kind = ?1) AND (?2 IS NULL OR peer = ?2)"
            " ORDER BY peer, number",
            kind,
            peer,
        )
        return [_job(row) for row in rows]

    def update(
        self,
        job_id: bytes,
        *,
        state: str | None = None,
        result: bytes | None = None,
        payload: bytes | None = None,
        next_try_s: int | None = None,
        attempts: int | None = None,
    ) -> None:
        """Change what is given.

        Raises:
            CallerError: no such job.
        """
        given: dict[str, Value] = {
            "state": state,
            "result": result,
            "payload": payload,
            "next_try_s": next_try_s,
            "attempts": attempts,
        }
        names = [name for name, value in given.items() if value is not None]
        if not names:
            return
        settings = ", ".join(f"{name} = ?" for name in names)
        values = [given[name] for name in names]
        if not self._run(f"UPDATE jobs SET {settings} WHERE job_id = ?", *values, job_id):
            raise CallerError("no such job", facts={"job_id": job_id.hex()})

    def delete(self, job_id: bytes) -> None:
        """Forget a job; its number stays taken."""
        self._run("DELETE FROM jobs WHERE job_id = ?", job_id)

    def lowest_open(self, peer: str) -> int | None:
        """The lowest number towards ``peer`` that is not final, None if all are."""
        row = self._row(
            "SELECT min(number) FROM jobs WHERE peer = ? AND state NOT IN (?, ?)", peer, *FINISHED
        )
        return None if row is None or row[0] is None else int(row[0])

    def inbound_result(self, source: str, job_id: bytes) -> bytes | None:
        """The stored answer to a job of ``source``, None if it was never applied."""
        row = self._row("SELECT result FROM inbound_results WHERE source = ? AND job_id = ?", source, job_id)
        return bytes(row[0]) if row else None

    def put_inbound_result(self, source: str, job_id: bytes, number: int, result: bytes) -> None:
        """Store the answer to a job, once.

        Raises:
            CallerError: it has one already.
        """
        if self.inbound_result(source, job_id) is not None:
            raise CallerError("this job was applied already", facts={"job_id": job_id.hex()})
        self._run("INSERT INTO inbound_results VALUES (?, ?, ?, ?)", source, job_id, number, result)

    def replace_inbound_result(self, source: str, job_id: bytes, result: bytes) -> None:
        """Store the final answer to a job whose stored one only said that it was to come."""
        self._run(
            "UPDATE inbound_results SET result = ? WHERE source = ? AND job_id = ?", result, source, job_id
        )

    def forget_inbound_below(self, source: str, number: int) -> int:
        """Forget the answers to jobs of ``source`` numbered below ``number``; returns how many."""
        return self._run("DELETE FROM inbound_results WHERE source = ? AND number < ?", source, number)
