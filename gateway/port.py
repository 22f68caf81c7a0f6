"""What the gateway needs from the world, as ports named by a noun.

``mesh.client.MeshClient`` is the key service of a running gateway; tests bring a hand-written one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

from mesh.client import DeliveredKeys, KeyStatus


class KeyService(Protocol):
    """The node's key plane, as seen by a gateway. Every call ends within ``timeout_s``.

    All methods raise ``MeshError``; which HTTP status that is, ``gateway.etsi014.errors`` says.
    """

    async def get_status(self, caller: str, peer: str, *, request_id: str, timeout_s: float) -> KeyStatus:
        """What can be delivered to ``caller`` for the pair (caller, peer)."""
        ...

    async def get_keys(
        self,
        master: str,
        slave: str,
        *,
        number: int,
        size_bytes: int | None,
        additional_slaves: Sequence[str],
        request_id: str,
        timeout_s: float,
    ) -> DeliveredKeys:
        """Draw ``number`` fresh keys; all or nothing."""
        ...

    async def get_keys_by_id(
        self, slave: str, master: str, key_ids: Sequence[UUID], *, request_id: str, timeout_s: float
    ) -> DeliveredKeys:
        """Redeem exactly these keys, in this order, once; all or nothing."""
        ...


class AuditTrail(Protocol):
    """Where it is written who asked for which key_ID, with what result; never key bytes."""

    def check(self) -> None:
        """Asked before a key is spent.

        Raises:
            UnavailableError: nothing can be written now; answer 503 and spend nothing.
        """
        ...

    def keys_asked(
        self,
        *,
        method: str,
        master: str,
        slave: str,
        key_ids: Sequence[str],
        result: str,
        request_id: str,
        additional_slaves: Sequence[str] = (),
    ) -> None:
        """Write one line; ``key_ids`` as text, empty when no key was involved."""
        ...
