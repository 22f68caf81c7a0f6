"""The gRPC server over real sockets: who gets in, renewal without a restart, errors as reasons."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mesh.errors import (
    CallerError,
    ConfigError,
    ErrorReason,
    MeshError,
    NotAuthorizedError,
    PeerError,
    ShortageError,
    UnavailableError,
)
from mesh.node.services.streamed import StreamedDelivery
from mesh.ops.certificates import fingerprint_of, serial_of
from mesh.ops.logging import request_id
from mesh.ops.metrics import Metrics
from mesh.ops.tls import TlsFiles
from mesh.pki.authority import Credential, Pki
from mesh.rpc.channels import ChannelPool
from mesh.rpc.identity import Identity, Role
from mesh.rpc.server import RpcServer, caller
from mesh.rpc.status import REQUEST_ID_KEY, error_from_rpc
from mesh.v1 import admin_pb2, admin_pb2_grpc, keys_pb2, keys_pb2_grpc, link_pb2, link_pb2_grpc, peer_pb2_grpc

NODE = Identity("metro", Role.NODE, "kme-a")
SECRET = bytes.fromhex("00112233445566778899aabbccddeeff")
ALL_ROLES = frozenset(Role)
Context = grpc.aio.ServicerContext[Any, Any]


class Delivery(StreamedDelivery):
    """Answers who asked; fails as the caller's SAE id says."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()

    async def GetStatus(self, request: keys_pb2.StatusRequest, context: Context) -> keys_pb2.StatusResponse:
        match request.caller_sae_id:
            case "foreign":
                raise ValueError(SECRET.hex())
            case "shortage":
                raise ShortageError("no material", retry_after_s=2.5, facts={"file": "/secret/path"})
            case "caller":
                raise CallerError("number is too large", facts={"number": 7})
            case "group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._fail())
            case "wait":
                self.entered.set()
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
        return keys_pb2.StatusResponse(source_kme_id=caller().uri, target_kme_id=request_id.get())

    async def WatchLevels(
        self, request: keys_pb2.WatchLevelsRequest, context: Context
    ) -> AsyncIterator[keys_pb2.Level]:
        yield keys_pb2.Level(peer_kme_id=caller().id)
        raise UnavailableError("no directory", reason=ErrorReason.DIRECTORY_UNAVAILABLE)

    async def GetKeys(self, request: keys_pb2.GetKeysRequest, context: Context) -> keys_pb2.GetKeysResponse:
        raise NotImplementedError

    async def GetKeysById(
        self, request: keys_pb2.GetKeysByIdRequest, context: Context
    ) -> keys_pb2.GetKeysByIdResponse:
        raise NotImplementedError

    async def _fail(self) -> None:
        raise ShortageError("busy", reason=ErrorReason.BUSY)


class Exchange:
    """Echoes link messages, written with the reader and writer calls."""

    async def Exchange(self, request_iterator: AsyncIterator[link_pb2.LinkMessage], context: Context) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)


class Site:
    """A domain's files, a server, and channels of anybody."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.pki = Pki.create("metro")
        self.roots = self.pki.save(directory)
        self.deny = directory / "deny"
        self.deny.write_text("")
        self.delivery = Delivery()
        self.metrics = Metrics(with_process=False)
        node = self.pki.node("kme-a").save(directory, "node")
        self.files = TlsFiles(self.roots["node"], node.cert, node.key, self.deny)
        self.port = 0
        self._pools: list[ChannelPool] = []

    async def start(self) -> RpcServer:
        server = RpcServer(NODE, self.files, metrics=self.metrics, interval_s=0)
        server.add(keys_pb2_grpc.add_KeyDeliveryServicer_to_server, self.delivery)
        server.add(link_pb2_grpc.add_LinkServicer_to_server, Exchange())
        server.add(admin_pb2_grpc.add_AdminServicer_to_server, cast("Any", admin_pb2_grpc.AdminServicer)())
        server.add(peer_pb2_grpc.add_PeerServicer_to_server, cast("Any", peer_pb2_grpc.PeerServicer)())
        self.port = await server.start("127.0.0.1:0")
        return server

    def tls(self, credential: Credential, stem: str = "client") -> TlsFiles:
        files = credential.save(self.dir, stem)
        return TlsFiles(self.roots["node"], files.cert, files.key)

    def pool(self, credential: Credential, stem: str = "client") -> ChannelPool:
        pool = ChannelPool(self.tls(credential, stem), ALL_ROLES, interval_s=0)
        self._pools.append(pool)
        return pool

    def channel(self, credential: Credential, node: Identity = NODE) -> grpc.aio.Channel:
        return self.pool(credential, f"client-{len(self._pools)}").channel(f"127.0.0.1:{self.port}", node)

    def raw_channel(self, credential: Credential) -> grpc.aio.Channel:
        """A stranger's channel: no check of ours stands in front of the handshake."""
        return grpc.aio.secure_channel(
            f"127.0.0.1:{self.port}",
            grpc.ssl_channel_credentials(
                self.roots["node"].read_bytes(), credential.key_pem, credential.cert_pem
            ),
            options=[("grpc.ssl_target_name_override", NODE.dns_name)],
        )

    async def close(self) -> None:
        for pool in self._pools:
            await pool.close()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    server = await made.start()
    yield made
    await made.close()
    await server.stop(0)


