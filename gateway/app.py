"""Builds one gateway: the ETSI 014 listener over a key service, ETSI 020 at a border, what surrounds them.

Stateless: every durable fact lives in the node. Owns start, reload and drain. Certificates, the
deny list and the mapping table follow their files; a table that does not fit is refused in words
and the last good one stays in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from gateway.config import GatewayConfig
from gateway.etsi014.routes import Etsi014
from gateway.etsi020.server import BorderSide
from gateway.http import RestServer
from gateway.identity import Caller, load_mapper, read_certificate
from gateway.port import KeyService
from gateway.telemetry import Telemetry
from gateway.tracing import traced
from mesh.client import ConfigError, UnavailableError
from mesh.client.border import BorderClient
from mesh.ops.audit import AuditLog, AuditValue
from mesh.ops.certificate_expiry import CertificateExpiry, expiry_gauge
from mesh.ops.denylist import DenyList
from mesh.ops.http import OpsServer, split_host_port
from mesh.ops.metrics import Metrics
from mesh.ops.tls import ServerTls, TlsFiles
from mesh.ops.watch import FileWatch

_LOG = logging.getLogger("keymesh.gateway")


class KeyAudit:
    """``AuditTrail`` over the process's audit log: one line per call.

    Args:
        log: the log.
    """

    def __init__(self, log: AuditLog) -> None:
        self._log = log

    def check(self) -> None:
        """See ``gateway.port.AuditTrail``."""
        self._log.check()

    def keys_asked(
        self,
        *,
        method: str,
        master: str,
        slave: str,
        key_ids: Sequence[str],
        result: str,
        request_id: str,
        additional_slaves: Sequence[str] = (),
    ) -> None:
        """See ``gateway.port.AuditTrail``.

        Raises:
            UnavailableError: the line could not be written; the keys must not leave.
        """
        line: dict[str, AuditValue] = {
            "request_id": request_id,
            "master": master,
            "slave": slave,
            "result": result,
        }
        if additional_slaves:
            line["additional_slaves"] = list(additional_slaves)
        if key_ids:
            line["key_ids"] = key_ids
        self._log.record_all(method, [line])


class Gateway:
    """One running gateway.

    Args:
        config: its configuration.
        base: directory that relative paths start from.
        service: the node's key plane.
        border: the node's border service, needed with an ``etsi020`` section.
        missing: what stands between the service and serving; empty means ready.
        metrics: registry of the process.

    Raises:
        ConfigError: a certificate, table, deny list or audit log that cannot be used, in words.
    """

    def __init__(
        self,
        config: GatewayConfig,
        *,
        base: Path,
        service: KeyService,
        border: BorderClient | None = None,
        missing: Callable[[], Sequence[str]] = tuple,
        metrics: Metrics | None = None,
    ) -> None:
        self._config = config
        self._base = base
        self._missing = missing
        limits, tls = config.limits, config.tls
        metrics = metrics or Metrics()
        self._mapper = load_mapper(config.sae_mapping, domain_id=config.domain_id, base=base)
        table = config.sae_mapping.table_file
        self._table_watch = FileWatch([base / table] if table else [], interval_s=0)
        self._deny_list = DenyList(base / tls.deny_list if tls.deny_list else None)
        self._tls = ServerTls(
            TlsFiles(ca=base / tls.ca, cert=base / tls.cert, key=base / tls.key),
            minimum=tls.min_version,
            expiry=expiry_gauge(metrics).labels("rest"),
        )
        towards_node = config.node_tls
        self._certificates = CertificateExpiry(
            metrics,
            shown={"node": base / towards_node.cert},
            roots={"node-root": base / towards_node.ca, "rest-root": base / tls.ca},
        )
        self._ready = metrics.gauge("ready", "1 while the process can do its work.")
        self._audit_log = AuditLog(base / config.audit_log)
        self._api = Etsi014(
            service,
            audit=KeyAudit(self._audit_log),
            profile=config.profile,
            timeout_s=limits.request_timeout_s,
        )
        self._rest = RestServer(
            traced(self._api),
            identify=self._identify,
            is_denied=lambda caller: self._deny_list.denies(
                fingerprint=caller.fingerprint, serial=caller.serial
            ),
            limits=limits,
            telemetry=Telemetry(metrics, Etsi014.methods),
        )
        self._border_side: BorderSide | None = None
        if config.etsi020 is not None:
            if border is None:
                raise ConfigError("etsi020 needs a node with a border service")
            self._border_side = BorderSide(
                config.etsi020, base=base, border=border, limits=limits, metrics=metrics
            )
        self._ops = OpsServer(metrics, self._readiness)
        self._listener: asyncio.Server | None = None
        self._follower: asyncio.Task[None] | None = None
        self.https_port = 0
        self.http_port = 0

    @property
    def etsi020_port(self) -> int:
        """Where key managers are listened for; 0 for nowhere."""
        return 0 if self._border_side is None else self._border_side.port

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: an address cannot be bound.
        """
        config, loop = self._config, asyncio.get_running_loop()
        host, port = split_host_port(config.listen.https)
        try:
            self._listener = await loop.create_server(
                self._rest,
                host,
                port,
                ssl=self._tls.context,
                backlog=1024,
                ssl_handshake_timeout=config.limits.handshake_timeout_s,
                ssl_shutdown_timeout=1.0,
            )
        except OSError as error:
            raise ConfigError(
                "listen.https cannot be bound", facts={"host": host, "port": port, "cause": error.strerror}
            ) from error
        self.https_port = self._listener.sockets[0].getsockname()[1]
        if self._border_side is not None:
            await self._border_side.start()
        if config.listen.http is not None:
            self.http_port = await self._ops.start(*split_host_port(config.listen.http))
        self._follower = loop.create_task(self._follow_files(), name="follow files")
        _LOG.info("listening", extra={"https_port": self.https_port, "http_port": self.http_port})

    async def stop(self) -> None:
        """Drain both interfaces at once: no new connections, answer what is being asked, then end.

        Takes ``drain_delay_s`` and at most ``drain_s``; whoever kills the process waits little longer.
        """
        limits = self._config.limits
        listener, self._listener = self._listener, None  # from here /readyz says no
        if listener is not None:
            await asyncio.sleep(limits.drain_delay_s)
        async with asyncio.TaskGroup() as draining:
            if listener is not None:
                listener.close()
                draining.create_task(self._rest.drain(limits.drain_s))
            if self._border_side is not None:
                draining.create_task(self._border_side.stop())
        if self._follower is not None:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower
        await self._ops.stop()
        self._audit_log.close()

    def reload(self) -> None:
        """Read the mapping table again now; a bad one changes nothing."""
        try:
            self._mapper = load_mapper(
                self._config.sae_mapping, domain_id=self._config.domain_id, base=self._base
            )
        except ConfigError as error:
            _LOG.error("mapping table refused, the last one stays in force", extra={"cause": str(error)})
            return
        self._rest.identities_changed()
        _LOG.info("mapping table read")

    def _identify(self, der: bytes) -> Caller:
        return self._mapper.identify(read_certificate(der))

    def _readiness(self) -> Sequence[str]:
        if self._listener is None:
            return ["not listening"]
        try:
            self._audit_log.check()
        except UnavailableError as error:
            return [error.message, *self._missing()]
        return self._missing()

    async def _follow_files(self) -> None:
        while True:
            await asyncio.sleep(self._config.limits.reload_poll_s)
            self._tls.reload_if_changed()
            self._certificates.sample()
            if self._border_side is not None:
                self._border_side.follow_files()
            self._ready.set(not self._readiness())
            if self._table_watch.changed():
                self.reload()
