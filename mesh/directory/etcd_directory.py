"""The directory on etcd: leased records and levels, copies of the marks, the network document.

Owns the layout of the keys and what happens when etcd is slow, away, restarted, compacted,
or lies. What it reads can only remove choices (protocol 5.1): records of nodes that the
network document does not know are ignored, and the document itself has to pass the keeper.

Keys, below ``/keymesh/<domain>/``:

=================  ======  =====================================================
``document``       kept    the signed network document, bytes as signed
``nodes/<kme>``    leased  ``NodeRecord`` as JSON
``levels/<kme>``   leased  ``NodeLevels`` as JSON
``marks/<kme>``    kept    ``MarksCopy`` as JSON
=================  ======  =====================================================
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from mesh.core.names import check_domain_id, check_kme_id
from mesh.core.network import NetworkDocument
from mesh.core.network_parse import MAX_NODES
from mesh.directory.document import MAX_DOCUMENT_BYTES, DocumentKeeper, decode_body, is_signed, split
from mesh.directory.etcd import Change, EtcdClient
from mesh.directory.etcd_follow import Follower
from mesh.directory.etcd_publish import Publisher
from mesh.directory.listeners import Listeners
from mesh.directory.port import MarksCopy, NodeLevels, NodeRecord, check_address
from mesh.errors import CallerError, ConfigError

MAX_VALUE_BYTES = 256 * 1024
"""Bound on a record; a node with a thousand neighbours stays below it."""

T = TypeVar("T", NodeRecord, NodeLevels, MarksCopy)

_log = logging.getLogger(__name__)


def domain_prefix(domain_id: str) -> bytes:
    """Where a domain's keys begin."""
    return f"/keymesh/{check_domain_id(domain_id)}/".encode()


def document_key(domain_id: str) -> bytes:
    """Where a domain's network document stands."""
    return domain_prefix(domain_id) + b"document"


async def publish_document(client: EtcdClient, data: bytes) -> int:
    """Puts a document, signed or (labs) not, into its domain's directory; returns its serial.

    For the operator's tools; the nodes check signature and serial for themselves.

    Raises:
        ConfigError: malformed, too long, or the directory holds a higher serial or another
            document with the same one.
        UnavailableError: etcd is away.
    """
    document = _read_document(data)
    key = document_key(document.domain_id)
    while True:
        held = await client.get(key)
        if held is not None and held.value == data:
            return document.serial
        if held is not None and (serial := _read_document(held.value).serial) >= document.serial:
            raise ConfigError(
                "network document: the directory's serial is not lower; sign with a higher one",
                facts={"serial": document.serial, "directory": serial},
            )
        if await client.replace(key, data, mod_revision=0 if held is None else held.mod_revision):
            return document.serial


def _read_document(data: bytes) -> NetworkDocument:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ConfigError(f"network document: is longer than {MAX_DOCUMENT_BYTES} bytes")
    return decode_body(split(data).body if is_signed(data) else data)


