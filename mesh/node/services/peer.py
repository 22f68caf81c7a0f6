"""The service between two KMEs that are ends of a reserve (peer.proto).

The caller's certificate only keeps strangers out: what a call achieves is decided by reserve bytes.
"""

from __future__ import annotations

from mesh.errors import PeerError, TagMismatchError
from mesh.node.keyplane import KeyPlane
from mesh.rpc.server import caller
from mesh.v1 import peer_pb2 as pb
from mesh.v1.peer_pb2_grpc import PeerServicer


class PeerService(PeerServicer):
    """Confirms, transfer queries and deposits; all refused while the node must not serve."""

    def __init__(self, plane: KeyPlane) -> None:
        self._plane = plane

    async def Confirm(self, request: pb.ConfirmRequest, context: object) -> pb.ConfirmResponse:
        """A target says that it holds a transfer."""
        self._plane.check_serving()
        try:
            return pb.ConfirmResponse(accepted=self._plane.establisher.on_confirm(request))
        except TagMismatchError as exc:
            raise PeerError("confirm refused") from exc

    async def QueryTransfer(self, request: pb.TransferQuery, context: object) -> pb.TransferAnswer:
        """A source asks what became of its transfer."""
        self._plane.check_serving()
        return self._plane.appender.on_query(request)

    async def ReportRoutes(self, request: pb.RouteReport, context: object) -> pb.RouteReportAck:
        """A target or a relay tells what became of a transfer's routes."""
        self._plane.establisher.on_report(caller().id, request)
        return pb.RouteReportAck()

    async def Deposit(self, request: pb.DepositRequest, context: object) -> pb.DepositResponse:
        """A sealed message from a source."""
        self._plane.check_serving()
        return await self._plane.deposits.on_deposit(request)