async def failure(call: Awaitable[object]) -> MeshError:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return error_from_rpc(caught.value)


def status(
    channel: grpc.aio.Channel, kind: str = "", **options: object
) -> Awaitable[keys_pb2.StatusResponse]:
    call: Callable[..., Awaitable[keys_pb2.StatusResponse]] = keys_pb2_grpc.KeyDeliveryStub(channel).GetStatus
    return call(keys_pb2.StatusRequest(caller_sae_id=kind), timeout=10, **options)


def raw_call(channel: grpc.aio.Channel, method: str) -> Callable[..., Awaitable[bytes]]:
    """A method called with bytes instead of messages."""
    return cast("Callable[..., Awaitable[bytes]]", cast("Any", channel).unary_unary(method))


async def test_service_sees_the_caller_and_the_request_id(site: Site) -> None:
    channel = site.channel(site.pki.gateway_client("gw-a"))
    answer = await status(channel, metadata=((REQUEST_ID_KEY, "req-1"),))
    assert answer.source_kme_id == "keymesh://metro/gateway/gw-a"
    assert answer.target_kme_id == "req-1"
    unfit = await status(channel, metadata=((REQUEST_ID_KEY, "no spaces please"),))
    assert unfit.target_kme_id not in ("", "no spaces please")


async def test_roles_are_admitted_per_method(site: Site) -> None:
    node = site.channel(site.pki.node("kme-b"))
    refused = await failure(status(node))
    assert isinstance(refused, NotAuthorizedError)
    assert refused.message == "not authorized"
    gateway = site.channel(site.pki.gateway_client("gw-a"))
    reset = admin_pb2_grpc.AdminStub(gateway).ResetLink(admin_pb2.ResetLinkRequest(), timeout=10)
    assert (await failure(reset)).reason is ErrorReason.NOT_AUTHORIZED
    stream = link_pb2_grpc.LinkStub(gateway).Exchange(iter([link_pb2.LinkMessage(frame=b"x")]), timeout=10)
    assert (await failure(stream.read())).reason is ErrorReason.NOT_AUTHORIZED
    assert b'keymesh_rpc_refused_total{method="/mesh.v1.Admin/ResetLink"} 1.0' in site.metrics.render()


async def test_streams_of_both_kinds_pass(site: Site) -> None:
    neighbour = link_pb2_grpc.LinkStub(site.channel(site.pki.hub("hub-1"))).Exchange(timeout=10)
    for number in range(3):
        await neighbour.write(link_pb2.LinkMessage(frame=bytes([number])))
        message = await neighbour.read()
        assert isinstance(message, link_pb2.LinkMessage)
        assert message.frame == bytes([number])
    await neighbour.done_writing()
    assert await neighbour.read() is grpc.aio.EOF
    levels = keys_pb2_grpc.KeyDeliveryStub(site.channel(site.pki.tool("t"))).WatchLevels(
        keys_pb2.WatchLevelsRequest(), timeout=10
    )
    first = await levels.read()
    assert isinstance(first, keys_pb2.Level)
    assert first.peer_kme_id == "t"
    assert (await failure(levels.read())).reason is ErrorReason.DIRECTORY_UNAVAILABLE


async def test_sae_certificates_cannot_speak_to_the_node_plane(site: Site) -> None:
    for credential in (
        site.pki.sae("sae-a"),
        site.pki.gateway_server("gw-a"),
        site.pki.device_client("kme-a"),
    ):
        channel = site.raw_channel(credential)
        error = await failure(status(channel))
        assert error.reason in (ErrorReason.PEER_UNREACHABLE, ErrorReason.DEADLINE_EXCEEDED)
        await channel.close()
    # And the file is refused in words before it is ever shown.
    with pytest.raises(ConfigError, match="was issued by"):
        site.pool(site.pki.sae("sae-a"))


