"""The operator's service (admin.proto): status, links, reserves, alarms. No key facts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from mesh.errors import CallerError
from mesh.node.keyplane import KeyPlane
from mesh.node.links import rollback_alarm
from mesh.node.ports import LinkPlanePort
from mesh.node.psrd_desk import PsrdDesk
from mesh.ops.alarms import Alarms
from mesh.v1 import admin_pb2 as pb
from mesh.v1.admin_pb2_grpc import AdminServicer


class AdminService(AdminServicer):
    """What an operator sees and may do.

    Args:
        plane: reserves; None at a hub.
        links: the link plane.
        psrd: takes orders about pre-shared random data.
        alarms: open alarms.
        node_status: facts that only the node's builder knows; open alarms are filled in here.
    """

    def __init__(
        self,
        *,
        plane: KeyPlane | None,
        links: LinkPlanePort,
        psrd: PsrdDesk,
        alarms: Alarms,
        node_status: Callable[[], pb.NodeStatus],
    ) -> None:
        self._plane = plane
        self._links = links
        self._psrd = psrd
        self._alarms = alarms
        self._node_status = node_status

    async def GetNodeStatus(self, request: pb.NodeStatusRequest, context: object) -> pb.NodeStatus:
        """The node itself."""
        status = self._node_status()
        status.open_alarms = len(self._alarms.open_alarms())
        return status

    async def ListLinks(self, request: pb.ListLinksRequest, context: object) -> pb.ListLinksResponse:
        """Every link with its lanes."""
        links = self._links.links
        return pb.ListLinksResponse(links=[links[peer].status() for peer in sorted(links)])

    async def ListReserves(self, request: pb.ListReservesRequest, context: object) -> pb.ListReservesResponse:
        """Every reserve epoch."""
        return pb.ListReservesResponse(reserves=self._plane.reserve_status() if self._plane else [])

    async def ListAlarms(self, request: pb.ListAlarmsRequest, context: object) -> pb.ListAlarmsResponse:
        """Open alarms."""
        return pb.ListAlarmsResponse(
            alarms=[
                pb.Alarm(
                    alarm_id=alarm.alarm_id,
                    severity=alarm.severity.value,
                    raised_at_s=int(alarm.raised_at_s),
                    count=alarm.count,
                    message=alarm.message,
                    next_step=alarm.next_step,
                    needs_operator=alarm.needs_operator,
                )
                for alarm in self._alarms.open_alarms()
            ]
        )

    async def AcknowledgeAlarm(
        self, request: pb.AcknowledgeAlarmRequest, context: object
    ) -> pb.AcknowledgeAlarmResponse:
        """Closes an alarm that waited for the operator."""
        self._alarms.acknowledge(request.alarm_id)
        return pb.AcknowledgeAlarmResponse()

    async def ResetLink(self, request: pb.ResetLinkRequest, context: object) -> pb.ResetLinkResponse:
        """Throws a link's lanes away at this end."""
        if request.peer_kme_id != request.confirm_peer_kme_id:
            raise CallerError(
                "confirm_peer_kme_id must repeat peer_kme_id", facts={"field": "confirm_peer_kme_id"}
            )
        if self._plane is not None:
            await self._plane.forget_after_rollback()
        transmit, receive = await self._links.reset_link(request.peer_kme_id)
        # The operator has looked, and has acted on the alarm's next step.
        if self._alarms.is_open(rollback_alarm(request.peer_kme_id)):
            self._alarms.acknowledge(rollback_alarm(request.peer_kme_id))
        return pb.ResetLinkResponse(transmit_epoch=transmit, receive_epoch=receive)

    async def IssuePsrd(
        self, request: pb.IssuePsrdRequest, context: object
    ) -> AsyncIterator[pb.PsrdProgress]:
        """Makes a table and its courier file."""
        async for progress in self._psrd.issue(request):
            yield progress

    async def ImportPsrd(
        self, request: pb.ImportPsrdRequest, context: object
    ) -> AsyncIterator[pb.PsrdProgress]:
        """Takes a courier file's table."""
        async for progress in self._psrd.take(request):
            yield progress

    async def DiscardPsrd(self, request: pb.DiscardPsrdRequest, context: object) -> pb.PsrdTable:
        """Gives up a table whose courier was lost."""
        return await self._psrd.discard(request)

    async def GetPsrdStatus(self, request: pb.PsrdStatusRequest, context: object) -> pb.PsrdStatusResponse:
        """Levels and tables of links that courier files feed."""
        return self._psrd.status()
