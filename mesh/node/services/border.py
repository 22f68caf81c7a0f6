"""The border service for gateways that speak ETSI GS QKD 020 (border.proto)."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable

from mesh.core.border_rules import AckStatus, Association
from mesh.errors import CallerError
from mesh.node.border.border import Border, Results
from mesh.node.border.ports import Ack, Arrival
from mesh.node.border.posts import STATUS_TO_PROTO, status_from_proto
from mesh.node.border.routing import Refused
from mesh.ops.audit import AuditLog, AuditValue
from mesh.ops.logging import log_soon
from mesh.rpc.status import failure_from
from mesh.v1 import border_pb2 as pb
from mesh.v1.border_pb2_grpc import BorderServicer

_LOG = logging.getLogger("keymesh.border")


class BorderService(BorderServicer):
    """Decodes, asks the border, encodes; a refusal is part of the answer.

    Args:
        border: decides.
        caller_id: id of the gateway that calls.
        audit: takes who did what with which key_IDs; asked before keys are taken, and raising in the end
            withholds the answer.
    """

    def __init__(
        self, border: Border, *, caller_id: Callable[[], str], audit: AuditLog | None = None
    ) -> None:
        self._border = border
        self._caller_id = caller_id
        self._audit = audit

    async def ImportKeys(self, request: pb.ImportKeysRequest, context: object) -> pb.ImportKeysResponse:
        """Keys that a peer hands to us."""
        self._border.check_gateway(self._caller_id())
        if self._audit is not None:
            self._audit.check()
        try:
            association = _association(request.association)
            results = await self._border.import_keys(
                request.peer_kme_id,
                association,
                [Arrival(key.key_id, key.value, key.extension) for key in request.keys],
                callback=request.ack_callback_url,
                extension=request.extension_optional,
                wait_s=request.wait_s,
            )
        except CallerError as refused:
            self._tell("foreign_keys_refused", request.peer_kme_id, request, refused)
            return pb.ImportKeysResponse(refusal=failure_from(_as_refused(refused)))
        log_soon(_LOG, "foreign keys taken", peer=request.peer_kme_id, keys=len(request.keys))
        self._tell("foreign_keys_taken", request.peer_kme_id, request, None)
        return pb.ImportKeysResponse(acks=_containers(results, association))

    async def AckKeys(self, request: pb.AckKeysRequest, context: object) -> pb.AckKeysResponse:
        """What a peer says became of keys."""
        self._border.check_gateway(self._caller_id())
        try:
            await self._border.ack_keys(request.peer_kme_id, _acks(request.acks))
        except CallerError as refused:
            return pb.AckKeysResponse(refusal=failure_from(_as_refused(refused)))
        return pb.AckKeysResponse()

    async def VoidKeys(
        self, request: pb.VoidForeignKeysRequest, context: object
    ) -> pb.VoidForeignKeysResponse:
        """A peer wants keys forgotten."""
        self._border.check_gateway(self._caller_id())
        try:
            association = _association(request.association)
            results = await self._border.void_keys(
                request.peer_kme_id,
                association,
                request.key_ids,
                is_all=request.is_all,
                callback=request.ack_callback_url,
                wait_s=request.wait_s,
            )
        except CallerError as refused:
            return pb.VoidForeignKeysResponse(refusal=failure_from(_as_refused(refused)))
        return pb.VoidForeignKeysResponse(acks=_containers(results, association))

    async def HoldsKeys(self, request: pb.HoldsKeysRequest, context: object) -> pb.HoldsKeysResponse:
        """Whether anything is held from this peer under any of these key_IDs."""
        self._border.check_gateway(self._caller_id())
        return pb.HoldsKeysResponse(is_held=self._border.holds(request.peer_kme_id, request.key_ids))

    async def LeaseJobs(self, request: pb.LeaseJobsRequest, context: object) -> AsyncIterator[pb.LeasedJob]:
        """Requests to perform, as they come."""
        gateway = self._caller_id()
        self._border.check_gateway(gateway)
        async for job in self._border.lease(gateway, request.session_id, request.max_in_flight):
            yield job

    async def CompleteJob(self, request: pb.CompleteJobRequest, context: object) -> pb.CompleteJobResponse:
        """What became of a leased request."""
        gateway = self._caller_id()
        self._border.check_gateway(gateway)
        outcome = request.WhichOneof("outcome")
        accepted = await self._border.complete(
            gateway,
            request.lease_id,
            http_status=request.http_status if outcome == "http_status" else None,
            was_sent=outcome != "not_sent",
            retry_after_s=request.retry_after_s,
            acks=_acks(request.acks),
        )
        return pb.CompleteJobResponse(accepted=accepted)

    def _tell(
        self, event: str, peer: str, request: pb.ImportKeysRequest, refused: CallerError | None
    ) -> None:
        if self._audit is None:
            return
        line: dict[str, AuditValue] = {
            "peer": peer,
            "gateway": self._caller_id(),
            "request_id": request.request_id,
            "initiator": request.association.initiator_sae_id,
            "targets": list(request.association.target_sae_ids),
            "key_ids": [key.key_id.hex() for key in request.keys],
            "result": "ok" if refused is None else str(refused.facts.get("problem", refused.reason.value)),
        }
        self._audit.record_all(event, [line])


def _as_refused(error: CallerError) -> CallerError:
    """A malformed field looks like any other refusal."""
    if isinstance(error, Refused) or "problem" in error.facts:
        return error
    return CallerError(error.message, reason=error.reason, facts={"problem": "malformed", **error.facts})


def _association(message: pb.Association) -> Association:
    return Association.of(message.initiator_sae_id, message.target_sae_ids)


def _acks(containers: Iterable[pb.AckContainer]) -> list[Ack]:
    return [
        Ack(
            status_from_proto(one.status),
            tuple(dict.fromkeys(one.key_ids)),
            _association(one.association),
            one.message,
        )
        for one in containers
    ]


def _containers(results: Results, association: Association) -> list[pb.AckContainer]:
    by_status: dict[AckStatus, list[bytes]] = {}
    for key_id, status in results.items():
        by_status.setdefault(status, []).append(key_id)
    named = pb.Association(initiator_sae_id=association.initiator, target_sae_ids=association.targets)
    return [
        pb.AckContainer(status=STATUS_TO_PROTO[status], key_ids=key_ids, association=named)
        for status, key_ids in by_status.items()
    ]
