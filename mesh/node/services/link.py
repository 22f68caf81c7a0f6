"""The gRPC Link service: streams that other nodes dial.

Owns nothing but the method: who calls comes from the certificate, the stream goes to the
link plane. Messages pass as bytes, because ``mesh.node.transport`` reads the envelope.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc

from mesh.node.links import LinkPlane
from mesh.node.transport import AcceptedTransport, Context

SERVICE = "mesh.v1.Link"


class LinkService:
    """Serves ``Exchange``.

    Args:
        plane: the node's links.
        caller_id: KME id of the caller, from its certificate; called inside the method.
    """

    def __init__(self, plane: LinkPlane, caller_id: Callable[[], str]) -> None:
        self._plane = plane
        self._caller_id = caller_id

    async def exchange(self, requests: object, context: Context) -> None:
        """One stream of a link, until it ends."""
        del requests
        await self._plane.accept(self._caller_id(), AcceptedTransport(context))


def add_link_service(service: LinkService, server: grpc.aio.Server) -> None:
    """Register like a generated ``add_LinkServicer_to_server``, with messages left as bytes."""
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Exchange": grpc.stream_stream_rpc_method_handler(service.exchange)
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_registered_method_handlers(SERVICE, handlers)
