"""The directory as a file: the same face without etcd, for small and for cut-off sites.

Owns the format ``keymesh-directory/1`` (YAML)::

    format: keymesh-directory/1
    nodes:
      kme-a: 192.0.2.1:7443        # host:port of its gRPC listener
    document: network.signed       # optional; relative to this file

The file is read again when it changes; a broken one is logged and the last good one kept.
What this end publishes is visible to this end only. The document passes the keeper as it
does from etcd, so it is signed and its serial never falls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from mesh.core.names import check_kme_id
from mesh.core.network import NetworkDocument
from mesh.directory.document import MAX_DOCUMENT_BYTES, DocumentKeeper, read_source
from mesh.directory.listeners import Listeners
from mesh.directory.port import MarksCopy, NodeLevels, NodeRecord, check_address
from mesh.errors import CallerError, ConfigError, MeshError

FORMAT = "keymesh-directory/1"
POLL_S = 2.0

_log = logging.getLogger(__name__)


def parse_static(data: bytes) -> tuple[dict[str, NodeRecord], str | None]:
    """Reads the file's bytes: records by KME id, and the document's path if it names one.

    Raises:
        ConfigError: names the field.
    """
    try:
        top = read_source(data)
    except ConfigError as error:
        raise ConfigError(error.message.replace("network document", "directory file", 1)) from error
    if not isinstance(top, dict) or top.get("format") != FORMAT:
        raise ConfigError(f"directory file: format must be {FORMAT!r}")
    if unknown := [str(name)[:64] for name in top if name not in ("format", "nodes", "document")]:
        raise ConfigError(f"directory file: unknown field {unknown[0]!r}")
    nodes = top.get("nodes")
    if not isinstance(nodes, dict):
        raise ConfigError("directory file: nodes must be a mapping of KME id to host:port")
    records = {}
    for kme_id, address in nodes.items():
        try:
            check_kme_id(kme_id, "nodes")
            record = NodeRecord(kme_id, check_address(address, f"nodes.{kme_id}"))
        except CallerError as error:
            raise ConfigError(f"directory file: {error.message}", facts=error.facts) from error
        records[kme_id] = record
    document = top.get("document")
    if document is not None and not isinstance(document, str):
        raise ConfigError("directory file: document must be a path")
    return records, document


class StaticDirectory:
    """A ``Directory`` from a file.

    Args:
        path: of the file.
        keeper: checks and holds the network document.
        poll_s: how often to look whether the file changed.
    """

    def __init__(self, path: Path, keeper: DocumentKeeper, *, poll_s: float = POLL_S) -> None:
        self._path = path
        self._keeper = keeper
        self._poll_s = poll_s
        self._listed: dict[str, NodeRecord] = {}
        self._published: dict[str, NodeRecord] = {}
        self._levels: dict[str, NodeLevels] = {}
        self._marks: dict[str, MarksCopy] = {}
        self._listeners = Listeners()
        self._document_path: Path | None = None
        self._seen: tuple[tuple[int, int] | None, ...] = ()
        self._task: asyncio.Task[None] | None = None
        self._end_keeper: Callable[[], None] | None = None

    async def start(self) -> None:
        """See ``Directory.start``.

        Raises:
            ConfigError: the file is missing or malformed.
        """
        self._end_keeper = self._keeper.subscribe(self._listeners.tell)
        await self._load()
        self._task = asyncio.create_task(self._follow(), name="directory-file")

    async def stop(self) -> None:
        """See ``Directory.stop``."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._end_keeper is not None:
            self._end_keeper()
            self._end_keeper = None

    @property
    def document(self) -> NetworkDocument | None:
        """See ``Directory.document``."""
        return self._keeper.document

    def address(self, kme_id: str) -> str | None:
        """See ``Directory.address``."""
        record = self.peers().get(kme_id)
        return None if record is None else record.address

    def peers(self) -> Mapping[str, NodeRecord]:
        """See ``Directory.peers``: those in the file count as live."""
        document = self._keeper.document
        known = {**self._listed, **self._published}
        return {k: record for k, record in known.items() if document is None or k in document.nodes}

    @property
    def levels(self) -> Mapping[str, NodeLevels]:
        """See ``Directory.levels``."""
        return dict(self._levels)

    def marks(self, kme_id: str) -> MarksCopy | None:
        """See ``Directory.marks``."""
        return self._marks.get(kme_id)

    async def publish_node(self, record: NodeRecord) -> None:
        """See ``Directory.publish_node``."""
        check_address(record.address, "address")
        self._published[check_kme_id(record.kme_id)] = record
        self._listeners.tell()

    async def publish_levels(self, levels: NodeLevels) -> None:
        """See ``Directory.publish_levels``."""
        self._levels[check_kme_id(levels.kme_id)] = levels
        self._listeners.tell()

    async def publish_marks(self, kme_id: str, marks: MarksCopy) -> None:
        """See ``Directory.publish_marks``."""
        self._marks[check_kme_id(kme_id)] = marks
        self._listeners.tell()

    async def withdraw(self) -> None:
        """See ``Directory.withdraw``."""
        self._published.clear()
        self._levels.clear()
        self._listeners.tell()

    def staleness_s(self) -> float:
        """See ``Directory.staleness_s``: a file is never stale."""
        return 0.0

    def subscribe(self, changed: Callable[[], None]) -> Callable[[], None]:
        """See ``Directory.subscribe``."""
        return self._listeners.add(changed)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                if self._stamps() != self._seen:
                    await self._load()
            except MeshError as error:
                _log.warning("directory file ignored", extra={"error": str(error)})

    async def _load(self) -> None:
        self._seen = self._stamps()
        self._listed, document = parse_static(_read(self._path))
        path = None if document is None else self._path.parent / document
        if path != self._document_path:
            self._document_path = path
            self._seen = self._stamps()
        if path is not None:
            await self._keeper.offer(_read(path), str(path))
        self._listeners.tell()

    def _stamps(self) -> tuple[tuple[int, int] | None, ...]:
        """What shows that a file changed: modification time in ns, and size."""
        stamps: list[tuple[int, int] | None] = []
        for path in (self._path, self._document_path):
            try:
                state = None if path is None else path.stat()
            except OSError:
                state = None
            stamps.append(None if state is None else (state.st_mtime_ns, state.st_size))
        return tuple(stamps)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"directory file: cannot read {path}: {error.strerror}") from error