async def test_another_domains_member_under_the_same_root_is_refused(site: Site) -> None:
    foreign = Pki("other", site.pki.roots)
    channel = site.raw_channel(foreign.tool("t"))
    assert (await failure(status(channel))).reason is ErrorReason.CERTIFICATE
    await channel.close()


async def test_a_channel_reaches_only_whom_it_means(site: Site) -> None:
    for meant in (Identity("metro", Role.NODE, "kme-b"), Identity("metro", Role.HUB, "kme-a")):
        error = await failure(status(site.channel(site.pki.tool("t"), meant)))
        assert isinstance(error, UnavailableError)
        assert "someone else" in error.message


async def test_own_certificate_of_somebody_else_is_refused_at_the_start(site: Site) -> None:
    with pytest.raises(ConfigError, match="speaks for"):
        RpcServer(Identity("metro", Role.NODE, "kme-z"), site.files)


async def test_deny_list_bites_on_open_connections(site: Site) -> None:
    credential = site.pki.tool("t")
    channel = site.channel(credential)
    await status(channel)
    for entry in (fingerprint_of(credential.certificate), serial_of(credential.certificate)):
        site.deny.write_text(f"{entry}\n")
        assert (await failure(status(channel))).reason is ErrorReason.CERTIFICATE
        site.deny.write_text("# nobody\n")
        await status(channel)


