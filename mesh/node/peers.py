"""Calls the peer service of other KMEs over gRPC.

Owns addressing, the request id that goes along, and the translation of errors, nothing else: what an
answer means is decided by its caller, and believed only as far as reserve bytes authenticate it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc

from mesh.ops.logging import request_id
from mesh.rpc.status import REQUEST_ID_KEY, error_from_rpc
from mesh.v1.peer_pb2 import (
    ConfirmRequest,
    ConfirmResponse,
    DepositRequest,
    DepositResponse,
    RouteReport,
    TransferAnswer,
    TransferQuery,
)
from mesh.v1.peer_pb2_grpc import PeerStub

if TYPE_CHECKING:
    from mesh.v1.peer_pb2_grpc import PeerAsyncStub


class GrpcPeers:
    """The real ``PeerCaller``.

    Args:
        channel: gives the channel to a KME; raises UnavailableError when its address is unknown.
    """

    def __init__(self, channel: Callable[[str], grpc.aio.Channel]) -> None:
        self._channel = channel
        self._stubs: dict[grpc.aio.Channel, PeerAsyncStub] = {}

    async def confirm(self, kme_id: str, request: ConfirmRequest, *, timeout_s: float) -> ConfirmResponse:
        """Tells the source that its transfer is appended."""
        try:
            return await self._stub(kme_id).Confirm(request, timeout=timeout_s, metadata=_metadata())
        except grpc.RpcError as exc:
            raise error_from_rpc(exc) from exc

    async def query(self, kme_id: str, request: TransferQuery, *, timeout_s: float) -> TransferAnswer:
        """Asks the target what became of a transfer."""
        try:
            return await self._stub(kme_id).QueryTransfer(request, timeout=timeout_s, metadata=_metadata())
        except grpc.RpcError as exc:
            raise error_from_rpc(exc) from exc

    async def deposit(self, kme_id: str, request: DepositRequest, *, timeout_s: float) -> DepositResponse:
        """Delivers a sealed message."""
        try:
            return await self._stub(kme_id).Deposit(request, timeout=timeout_s, metadata=_metadata())
        except grpc.RpcError as exc:
            raise error_from_rpc(exc) from exc

    async def report(self, kme_id: str, request: RouteReport, *, timeout_s: float) -> None:
        """Tells the source of a transfer what became of its routes."""
        try:
            await self._stub(kme_id).ReportRoutes(request, timeout=timeout_s, metadata=_metadata())
        except grpc.RpcError as exc:
            raise error_from_rpc(exc) from exc

    def _stub(self, kme_id: str) -> PeerAsyncStub:
        channel = self._channel(kme_id)
        stub = self._stubs.get(channel)
        if stub is None:
            if len(self._stubs) > 1024:
                self._stubs.clear()
            stub = self._stubs[channel] = PeerStub(channel)
        return stub


def _metadata() -> tuple[tuple[str, str], ...] | None:
    """The id of the request that the call is made for, so that the other end's log lines carry it."""
    identifier = request_id.get()
    return ((REQUEST_ID_KEY, identifier),) if identifier else None
