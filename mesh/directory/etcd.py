"""A small etcd client over etcd's own gRPC interface: TLS, users, several endpoints.

Owns failover between endpoints, the authentication token's life, and the translation of
etcd's errors; knows nothing of keymesh's keys. Why not a library: ADR 0002.

Every call has a deadline and is tried at each endpoint in turn, the last one that answered
first. Range, put, delete and leases may be repeated without harm; ``txn`` is repeated only
where the caller's comparison makes that harmless too. Temporary failures are
``UnavailableError``, wrong users, passwords and permissions ``ConfigError``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import grpc

from mesh.directory.etcdpb import rpc_pb2 as pb
from mesh.directory.etcdpb import rpc_pb2_grpc as stubs
from mesh.errors import ConfigError, ErrorReason, MeshError, UnavailableError

PAGE = 500
"""Entries fetched per range call."""
MAX_ANSWER_BYTES = 16 * 1024 * 1024

Q = TypeVar("Q")
A = TypeVar("A")

_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
)


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """PEM texts: the CA that signed the servers' certificates, and one's own certificate if asked for."""

    ca: bytes
    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)


class CompactedError(UnavailableError):
    """The history asked for is gone: list again."""

    default_reason = ErrorReason.DIRECTORY_UNAVAILABLE

    def __init__(self, revision: int) -> None:
        super().__init__("etcd compacted the history asked for", facts={"revision": revision})


@dataclass(frozen=True, slots=True)
class Change:
    """One event of a watch; ``value`` is None when the key was deleted or its lease ran out."""

    key: bytes
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Changes:
    """One answer of a watch; without changes: a heartbeat."""

    store_revision: int
    """Of the whole store at that member; may run ahead of the changes delivered so far."""
    changes: tuple[Change, ...] = ()
    last_revision: int = 0
    """Of the last change; resume at the next. 0 without changes."""


class LeaseGoneError(UnavailableError):
    """The lease ran out or was revoked: get a new one."""

    default_reason = ErrorReason.DIRECTORY_UNAVAILABLE


def prefix_end(prefix: bytes) -> bytes:
    """The end of the range of keys that start with ``prefix`` (not empty)."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else b"\x00"


