"""Channels to other members of the node plane, by address and pinned identity.

Owns that a channel reaches exactly the member it is meant for: the server's
certificate must lead to the node root and carry the DNS name of that identity,
whatever host name or address it was dialled at. Renewed certificates are picked up
by the next call of ``channel``; channels made with older ones end after a grace.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict

import grpc

from mesh.core.identity import Identity, Role
from mesh.errors import ConfigError, ErrorReason, UnavailableError
from mesh.ops.tls import TlsFiles
from mesh.ops.watch import FileWatch
from mesh.rpc.credentials import MAX_MESSAGE_BYTES, channel_credentials

_LOG = logging.getLogger("keymesh.channels")
_LIMIT = 1024
# Long enough for every unary call; streams dial again, with the new certificate.
_GRACE_S = 30.0

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    # Claims and answers must not wait for a peer's slow name service.
    ("grpc.service_config_disable_resolution", 1),
)


class ChannelPool:
    """Channels of one process, one per address and identity.

    Args:
        files: roots of the node plane, and the process's own certificate.
        roles: what the own certificate may be for.
        interval_s: least time between two looks at the files.

    Raises:
        ConfigError: an unusable file or certificate, in words.
    """

    def __init__(self, files: TlsFiles, roles: frozenset[Role], *, interval_s: float = 1.0) -> None:
        self._files = files
        self._roles = roles
        self._watch = FileWatch([files.ca, files.cert, files.key], interval_s=interval_s)
        self._credentials = channel_credentials(files, roles)
        self._channels: OrderedDict[tuple[str, Identity], grpc.aio.Channel] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def channel(self, address: str, identity: Identity) -> grpc.aio.Channel:
        """The channel to a member; connects when first used.

        Args:
            address: ``host:port``.
            identity: who must be there; any other certificate fails the handshake.

        Raises:
            UnavailableError: SHUTTING_DOWN, the pool is closed.
        """
        if self._is_closed:
            raise UnavailableError("channels are closed", reason=ErrorReason.SHUTTING_DOWN)
        if self._watch.changed():
            self._renew()
        key = (address, identity)
        channel = self._channels.get(key)
        if channel is None:
            options = (*OPTIONS, ("grpc.ssl_target_name_override", identity.dns_name))
            channel = grpc.aio.secure_channel(address, self._credentials, options=options)
            self._channels[key] = channel
            if len(self._channels) > _LIMIT:
                self._retire(self._channels.popitem(last=False)[1])
        else:
            self._channels.move_to_end(key)
        return channel

    async def close(self) -> None:
        """Closes all channels at once; calls in flight fail."""
        self._is_closed = True
        for task in self._closing:
            task.cancel()
        channels = [*self._channels.values()]
        self._channels.clear()
        await asyncio.gather(*self._closing, return_exceptions=True)
        for channel in channels:
            await channel.close()

    def _renew(self) -> None:
        try:
            self._credentials = channel_credentials(self._files, self._roles)
        except ConfigError as exc:
            _LOG.error("certificate not renewed, the last one stays in force", extra={"cause": str(exc)})
            return
        _LOG.info("certificate renewed", extra={"cert": str(self._files.cert)})
        for channel in self._channels.values():
            self._retire(channel)
        self._channels.clear()

    def _retire(self, channel: grpc.aio.Channel) -> None:
        task = asyncio.get_running_loop().create_task(_close_later(channel))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _close_later(channel: grpc.aio.Channel) -> None:
    """Lets calls in flight end; a pool that is closing cancels the wait, not the closing."""
    try:
        await channel.close(_GRACE_S)
    except asyncio.CancelledError:
        await channel.close()
        raise
