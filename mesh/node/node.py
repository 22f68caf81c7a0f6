"""A node (KME): the one place where its parts are built, started and stopped.

Order of life: the store first (it holds the lock), then this start's incarnation, durable
before anything is said to anybody; the directory and the document; links and key plane; last
the server, so that nobody is admitted to half a node. Stopping goes the other way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc

from mesh import __version__
from mesh.core.border_rules import BorderConfig, BufferSpec, Peer
from mesh.core.identity import Identity, Role
from mesh.core.mac import require_poly1305
from mesh.core.policy import AccessTable, Limits, Rate
from mesh.directory.document import DocumentKeeper, read_source
from mesh.directory.etcd import EtcdClient, EtcdTls
from mesh.directory.etcd_directory import EtcdDirectory
from mesh.directory.port import Directory
from mesh.directory.static import StaticDirectory
from mesh.errors import (
    NOTHING_HAPPENED,
    ConfigError,
    ErrorReason,
    MeshError,
    NotAuthorizedError,
    RolledBackError,
    UnavailableError,
)
from mesh.node.config import LinkSection, NodeConfig, load_node_config
from mesh.node.documents import PeerDocuments, build_keeper
from mesh.node.keymetrics import KeyMetrics
from mesh.node.keyplane import KeyPlane
from mesh.node.keyports import Incarnation, KeyPlaneConfig, Surroundings
from mesh.node.links import LinkConfig, LinkPlane
from mesh.node.pad_recorder import JsonlPadRecorder
from mesh.node.peers import GrpcPeers
from mesh.node.psrd_desk import PsrdDesk
from mesh.node.publishing import Publisher
from mesh.node.routing import DirectoryRoutes
from mesh.node.services.admin import AdminService
from mesh.node.services.border import BorderService
from mesh.node.services.keys import KeyDeliveryService
from mesh.node.services.link import LinkService, add_link_service
from mesh.node.services.peer import PeerService
from mesh.node.tasks import Background
from mesh.node.telemetry import Telemetry, missing_for_service
from mesh.node.transport import DialledTransport
from mesh.ops.alarms import Alarms
from mesh.ops.audit import AuditLog
from mesh.ops.certificate_expiry import CertificateExpiry, certificate_expiry_s
from mesh.ops.http import OpsServer, split_host_port
from mesh.ops.logging import setup_logging
from mesh.ops.metrics import Metrics
from mesh.ops.runtime import EXIT_CONFIG
from mesh.ops.runtime import run as run_process
from mesh.ops.tls import TlsFiles
from mesh.ops.tracing import close_tracing, setup_tracing
from mesh.ops.watch import FileWatch
from mesh.rpc.channels import ChannelPool
from mesh.rpc.server import RpcServer, caller
from mesh.sources.etsi014_device import Etsi014Device, client_context
from mesh.store.store import Store
from mesh.v1.admin_pb2 import NodeStatus
from mesh.v1.admin_pb2_grpc import add_AdminServicer_to_server
from mesh.v1.border_pb2_grpc import add_BorderServicer_to_server
from mesh.v1.keys_pb2_grpc import add_KeyDeliveryServicer_to_server
from mesh.v1.peer_pb2_grpc import add_PeerServicer_to_server

PROTOCOL_VERSION = 1
_SAMPLE_EVERY_S = 2.0
_T = TypeVar("_T")

_LOG = logging.getLogger("keymesh.node")


def load_access(config: NodeConfig) -> AccessTable:
    """The access table that the configuration names; without one nobody may ask for anything.

    Raises:
        ConfigError: names the file and the field.
    """
    if config.access == "open":
        return AccessTable.open()
    if config.access_file is None:
        return AccessTable()
    path = Path(config.access_file)
    try:
        return AccessTable.parse(read_source(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"access_file: cannot be read: {error.strerror}", facts={"file": path}) from error
    except ConfigError as error:
        message = error.message.replace("network document", "access table", 1)
        raise ConfigError(message, facts={**error.facts, "file": path}) from error


def build_source(link: LinkSection) -> Etsi014Device | None:
    """The adapter to the link's own device; None where the lanes are filled another way.

    Raises:
        ConfigError: a certificate of the device section is unusable.
    """
    device = link.device
    if device is None:
        return None
    files = (device.ca, device.cert, device.key)
    watch = FileWatch([Path(file) for file in files])
    try:
        tls = client_context(*files)
    except MeshError as error:
        raise ConfigError(f"links[{link.peer}].device: {error.message}", facts=error.facts) from error

    def renew() -> ssl.SSLContext | None:
        try:
            return client_context(*files) if watch.changed() else None
        except MeshError as error:
            _LOG.error("certificate not renewed, the last one stays in force", extra={"cause": str(error)})
            return None

    return Etsi014Device(
        device.url,
        peer_sae_id=device.sae_id,
        tls=tls,
        key_size_bits=device.key_size_bits,
        timeout_s=device.timeout_s,
        renew=renew,
    )


def build_directory(config: NodeConfig, keeper: DocumentKeeper) -> Directory:
    """The directory that the configuration names.

    Raises:
        ConfigError: a file of the section cannot be read.
    """
    section = config.directory
    if section.etcd is None:
        return StaticDirectory(Path(section.static or ""), keeper)
    etcd = section.etcd

    def read(path: str | None, field: str) -> bytes | None:
        if path is None:
            return None
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"directory.etcd.{field}: cannot be read: {error.strerror}", facts={"file": path}
            ) from error

    def tls() -> EtcdTls:
        return EtcdTls(read(etcd.ca, "ca") or b"", read(etcd.cert, "cert"), read(etcd.key, "key"))

    def renew() -> EtcdTls | None:
        try:
            return tls()
        except ConfigError as error:
            _LOG.error("certificate not renewed, the last one stays in force", extra={"cause": str(error)})
            return None

    password = read(etcd.password_file, "password_file")
    client = EtcdClient(
        etcd.endpoints,
        tls=tls(),
        renew=renew,
        username=etcd.username,
        password=None if password is None else password.decode().strip(),
    )
    return EtcdDirectory(client, config.domain_id, keeper, lease_s=etcd.lease_ttl_s)


def key_plane_config(config: NodeConfig) -> KeyPlaneConfig:
    """The key plane's settings, sizes in bytes."""
    limits, reserves, quota = config.limits, config.reserves, config.quota
    return KeyPlaneConfig(
        limits=Limits(
            default_key_size_bytes=limits.key_size_bits // 8,
            min_key_size_bytes=limits.min_key_size_bits // 8,
            max_key_size_bytes=limits.max_key_size_bits // 8,
            max_keys_per_request=limits.max_key_per_request,
            max_additional_slaves=limits.max_sae_id_count,
            max_call_bytes=limits.max_bytes_per_request,
        ),
        access=load_access(config),
        quota=Rate(quota.bytes_per_s, quota.burst_bytes or quota.bytes_per_s) if quota.bytes_per_s else None,
        high_water_bytes=reserves.high_water_bytes,
        low_water_bytes=reserves.low_water_bytes or reserves.high_water_bytes * 3 // 4,
        transfer_max_bytes=reserves.transfer_max_bytes,
        inbound_max_bytes=reserves.inbound_max_bytes,
        key_lifetime_s=reserves.key_lifetime_s,
        request_timeout_s=limits.request_timeout_s,
        prefill=reserves.prefill,
        border=border_config(config),
        buffers=tuple(
            BufferSpec(pair.master, pair.slave, pair.buffer, pair.key_size_bits // 8)
            for pair in config.foreign_buffers
        ),
    )


def certificate_files(config: NodeConfig) -> tuple[dict[str, Path], dict[str, Path]]:
    """The certificates that a node shows, and the roots that it trusts, by use."""
    shown, roots = {"node": Path(config.tls.cert)}, {"node-root": Path(config.tls.ca)}
    etcd = config.directory.etcd
    if etcd is not None:
        roots["etcd-root"] = Path(etcd.ca)
        if etcd.cert is not None:
            shown["etcd"] = Path(etcd.cert)
    for link in config.links:
        if link.device is not None:
            shown[f"device-{link.peer}"] = Path(link.device.cert)
            roots[f"device-{link.peer}-root"] = Path(link.device.ca)
    return shown, roots


def border_config(config: NodeConfig) -> BorderConfig | None:
    """The border's settings, None where there is no border."""
    border = config.border
    if border is None:
        return None
    return BorderConfig(
        gateways=frozenset(border.gateways),
        url=border.url,
        peers=tuple(Peer(peer.kme_id, peer.url, tuple(peer.prefixes)) for peer in border.peers),
        carry_timeout_s=border.carry_timeout_s,
        ack_give_up_s=border.ack_give_up_s,
        void_give_up_s=border.void_give_up_s,
        void_repeat_s=border.void_repeat_s,
        max_targets=border.max_targets,
        max_key_bytes=config.limits.max_key_size_bits // 8,
        max_open_keys=border.max_open_keys,
        max_settled_keys=border.max_settled_keys,
        keep_s=border.keep_s,
    )


def local_randomness(config: NodeConfig) -> Callable[[int], bytes]:
    """Random bytes of this machine: the operating system's, xor a device's where one is configured."""
    if config.random_device is None:
        return os.urandom
    path = Path(config.random_device)

    def mixed(count: int) -> bytes:
        try:
            with path.open("rb", buffering=0) as device:
                drawn = b""
                while len(drawn) < count:
                    piece = device.read(count - len(drawn))
                    if not piece:
                        raise UnavailableError("random_device ended early", facts={"file": path})
                    drawn += piece
        except OSError as error:
            raise UnavailableError(
                f"random_device cannot be read: {error.strerror}", facts={"file": path}
            ) from error
        return bytes(a ^ b for a, b in zip(drawn, os.urandom(count), strict=True))

    return mixed


class Node:
    """A running KME. Build with ``Node.running(config)``."""

    def __init__(self, config: NodeConfig, *, role: Role = Role.NODE) -> None:
        self.config = config
        self.identity = Identity(config.domain_id, role, config.kme_id)
        self.metrics = Metrics()
        self.alarms = Alarms(gauge=self.metrics.alarm_gauge)
        self.started_at_s = time.time()
        self.is_stopping = False
        self.audit: AuditLog | None = None
        self.incarnation = secrets.token_bytes(16)

    @classmethod
    def running(cls, config: NodeConfig) -> contextlib.AbstractAsyncContextManager[Node]:
        """Start a node, and stop it in the reverse order.

        Raises:
            ConfigError: something configured is unusable; says what.
            MeshError: the store cannot be opened, or an address not bound.
        """
        return cls(config)._running()

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[Node]:
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            yield self
            self.is_stopping = True
            await self.server.set_serving(False)

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        config = self.config
        require_poly1305()
        files = TlsFiles(
            ca=Path(config.tls.ca),
            cert=Path(config.tls.cert),
            key=Path(config.tls.key),
            deny_list=None if config.tls.deny_list is None else Path(config.tls.deny_list),
        )
        settings = key_plane_config(config)
        self.store = Store.open(
            Path(config.data_dir),
            kme_id=config.kme_id,
            proof_dir=None if config.proof_dir is None else Path(config.proof_dir),
        )
        stack.push_async_callback(self.store.aclose)
        self.store.begin_incarnation(self.incarnation)
        self.is_proven = self.store.is_proven_restart
        self.tasks = Background()
        stack.push_async_callback(self.tasks.close)

        self.keeper = await build_keeper(config.domain_id, config.network, self.store, self.alarms)
        self.directory = build_directory(config, self.keeper)
        channels = ChannelPool(files, frozenset({self.identity.role}))
        stack.push_async_callback(channels.close)
        self._build_links(channels, stack)
        self._build_plane(channels, settings)
        self._build_server(files, stack)
        self.publisher = Publisher(
            self.directory,
            self.store,
            self.links,
            self.alarms,
            kme_id=config.kme_id,
            address=config.advertise or config.listen.grpc,
            role=self.identity.role,
            incarnation=self.incarnation,
            reserves=self._reserve_levels,
        )
        if (plane := self._key_plane()) is not None:
            plane.stopped_by = self._stopped_by

        await self.directory.start()
        stack.push_async_callback(self.directory.stop)
        await self._start_plane(stack)
        # Stopped after the links (their streams would outlast its grace), before the planes.
        stack.push_async_callback(self.server.stop, 2.0)
        await self.links.start()
        stack.push_async_callback(self.links.stop)
        self.publisher.check_copy()
        await self.server.start(config.listen.grpc)
        self.tasks.keep("publish", self.publisher.run)
        self.telemetry = Telemetry(
            self.metrics,
            links=self.links,
            plane=self._key_plane(),
            directory=self.directory,
            psrd=self.psrd,
            certificates=CertificateExpiry(self.metrics, *certificate_files(config)),
            data_dir=Path(config.data_dir),
            missing=self.missing,
        )
        self.tasks.keep("telemetry", self._sample)
        if config.access_file is not None:
            self.tasks.keep("access", partial(self._follow_access, Path(config.access_file)))
        await self._start_ops(stack)

    # -- parts ----------------------------------------------------------------------------

    def _channel(self, channels: ChannelPool, kme_id: str, role: Role) -> grpc.aio.Channel:
        address = self.config.addresses.get(kme_id)
        address = address or self.directory.address(kme_id)
        if address is None:
            raise UnavailableError("no address is known for this KME", facts={"kme_id": kme_id})
        return channels.channel(address, Identity(self.config.domain_id, role, kme_id))

    def _link_is_open(self, peer: str) -> bool | None:
        link = self.links.link(peer)
        return None if link is None else link.is_open

    def _role_of(self, kme_id: str) -> Role:
        document = self.keeper.document
        known = None if document is None else document.nodes.get(kme_id)
        return Role.NODE if known is None else Role(known.role)

    def _build_links(self, channels: ChannelPool, stack: contextlib.AsyncExitStack) -> None:
        config = self.config
        links = []
        for section in config.links:
            source = build_source(section)
            if source is not None:
                stack.push_async_callback(source.close)
            links.append(
                LinkConfig(
                    section.peer,
                    source,
                    pool_max_bytes=section.pool_max_bytes,
                    window_bytes=section.window_bytes,
                    low_water_bytes=section.low_water_bytes,
                    redial_min_s=config.redial_min_s,
                    redial_max_s=config.redial_max_s,
                )
            )
        recorder = None
        if config.pad_audit_file is not None:
            recorder = JsonlPadRecorder(Path(config.pad_audit_file), config.kme_id)
            stack.callback(recorder.close)
        self.links = LinkPlane(
            config.kme_id,
            config.domain_id,
            self.store,
            self.incarnation,
            links,
            dial=lambda peer: DialledTransport(self._channel(channels, peer, self._role_of(peer))),
            alarms=self.alarms,
            document=PeerDocuments(self.keeper, self.tasks.spawn),
            recorder=recorder,
        )

    def _build_plane(self, channels: ChannelPool, settings: KeyPlaneConfig) -> None:
        self.plane = KeyPlane(
            Surroundings(
                own_id=self.config.kme_id,
                now_s=time.time,
                monotonic_s=time.monotonic,
                randomness=local_randomness(self.config),
                alarms=self.alarms,
                metrics=KeyMetrics(self.metrics),
                has_random_device=self.config.random_device is not None,
            ),
            settings,
            store=self.store,
            links=self.links,
            directory=self.directory,
            routes=DirectoryRoutes(self.config.kme_id, self.directory, link_is_open=self._link_is_open),
            peers=GrpcPeers(lambda peer: self._channel(channels, peer, Role.NODE)),
            incarnation=Incarnation(self.incarnation, self.is_proven),
        )
        self.links.handler = self.plane.shares

    async def _start_plane(self, stack: contextlib.AsyncExitStack) -> None:
        await self.plane.start()
        stack.push_async_callback(self.plane.stop)

    def _reserve_levels(self) -> dict[str, int]:
        return self.plane.reserve_levels()

    def _key_plane(self) -> KeyPlane | None:
        """What ends routes here; a hub has none."""
        return self.plane

    def _build_server(self, files: TlsFiles, stack: contextlib.AsyncExitStack) -> None:
        config = self.config
        if config.audit_log is not None:
            self.audit = AuditLog(Path(config.audit_log))
            stack.callback(self.audit.close)
        self.server = RpcServer(self.identity, files, metrics=self.metrics)
        self._admit_batch = self.server.admission("/mesh.v1.KeyDelivery/Deliver")
        self.psrd = PsrdDesk(self.links.links, self.tasks.spawn)
        plane = self._key_plane()
        if plane is not None:
            self.server.add(
                add_KeyDeliveryServicer_to_server,
                KeyDeliveryService(
                    plane,
                    staleness_s=self.directory.staleness_s,
                    admit=self._admit_gateway,
                    audit=self.audit,
                    readmit=self._readmit,
                ),
            )
            self.server.add(add_PeerServicer_to_server, PeerService(plane))
            if config.border is not None:
                self.server.add(
                    add_BorderServicer_to_server,
                    BorderService(
                        plane.border,
                        caller_id=lambda: caller().id,
                        audit=self.audit,
                    ),
                )
        self.server.add(
            add_AdminServicer_to_server,
            AdminService(
                plane=plane,
                links=self.links,
                psrd=self.psrd,
                alarms=self.alarms,
                node_status=self.status,
            ),
        )
        self.server.add(add_link_service, LinkService(self.links, self._neighbour))

    def _readmit(self, context: Any) -> None:
        """Whether a batch may begin on a stream that is open already.

        Not for a certificate that is refused by now, and not while the node stops: what began then would
        be cut with the stream, its keys spent and never answered.
        """
        if self.is_stopping:
            raise UnavailableError(
                "the node is stopping", reason=ErrorReason.SHUTTING_DOWN, facts=NOTHING_HAPPENED
            )
        self._admit_batch(context)

    def _admit_gateway(self) -> Sequence[str] | None:
        """The SAEs that the caller speaks for (5.2): None for all homed here, as for tools."""
        who, gateways = caller(), self.config.gateways
        if who.role is not Role.GATEWAY or gateways is None:
            return None
        if who.id not in gateways:
            raise NotAuthorizedError("this gateway is not registered at this node", facts={"gateway": who.id})
        return gateways[who.id] if isinstance(gateways, dict) else None

    def _neighbour(self) -> str:
        """Who opens a link: the certificate's role must be the one that the network document gives it."""
        who = caller()
        if who.role is not self._role_of(who.id):
            raise NotAuthorizedError(
                "the network document gives this peer another role",
                facts={"peer": who.id, "role": who.role.value},
            )
        return who.id

    async def _start_ops(self, stack: contextlib.AsyncExitStack) -> None:
        host, port = split_host_port(self.config.listen.http)
        ops = OpsServer(self.metrics, self.missing)
        await ops.start(host, port)
        stack.push_async_callback(ops.stop)

    # -- background -----------------------------------------------------------------------

    async def _sample(self) -> None:
        while True:
            self.telemetry.sample()
            await asyncio.sleep(_SAMPLE_EVERY_S)

    async def _follow_access(self, path: Path) -> None:
        watch = FileWatch([path], interval_s=1.0)
        while True:
            await asyncio.sleep(1.0)
            if not watch.changed():
                continue
            try:
                self.plane.set_access(load_access(self.config))
            except ConfigError as error:
                self.alarms.raise_alarm(
                    "config/access",
                    "warning",
                    f"the access table was not taken over: {error}",
                    "mend the file; the last good table stays in force",
                )
            else:
                self.alarms.clear("config/access")

    # -- what others see ------------------------------------------------------------------

    def _stopped_by(self) -> MeshError | None:
        """A rolled-back disk must not serve: it would redeem keys a second time (invariants 4 and 6)."""
        if self.links.refusal is not None:
            return self.links.refusal
        if self.publisher.doubts():
            return RolledBackError("the directory remembers a newer disk: see the alarm node/rolled-back")
        if self._waits_for_a_peer():
            return UnavailableError(
                "restarted without proof: waits for a neighbour to say that this disk is current",
                retry_after_s=1.0,
            )
        return None

    def _waits_for_a_peer(self) -> bool:
        """Whether nobody could say yet that this is not an older disk (protocol 1.10 and 7).

        A verified hello settles a link's lanes, and so does the operator by resetting it.
        """
        links = self.links.links.values()
        return bool(links) and not self.store.is_new and not any(link.lanes.is_settled for link in links)

    def missing(self) -> Sequence[str]:
        """What keeps the node from serving; empty when it is ready."""
        stopped_by = self._stopped_by()
        missing = missing_for_service(
            self.directory,
            stopped_by="" if stopped_by is None else stopped_by.message,
            is_stopping=self.is_stopping,
        )
        try:
            if self.audit is not None:
                self.audit.check()
        except UnavailableError as error:
            return [*missing, error.message]
        return missing

    def status(self) -> NodeStatus:
        """The node's own facts for operators."""
        document = self.keeper.document
        return NodeStatus(
            kme_id=self.config.kme_id,
            domain_id=self.config.domain_id,
            role=self.identity.role.value,
            software_version=__version__,
            protocol_version=PROTOCOL_VERSION,
            incarnation=self.incarnation,
            is_proven_restart=self.is_proven,
            uptime_s=time.time() - self.started_at_s,
            document_serial=0 if document is None else document.serial,
            trusts_directory=self.config.network.trust_directory,
            directory_staleness_s=min(self.directory.staleness_s(), 1e9),
            certificate_expires_at_s=int(certificate_expiry_s(Path(self.config.tls.cert))),
        )


async def _serve(config: NodeConfig, stop: asyncio.Event) -> None:
    async with Node.running(config):
        await stop.wait()


def run(config_path: str | Path) -> int:
    """The process ``keymesh node run``: configuration in, exit status out."""
    try:
        config = load_node_config(Path(config_path))
        setup_logging(
            level=config.log.level,
            file=None if config.log.file is None else Path(config.log.file),
            facts={"kme": config.kme_id},
        )
        setup_tracing(config.tracing, role="node", member=config.kme_id)
    except ConfigError as error:
        sys.stderr.write(f"keymesh: node: {error}\n")
        return EXIT_CONFIG
    try:
        return run_process(lambda stop: _serve(config, stop), name=f"node {config.kme_id}")
    finally:
        close_tracing()
