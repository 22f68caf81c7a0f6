"""BorderClient: what a gateway that speaks ETSI GS QKD 020 asks its node, and performs for it.

Translates between values and ``mesh.v1.Border``; nothing is decided, retried or kept here.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

import grpc

from mesh.core.border_rules import AckStatus, Association, Problem
from mesh.errors import CallerError, PeerError
from mesh.rpc.status import REQUEST_ID_KEY, error_from_failure, error_from_rpc
from mesh.v1 import border_pb2 as pb
from mesh.v1.border_pb2_grpc import BorderStub

if TYPE_CHECKING:
    from mesh.v1.border_pb2_grpc import BorderAsyncStub

__all__ = [
    "Ack",
    "AckStatus",
    "Association",
    "BorderClient",
    "ForeignKey",
    "Job",
    "Outcome",
    "PostAcks",
    "PostKeys",
    "PostVoid",
    "Problem",
    "problem_of",
]

_TO_PROTO = {
    AckStatus.RELAYED: pb.RELAYED,
    AckStatus.FAILED: pb.FAILED,
    AckStatus.VOIDED: pb.VOIDED,
    AckStatus.FAILED_TO_VOID: pb.FAILED_TO_VOID,
    AckStatus.KEY_NOT_PRESENT: pb.KEY_NOT_PRESENT,
}
_FROM_PROTO = {number: status for status, number in _TO_PROTO.items()}


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """A key as it crosses a border; ``extension`` is its JSON object, empty for none."""

    key_id: UUID
    value: bytes = field(repr=False)
    extension: bytes = b""


@dataclass(frozen=True, slots=True)
class Ack:
    """One ack container."""

    status: AckStatus
    key_ids: tuple[UUID, ...]
    association: Association
    message: str = ""


@dataclass(frozen=True, slots=True)
class PostKeys:
    """Body of POST ext_keys; ``extension`` is the optional extension's JSON object, empty for none."""

    association: Association
    keys: tuple[ForeignKey, ...]
    callback: str
    extension: bytes = b""


@dataclass(frozen=True, slots=True)
class PostAcks:
    """Body of POST ext_keys/ack."""

    acks: tuple[Ack, ...]


@dataclass(frozen=True, slots=True)
class PostVoid:
    """Body of POST ext_keys/void."""

    association: Association
    key_ids: tuple[UUID, ...]
    callback: str


