"""The ETSI GS QKD 020 side of a gateway, put together: listener, client, job runner.

Owns which certificates are welcome: TLS 1.3 with a certificate under some peer's root, then that peer's pin.
Certificates, roots, deny list and pins follow their files; what does not fit is refused in words, and the
last good ones stay in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

from gateway.config import Etsi020Settings, Limits
from gateway.etsi020.client import PeerClient
from gateway.etsi020.identity import Pins
from gateway.etsi020.jobs import JobRunner
from gateway.etsi020.routes import METHODS, Etsi020
from gateway.exchange import Identified
from gateway.http import RestServer
from gateway.telemetry import PeerTelemetry, Telemetry
from gateway.tracing import traced
from mesh.client import ConfigError
from mesh.client.border import BorderClient
from mesh.ops.certificate_expiry import expiry_gauge
from mesh.ops.denylist import DenyList
from mesh.ops.diagnosis import Expectation
from mesh.ops.http import split_host_port
from mesh.ops.metrics import Metrics
from mesh.ops.tls import ServerTls, TlsFiles
from mesh.ops.watch import FileWatch

_LOG = logging.getLogger("keymesh.gateway")

AGAIN_S: Final = 1.0


class BorderSide:
    """What a gateway is to other owners' key managers.

    Args:
        settings: the ``etsi020`` section.
        base: directory that relative paths start from.
        border: the node.
        limits: the gateway's bounds; the body's comes from the section.
        metrics: registry of the process.

    Raises:
        ConfigError: a certificate, pin or deny list that cannot be used, in words.
    """

    def __init__(
        self, settings: Etsi020Settings, *, base: Path, border: BorderClient, limits: Limits, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._base = base
        self._limits = msgspec.structs.replace(limits, max_body_bytes=settings.max_body_bytes)
        roots = [base / peer.ca for peer in settings.peers]
        files = TlsFiles(roots[0], base / settings.cert, base / settings.key, more_ca=tuple(roots[1:]))
        self._pins = Pins(settings.peers, base=base)
        self._pin_watch = FileWatch(roots, interval_s=0)
        self._deny_list = DenyList(base / settings.deny_list if settings.deny_list else None)
        self._tls = ServerTls(
            files,
            minimum="1.3",
            expected=Expectation(is_server=True, is_client=True),
            what="etsi020",
            expiry=expiry_gauge(metrics).labels("etsi020"),
        )
        self._rest = RestServer(
            traced(
                Etsi020(
                    border, timeout_s=limits.request_timeout_s, synchronous_wait_s=settings.synchronous_wait_s
                )
            ),
            identify=self._identify,
            is_denied=lambda caller: self._deny_list.denies(
                fingerprint=caller.fingerprint, serial=caller.serial
            ),
            limits=self._limits,
            telemetry=Telemetry(metrics, METHODS),
            adopts_request_ids=True,
        )
        telemetry = PeerTelemetry(metrics)
        self._client = PeerClient(
            settings, base=base, pins=lambda: self._pins, deny_list=self._deny_list, telemetry=telemetry
        )
        self._runner = JobRunner(
            border, self._client.perform, max_jobs=settings.max_jobs, telemetry=telemetry
        )
        self._listener: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.port = 0

    async def start(self) -> None:
        """Listen, and perform what the node has to post.

        Raises:
            ConfigError: the address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        host, port = split_host_port(self._settings.listen)
        try:
            self._listener = await loop.create_server(
                self._rest,
                host,
                port,
                ssl=self._tls.context,
                backlog=1024,
                ssl_handshake_timeout=self._limits.handshake_timeout_s,
                ssl_shutdown_timeout=1.0,
            )
        except OSError as error:
            raise ConfigError(
                "etsi020.listen cannot be bound",
                facts={"host": host, "port": port, "cause": error.strerror},
            ) from error
        self.port = self._listener.sockets[0].getsockname()[1]
        self._client.open()
        self._tasks = [
            loop.create_task(lasting("warm peers", self._client.keep_warm)),
            loop.create_task(lasting("post to peers", self._runner.run)),
        ]
        _LOG.info("listening for key managers", extra={"https_port": self.port})

    async def stop(self) -> None:
        """Take no more jobs and no more requests, answer what is being asked, then end."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._listener is not None:
            self._listener.close()
            await self._rest.drain(self._limits.drain_s)
        await self._client.close()

    def follow_files(self) -> None:
        """Take up what changed on the disk; call every few seconds."""
        self._tls.reload_if_changed()
        self._client.reload_if_changed()
        if not self._pin_watch.changed():
            return
        try:
            self._pins = Pins(self._settings.peers, base=self._base)
        except ConfigError as error:
            _LOG.error("pins refused, the last ones stay in force", extra={"cause": str(error)})
            return
        self._rest.identities_changed()

    def _identify(self, der: bytes) -> Identified:
        return self._pins.identify(der)


async def lasting(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Background work that nobody may miss: a fault of ours is logged, and it begins again."""
    while True:
        try:
            await work()
        except Exception:  # noqa: BLE001 - whatever it is, requests must go on
            _LOG.exception("background work failed and begins again", extra={"work": what})
        await asyncio.sleep(AGAIN_S)
