"""The store of one node: group commit, start-up checks, pad files, the proof of a restart.

Changes are queued and run in order, each in a savepoint of its own, all queued ones
in one transaction; then one synced COMMIT, then the proof copy, then the callers
learn their results (persist, then publish). Statements run on the event loop (a few
microseconds each; a thread would fight the loop for the interpreter lock at every
one of them), only the COMMIT, which waits for the disk, runs in the store's thread.
The connection has one user at a time: whoever holds ``_connection_lock``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import apsw

from mesh.core.transfer import SLOT_BYTES
from mesh.errors import ConfigError, ErrorReason, MeshError, ShortageError, UnavailableError
from mesh.store import directory, vfs
from mesh.store.database import (
    NAME,
    SIDE_NAMES,
    check_database,
    close_database,
    damaged,
    open_database,
    translated,
)
from mesh.store.failpoints import fail_at
from mesh.store.files import FileLayer, Lock, OsFiles
from mesh.store.pads import PadFiles
from mesh.store.proof import ProofCopy
from mesh.store.tables import AppendRow, LaneRow, ReserveRow, Tables
from mesh.store.tables.lanes import mark_name as lane_mark_name
from mesh.store.tables.reserves import mark_name as reserve_mark_name

T = TypeVar("T")
Change = Callable[[Tables], T]
Moved = dict[str, "tuple[int, ...] | None"]

MAX_QUEUED = 65_536
MAX_BATCH = 256

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Batch:
    """What one transaction did: (future, value, error) per change in order, and the marks moved."""

    loop: asyncio.AbstractEventLoop | None
    results: list[tuple[asyncio.Future[Any] | None, Any, Exception | None]] = field(default_factory=list)
    moved: Moved = field(default_factory=dict)
    incarnation: bytes | None = None
    error: Exception | None = None


class Store:
    """Everything durable of one node. Make it with ``Store.open``; use it from one event loop."""

    def __init__(
        self,
        path: Path,
        files: FileLayer,
        lock: Lock,
        database: apsw.Connection,
        proof: ProofCopy,
        *,
        is_new: bool,
    ) -> None:
        """Use ``Store.open``."""
        self.path = path
        self.is_new = is_new
        self.is_proven_restart = False
        self._files = files
        self._lock = lock
        self._database = database
        self._proof = proof
        self._tables = Tables(database)
        self._executors = ThreadPoolExecutor(2, "keymesh-pads"), ThreadPoolExecutor(2, "keymesh-removals")
        self.pads = PadFiles(path / directory.PADS_NAME, files, *self._executors)
        self.reserve_files = PadFiles(path / directory.RESERVES_NAME, files, *self._executors)
        self._queue: deque[tuple[Change[Any], asyncio.Future[Any]]] = deque()
        self._finished: deque[_Batch] = deque()
        self._to_sync: SimpleQueue[_Batch | None] = SimpleQueue()
        self._connection_lock = threading.Lock()
        self._is_running_change = False
        self._is_scheduled = False
        self._is_committing = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._sync_batches, name="keymesh-store", daemon=True)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        kme_id: str,
        files: FileLayer | None = None,
        proof_dir: Path | None = None,
    ) -> Store:
        """Open or make the data directory, check it, and take it for this process.

        Args:
            path: the data directory; made with mode 0700 if missing.
            kme_id: the node's own id; a directory belongs to one node.
            files: the file layer; the operating system's by default.
            proof_dir: a directory on tmpfs for the proof copy; None looks for one.

        Raises:
            UnavailableError: another process holds it (already-running); the disk fails (disk-full).
            ConfigError: not a data directory, another node's, or a newer release's.
            IntegrityError: damaged; the message names the operator's next step.
        """
        layer = OsFiles() if files is None else files
        lock = directory.lock_directory(path, layer)
        try:
            is_new = not directory.is_finished(path, layer)
            database = _made(path, layer) if is_new else open_database(path / NAME, layer)
        except OSError as exc:
            lock.release()
            raise translated(exc, path) from exc
        except BaseException:
            lock.release()
            raise
        store = cls(path, layer, lock, database, ProofCopy(path, layer, proof_dir), is_new=is_new)
        try:
            store._start(kme_id)
        except (apsw.Error, OSError) as exc:
            store.close()
            raise translated(exc, path) from exc
        except BaseException:
            store.close()
            raise
        return store

    @property
    def proof_path(self) -> Path | None:
        """Where the proof copy stands; None without a tmpfs: no restart is proven then."""
        return self._proof.path

    def begin_incarnation(self, incarnation: bytes) -> None:
        """Write the id of this start (16 random bytes) durably, once, before any greeting (1.9)."""
        is_proven = self.is_proven_restart
        self.commit_now(lambda tables: tables.incarnations.begin(incarnation, is_proven=is_proven))

    async def commit(self, change: Change[T]) -> T:
        """Run ``change`` and return its value once it is durable.

        The change is a sync function of the tables. If it raises, it alone is rolled
        back and the error raised here. Cancelling the caller does not undo it.

        Raises:
            UnavailableError: (disk-full) the whole batch is undone; (shutting-down) closed.
            ShortageError: (busy) too many changes wait.
        """
        return await self.commit_soon(change)

    def commit_soon(self, change: Change[T]) -> asyncio.Future[T]:
        """Queue ``change``; the future completes in queue order, as ``commit`` would."""
        self._check_open()
        if len(self._queue) >= MAX_QUEUED:
            raise ShortageError(
                "too many changes wait for the disk", reason=ErrorReason.BUSY, retry_after_s=1.0
            )
        return self._enqueue(change)

    def commit_now(self, change: Change[T]) -> T:
        """``commit`` in the calling thread, blocking it: for start-up and tools."""
        self._check_open()
        with self._owned_connection():
            batch = _Batch(None)
            self._begin(batch)
            self._apply(change, None, batch)
            self._finish_transaction(batch)
        self._publish(batch)
        _, value, error = batch.results[0]
        if batch.error or error:
            raise batch.error or error  # type: ignore[misc]  # one of them is set
        result: T = value
        return result

    def read(self, query: Change[T]) -> T:
        """Run a reading function now, in the calling thread; waits for a COMMIT under way."""
        self._check_open()
        with self._owned_connection():
            try:
                return query(self._tables)
            except apsw.Error as exc:
                raise translated(exc, self.path) from exc

    async def drain(self) -> None:
        """Return once all that is queued now is durable or has failed."""
        self._check_open()
        await asyncio.gather(self._enqueue(lambda tables: None), return_exceptions=True)

    async def aclose(self) -> None:
        """Drain, then close."""
        if not self._is_closed:
            await self.drain()
        self.close()

    def close(self) -> None:
        """Finish the COMMIT under way, refuse what is queued, let go of the directory; idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._thread.ident is not None:
            self._to_sync.put(None)
            self._thread.join()
        self._deliver()
        while self._queue:
            future = self._queue.popleft()[1]
            if not future.done():
                future.set_exception(_closed())
        for executor in self._executors:
            executor.shutdown()
        self.pads.close()
        self.reserve_files.close()
        close_database(self._database)
        if not self._files.is_native:
            vfs.forget(self._files)
        self._lock.release()

    # -- opening -----------------------------------------------------------

    def _start(self, kme_id: str) -> None:
        check_database(self._database, self.path)
        stored = self._tables.meta.get("kme_id")
        if stored is None and not self.is_new:
            raise damaged(self.path, "state.db does not say whose it is")
        if stored is None:
            self.commit_now(lambda tables: tables.meta.put("kme_id", kme_id.encode()))
            directory.write_format(self.path, self._files)
        elif stored != kme_id.encode():
            raise ConfigError(
                "this data directory belongs to another node; name its own",
                facts={"path": self.path, "kme_id": stored.decode(), "configured": kme_id},
            )
        lanes, reserves = self._tables.lanes.list(), self._tables.reserves.list()
        appends = [append for reserve in reserves for append in self._tables.appends.list(reserve.reserve_id)]
        self.pads.reconcile(
            (extent.file, extent.file_offset + extent.stop - extent.start)
            for extent in self._tables.extents.list()
        )
        self.reserve_files.reconcile(_files_needed(appends))
        incarnations = self._tables.incarnations.own_incarnations(1)
        proves = self._proof.proves(incarnations[0] if incarnations else None, _marks(lanes, reserves))
        self.is_proven_restart = proves and all(lane.is_settled for lane in lanes)
        self._thread.start()

    # -- group commit ------------------------------------------------------

    def _enqueue(self, change: Change[T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._queue.append((change, future))
        if not (self._is_committing or self._is_scheduled):
            self._is_scheduled = True
            loop.call_soon(self._run_batch)
        return future

    def _run_batch(self) -> None:
        self._is_scheduled = False
        if self._is_committing or self._is_closed or not self._queue:
            return
        batch = _Batch(asyncio.get_running_loop())
        self._connection_lock.acquire()
        self._begin(batch)
        for _ in range(min(len(self._queue), MAX_BATCH)):
            self._apply(*self._queue.popleft(), batch)
        self._is_committing = True
        self._to_sync.put(batch)

    def _begin(self, batch: _Batch) -> None:
        try:
            self._database.execute("BEGIN IMMEDIATE")
        except apsw.Error as exc:
            batch.error = translated(exc, self.path)

    def _apply(self, change: Change[Any], future: asyncio.Future[Any] | None, batch: _Batch) -> None:
        """Run one change in its savepoint; an error that ended the transaction ends the batch."""
        if batch.error is not None:
            batch.results.append((future, None, None))
            return
        value, error = None, None
        self._is_running_change = True
        try:
            self._database.execute("SAVEPOINT change")
            value = change(self._tables)
            self._database.execute("RELEASE change")
        except Exception as exc:  # noqa: BLE001 - whatever it is belongs to this change's caller
            error = translated(exc, self.path)
            self._undo(error, batch)
        finally:
            self._is_running_change = False
        moved, incarnation = self._tables.moved.take()
        if error is None:
            batch.moved.update(moved)
            batch.incarnation = incarnation or batch.incarnation
        batch.results.append((future, value, error))

    def _undo(self, error: Exception, batch: _Batch) -> None:
        if not self._database.in_transaction:
            batch.error = error
            return
        try:
            self._database.execute("ROLLBACK TO change")
            self._database.execute("RELEASE change")
        except apsw.Error as exc:
            batch.error = translated(exc, self.path)

    def _finish_transaction(self, batch: _Batch) -> None:
        """COMMIT, or roll everything back and say why in ``batch.error``."""
        try:
            if batch.error is None:
                fail_at("commit.before")
                self._database.execute("COMMIT")
                fail_at("commit.after")
        except Exception as exc:  # noqa: BLE001 - goes to every caller of the batch
            batch.error = translated(exc, self.path)
        if self._database.in_transaction:
            try:
                self._database.execute("ROLLBACK")
            except apsw.Error as exc:
                batch.error = translated(exc, self.path)

    def _sync_batches(self) -> None:
        """The store's thread: wait for the disk, hand the batch back to the loop."""
        while (batch := self._to_sync.get()) is not None:
            self._finish_transaction(batch)
            self._connection_lock.release()
            self._finished.append(batch)
            try:
                if batch.loop is not None:
                    batch.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                _log.warning("the event loop ended before a commit was reported")

    def _deliver(self) -> None:
        while self._finished:
            batch = self._finished.popleft()
            self._is_committing = False
            self._publish(batch)
            for future, value, error in batch.results:
                if future is None or future.done():
                    continue
                if batch.error is not None or error is not None:
                    future.set_exception(error or batch.error)  # type: ignore[arg-type]  # one of them is set
                else:
                    future.set_result(value)
        if self._queue and not self._is_closed:
            self._run_batch()

    def _publish(self, batch: _Batch) -> None:
        """Copy the marks to tmpfs; if that is impossible the batch counts as failed."""
        if batch.error is not None or not (batch.moved or batch.incarnation):
            return
        try:
            self._proof.publish(batch.moved, batch.incarnation)
        except MeshError as exc:
            batch.error = exc

    # -- guards ------------------------------------------------------------

    def _owned_connection(self) -> threading.Lock:
        if self._is_running_change:
            raise RuntimeError("a change uses its tables, not the store")
        return self._connection_lock

    def _check_open(self) -> None:
        if self._is_closed:
            raise _closed()


def _closed() -> UnavailableError:
    return UnavailableError("the store is closed", reason=ErrorReason.SHUTTING_DOWN)


def _made(path: Path, files: FileLayer) -> apsw.Connection:
    """Make an empty store, throwing away one that was never finished."""
    for name in (NAME, *SIDE_NAMES):
        if files.exists(path / name):
            files.unlink(path / name)
    for name in (directory.PADS_NAME, directory.RESERVES_NAME):
        files.make_dir(path / name)
    files.open(path / NAME, exclusive=True).close()
    files.sync_dir(path)
    return open_database(path / NAME, files)


def _files_needed(appends: list[AppendRow]) -> list[tuple[str, int]]:
    return [
        (append.file, append.file_offset + SLOT_BYTES * append.count) for append in appends if append.file
    ]


def _marks(lanes: list[LaneRow], reserves: list[ReserveRow]) -> dict[str, tuple[int, ...]]:
    marks: dict[str, tuple[int, ...]] = {
        lane_mark_name(lane.peer, lane.is_outbound): (lane.epoch, lane.mark) for lane in lanes
    }
    for reserve in reserves:
        marks[reserve_mark_name(reserve, "assign")] = (reserve.assign_mark,)
        marks[reserve_mark_name(reserve, "draw")] = (reserve.draw_mark,)
    return marks
