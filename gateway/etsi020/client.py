"""HTTP towards other owners' key managers: one POST at a time as the node says, nothing else.

Owns that a request goes to a configured peer and nobody else: its own roots, its pin checked in the handshake
before a byte of any request leaves, TLS 1.3, no redirects, nothing decompressed, every answer bounded.
Connections are kept, and one to each peer is kept warm; none is used again once its certificate would not be
admitted any more. Retries are the node's.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Final

import aiohttp
from cryptography import x509

from gateway.config import Etsi020Settings, KeyManager
from gateway.etsi020.errors import Refusal
from gateway.etsi020.identity import Pins, read_der
from gateway.etsi020.schema import (
    decode_acks,
    decode_versions,
    encode_acks,
    encode_ext_keys,
    encode_void,
    problem_type,
)
from gateway.telemetry import PeerTelemetry
from mesh.client import ConfigError, MeshError, NotAuthorizedError
from mesh.client.border import Job, Outcome, PostAcks, PostKeys
from mesh.ops.certificates import fingerprint_of, serial_of
from mesh.ops.denylist import DenyList
from mesh.ops.diagnosis import Expectation
from mesh.ops.logging import clean_request_id
from mesh.ops.tls import TlsFiles, client_context
from mesh.ops.watch import FileWatch

_LOG = logging.getLogger("keymesh.gateway")

MAX_ANSWER_BYTES: Final = 1024 * 1024
CONNECT_TIMEOUT_S: Final = 5.0
# A lease is over before anybody else performs the job; so must the request be.
LEASE_MARGIN_S: Final = 2.0
KEEP_IDLE_S: Final = 60.0
_HEADERS: Final = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": "keymesh",
}
_VERSIONS_PATH: Final = "/kmapi/versions"


@dataclass(slots=True)
class _Trust:
    """TLS towards one peer. Kept connections belong to their context, so that a new one uses none of them.

    Attributes:
        shown: certificates that were admitted in its handshakes, by fingerprint.
        pins: in force when they were.
    """

    context: ssl.SSLContext
    pins: Pins
    shown: dict[str, x509.Certificate] = field(default_factory=dict)


@dataclass(slots=True)
class _Peer:
    settings: KeyManager
    files: TlsFiles
    watch: FileWatch
    trust: _Trust
    trouble: str = ""


class PeerClient:
    """Requests to the configured peers.

    Args:
        settings: the ``etsi020`` section.
        base: directory that relative paths start from.
        pins: the pins in force.
        deny_list: certificates that are refused.
        telemetry: told whether peers answer.

    Raises:
        ConfigError: a certificate that cannot be used, in words.
    """

    def __init__(
        self,
        settings: Etsi020Settings,
        *,
        base: Path,
        pins: Callable[[], Pins],
        deny_list: DenyList,
        telemetry: PeerTelemetry,
    ) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._pins = pins
        self._deny_list = deny_list
        self._peers = {peer.kme_id: self._peer(peer, base) for peer in settings.peers}
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Make the pool of connections."""
        connector = aiohttp.TCPConnector(
            limit=0, limit_per_host=self._settings.max_jobs, keepalive_timeout=KEEP_IDLE_S
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers=_HEADERS,
            trust_env=False,
        )

    async def close(self) -> None:
        """End all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def reload_if_changed(self) -> None:
        """Take up new certificates and roots; what does not fit is refused, the last good ones stay."""
        for peer in self._peers.values():
            if peer.watch.changed():
                try:
                    peer.trust = self._trust(peer.settings.kme_id, peer.files)
                except ConfigError as error:
                    _LOG.error(
                        "certificate towards a peer not renewed",
                        extra={"peer": peer.settings.kme_id, "cause": str(error)},
                    )

    async def perform(self, job: Job) -> Outcome:
        """Perform one request within its lease; never raises what the peer or the network caused."""
        peer = self._peers.get(job.peer)
        if peer is None or not job.url.startswith(peer.settings.url + "/"):
            # The node is configured for somebody else: nothing must leave.
            _LOG.error("request for a peer that is not configured here", extra={"peer": job.peer})
            return Outcome(problem="not a configured peer or URL of this gateway", was_sent=False)
        outcome = await self._post(peer, job.url, _body_of(job), job.lease_s - LEASE_MARGIN_S, job)
        if outcome.http_status is None or outcome.http_status >= HTTPStatus.MULTIPLE_CHOICES:
            extra = {"peer": job.peer, "http_status": outcome.http_status, "cause": outcome.problem}
            _LOG.info("request to a peer failed", extra=extra)
        return outcome

    async def keep_warm(self) -> None:
        """Ask each peer for its versions, again and again: a connection is there when a key needs it."""
        async with asyncio.TaskGroup() as tasks:
            for peer in self._peers.values():
                tasks.create_task(self._keep_warm(peer))

    async def _keep_warm(self, peer: _Peer) -> None:
        while True:
            trouble = await self._ask_versions(peer)
            self._telemetry.answers(peer.settings.kme_id, not trouble)
            if trouble != peer.trouble:
                peer.trouble = trouble
                extra = {"peer": peer.settings.kme_id, "cause": trouble}
                if trouble:
                    _LOG.warning("peer does not answer", extra=extra)
                else:
                    _LOG.info("peer answers", extra=extra)
            await asyncio.sleep(self._settings.warm_every_s)

    async def _ask_versions(self, peer: _Peer) -> str:
        """What is wrong with a peer; empty for nothing."""
        timeout = aiohttp.ClientTimeout(total=2 * CONNECT_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        url = peer.settings.url + _VERSIONS_PATH
        try:
            async with self._request("GET", url, peer, timeout) as response:
                body = await _read(response)
                if response.status != HTTPStatus.OK:
                    return f"versions answered {response.status}"
                if "v1" not in decode_versions(body).versions:
                    return "the peer does not speak v1"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return _cause(error)
        except (MeshError, Refusal) as error:
            return str(error)
        return ""

    async def _post(self, peer: _Peer, url: str, body: bytes, limit_s: float, job: Job) -> Outcome:
        timeout = aiohttp.ClientTimeout(total=max(limit_s, 1.0), connect=CONNECT_TIMEOUT_S)
        try:
            async with self._request(
                "POST", url, peer, timeout, body=body, request_id=job.request_id
            ) as response:
                return _outcome(response, await _read(response), job)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return Outcome(problem=_cause(error), was_sent=False)
        except (aiohttp.ClientError, TimeoutError, OSError, MeshError) as error:
            return Outcome(problem=_cause(error), was_sent=True)

    def _request(
        self,
        verb: str,
        url: str,
        peer: _Peer,
        timeout: aiohttp.ClientTimeout,
        *,
        body: bytes | None = None,
        request_id: str = "",
    ) -> aiohttp.client._RequestContextManager:
        if self._session is None:
            raise RuntimeError("the client is not open")
        trust = peer.trust
        if trust.pins is not self._pins() or any(map(self._is_withdrawn, trust.shown.values())):
            trust = peer.trust = self._trust(peer.settings.kme_id, peer.files)
        return self._session.request(
            verb,
            url,
            data=body,
            headers={"X-Request-Id": clean_request_id(request_id)} if request_id else None,
            ssl=trust.context,
            server_hostname=peer.settings.server_name,
            allow_redirects=False,
            timeout=timeout,
        )

    def _peer(self, settings: KeyManager, base: Path) -> _Peer:
        files = TlsFiles(base / settings.ca, base / self._settings.cert, base / self._settings.key)
        watch = FileWatch(files.watched, interval_s=0)
        return _Peer(settings, files, watch, self._trust(settings.kme_id, files))

    def _is_withdrawn(self, certificate: x509.Certificate) -> bool:
        return certificate.not_valid_after_utc.timestamp() < time.time() or self._deny_list.denies(
            fingerprint=fingerprint_of(certificate), serial=serial_of(certificate)
        )

    def _trust(self, kme_id: str, files: TlsFiles) -> _Trust:
        context = client_context(
            files,
            minimum="1.3",
            expected=Expectation(is_server=True, is_client=True),
            what=f"etsi020 towards {kme_id}",
        )
        trust = _Trust(context, self._pins())

        def check(der: bytes | None) -> None:
            certificate = read_der(der or b"")
            if not self._pins().of(kme_id).fits(certificate):
                raise NotAuthorizedError("the server's certificate is not the pinned key manager's")
            if self._is_withdrawn(certificate):
                raise NotAuthorizedError("the server's certificate is on the deny list, or has expired")
            trust.shown[fingerprint_of(certificate)] = certificate

        class PinnedObject(ssl.SSLObject):
            """Checks the pin as the last step of the handshake, so that no request leaves before."""

            def do_handshake(self) -> None:
                super().do_handshake()
                try:
                    check(self.getpeercert(binary_form=True))
                except NotAuthorizedError as error:
                    raise ssl.SSLCertVerificationError(error.message) from error

        context.sslobject_class = PinnedObject
        return trust


def _body_of(job: Job) -> bytes:
    if isinstance(job.body, PostKeys):
        return encode_ext_keys(job.body)
    if isinstance(job.body, PostAcks):
        return encode_acks(job.body)
    return encode_void(job.body)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The whole answer.

    Raises:
        ClientPayloadError: larger than MAX_ANSWER_BYTES, or cut.
    """
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise aiohttp.ClientPayloadError("the answer is too large")
    return bytes(body)


def _outcome(response: aiohttp.ClientResponse, body: bytes, job: Job) -> Outcome:
    retry_after = response.headers.get("Retry-After", "")
    retry_after_s = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0
    if response.status != HTTPStatus.OK or isinstance(job.body, PostAcks) or not body:
        return Outcome(response.status, problem_type(body), retry_after_s=min(retry_after_s, 3600.0))
    try:
        # Nobody asked for a synchronous answer; what it says counts all the same.
        return Outcome(response.status, acks=decode_acks(body))
    except Refusal as refusal:
        return Outcome(response.status, f"unreadable answer: {refusal.title}")


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:512]
