"""A node's ``KeyDelivery`` service over the fake key service: the real wire, real mTLS, no key plane."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from mesh.client import DeliveredKeys, MeshError
from mesh.core.identity import Identity, Role
from mesh.node.services.streamed import StreamedDelivery
from mesh.ops.tls import TlsFiles
from mesh.pki.authority import Pki
from mesh.rpc.server import RpcServer
from mesh.rpc.status import failure_from
from mesh.v1 import keys_pb2, keys_pb2_grpc
from tests.fakes.key_service import FakeKeyService


class KeyDelivery(StreamedDelivery):
    """Translates the wire to ``FakeKeyService`` and back."""

    def __init__(self, service: FakeKeyService) -> None:
        self._service = service

    async def GetStatus(self, request: keys_pb2.StatusRequest, context: Any) -> keys_pb2.StatusResponse:
        """See keys.proto."""
        status = await self._service.get_status(
            request.caller_sae_id, request.peer_sae_id, request_id=request.request_id
        )
        names = keys_pb2.StatusResponse.DESCRIPTOR.fields_by_name
        return keys_pb2.StatusResponse(**{name: getattr(status, name) for name in names})

    async def GetKeys(self, request: keys_pb2.GetKeysRequest, context: Any) -> keys_pb2.GetKeysResponse:
        """See keys.proto."""
        return keys_pb2.GetKeysResponse(results=[await self._draw(one) for one in request.requests])

    async def GetKeysById(
        self, request: keys_pb2.GetKeysByIdRequest, context: Any
    ) -> keys_pb2.GetKeysByIdResponse:
        """See keys.proto."""
        return keys_pb2.GetKeysByIdResponse(results=[await self._redeem(one) for one in request.requests])

    async def WatchLevels(
        self, request: keys_pb2.WatchLevelsRequest, context: Any
    ) -> AsyncIterator[keys_pb2.Level]:
        """See keys.proto; one level, then silence."""
        import asyncio

        yield keys_pb2.Level(peer_kme_id="kme-b", outbound_bytes=1)
        await asyncio.Event().wait()

    async def _draw(self, one: keys_pb2.KeyRequest) -> keys_pb2.KeyResult:
        try:
            keys = await self._service.get_keys(
                one.master_sae_id,
                one.slave_sae_id,
                number=one.number,
                size_bytes=one.size_bytes or None,
                additional_slaves=one.additional_slave_sae_ids,
                request_id=one.request_id,
            )
        except MeshError as error:
            return keys_pb2.KeyResult(failure=failure_from(error))
        return _result(keys)

    async def _redeem(self, one: keys_pb2.KeyByIdRequest) -> keys_pb2.KeyResult:
        ids: Sequence[UUID] = [UUID(bytes=key_id) for key_id in one.key_ids]
        try:
            keys = await self._service.get_keys_by_id(
                one.slave_sae_id, one.master_sae_id, ids, request_id=one.request_id
            )
        except MeshError as error:
            return keys_pb2.KeyResult(failure=failure_from(error))
        return _result(keys)


def _result(keys: DeliveredKeys) -> keys_pb2.KeyResult:
    wire = [keys_pb2.Key(key_id=key.key_id.bytes, value=key.value) for key in keys.keys]
    return keys_pb2.KeyResult(keys=keys_pb2.Keys(keys=wire, grade=keys.grade))


async def start_key_node(
    service: FakeKeyService, *, pki: Pki, directory: Path, kme_id: str, address: str = "127.0.0.1:0"
) -> tuple[RpcServer, int]:
    """Serve ``service`` as node ``kme_id``; returns the server and its port."""
    files = pki.node(kme_id).save(directory, f"node-{kme_id}")
    server = RpcServer(
        Identity(pki.domain, Role.NODE, kme_id),
        TlsFiles(ca=directory / "node-ca.pem", cert=files.cert, key=files.key),
    )
    server.add(keys_pb2_grpc.add_KeyDeliveryServicer_to_server, KeyDelivery(service))
    return server, await server.start(address)