@dataclass(frozen=True, slots=True)
class Job:
    """A request to perform within ``lease_s`` seconds, at ``url`` of the configured peer."""

    lease_id: bytes
    lease_s: float
    peer: str
    url: str
    body: PostKeys | PostAcks | PostVoid
    request_id: str

    @property
    def kind(self) -> str:
        """``keys``, ``acks`` or ``void``: for logs and metrics."""
        return type(self.body).__name__.removeprefix("Post").lower()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request: a whole answer, or why there is none.

    Attributes:
        http_status: of the answer; None for none.
        problem: without an answer: why; with an error answer: its problem type.
        was_sent: without an answer: whether anything of the request may have left.
        acks: what a successful answer itself held.
    """

    http_status: int | None = None
    problem: str = ""
    was_sent: bool = True
    retry_after_s: float = 0.0
    acks: tuple[Ack, ...] = ()


class BorderClient:
    """The border service of one node; safe for any number of tasks of one loop.

    Args:
        channel: returns the channel to use now.
    """

    def __init__(self, channel: Callable[[], grpc.aio.Channel]) -> None:
        self._channel = channel
        self._stub_channel: grpc.aio.Channel | None = None
        self._stub: BorderAsyncStub | None = None

    async def import_keys(
        self,
        peer: str,
        association: Association,
        keys: Iterable[ForeignKey],
        *,
        callback: str,
        extension: bytes = b"",
        wait_s: float = 0.0,
        request_id: str = "",
        timeout_s: float,
    ) -> list[Ack]:
        """Hands a peer's keys to the node: all stored durably, or none.

        Args:
            wait_s: above 0 (and no callback): wait for the outcome of every key.

        Raises:
            CallerError: refused; ``facts["problem"]`` is a ``Problem``, ``facts["is_held"]`` is "true"
                when some key of the request is held from an earlier one.
            MeshError: nothing is known.
        """
        request = pb.ImportKeysRequest(
            peer_kme_id=peer,
            association=_association(association),
            keys=[
                pb.ForeignKey(key_id=key.key_id.bytes, value=key.value, extension=key.extension)
                for key in keys
            ],
            ack_callback_url=callback,
            extension_optional=extension,
            request_id=request_id,
            wait_s=wait_s,
        )
        try:
            answer = await self._border().ImportKeys(
                request, timeout=timeout_s, metadata=_metadata(request_id)
            )
        except grpc.RpcError as exc:
            raise error_from_rpc(exc) from exc
        if answer.HasField("refusal"):
            raise error_from_failure(answer.refusal)
        return [_ack(one) for one in answer.acks]

    async def ack_keys(
        self, peer: str, acks: Sequence[Ack], *, request_id: str = "", timeout_s: float
    ) -> None:
        """Hands a peer's acks to the node: all applied, or none.

        Raises:
            CallerError: refused; ``facts["problem"]`` and ``facts["key_ids"]`` say why.
            MeshError: nothing is known.
        """
        request = pb.AckKeysRequest(
            peer_kme_id=peer, acks=[_container(one) for one in acks], request_id=request_id
        )
        try:
            answer = await self._border().AckKeys(request, timeout=timeout_s, metadata=_metadata(request_id))
        except grpc.RpcError as exc:
            raise error_from_rpc(exc) from exc
        if answer.HasField("refusal"):
            raise error_from_failure(answer.refusal)

    async def void_keys(
        self,
        peer: str,
        association: Association,
        key_ids: Sequence[UUID],
        *,
        is_all: bool = False,
        callback: str,
        wait_s: float = 0.0,
        request_id: str = "",
        timeout_s: float,
    ) -> list[Ack]:
        """Has the node void a peer's keys; errors as ``import_keys``."""
        request = pb.VoidForeignKeysRequest(
            peer_kme_id=peer,
            association=_association(association),
            key_ids=[key_id.bytes for key_id in key_ids],
            is_all=is_all,
            ack_callback_url=callback,
            request_id=request_id,
            wait_s=wait_s,
        )
        try:
            answer = await self._border().VoidKeys(request, timeout=timeout_s, metadata=_metadata(request_id))
        except grpc.RpcError as exc:
            raise error_from_rpc(exc) from exc
        if answer.HasField("refusal"):
            raise error_from_failure(answer.refusal)
        return [_ack(one) for one in answer.acks]

    async def holds_keys(self, peer: str, key_ids: Sequence[UUID], *, timeout_s: float) -> bool:
        """Whether anything is held for any of these keys: then 400 and 401 would lie.

        Raises:
            MeshError: nothing is known.
        """
        request = pb.HoldsKeysRequest(peer_kme_id=peer, key_ids=[key_id.bytes for key_id in key_ids])
        try:
            return (await self._border().HoldsKeys(request, timeout=timeout_s)).is_held
        except grpc.RpcError as exc:
            raise error_from_rpc(exc) from exc

    async def lease_jobs(self, *, session_id: bytes = b"", max_in_flight: int) -> AsyncIterator[Job]:
        """Requests to perform, as they come; a new stream ends this gateway's older one.

        Raises:
            MeshError: the stream broke: stop what is performed, start again after a pause.
        """
        request = pb.LeaseJobsRequest(session_id=session_id or os.urandom(16), max_in_flight=max_in_flight)
        call = self._border().LeaseJobs(request)
        try:
            async for job in call:
                yield _job(job)
        except grpc.RpcError as exc:
            raise error_from_rpc(exc) from exc
        finally:
            call.cancel()

    async def complete_job(self, lease_id: bytes, outcome: Outcome, *, timeout_s: float) -> bool:
        """Tells what became of a request; False when the lease had ended.

        Raises:
            MeshError: the node did not hear it; it will lease the request again.
        """
        request = pb.CompleteJobRequest(
            lease_id=lease_id,
            problem_type=outcome.problem[:1024],
            retry_after_s=outcome.retry_after_s,
            acks=[_container(one) for one in outcome.acks],
        )
        if outcome.http_status is not None:
            request.http_status = outcome.http_status
        elif outcome.was_sent:
            request.uncertain = outcome.problem[:1024]
        else:
            request.not_sent = outcome.problem[:1024]
        try:
            return (await self._border().CompleteJob(request, timeout=timeout_s)).accepted
        except grpc.RpcError as exc:
            raise error_from_rpc(exc) from exc

    def _border(self) -> BorderAsyncStub:
        channel = self._channel()
        if self._stub is None or channel is not self._stub_channel:
            self._stub = BorderStub(channel)
            self._stub_channel = channel
        return self._stub


def _metadata(request_id: str) -> tuple[tuple[str, str], ...] | None:
    return ((REQUEST_ID_KEY, request_id),) if request_id else None


def _association(association: Association) -> pb.Association:
    return pb.Association(initiator_sae_id=association.initiator, target_sae_ids=association.targets)


def _named(message: pb.Association) -> Association:
    return Association(message.initiator_sae_id, tuple(message.target_sae_ids))


def _container(ack: Ack) -> pb.AckContainer:
    return pb.AckContainer(
        status=_TO_PROTO[ack.status],
        key_ids=[key_id.bytes for key_id in ack.key_ids],
        association=_association(ack.association),
        message=ack.message,
    )


def _ack(container: pb.AckContainer) -> Ack:
    status = _FROM_PROTO.get(container.status)
    if status is None:
        raise PeerError("node sent an unknown ack status")
    return Ack(status, _ids(container.key_ids), _named(container.association), container.message)


def _ids(raw: Iterable[bytes]) -> tuple[UUID, ...]:
    try:
        return tuple(UUID(bytes=one) for one in raw)
    except ValueError as exc:
        raise PeerError("node sent a key_ID that is not 16 bytes long") from exc


def _job(job: pb.LeasedJob) -> Job:
    kind = job.WhichOneof("body")
    body: PostKeys | PostAcks | PostVoid
    if kind == "post_keys":
        keys = job.post_keys
        body = PostKeys(
            _named(keys.association),
            tuple(ForeignKey(_ids([key.key_id])[0], key.value, key.extension) for key in keys.keys),
            keys.ack_callback_url,
            keys.extension_optional,
        )
    elif kind == "post_acks":
        body = PostAcks(tuple(_ack(one) for one in job.post_acks.acks))
    elif kind == "post_void":
        void = job.post_void
        body = PostVoid(_named(void.association), _ids(void.key_ids), void.ack_callback_url)
    else:
        raise PeerError("node sent a request without a body")
    return Job(job.lease_id, job.lease_s, job.peer_kme_id, job.url, body, job.request_id)


def problem_of(error: CallerError) -> Problem:
    """Why the node refused; MALFORMED for anything that it does not name."""
    try:
        return Problem(str(error.facts.get("problem", "")))
    except ValueError:
        return Problem.MALFORMED
