"""MeshClient: key delivery for asyncio programs, over one mTLS channel to one node.

Owns the translation between values and ``mesh.v1.KeyDelivery``; batching is in
``mesh.client.batching``. Nothing is retried: a key whose answer was lost counts as
handed out, and only the caller knows whether it still wants another.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any
from uuid import UUID

import grpc

from mesh.client.batching import Batcher
from mesh.client.border import BorderClient
from mesh.client.results import DeliveredKey, DeliveredKeys, KeyStatus, ReserveLevel
from mesh.client.stream import DeliveryStreams
from mesh.errors import CallerError, MeshError, PeerError
from mesh.ops.tls import TlsFiles
from mesh.rpc.channels import ChannelPool
from mesh.rpc.identity import Identity, Role
from mesh.rpc.status import REQUEST_ID_KEY, error_from_failure, error_from_rpc
from mesh.v1 import keys_pb2, keys_pb2_grpc

DEFAULT_TIMEOUT_S = 8.0
_MAX_NUMBER = 65_535
_MAX_KEY_BYTES = 8192
_KEY_ID_BYTES = 16
# Key_ID, field headers and the grade, rounded up.
_OVERHEAD_BYTES = 64

_GetKeys = Batcher[keys_pb2.KeyRequest, DeliveredKeys]
_GetKeysById = Batcher[keys_pb2.KeyByIdRequest, DeliveredKeys]


class MeshClient:
    """A typed client of one node's key delivery; safe for any number of tasks of one loop.

    Args:
        channel: returns the channel to use now; see ``connect`` for the usual way.
        on_close: awaited by ``close`` after the client's own work ended.
    """

    def __init__(self, channel: Callable[[], grpc.aio.Channel], on_close: Callable[[], Any] | None = None):
        self._channel = channel
        self._on_close = on_close
        self._stub_channel: grpc.aio.Channel | None = None
        self._stub: keys_pb2_grpc.KeyDeliveryAsyncStub | None = None
        self._streams = DeliveryStreams(channel)
        self.border = BorderClient(channel)
        self._get_keys: _GetKeys = Batcher(self._send_get_keys)
        self._get_keys_by_id: _GetKeysById = Batcher(self._send_get_keys_by_id)

    @classmethod
    def connect(
        cls,
        address: str,
        *,
        domain_id: str,
        kme_id: str,
        tls: TlsFiles,
        roles: Sequence[str] = ("gateway", "tool"),
    ) -> MeshClient:
        """Makes a client of a node; connects at the first call and again after each loss.

        Args:
            address: ``host:port`` of the node's gRPC port.
            domain_id: the node's domain.
            kme_id: the node that must answer there; another certificate is refused.
            tls: node root, and the caller's own certificate and key.
            roles: what the own certificate may be for.

        Raises:
            ConfigError: unusable files, in words.
        """
        pool = ChannelPool(tls, frozenset(Role(role) for role in roles))
        node = Identity(domain_id, Role.NODE, kme_id)
        return cls(lambda: pool.channel(address, node), pool.close)

    async def __aenter__(self) -> MeshClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Fails what waits or is in flight, and closes the channel."""
        await self._get_keys.close()
        await self._get_keys_by_id.close()
        await self._streams.close()
        if self._on_close is not None:
            await self._on_close()

    async def get_status(
        self, caller: str, peer: str, *, request_id: str = "", timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> KeyStatus:
        """What the node can deliver to the pair of SAEs (ETSI GS QKD 014 6.1).

        Args:
            caller: the SAE that asks.
            peer: the other SAE.
            request_id: for logs on both sides.
            timeout_s: seconds to wait.

        Raises:
            MeshError: by reason: UNKNOWN_SAE, NOT_AUTHORIZED, PEER_UNREACHABLE, …
        """
        request = _build(
            keys_pb2.StatusRequest, caller_sae_id=caller, peer_sae_id=peer, request_id=request_id
        )
        metadata = ((REQUEST_ID_KEY, request_id),) if request_id else None
        try:
            answer = await self._delivery().GetStatus(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as exc:
            raise error_from_rpc(exc) from exc
        return KeyStatus(
            source_kme_id=answer.source_kme_id,
            target_kme_id=answer.target_kme_id,
            key_size_bits=answer.key_size_bits,
            min_key_size_bits=answer.min_key_size_bits,
            max_key_size_bits=answer.max_key_size_bits,
            stored_key_count=answer.stored_key_count,
            max_key_count=answer.max_key_count,
            max_key_per_request=answer.max_key_per_request,
            max_sae_id_count=answer.max_sae_id_count,
            grade=answer.grade,
            directory_staleness_s=answer.directory_staleness_s,
        )

    async def get_keys(
        self,
        master: str,
        slave: str,
        *,
        number: int = 1,
        size_bytes: int | None = None,
        additional_slaves: Sequence[str] = (),
        request_id: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> DeliveredKeys:
        """Draws fresh keys for a master (ETSI GS QKD 014 6.2).

        A call that is cancelled or runs out of time after it was sent may have handed
        out keys; they are spent.

        Args:
            master: the SAE that asks.
            slave: the SAE that will fetch them by id.
            number: how many keys, 1 and more.
            size_bytes: bytes per key, 1 to 8192; None for the node's default.
            additional_slaves: further SAEs that may fetch them.
            request_id: for logs on both sides.
            timeout_s: seconds to wait.

        Raises:
            MeshError: by reason: OUT_OF_MATERIAL, LIMIT_EXCEEDED, UNKNOWN_SAE, BUSY, …
        """
        if not 1 <= number <= _MAX_NUMBER:
            raise CallerError("number must be 1 to 65535", facts={"number": number})
        if size_bytes is not None and not 1 <= size_bytes <= _MAX_KEY_BYTES:
            raise CallerError("size_bytes must be 1 to 8192", facts={"size_bytes": size_bytes})
        request = _build(
            keys_pb2.KeyRequest,
            master_sae_id=master,
            slave_sae_id=slave,
            number=number,
            size_bytes=size_bytes or 0,
            additional_slave_sae_ids=additional_slaves,
            request_id=request_id,
        )
        weight = number * ((size_bytes or _MAX_KEY_BYTES) + _OVERHEAD_BYTES)
        return await self._get_keys.submit(request, pair=(master, slave), weight=weight, timeout_s=timeout_s)

    async def get_keys_by_id(
        self,
        slave: str,
        master: str,
        key_ids: Sequence[UUID],
        *,
        request_id: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> DeliveredKeys:
        """Redeems keys for a slave (ETSI GS QKD 014 6.3): all of them or none.

        Args:
            slave: the SAE that asks.
            master: the SAE that drew them.
            key_ids: no duplicates.
            request_id: for logs on both sides.
            timeout_s: seconds to wait.

        Raises:
            MeshError: by reason: UNKNOWN_KEY, NOT_AUTHORIZED, LIMIT_EXCEEDED, BUSY, …
        """
        if not 1 <= len(key_ids) <= _MAX_NUMBER:
            raise CallerError("key_ids must name 1 to 65535 keys", facts={"count": len(key_ids)})
        request = _build(
            keys_pb2.KeyByIdRequest,
            slave_sae_id=slave,
            master_sae_id=master,
            key_ids=[key_id.bytes for key_id in key_ids],
            request_id=request_id,
        )
        weight = len(key_ids) * (_MAX_KEY_BYTES + _OVERHEAD_BYTES)
        return await self._get_keys_by_id.submit(
            request, pair=(slave, master), weight=weight, timeout_s=timeout_s
        )

    async def watch_levels(self, peer_kme_id: str = "") -> AsyncIterator[ReserveLevel]:
        """Yields reserve levels as they change, until the node or the caller ends it.

        Args:
            peer_kme_id: only this peer KME; empty for all.

        Raises:
            MeshError: the stream broke; start again after a pause.
        """
        call = self._delivery().WatchLevels(keys_pb2.WatchLevelsRequest(peer_kme_id=peer_kme_id))
        try:
            async for level in call:
                yield ReserveLevel(
                    peer_kme_id=level.peer_kme_id,
                    epoch=level.epoch,
                    grade=level.grade,
                    outbound_bytes=level.outbound_bytes,
                    inbound_bytes=level.inbound_bytes,
                    high_water_bytes=level.high_water_bytes,
                )
        except grpc.RpcError as exc:
            raise error_from_rpc(exc) from exc
        finally:
            call.cancel()

    def _delivery(self) -> keys_pb2_grpc.KeyDeliveryAsyncStub:
        channel = self._channel()
        if self._stub is None or channel is not self._stub_channel:
            self._stub = keys_pb2_grpc.KeyDeliveryStub(channel)
            self._stub_channel = channel
        return self._stub

    async def _send_get_keys(
        self, requests: Sequence[keys_pb2.KeyRequest], timeout_s: float
    ) -> list[DeliveredKeys | MeshError]:
        batch = keys_pb2.DeliverRequest(get_keys=keys_pb2.GetKeysRequest(requests=requests))
        return [_delivered(result) for result in await self._streams.ask(batch, timeout_s, len(requests))]

    async def _send_get_keys_by_id(
        self, requests: Sequence[keys_pb2.KeyByIdRequest], timeout_s: float
    ) -> list[DeliveredKeys | MeshError]:
        batch = keys_pb2.DeliverRequest(get_keys_by_id=keys_pb2.GetKeysByIdRequest(requests=requests))
        return [_delivered(result) for result in await self._streams.ask(batch, timeout_s, len(requests))]


def _build(kind: Callable[..., Any], **fields: object) -> Any:
    try:
        return kind(**fields)
    except (TypeError, ValueError) as exc:
        raise CallerError("a field of the request is of the wrong type or not Unicode text") from exc


def _delivered(result: keys_pb2.KeyResult) -> DeliveredKeys | MeshError:
    if result.HasField("failure"):
        return error_from_failure(result.failure)
    keys = [DeliveredKey(key.key_id, key.value) for key in result.keys.keys]
    if any(len(key.id_bytes) != _KEY_ID_BYTES for key in keys):
        return PeerError("node answered a key_ID that is not 16 bytes long")
    if not keys:
        return PeerError("node answered no keys and no failure")
    return DeliveredKeys(keys, result.keys.grade)
