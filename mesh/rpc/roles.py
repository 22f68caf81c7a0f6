"""Which role may call which method: one table, everything else is denied.

A method of a new service is unreachable until it stands here; that is the point.
"""

from __future__ import annotations

from collections.abc import Mapping

from mesh.core.identity import Role
from mesh.errors import NotAuthorizedError

_EVERYBODY = frozenset(Role)
_NEIGHBOURS = frozenset({Role.NODE, Role.HUB})
_NODE = frozenset({Role.NODE})
_GATEWAY = frozenset({Role.GATEWAY})
_READERS = frozenset({Role.GATEWAY, Role.TOOL})
_TOOL = frozenset({Role.TOOL})

ADMITTED: Mapping[str, frozenset[Role]] = {
    "/mesh.v1.Link/Exchange": _NEIGHBOURS,
    "/mesh.v1.Peer/Confirm": _NODE,
    "/mesh.v1.Peer/QueryTransfer": _NODE,
    "/mesh.v1.Peer/Deposit": _NODE,
    "/mesh.v1.Peer/ReportRoutes": _NEIGHBOURS,
    "/mesh.v1.KeyDelivery/GetStatus": _READERS,
    "/mesh.v1.KeyDelivery/GetKeys": _GATEWAY,
    "/mesh.v1.KeyDelivery/GetKeysById": _GATEWAY,
    "/mesh.v1.KeyDelivery/Deliver": _GATEWAY,
    "/mesh.v1.KeyDelivery/WatchLevels": _READERS,
    # And only gateways that the node's configuration names as border.
    "/mesh.v1.Border/ImportKeys": _GATEWAY,
    "/mesh.v1.Border/AckKeys": _GATEWAY,
    "/mesh.v1.Border/VoidKeys": _GATEWAY,
    "/mesh.v1.Border/HoldsKeys": _GATEWAY,
    "/mesh.v1.Border/LeaseJobs": _GATEWAY,
    "/mesh.v1.Border/CompleteJob": _GATEWAY,
    "/mesh.v1.Admin/GetNodeStatus": _TOOL,
    "/mesh.v1.Admin/ListLinks": _TOOL,
    "/mesh.v1.Admin/ListReserves": _TOOL,
    "/mesh.v1.Admin/ListAlarms": _TOOL,
    "/mesh.v1.Admin/AcknowledgeAlarm": _TOOL,
    "/mesh.v1.Admin/ResetLink": _TOOL,
    "/mesh.v1.Admin/IssuePsrd": _TOOL,
    "/mesh.v1.Admin/ImportPsrd": _TOOL,
    "/mesh.v1.Admin/DiscardPsrd": _TOOL,
    "/mesh.v1.Admin/GetPsrdStatus": _TOOL,
    "/grpc.health.v1.Health/Check": _EVERYBODY,
    "/grpc.health.v1.Health/List": _EVERYBODY,
    "/grpc.health.v1.Health/Watch": _EVERYBODY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _TOOL,
}


def require_admitted(method: str, role: Role) -> None:
    """Lets a role call a method, given as ``/package.Service/Method``.

    Raises:
        NotAuthorizedError: the table does not say so.
    """
    if role not in ADMITTED.get(method, frozenset()):
        raise NotAuthorizedError("role may not call this method", facts={"role": role.value})
