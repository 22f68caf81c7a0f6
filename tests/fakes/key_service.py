"""A hand-written key plane of two sites with the node's rules, in memory.

Faithful where an SAE can see it: one-shot delivery per entitled SAE, all or nothing, 401 before 400,
limits, addressed (version 8) key_IDs that answer 401 when their tag cannot match. Not faithful where
it cannot be seen: keys come from ``secrets``, both sites share one dictionary.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from mesh.client import (
    CallerError,
    DeliveredKey,
    DeliveredKeys,
    ErrorReason,
    KeyStatus,
    MeshError,
    NotAuthorizedError,
    ShortageError,
)


@dataclass
class _Record:
    value: bytes
    # slave -> has it been delivered
    slaves: dict[str, bool]


@dataclass
class FakeNetwork:
    """What both sites share. Sizes in bytes unless named otherwise.

    Attributes:
        homes: SAE ID -> KME ID.
        denied_pairs: (master, slave) that the access table refuses.
        available_bytes: what can still be drawn.
        fault: raised by every call while set.
        calls: one (method, request_id) per call.
    """

    homes: dict[str, str]
    denied_pairs: set[tuple[str, str]] = field(default_factory=set)
    available_bytes: int = 1 << 24
    fault: Exception | None = None
    grade: str = "trusted-relay"
    key_size_bits: int = 256
    min_key_size_bits: int = 8
    max_key_size_bits: int = 65536
    max_key_per_request: int = 128
    max_sae_id_count: int = 8
    keys: dict[tuple[str, UUID], _Record] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)

    def site(self, kme_id: str) -> FakeKeyService:
        """The key service of one KME."""
        return FakeKeyService(self, kme_id)


class FakeKeyService:
    """``KeyService`` of one site of a ``FakeNetwork``."""

    def __init__(self, network: FakeNetwork, kme_id: str) -> None:
        self._network = network
        self._kme_id = kme_id

    async def get_status(
        self, caller: str, peer: str, *, request_id: str, timeout_s: float = 8.0
    ) -> KeyStatus:
        """See ``KeyService``."""
        network = self._enter("status", caller, request_id)
        self._check_pair(caller, peer)
        size_bytes = network.key_size_bits // 8
        return KeyStatus(
            source_kme_id=self._kme_id,
            target_kme_id=network.homes[peer],
            key_size_bits=network.key_size_bits,
            min_key_size_bits=network.min_key_size_bits,
            max_key_size_bits=network.max_key_size_bits,
            stored_key_count=network.available_bytes // size_bytes,
            max_key_count=(1 << 24) // size_bytes,
            max_key_per_request=network.max_key_per_request,
            max_sae_id_count=network.max_sae_id_count,
            grade=network.grade,
            directory_staleness_s=0.0,
        )

    async def get_keys(
        self,
        master: str,
        slave: str,
        *,
        number: int = 1,
        size_bytes: int | None = None,
        additional_slaves: Sequence[str] = (),
        request_id: str,
        timeout_s: float = 8.0,
    ) -> DeliveredKeys:
        """See ``KeyService``."""
        network = self._enter("enc_keys", master, request_id)
        for each in (slave, *additional_slaves):
            self._check_pair(master, each)
        bits = network.key_size_bits if size_bytes is None else size_bytes * 8
        if not 1 <= number <= network.max_key_per_request:
            raise _limit("number", 1, network.max_key_per_request)
        if not network.min_key_size_bits <= bits <= network.max_key_size_bits:
            raise _limit("size", network.min_key_size_bits, network.max_key_size_bits)
        if len(additional_slaves) > network.max_sae_id_count:
            raise _limit("additional_slave_SAE_IDs", 0, network.max_sae_id_count)
        total = number * bits // 8
        if total > 1 << 20:
            raise _limit("number", 1, (1 << 20) * 8 // bits)
        if total > network.available_bytes:
            raise ShortageError(
                "not enough key material",
                retry_after_s=2.5,
                facts={"requested_bytes": total, "available_bytes": network.available_bytes},
            )
        network.available_bytes -= total
        keys = [DeliveredKey(_addressed_id().bytes, secrets.token_bytes(bits // 8)) for _ in range(number)]
        for key in keys:
            entitled = dict.fromkeys((slave, *additional_slaves), False)
            network.keys[master, key.key_id] = _Record(key.value, entitled)
        return DeliveredKeys(keys, network.grade)

    async def get_keys_by_id(
        self, slave: str, master: str, key_ids: Sequence[UUID], *, request_id: str, timeout_s: float = 8.0
    ) -> DeliveredKeys:
        """See ``KeyService``."""
        network = self._enter("dec_keys", slave, request_id)
        if len(key_ids) > network.max_key_per_request:
            raise _limit("key_IDs", 1, network.max_key_per_request)
        records = [network.keys.get((master, key_id)) for key_id in key_ids]
        for key_id, record in zip(key_ids, records, strict=True):
            if (record is None and key_id.version == 8) or (record and slave not in record.slaves):
                raise NotAuthorizedError("not entitled")
        found = [record for record in records if record is not None and not record.slaves[slave]]
        if len(found) != len(key_ids):
            raise CallerError("one or more keys are unknown", reason=ErrorReason.UNKNOWN_KEY)
        for record in found:
            record.slaves[slave] = True
        keys = [
            DeliveredKey(key_id.bytes, record.value) for key_id, record in zip(key_ids, found, strict=True)
        ]
        return DeliveredKeys(keys, network.grade)

    def _enter(self, method: str, caller: str, request_id: str) -> FakeNetwork:
        network = self._network
        network.calls.append((method, request_id))
        if network.fault is not None:
            raise network.fault
        if network.homes.get(caller) != self._kme_id:
            raise NotAuthorizedError("this gateway may not act for that SAE")
        return network

    def _check_pair(self, master: str, slave: str) -> None:
        if (master, slave) in self._network.denied_pairs:
            raise NotAuthorizedError("the access table refuses this pair")
        if slave not in self._network.homes:
            raise CallerError("the slave SAE is not known", reason=ErrorReason.UNKNOWN_SAE)


def _limit(name: str, low: int, high: int) -> MeshError:
    return CallerError(
        f"{name} must be between {low} and {high}",
        reason=ErrorReason.LIMIT_EXCEEDED,
        facts={"parameter": name, "min": low, "max": high},
    )


def _addressed_id() -> UUID:
    raw = bytearray(secrets.token_bytes(16))
    raw[6] = 0x80 | (raw[6] & 0x0F)
    raw[8] = 0x80 | (raw[8] & 0x3F)
    return UUID(bytes=bytes(raw))