async def served_serial(site: Site, *options: str) -> str:
    """The serial of the certificate that the next handshake is served, by openssl."""
    client = site.tls(site.pki.tool("probe"), "probe")
    command = (
        "openssl s_client -connect 127.0.0.1:{port} -CAfile {ca} -cert {cert} -key {key} -alpn h2 {more} "
        "| openssl x509 -noout -serial"
    ).format(port=site.port, ca=client.ca, cert=client.cert, key=client.key, more=" ".join(options))
    process = await asyncio.create_subprocess_shell(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    output, _ = await process.communicate()
    return output.decode().strip().removeprefix("serial=").lower().lstrip("0")


async def test_renewed_certificate_serves_the_next_handshake(site: Site) -> None:
    channel = site.channel(site.pki.tool("t"))
    await status(channel)
    before = await served_serial(site)
    renewed = site.pki.node("kme-a")
    renewed.save(site.dir, "node")
    after = await served_serial(site)
    assert after == serial_of(renewed.certificate) != before
    # Connections that are open stay open.
    await status(channel)
    # What cannot be used changes nothing.
    site.pki.node("kme-z").save(site.dir, "node")
    assert await served_serial(site) == after


async def test_channels_follow_their_own_renewed_certificate(site: Site) -> None:
    pool = site.pool(site.pki.tool("old"))
    address = f"127.0.0.1:{site.port}"
    before = pool.channel(address, NODE)
    assert (await status(before)).source_kme_id.endswith("/old")
    assert pool.channel(address, NODE) is before
    site.pki.tool("new").save(site.dir, "client")
    after = pool.channel(address, NODE)
    assert (await status(after)).source_kme_id.endswith("/new")
    await pool.close()
    with pytest.raises(UnavailableError):
        pool.channel(address, NODE)


async def test_errors_arrive_as_reasons(site: Site) -> None:
    channel = site.channel(site.pki.tool("t"))
    shortage = await failure(status(channel, "shortage"))
    assert isinstance(shortage, ShortageError)
    assert (shortage.retry_after_s, shortage.message) == (2.5, "no material")
    wrong = await failure(status(channel, "caller"))
    assert (type(wrong), wrong.message) == (CallerError, "number is too large (number=7)")
    assert (await failure(status(channel, "group"))).reason is ErrorReason.BUSY


async def test_foreign_exceptions_never_reach_the_caller(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    channel = site.channel(site.pki.tool("t"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await status(channel, "foreign", metadata=((REQUEST_ID_KEY, "req-9"),))
    error = caught.value
    assert error_from_rpc(error).reason is ErrorReason.INTERNAL
    assert (REQUEST_ID_KEY, "req-9") in list(error.trailing_metadata())
    seen = f"{error.details()} {error.debug_error_string()} {list(error.trailing_metadata())}"
    assert SECRET.hex() not in seen
    assert "Traceback" not in seen
    assert SECRET.hex() not in " ".join(record.getMessage() for record in caplog.records)


async def test_unknown_methods_and_too_large_messages(site: Site) -> None:
    channel = site.channel(site.pki.gateway_client("gw-a"))
    unknown = raw_call(channel, "/mesh.v1.KeyDelivery/Invented")
    assert isinstance(await failure(unknown(b"", timeout=10)), PeerError)
    unimplemented = keys_pb2_grpc.KeyDeliveryStub(channel).GetKeys(keys_pb2.GetKeysRequest(), timeout=10)
    assert (await failure(unimplemented)).reason in (ErrorReason.PROTOCOL_VIOLATION, ErrorReason.INTERNAL)
    raw = raw_call(channel, "/mesh.v1.KeyDelivery/GetStatus")
    assert (await failure(raw(bytes(5 * 1024 * 1024), timeout=10))).reason is ErrorReason.BUSY


async def test_garbage_instead_of_a_message(site: Site) -> None:
    raw = raw_call(site.channel(site.pki.tool("t")), "/mesh.v1.KeyDelivery/GetStatus")
    error = await failure(raw(b"\xff\xff\xff", timeout=10))
    assert "Traceback" not in error.message


async def test_cancelled_calls_are_cancelled_at_the_server(site: Site) -> None:
    task = asyncio.ensure_future(status(site.channel(site.pki.tool("t")), "wait"))
    await site.delivery.entered.wait()
    task.cancel()
    await asyncio.wait_for(site.delivery.cancelled.wait(), 10)


async def test_health_and_reflection(site: Site) -> None:
    for credential in (site.pki.gateway_client("gw-a"), site.pki.node("kme-b"), site.pki.hub("h")):
        health: Any = health_pb2_grpc.HealthStub(site.channel(credential))
        answer = await health.Check(health_pb2.HealthCheckRequest(service="mesh.v1.KeyDelivery"), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    for credential, is_admitted in ((site.pki.tool("t"), True), (site.pki.gateway_client("g"), False)):
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", site.channel(credential)))
        call = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
        )
        if not is_admitted:
            assert (await failure(call.read())).reason is ErrorReason.NOT_AUTHORIZED
            continue
        listed = await call.read()
        assert isinstance(listed, reflection_pb2.ServerReflectionResponse)
        names = {service.name for service in listed.list_services_response.service}
        assert {"mesh.v1.KeyDelivery", "mesh.v1.Link", "grpc.health.v1.Health"} <= names


async def test_stopping_lets_calls_end_and_says_so(tmp_path: Path) -> None:
    site = Site(tmp_path)
    server = await site.start()
    channel = site.channel(site.pki.tool("t"))
    health: Any = health_pb2_grpc.HealthStub(channel)
    await server.set_serving(False)
    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    waiting = asyncio.ensure_future(status(channel, "wait"))
    await site.delivery.entered.wait()
    await server.stop(0.1)
    assert isinstance(await failure(waiting), UnavailableError)
    assert isinstance(await failure(status(channel)), UnavailableError)
    await site.close()


async def test_two_servers_never_share_a_port(site: Site) -> None:
    other = RpcServer(NODE, site.files)
    with pytest.raises(ConfigError, match=r"listen\.grpc"):
        await other.start(f"127.0.0.1:{site.port}")
    await other.stop(0)


SERVE = """
import asyncio, sys
from pathlib import Path
from mesh.ops.tls import TlsFiles
from mesh.rpc.identity import Identity, Role
from mesh.rpc.server import RpcServer

async def main(ca, cert, key):
    server = RpcServer(Identity("metro", Role.NODE, "kme-a"), TlsFiles(Path(ca), Path(cert), Path(key)))
    print(await server.start("127.0.0.1:0"), flush=True)
    await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "is_accepted"),
    [
        ("-tls1_3", True),
        ("-tls1_2 -cipher ECDHE-ECDSA-AES256-GCM-SHA384", True),
        ("-tls1_2 -cipher ECDHE-ECDSA-CHACHA20-POLY1305", True),
        ("-tls1_2 -cipher ECDHE-ECDSA-AES128-SHA", False),
        ("-tls1_1 -cipher ALL:@SECLEVEL=0", False),
    ],
)
async def test_tls12_is_limited_whatever_the_environment_says(
    tmp_path: Path, options: str, is_accepted: bool
) -> None:
    site = Site(tmp_path)
    environment = {**os.environ, "GRPC_SSL_CIPHER_SUITES": "ECDHE-ECDSA-AES128-SHA"}
    files = [str(path) for path in (site.files.ca, site.files.cert, site.files.key)]
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, *files, stdout=subprocess.PIPE, env=environment
    )
    try:
        assert server.stdout is not None
        site.port = int(await asyncio.wait_for(server.stdout.readline(), 30))
        assert bool(await served_serial(site, options)) is is_accepted
    finally:
        server.kill()
        await server.wait()
