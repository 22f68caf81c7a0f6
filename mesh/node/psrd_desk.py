"""The operator's side of pre-shared random data: issue, import, discard, status while running.

Owns what keeps such work whole: one at a time per link, run to its end whatever becomes of
the caller, progress in between. What is done is ``mesh.node.psrd``'s; who may ask stands in
``mesh.rpc.roles`` (tool). Carries paths and numbers, never table bytes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol

from mesh.errors import CallerError, ErrorReason, ShortageError
from mesh.node.psrd_courier import ImportOrder, IssueOrder, read_passphrase
from mesh.node.psrd_link import CourierFed, Gauge
from mesh.node.psrd_rows import TableRecord
from mesh.sources.psrd_file import Progress
from mesh.sources.randomness import open_random
from mesh.v1.admin_pb2 import (
    DiscardPsrdRequest,
    ImportPsrdRequest,
    IssuePsrdRequest,
    PsrdLevel,
    PsrdLink,
    PsrdProgress,
    PsrdStatusResponse,
    PsrdTable,
)

_LOG = logging.getLogger("keymesh.psrd")
_TELL_EVERY_S = 0.2

_Work = Callable[[Progress], Coroutine[Any, Any, TableRecord]]


class _FedLink(Protocol):
    """A link with what feeds it."""

    @property
    def ingest(self) -> object:
        """A ``CourierFed`` where courier files do."""
        ...


class PsrdDesk:
    """Takes the operator's orders for all links of a node.

    Args:
        links: by peer KME id.
        spawn: starts background work that outlives its caller.
        now_s: seconds since 1970.
    """

    def __init__(
        self,
        links: Mapping[str, _FedLink],
        spawn: Callable[[Coroutine[Any, Any, TableRecord]], asyncio.Task[TableRecord]],
        *,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._links = links
        self._spawn = spawn
        self._now_s = now_s
        self._busy: set[str] = set()

    async def issue(self, request: IssuePsrdRequest) -> AsyncIterator[PsrdProgress]:
        """Make a table for a client and its courier file; the last message names the table.

        Raises:
            CallerError: peer, sizes, path, passphrase file or random source cannot be.
            ShortageError: ``BUSY``, this link is being supplied already.
            UnavailableError: a disk or the random source fails; nothing is issued.
        """
        fed = self._fed(request.peer_kme_id)

        async def work(progress: Progress) -> TableRecord:
            order = IssueOrder(
                request.to_client_bytes,
                request.from_client_bytes,
                Path(request.path),
                await asyncio.to_thread(read_passphrase, request.passphrase_file),
            )
            source = await asyncio.to_thread(open_random, request.random_source)
            try:
                async with fed.lock:
                    now_s = int(self._now_s())
                    return await fed.tables.issue(order, source, now_s=now_s, progress=progress)
            finally:
                source.close()

        async for message in self._run(request.peer_kme_id, fed, work):
            yield message

    async def take(self, request: ImportPsrdRequest) -> AsyncIterator[PsrdProgress]:
        """Import a courier file; the last message names the table.

        Raises:
            CallerError: not a file for this node now; says why and what to do.
            IntegrityError: altered.
            ShortageError: ``BUSY``, this link is being supplied already.
            UnavailableError: the disk is full; nothing is imported.
        """
        fed = self._fed(request.peer_kme_id)

        async def work(progress: Progress) -> TableRecord:
            passphrase = await asyncio.to_thread(read_passphrase, request.passphrase_file)
            order = ImportOrder(Path(request.path), passphrase, request.wipe_courier_file)
            async with fed.lock:
                return await fed.tables.take(order, progress=progress)

        async for message in self._run(request.peer_kme_id, fed, work):
            yield message

    async def discard(self, request: DiscardPsrdRequest) -> PsrdTable:
        """Give up the last table issued, whose courier file was lost.

        Raises:
            CallerError: it is not the last, or its client has it.
        """
        fed = self._fed(request.peer_kme_id)
        async with fed.lock:
            record = await fed.tables.discard(request.table_id)
        _LOG.warning("a table was discarded", extra=_facts(request.peer_kme_id, record))
        return _table(record)

    def status(self) -> PsrdStatusResponse:
        """Levels and tables of every link that courier files feed."""
        links: list[PsrdLink] = []
        for peer, link in sorted(self._links.items()):
            fed = link.ingest
            if isinstance(fed, CourierFed):
                fed.look()
                links.append(
                    PsrdLink(
                        peer_kme_id=peer,
                        transmit=_level(fed.transmit),
                        receive=_level(fed.receive),
                        tables=[_table(record) for record in fed.tables.records()],
                    )
                )
        return PsrdStatusResponse(links=links)

    def _fed(self, peer: str) -> CourierFed:
        link = self._links.get(peer)
        if link is None:
            raise CallerError("peer_kme_id names no link of this node", facts={"peer_kme_id": peer})
        if not isinstance(link.ingest, CourierFed):
            raise CallerError(
                "peer_kme_id: a device feeds this link, and courier files cannot be mixed in; remove "
                "links[].device at both ends",
                facts={"peer_kme_id": peer},
            )
        return link.ingest

    async def _run(self, peer: str, fed: CourierFed, work: _Work) -> AsyncIterator[PsrdProgress]:
        """Do the work in a task of its own and tell how far it is."""
        if peer in self._busy:
            raise ShortageError("this link is being supplied already", reason=ErrorReason.BUSY)
        at = (0, 0)

        def progress(done: int, total: int) -> None:
            nonlocal at
            at = (done, total)

        async def whole() -> TableRecord:
            self._busy.add(peer)
            try:
                record = await work(progress)
            finally:
                self._busy.discard(peer)
            _LOG.info("a table came", extra=_facts(peer, record))
            return record

        task = self._spawn(whole())
        told = (0, 0)
        while not await _done(task):
            if at != told:
                told = at
                yield PsrdProgress(done_bytes=at[0], total_bytes=at[1])
        yield PsrdProgress(done_bytes=at[1], total_bytes=at[1], table=_table(await task))


async def _done(task: Awaitable[TableRecord]) -> bool:
    """Whether the task ends soon; its error is left to whoever awaits it."""
    done, _ = await asyncio.wait([asyncio.ensure_future(task)], timeout=_TELL_EVERY_S)
    return bool(done)


def _facts(peer: str, record: TableRecord) -> dict[str, object]:
    return {"peer": peer, "table_id": record.table_id.hex(), "state": record.state, "path": record.path}


def _table(record: TableRecord) -> PsrdTable:
    return PsrdTable(
        table_id=record.table_id,
        is_issued=record.is_issued,
        state=record.state,
        made_at_s=record.made_at_s,
        path=record.path,
        transmit_start=record.transmit.start,
        transmit_stop=record.transmit.stop,
        receive_start=record.receive.start,
        receive_stop=record.receive.stop,
    )


def _level(gauge: Gauge) -> PsrdLevel:
    return PsrdLevel(
        usable_bytes=gauge.usable_bytes,
        waiting_bytes=gauge.waiting_bytes,
        bytes_per_s=gauge.use.bytes_per_s,
        seconds_to_empty=-1.0 if math.isinf(gauge.seconds_to_empty) else gauge.seconds_to_empty,
        low_water_bytes=gauge.low_water_bytes,
        is_low=gauge.is_low,
    )