class EtcdDirectory:
    """A ``Directory`` on an etcd cluster.

    Args:
        client: closed by ``stop``.
        domain_id: whose keys.
        keeper: checks and holds the network document.
        lease_s: how long records outlive their node; renewed three times in that.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: EtcdClient,
        domain_id: str,
        keeper: DocumentKeeper,
        *,
        lease_s: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._prefix = domain_prefix(domain_id)
        self._keeper = keeper
        self._clock = clock
        self._follower = Follower(client, self._prefix, self._apply, clock)
        self._publisher = Publisher(client, lease_s, clock)
        self._records: dict[str, NodeRecord] = {}
        self._known: dict[str, NodeRecord] = {}
        self._levels: dict[str, NodeLevels] = {}
        self._marks: dict[str, MarksCopy] = {}
        self._listeners = Listeners()
        self._tasks: list[asyncio.Task[None]] = []
        self._end_keeper: Callable[[], None] | None = None

    async def start(self) -> None:
        """See ``Directory.start``; waits for one attempt, not for etcd."""
        self._end_keeper = self._keeper.subscribe(self._listeners.tell)
        self._tasks = [
            asyncio.create_task(self._follower.run(), name="directory-follow"),
            asyncio.create_task(self._publisher.run(), name="directory-publish"),
        ]
        await self._follower.first_attempt.wait()

    async def stop(self) -> None:
        """Withdraws the leased records, if etcd takes it, and closes the client."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._end_keeper is not None:
            self._end_keeper()
            self._end_keeper = None
        await self._publisher.withdraw()
        await self._client.close()

    @property
    def document(self) -> NetworkDocument | None:
        """See ``Directory.document``."""
        return self._keeper.document

    def address(self, kme_id: str) -> str | None:
        """See ``Directory.address``."""
        record = self._known.get(kme_id)
        return None if record is None or not self._is_ours(kme_id) else record.address

    def peers(self) -> Mapping[str, NodeRecord]:
        """See ``Directory.peers``."""
        return {kme_id: record for kme_id, record in self._records.items() if self._is_ours(kme_id)}

    @property
    def levels(self) -> Mapping[str, NodeLevels]:
        """See ``Directory.levels``."""
        return {kme_id: levels for kme_id, levels in self._levels.items() if self._is_ours(kme_id)}

    def marks(self, kme_id: str) -> MarksCopy | None:
        """See ``Directory.marks``."""
        return self._marks.get(kme_id)

    async def publish_node(self, record: NodeRecord) -> None:
        """See ``Directory.publish_node``."""
        _check_record(record.kme_id, record)
        self._publisher.want(self._key("nodes", record.kme_id), msgspec.json.encode(record), leased=True)

    async def publish_levels(self, levels: NodeLevels) -> None:
        """See ``Directory.publish_levels``."""
        self._publisher.want(self._key("levels", levels.kme_id), msgspec.json.encode(levels), leased=True)

    async def publish_marks(self, kme_id: str, marks: MarksCopy) -> None:
        """See ``Directory.publish_marks``."""
        self._publisher.want(self._key("marks", kme_id), msgspec.json.encode(marks), leased=False)

    async def withdraw(self) -> None:
        """See ``Directory.withdraw``."""
        self._publisher.want_no_leased()

    def staleness_s(self) -> float:
        """See ``Directory.staleness_s``; some seconds while all is well (the watch's heartbeat)."""
        return self._clock() - self._follower.answered_at_s

    def subscribe(self, changed: Callable[[], None]) -> Callable[[], None]:
        """See ``Directory.subscribe``."""
        return self._listeners.add(changed)

    def _key(self, kind: str, kme_id: str) -> bytes:
        return self._prefix + f"{kind}/{check_kme_id(kme_id)}".encode()

    def _is_ours(self, kme_id: str) -> bool:
        document = self._keeper.document
        return document is None or kme_id in document.nodes

    async def _apply(self, changes: tuple[Change, ...], whole: bool) -> None:
        """Takes changes in; ``whole``: they are everything there is."""
        if whole:
            self._records.clear()
            self._levels.clear()
            self._marks.clear()
        for change in changes:
            await self._apply_one(change)
            if change.value is None:
                self._publisher.lost(change.key)
        if whole:
            self._publisher.listed({change.key for change in changes})
        if changes or whole:
            self._listeners.tell()

    async def _apply_one(self, change: Change) -> None:
        name = change.key.removeprefix(self._prefix).decode(errors="replace")
        if name == "document":
            if change.value is not None:
                await self._keeper.offer(change.value, "directory")
            return
        kind, _, kme_id = name.partition("/")
        if kind == "nodes":
            record = _entry(self._records, kme_id, change.value, NodeRecord)
            if record is not None and (kme_id in self._known or len(self._known) < MAX_NODES):
                self._known[kme_id] = record
        elif kind == "levels":
            _entry(self._levels, kme_id, change.value, NodeLevels)
        elif kind == "marks":
            _entry(self._marks, kme_id, change.value, MarksCopy)


def _entry(entries: dict[str, T], kme_id: str, value: bytes | None, kind: type[T]) -> T | None:
    """Decodes and files a value; a bad one is logged and counts as absent."""
    entries.pop(kme_id, None)
    if value is None:
        return None
    try:
        if len(value) > MAX_VALUE_BYTES:
            raise ConfigError("value is too long", facts={"bytes": len(value)})
        check_kme_id(kme_id)
        decoded = msgspec.json.decode(value, type=kind)
        if not isinstance(decoded, MarksCopy):
            _check_record(kme_id, decoded)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, CallerError) as error:
        facts = {"kind": kind.__name__, "kme_id": kme_id[:64], "error": str(error)[:200]}
        _log.warning("directory entry ignored", extra=facts)
        return None
    if kme_id in entries or len(entries) < MAX_NODES:
        entries[kme_id] = decoded
    return decoded


def _check_record(kme_id: str, record: NodeRecord | NodeLevels) -> None:
    if record.kme_id != kme_id:
        raise CallerError("record is of another node than its key", facts={"kme_id": record.kme_id[:64]})
    if isinstance(record, NodeRecord):
        check_address(record.address, "address")
