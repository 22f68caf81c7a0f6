"""The key-delivery service for gateways and internal tools (keys.proto)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from mesh.core.keyid import text_of
from mesh.errors import CallerError, ErrorReason, MeshError
from mesh.node.keyplane import Delivered, KeyPlane
from mesh.node.services.streamed import StreamedDelivery
from mesh.ops.audit import AuditLog, AuditValue
from mesh.ops.tracing import batch
from mesh.rpc.status import failure_from
from mesh.v1 import keys_pb2 as pb

MAX_BATCH = 256


class Timed(Protocol):
    """A call, as far as it is known how long its caller waits."""

    def time_remaining(self) -> float | None:
        """Seconds left; None if the caller did not say."""
        ...


class KeyDeliveryService(StreamedDelivery):
    """Batches in, batches out; an element's failure is part of the answer.

    Args:
        plane: decides.
        staleness_s: age of what the directory said, in seconds.
        admit: the SAEs that the calling gateway speaks for, None for all; raises if it is none of this
            node's (protocol 5.2).
        audit: takes one line per element (who, pair, key_IDs, result); asked first, so that no key is spent
            that cannot be recorded, and raising in the end withholds the answer.
        readmit: asked for each batch of a stream whether its caller may still call; raises if not.
    """

    def __init__(
        self,
        plane: KeyPlane,
        *,
        staleness_s: Callable[[], float],
        admit: Callable[[], Sequence[str] | None],
        audit: AuditLog | None = None,
        readmit: Callable[[Any], None] | None = None,
    ) -> None:
        self._plane = plane
        self._staleness_s = staleness_s
        self._admit = admit
        self._audit = audit
        self.readmit = readmit

    async def GetStatus(self, request: pb.StatusRequest, context: object) -> pb.StatusResponse:
        """What the node can deliver to a pair."""
        response = self._plane.status(request, saes=self._admit())
        response.directory_staleness_s = min(self._staleness_s(), 1e9)
        return response

    async def GetKeys(self, request: pb.GetKeysRequest, context: Timed | None) -> pb.GetKeysResponse:
        """Draws keys for masters."""
        saes = self._admit()
        self._check_batch(len(request.requests))
        with batch("draw", request.requests):
            results = await self._plane.get_keys(request.requests, timeout_s=_left_s(context), saes=saes)
        if self._audit is not None:
            self._audit.record_all(
                "keys_drawn",
                [
                    _line(one.master_sae_id, one.slave_sae_id, one.request_id, result)
                    for one, result in zip(request.requests, results, strict=True)
                ],
            )
        return pb.GetKeysResponse(results=[_encoded(result) for result in results])

    async def GetKeysById(
        self, request: pb.GetKeysByIdRequest, context: Timed | None
    ) -> pb.GetKeysByIdResponse:
        """Redeems keys for slaves."""
        saes = self._admit()
        self._check_batch(len(request.requests))
        with batch("redeem", request.requests):
            results = await self._plane.get_keys_by_id(
                request.requests, timeout_s=_left_s(context), saes=saes
            )
        if self._audit is not None:
            self._audit.record_all(
                "keys_redeemed",
                [
                    _line(one.master_sae_id, one.slave_sae_id, one.request_id, result)
                    for one, result in zip(request.requests, results, strict=True)
                ],
            )
        return pb.GetKeysByIdResponse(results=[_encoded(result) for result in results])

    async def WatchLevels(self, request: pb.WatchLevelsRequest, context: object) -> AsyncIterator[pb.Level]:
        """Reserve levels, as they change."""
        self._admit()
        async for level in self._plane.watch_levels(request.peer_kme_id):
            yield level

    def _check_batch(self, size: int) -> None:
        if size > MAX_BATCH:
            raise CallerError(
                "too many requests in one batch",
                reason=ErrorReason.LIMIT_EXCEEDED,
                facts={"field": "requests", "at_most": MAX_BATCH},
            )
        if self._audit is not None:
            self._audit.check()


def _left_s(context: Timed | None) -> float | None:
    return None if context is None else context.time_remaining()


def _encoded(result: Delivered) -> pb.KeyResult:
    if isinstance(result, MeshError):
        return pb.KeyResult(failure=failure_from(result))
    encoded = pb.KeyResult()
    encoded.keys.grade = result.grade
    add = encoded.keys.keys.add
    for key_id, value in result.keys:
        add(key_id=key_id, value=value)
    return encoded


def _line(master: str, slave: str, request_id: str, result: Delivered) -> dict[str, AuditValue]:
    line: dict[str, AuditValue] = {"master": master, "slave": slave, "request_id": request_id}
    if isinstance(result, MeshError):
        line["result"] = result.reason.value
    else:
        line["result"] = "ok"
        line["key_ids"] = [text_of(key_id) for key_id, _ in result.keys]
    return line
