"""What MeshClient returns: values, without wire types.

``DeliveredKey`` holds key bytes; its repr does not, and it cannot be pickled. Structs
instead of dataclasses where thousands are made per second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn
from uuid import UUID

import msgspec

from mesh.core.keyid import text_of


class DeliveredKey(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One key as handed out: its id (the 16 bytes of a UUID) and its bytes."""

    id_bytes: bytes
    value: bytes

    @property
    def key_id(self) -> UUID:
        """The key_ID; made when asked for, because making one costs more than all else of a key."""
        return UUID(bytes=self.id_bytes)

    @property
    def key_id_text(self) -> str:
        """``str(key_id)``."""
        return text_of(self.id_bytes)

    def __repr__(self) -> str:
        return f"DeliveredKey({self.key_id_text}, {len(self.value)} bytes)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys cannot be pickled")


class DeliveredKeys(msgspec.Struct, frozen=True, eq=False):
    """The keys of one call, in order, and the grade under which they were established."""

    keys: list[DeliveredKey]
    grade: str


@dataclass(frozen=True, slots=True)
class KeyStatus:
    """What a node can deliver to a pair of SAEs; sizes in bits as ETSI 014 counts them."""

    source_kme_id: str
    target_kme_id: str
    key_size_bits: int
    min_key_size_bits: int
    max_key_size_bits: int
    stored_key_count: int
    max_key_count: int
    max_key_per_request: int
    max_sae_id_count: int
    grade: str
    directory_staleness_s: float


@dataclass(frozen=True, slots=True)
class ReserveLevel:
    """How full the reserves towards one peer KME are, in bytes of key part."""

    peer_kme_id: str
    epoch: int
    grade: str
    outbound_bytes: int
    inbound_bytes: int
    high_water_bytes: int
