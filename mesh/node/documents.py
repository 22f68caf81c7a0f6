"""The network document of a node: restored from the store, pinned or followed, offered by peers.

Owns how ``DocumentKeeper`` meets the store (a document is durable before it is used, its
serial never falls across restarts) and the link plane (peers with an older one get ours).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from mesh.directory.document import DocumentKeeper, Verdict, load_public_key
from mesh.errors import ConfigError, MeshError
from mesh.node.config import NetworkSection
from mesh.ops.alarms import Alarms
from mesh.store.store import Store
from mesh.store.tables import Tables

_ALARM = "network/document"
_NEXT_STEP = (
    "compare 'keymesh network show' of the offered and the operator's document; sign with a higher serial"
)


async def build_keeper(
    domain_id: str, settings: NetworkSection, store: Store, alarms: Alarms
) -> DocumentKeeper:
    """The keeper of this node, with what it held before the restart.

    Raises:
        ConfigError: the operator's key or the pinned document is unusable.
    """
    operator_key = None
    if settings.operator_public_key is not None:
        operator_key = load_public_key(_read(settings.operator_public_key, "network.operator_public_key"))

    async def save(serial: int, data: bytes) -> None:
        def change(tables: Tables) -> None:
            tables.meta.put("document_serial", str(serial).encode())
            tables.meta.put("document", data)

        await store.commit(change)
        alarms.clear(_ALARM)

    def refused(origin: str, error: MeshError) -> None:
        alarms.raise_alarm(_ALARM, "warning", f"document from {origin} refused: {error}", _NEXT_STEP)

    keeper = DocumentKeeper(
        domain_id,
        operator_key=operator_key,
        trust_directory=settings.trust_directory,
        save=save,
        refused=refused,
    )
    serial, data = store.read(
        lambda tables: (tables.meta.get("document_serial"), tables.meta.get("document"))
    )
    if serial and data:
        try:
            keeper.restore(data, serial=int(serial))
        except MeshError as error:
            refused("this node's own store", error)
    if settings.document is not None:
        verdict = await keeper.pin(_read(settings.document, "network.document"))
        if verdict in (Verdict.OLDER, Verdict.REFUSED):
            raise ConfigError(
                "network.document: older than, or different from, the document this node already holds; "
                "sign it with a higher serial",
                facts={"verdict": verdict.value, "held_serial": keeper.serial()},
            )
    return keeper


class PeerDocuments:
    """The keeper as the link plane sees it."""

    def __init__(self, keeper: DocumentKeeper, spawn: Callable[[Coroutine[Any, Any, Any]], object]) -> None:
        self._keeper = keeper
        self._spawn = spawn

    def serial(self) -> int:
        """Serial of the document held, 0 for none."""
        return self._keeper.serial()

    def signed_bytes(self) -> bytes:
        """The document as signed, empty for none."""
        return self._keeper.data()

    def offer(self, document: bytes) -> None:
        """Considers a document that a peer handed over."""
        self._spawn(self._keeper.offer(document, "peer"))


def _read(path: str, field: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{field}: cannot be read: {error.strerror}", facts={"file": path}) from error
