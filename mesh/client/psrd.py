"""Orders about pre-shared random data to a running node, for operators' tools.

Speaks the admin service with a tool certificate. Names files local to the node; table bytes
and passphrases never travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc

from mesh.client.operator import OperatorTarget, open_channel
from mesh.rpc.status import error_from_rpc
from mesh.v1 import admin_pb2, admin_pb2_grpc

Progress = Callable[[int, int], None]
#: A table of a terabyte at the speed of a slow stick.
_WORK_TIMEOUT_S = 24 * 3600.0


def issue(
    target: OperatorTarget, request: admin_pb2.IssuePsrdRequest, progress: Progress
) -> admin_pb2.PsrdTable:
    """Have a table and its courier file made.

    Raises:
        MeshError: as the node says.
    """
    return _follow(target, lambda stub: stub.IssuePsrd(request, timeout=_WORK_TIMEOUT_S), progress)


def take(
    target: OperatorTarget, request: admin_pb2.ImportPsrdRequest, progress: Progress
) -> admin_pb2.PsrdTable:
    """Have a courier file imported.

    Raises:
        MeshError: as the node says.
    """
    return _follow(target, lambda stub: stub.ImportPsrd(request, timeout=_WORK_TIMEOUT_S), progress)


def discard(target: OperatorTarget, peer: str, table_id: bytes, *, timeout_s: float = 60.0) -> None:
    """Give up the last table issued.

    Raises:
        MeshError: as the node says.
    """
    request = admin_pb2.DiscardPsrdRequest(peer_kme_id=peer, table_id=table_id)
    with open_channel(target) as channel:
        try:
            admin_pb2_grpc.AdminStub(channel).DiscardPsrd(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error


def status(target: OperatorTarget, *, timeout_s: float = 5.0) -> admin_pb2.PsrdStatusResponse:
    """Levels and tables of links that courier files feed.

    Raises:
        MeshError: the node cannot be reached.
    """
    with open_channel(target) as channel:
        try:
            return admin_pb2_grpc.AdminStub(channel).GetPsrdStatus(
                admin_pb2.PsrdStatusRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error


def _follow(
    target: OperatorTarget,
    call: Callable[[admin_pb2_grpc.AdminStub], Iterator[admin_pb2.PsrdProgress]],
    progress: Progress,
) -> admin_pb2.PsrdTable:
    table = admin_pb2.PsrdTable()
    with open_channel(target) as channel:
        try:
            for message in call(admin_pb2_grpc.AdminStub(channel)):
                progress(message.done_bytes, message.total_bytes)
                table = message.table
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
    return table