class Endpoint:
    """One server: a channel and the stubs on it."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials) -> None:
        self.address = address
        self.channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        self.kv = stubs.KVStub(self.channel)
        self.watch = stubs.WatchStub(self.channel)
        self.lease = stubs.LeaseStub(self.channel)
        self.auth = stubs.AuthStub(self.channel)
        self.maintenance = stubs.MaintenanceStub(self.channel)
        self.cluster = stubs.ClusterStub(self.channel)


Pick = Callable[[Endpoint], "grpc.aio.UnaryUnaryMultiCallable[Q, A]"]


class EtcdClient:
    """A client of one etcd cluster. Make it inside the event loop that uses it; use as ``async with``.

    Args:
        endpoints: ``https://host:port`` or ``host:port``, any number of members.
        tls: always on.
        username: None when the cluster runs without authentication.
        password: of that user.
        timeout_s: for one attempt at one endpoint; a call takes at most that times the endpoints + 2.
        heartbeat_s: a silent watch asks for a sign of life after this, and is given up after two.
        renew: asked after each failure for the certificates as they are now; None keeps what there is.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: EtcdTls,
        username: str | None = None,
        password: str | None = None,
        timeout_s: float = 2.0,
        heartbeat_s: float = 2.0,
        renew: Callable[[], EtcdTls | None] = lambda: None,
    ) -> None:
        if not endpoints:
            raise ConfigError("etcd.endpoints: must name at least one endpoint")
        if username is not None and not password:
            raise ConfigError("etcd.password: needed with a username")
        addresses = [_address(endpoint) for endpoint in endpoints]
        credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
        self._endpoints = [Endpoint(address, credentials) for address in addresses]
        self._tls = tls
        self._renew = renew
        self._closing: set[asyncio.Task[None]] = set()
        self._current = 0
        self._username = username
        self._password = password or ""
        self._token = ""
        self._timeout_s = timeout_s
        self._heartbeat_s = heartbeat_s

    async def __aenter__(self) -> EtcdClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes every connection; calls under way fail."""
        for endpoint in self._endpoints:
            await endpoint.channel.close()
        await asyncio.gather(*self._closing)

    @property
    def endpoint(self) -> str:
        """The endpoint in use, host:port."""
        return self._endpoints[self._current].address

    async def call(self, pick: Pick[Q, A], request: Q) -> A:
        """One unary call, at one endpoint after the other until one answers.

        Raises:
            UnavailableError: DIRECTORY_UNAVAILABLE, none of the endpoints answered in time.
            ConfigError: the user, password or permission is wrong.
        """

        async def attempt(endpoint: Endpoint) -> A:
            return await pick(endpoint)(
                request, timeout=self._timeout_s, metadata=await self._metadata(endpoint)
            )

        return await self._somewhere(attempt)

    async def range(self, prefix: bytes) -> tuple[list[pb.KeyValue], int]:
        """All entries whose keys start with ``prefix``, at one revision, and that revision."""
        entries: list[pb.KeyValue] = []
        key, end, revision = prefix, prefix_end(prefix), 0
        while True:
            request = pb.RangeRequest(key=key, range_end=end, limit=PAGE, revision=revision)
            answer = await self.call(lambda e: e.kv.Range, request)
            entries += answer.kvs
            revision = revision or answer.header.revision
            if not answer.more:
                return entries, revision
            key = answer.kvs[-1].key + b"\x00"

    async def get(self, key: bytes) -> pb.KeyValue | None:
        """One entry, None if there is none."""
        answer = await self.call(lambda e: e.kv.Range, pb.RangeRequest(key=key))
        return answer.kvs[0] if answer.kvs else None

    async def put(self, key: bytes, value: bytes, *, lease: int = 0) -> int:
        """Writes an entry; returns the revision."""
        answer = await self.call(lambda e: e.kv.Put, pb.PutRequest(key=key, value=value, lease=lease))
        return answer.header.revision

    async def delete(self, key: bytes) -> int:
        """Deletes an entry; returns how many there were."""
        return (await self.call(lambda e: e.kv.DeleteRange, pb.DeleteRangeRequest(key=key))).deleted

    async def replace(self, key: bytes, value: bytes, *, mod_revision: int) -> bool:
        """Writes an entry if it was last changed at ``mod_revision`` (0: does not exist); says whether."""
        unchanged = pb.Compare(
            result=pb.Compare.EQUAL, target=pb.Compare.MOD, key=key, mod_revision=mod_revision
        )
        put = pb.RequestOp(request_put=pb.PutRequest(key=key, value=value))
        request = pb.TxnRequest(compare=[unchanged], success=[put])
        return (await self.call(lambda e: e.kv.Txn, request)).succeeded

    async def compact(self, revision: int) -> None:
        """Forgets the history before ``revision``."""
        await self.call(lambda e: e.kv.Compact, pb.CompactionRequest(revision=revision, physical=True))

    async def grant(self, ttl_s: int) -> int:
        """A new lease; returns its id."""
        return (await self.call(lambda e: e.lease.LeaseGrant, pb.LeaseGrantRequest(TTL=ttl_s))).ID

    async def revoke(self, lease: int) -> None:
        """Ends a lease and deletes what hangs on it."""
        await self.call(lambda e: e.lease.LeaseRevoke, pb.LeaseRevokeRequest(ID=lease))

    async def keep_alive(self, lease: int) -> int:
        """Renews a lease; returns the seconds it has, 0 if it is gone."""

        async def attempt(endpoint: Endpoint) -> int:
            metadata = await self._metadata(endpoint)
            call = endpoint.lease.LeaseKeepAlive(timeout=self._timeout_s, metadata=metadata)
            try:
                await call.write(pb.LeaseKeepAliveRequest(ID=lease))
                answer = await call.read()
                if not isinstance(answer, pb.LeaseKeepAliveResponse):
                    raise UnavailableError(
                        "etcd ended the keep-alive", reason=ErrorReason.DIRECTORY_UNAVAILABLE
                    )
                return answer.TTL
            finally:
                call.cancel()

        return await self._somewhere(attempt)

    async def status(self) -> pb.StatusResponse:
        """State of the endpoint that answers."""
        return await self.call(lambda e: e.maintenance.Status, pb.StatusRequest())

    async def members(self) -> list[pb.Member]:
        """The cluster's members."""
        answer = await self.call(lambda e: e.cluster.MemberList, pb.MemberListRequest(linearizable=True))
        return list(answer.members)

    async def watch(self, prefix: bytes, start_revision: int) -> AsyncGenerator[Changes, None]:
        """Follows keys that start with ``prefix`` from a revision on, at the current endpoint.

        Ends with an error, never by itself; the next call goes to the next endpoint. Resume after
        the ``last_revision`` seen.

        Raises:
            CompactedError: the start revision is gone.
            UnavailableError: the stream broke, fell silent, or its member lost the quorum.
            ConfigError: the user may not read the prefix.
        """
        endpoint = self._endpoints[self._current]
        call: grpc.aio.StreamStreamCall[pb.WatchRequest, pb.WatchResponse] | None = None
        try:
            # etcd refuses a watch with a token that ended as "permission denied": take a new one.
            self._token = ""
            # "hasleader": end the stream rather than wait at a member that lost the quorum.
            metadata = (*await self._metadata(endpoint), ("hasleader", "true"))
            call = endpoint.watch.Watch(metadata=metadata)
            create = pb.WatchCreateRequest(
                key=prefix, range_end=prefix_end(prefix), start_revision=start_revision, fragment=False
            )
            async with asyncio.timeout(self._timeout_s):
                await call.write(pb.WatchRequest(create_request=create))
            async for answer in self._answers(call):
                if answer.canceled:
                    raise self._cancelled(answer)
                yield _changes(answer)
        except grpc.aio.AioRpcError as error:
            self._after_failure(error, endpoint)
            raise self._translated(error) from error
        except (TimeoutError, asyncio.InvalidStateError) as error:
            self._rotate(endpoint)
            raise _away("etcd did not take the watch") from error
        except UnavailableError:
            self._rotate(endpoint)
            raise
        finally:
            if call is not None:
                call.cancel()

    async def _answers(
        self, call: grpc.aio.StreamStreamCall[pb.WatchRequest, pb.WatchResponse]
    ) -> AsyncIterator[pb.WatchResponse]:
        asked = False
        while True:
            read = asyncio.ensure_future(call.read())
            try:
                while not read.done():
                    await asyncio.wait((read,), timeout=self._heartbeat_s)
                    if read.done():
                        break
                    if asked:
                        raise _away("etcd's watch fell silent")
                    asked = True
                    progress = pb.WatchRequest(progress_request=pb.WatchProgressRequest())
                    async with asyncio.timeout(self._timeout_s):
                        await call.write(progress)
            finally:
                if not read.done():
                    read.cancel()
            answer = read.result()
            if not isinstance(answer, pb.WatchResponse):
                # End of stream: the status says why.
                await call.code()
                raise _away("etcd ended the watch")
            asked = False
            yield answer

    def _cancelled(self, answer: pb.WatchResponse) -> MeshError:
        if answer.compact_revision:
            return CompactedError(answer.compact_revision)
        if "permission denied" in answer.cancel_reason:
            return ConfigError("etcd: the user may not read this prefix", facts={"user": self._username})
        return _away("etcd cancelled the watch", why=answer.cancel_reason[:120])

    async def _somewhere(self, attempt: Callable[[Endpoint], Awaitable[A]]) -> A:
        failure: MeshError = _away("etcd was not tried")
        for _ in range(len(self._endpoints) + 2):  # one more for the token, one more for all
            endpoint = self._endpoints[self._current]
            try:
                return await attempt(endpoint)
            except grpc.aio.AioRpcError as error:
                failure = self._translated(error)
                if not self._after_failure(error, endpoint):
                    raise failure from error
            except asyncio.InvalidStateError:  # a stream that ended before the write
                failure = _away("etcd ended the call")
                self._rotate(endpoint)
            except UnavailableError as error:
                failure = error
                self._rotate(endpoint)
        raise failure

    async def _metadata(self, endpoint: Endpoint) -> tuple[tuple[str, str], ...]:
        if self._username is None:
            return ()
        if not self._token:
            request = pb.AuthenticateRequest(name=self._username, password=self._password)
            answer = await endpoint.auth.Authenticate(request, timeout=self._timeout_s)
            self._token = answer.token
        return (("token", self._token),)

    def _after_failure(self, error: grpc.aio.AioRpcError, endpoint: Endpoint) -> bool:
        """Prepares the next attempt; False if another one cannot help."""
        if _is_stale_token(error):
            had_token, self._token = bool(self._token), ""
            return had_token
        if error.code() in _TEMPORARY:
            self._rotate(endpoint)
            return True
        return False

    def _rotate(self, failed: Endpoint) -> None:
        """Turns to the next endpoint, unless somebody else already did."""
        if self._endpoints[self._current] is failed:
            self._current = (self._current + 1) % len(self._endpoints)
        tls = self._renew()
        if tls is not None and tls != self._tls:
            self._connect_anew(tls)

    def _connect_anew(self, tls: EtcdTls) -> None:
        """A connection that stands is not asked for a certificate again; one that broke needs the new one."""
        self._tls = tls
        credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
        old = self._endpoints
        self._endpoints = [Endpoint(endpoint.address, credentials) for endpoint in old]
        for endpoint in old:
            task = asyncio.get_running_loop().create_task(endpoint.channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _translated(self, error: grpc.aio.AioRpcError) -> MeshError:
        details = (error.details() or "")[:200]
        code = error.code()
        if code in _TEMPORARY:
            return _away("etcd is away", why=details or code.name)
        if "compacted" in details:
            return CompactedError(0)
        if "lease not found" in details:
            return LeaseGoneError("etcd knows the lease no longer")
        if code is grpc.StatusCode.PERMISSION_DENIED or _is_stale_token(error) or "auth" in details:
            facts = {"user": self._username, "why": details}
            return ConfigError("etcd refuses the user: check name, password and role", facts=facts)
        return _away("etcd refuses the call", why=details, code=code.name)


_TEMPORARY = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


def _is_stale_token(error: grpc.aio.AioRpcError) -> bool:
    """Tokens end by age, by a restart of the member, and by any change of users or roles."""
    details = error.details() or ""
    stale = ("invalid auth token", "revision of auth store is old", "user name is empty")
    return any(text in details for text in stale)


def _changes(answer: pb.WatchResponse) -> Changes:
    changes = tuple(
        Change(event.kv.key, event.kv.value if event.type == pb.Event.PUT else None)
        for event in answer.events
    )
    last = answer.events[-1].kv.mod_revision if changes else 0
    return Changes(answer.header.revision, changes, last)


def _away(message: str, **facts: object) -> UnavailableError:
    return UnavailableError(message, reason=ErrorReason.DIRECTORY_UNAVAILABLE, facts=facts)


def _address(endpoint: str) -> str:
    scheme, separator, rest = endpoint.rpartition("://")
    if separator and scheme != "https":
        raise ConfigError("etcd.endpoints: must be https", facts={"endpoint": endpoint[:100]})
    host, colon, port = rest.rstrip("/").rpartition(":")
    if not host or not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError("etcd.endpoints: must be https://host:port", facts={"endpoint": endpoint[:100]})
    return f"{host}:{port}"
