"""Pull keys from a QKD device over the device's own ETSI GS QKD 014 interface.

The node is an SAE of its device (V1.1.1 clauses 5 and 6); the device at the other
end gives the neighbour node the same keys by key_ID. This adapter orders, stores and
repeats nothing. Every answer is parsed strictly: what a device sends is input from
outside. After a failure it backs off, so that a dead device costs one attempt now and
then, not one per poll.
"""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar
from urllib.parse import quote
from uuid import UUID

import aiohttp
import msgspec

from mesh.core.secret import Secret
from mesh.errors import CallerError, ErrorReason, PeerError, UnavailableError
from mesh.sources.port import DeviceKey, DeviceReport, SourceState

_MAX_BODY = 4 << 20
_BACKOFF_FIRST_S = 0.25
_BACKOFF_LAST_S = 15.0
_MAX_CALLS_PER_TAKE = 64
_REPORT_LIFE_S = 60.0
_MALFORMED = (msgspec.ValidationError, msgspec.DecodeError, RecursionError)
_LOST_MESSAGES = ("not found", "unknown key")


class _Status(msgspec.Struct):
    key_size: Annotated[int, msgspec.Meta(ge=1)]
    stored_key_count: Annotated[int, msgspec.Meta(ge=0)]
    max_key_per_request: Annotated[int, msgspec.Meta(ge=1)]
    max_key_size: Annotated[int, msgspec.Meta(ge=8)]
    min_key_size: Annotated[int, msgspec.Meta(ge=1)]
    max_key_count: Annotated[int, msgspec.Meta(ge=0)] = 0
    # Vendors' own words (V1.1.1 clause 6.1); what is not understood says nothing.
    status_extension: Any = None


class _Key(msgspec.Struct):
    key_ID: str  # noqa: N815 - the standard's name
    key: bytes


class _Container(msgspec.Struct):
    keys: list[_Key]


class _Error(msgspec.Struct):
    message: str = ""


_T = TypeVar("_T", _Status, _Container)


def client_context(ca: str, cert: str, key: str) -> ssl.SSLContext:
    """Build the TLS context towards a device: its root, our certificate, TLS 1.2 or newer.

    Raises:
        CallerError: ``CERTIFICATE``, a file is missing or does not fit; names it.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise CallerError(
            f"cannot use the certificates for the device: {error}",
            reason=ErrorReason.CERTIFICATE,
            facts={"ca": ca, "cert": cert, "key": key},
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    return context


class Etsi014Device:
    """A :class:`~mesh.sources.port.KeySource` in front of a device's 014 interface.

    Args:
        url: base URL of the own device, without ``/api/v1``.
        peer_sae_id: the SAE ID by which the device knows the other end.
        tls: the context from :func:`client_context`.
        key_size_bits: bits per key asked for, clipped to what the device allows.
        min_take_bytes: a take below this returns nothing: let key gather first.
        timeout_s: deadline of one HTTP call.
        now_s: monotonic clock, for the back-off.
        renew: asked before each call for a context of certificates that changed; None keeps what there is.
    """

    def __init__(
        self,
        url: str,
        *,
        peer_sae_id: str,
        tls: ssl.SSLContext,
        key_size_bits: int = 65_536,
        min_take_bytes: int = 1024,
        timeout_s: float = 5.0,
        now_s: Callable[[], float] = time.monotonic,
        renew: Callable[[], ssl.SSLContext | None] = lambda: None,
    ) -> None:
        self._renew = renew
        self._base = f"{url.rstrip('/')}/api/v1/keys/{quote(peer_sae_id, safe='')}"
        self._tls = tls
        self._key_size_bytes = key_size_bits // 8
        self._min_take_bytes = min_take_bytes
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._now_s = now_s
        self._session: aiohttp.ClientSession | None = None
        self._state = SourceState.STARTING
        self._backoff_s = 0.0
        self._retry_at_s = 0.0
        self._limits: _Status | None = None
        self._asked_at_s = 0.0

    @property
    def state(self) -> str:
        """A ``SourceState`` value."""
        return self._state.value

    @property
    def report(self) -> DeviceReport | None:
        """What the device said of itself within the last minute; None if it said nothing."""
        status = self._limits
        if status is None or self._now_s() - self._asked_at_s > _REPORT_LIFE_S:
            return None
        told = status.status_extension if isinstance(status.status_extension, dict) else {}
        return DeviceReport(
            stored_bytes=_level(status),
            capacity_bytes=status.max_key_count * status.key_size // 8,
            secret_key_rate_bits_per_s=_number(told.get("keymesh_secret_key_rate_bps")),
            qber=_number(told.get("keymesh_qber")),
        )

    async def close(self) -> None:
        """Close the connection; further calls raise."""
        self._state = SourceState.CLOSED
        if self._session is not None:
            await self._session.close()

    async def level_bytes(self) -> int:
        """Return how many key bytes the device could hand out now."""
        return _level(await self._status())

    async def take(self, max_bytes: int) -> list[DeviceKey]:
        """Take fresh keys of at most ``max_bytes`` in total; see the port."""
        status = await self._status()
        size_bytes = min(self._key_size_bytes, status.max_key_size // 8, max_bytes)
        available = min(_level(status), max_bytes)
        if available < size_bytes:
            # A slow device: smaller keys now rather than none for long.
            size_bytes = available // 32 * 32
        if size_bytes * 8 < status.min_key_size or available < min(self._min_take_bytes, max_bytes):
            self._state = SourceState.EMPTY
            return []
        keys: list[DeviceKey] = []
        wanted = available // size_bytes
        for _ in range(_MAX_CALLS_PER_TAKE):
            number = min(wanted - len(keys), status.max_key_per_request)
            if number == 0:
                break
            try:
                got = await self._keys("enc_keys", {"number": number, "size": size_bytes * 8})
            except UnavailableError:
                if not keys:
                    raise
                break
            if any(len(key.value) != size_bytes for key in got) or len(got) > number:
                raise PeerError("the device sent keys of another size or number than asked for")
            keys += got
        return keys

    async def fetch(self, key_ids: Sequence[str]) -> list[DeviceKey]:
        """Fetch just these keys, in the order asked; see the port."""
        status = self._limits or await self._status()
        step = status.max_key_per_request
        keys: list[DeviceKey] = []
        for start in range(0, len(key_ids), step):
            asked = key_ids[start : start + step]
            got = await self._keys("dec_keys", {"key_IDs": [{"key_ID": key_id} for key_id in asked]})
            by_id = {key.key_id: key for key in got}
            if by_id.keys() != set(asked) or len(got) != len(asked):
                raise PeerError("the device sent other keys than asked for")
            keys += [by_id[key_id] for key_id in asked]
        return keys

    async def _status(self) -> _Status:
        self._limits = await self._call("GET", "status", None, _Status)
        self._asked_at_s = self._now_s()
        return self._limits

    async def _keys(self, method: str, body: object) -> list[DeviceKey]:
        container = await self._call("POST", method, body, _Container)
        try:
            return [DeviceKey(str(UUID(key.key_ID)), Secret(key.key)) for key in container.keys]
        except ValueError as error:
            raise PeerError("the device sent a key_ID that is not a UUID") from error

    async def _call(self, verb: str, method: str, body: object, kind: type[_T]) -> _T:
        if self._state is SourceState.CLOSED:
            raise UnavailableError("the source is closed", reason=ErrorReason.SHUTTING_DOWN)
        wait_s = self._retry_at_s - self._now_s()
        if wait_s > 0:
            raise UnavailableError(
                "the device did not answer, backing off",
                reason=ErrorReason.DEVICE_UNAVAILABLE,
                retry_after_s=wait_s,
            )
        try:
            status, payload = await self._exchange(verb, method, body)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._back_off()
            problem = "timed out" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            raise UnavailableError(
                f"the device cannot be reached: {problem}",
                reason=ErrorReason.DEVICE_UNAVAILABLE,
                retry_after_s=self._backoff_s,
            ) from error
        self._check(method, status, payload)
        try:
            answer = msgspec.json.decode(payload, type=kind)
        except _MALFORMED:
            self._back_off()
            # No cause: a parser's message may quote what it read, and that may be key.
            raise PeerError(f"the device's answer to {method} is malformed") from None
        self._backoff_s = 0.0
        self._state = SourceState.READY
        return answer

    async def _exchange(self, verb: str, method: str, body: object) -> tuple[int, bytes]:
        context = self._renew()
        if context is not None:
            self._tls = context
            if self._session is not None:
                await self._session.close()
                self._session = None
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=self._tls, limit=2, keepalive_timeout=60)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=self._timeout, auto_decompress=False, trust_env=False
            )
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"} if data is not None else {}
        async with self._session.request(
            verb, f"{self._base}/{method}", data=data, headers=headers, allow_redirects=False
        ) as response:
            chunks = []
            size = 0
            async for chunk in response.content.iter_any():
                size += len(chunk)
                if size > _MAX_BODY:
                    raise aiohttp.ClientPayloadError("answer larger than 4 MiB")
                chunks.append(chunk)
            return response.status, b"".join(chunks)

    def _check(self, method: str, status: int, payload: bytes) -> None:
        if status == 200:
            return
        if method == "dec_keys" and _says_lost(status, payload):
            self._state = SourceState.READY
            raise CallerError("the device no longer has these keys", reason=ErrorReason.UNKNOWN_KEY)
        if status == 401:
            self._back_off()
            raise UnavailableError(
                "the device refuses our certificate: register this node's device certificate there",
                reason=ErrorReason.DEVICE_UNAVAILABLE,
            )
        if status >= 500:
            self._back_off()
            raise UnavailableError(
                "the device has no key or failed",
                reason=ErrorReason.DEVICE_UNAVAILABLE,
                retry_after_s=self._backoff_s,
                facts={"http_status": status},
            )
        self._back_off()
        text = f"the device refused {method}"
        if status == 404:
            text += ": it has no such path, or no such sae_id"
        raise PeerError(text, facts={"http_status": status})

    def _back_off(self) -> None:
        self._state = SourceState.UNAVAILABLE
        self._backoff_s = min(max(2 * self._backoff_s, _BACKOFF_FIRST_S), _BACKOFF_LAST_S)
        self._retry_at_s = self._now_s() + self._backoff_s


def _says_lost(status: int, payload: bytes) -> bool:
    """Whether the device itself says that keys are gone, which destroys their block at both ends.

    A proxy, a wrong URL and a wrong SAE ID answer 404 too: only an error object that speaks of keys counts.
    """
    try:
        message = msgspec.json.decode(payload, type=_Error).message[:200].lower()
    except _MALFORMED:
        return False
    return (status == 404 and "key" in message) or (
        status == 400 and any(text in message for text in _LOST_MESSAGES)
    )


def _level(status: _Status) -> int:
    return status.stored_key_count * status.key_size // 8


def _number(value: object) -> float | None:
    """A number from outside, if it is one; a flag is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        return None
    return float(value)


def connect(
    url: str,
    *,
    ca: str,
    cert: str,
    key: str,
    sae_id: str,
    key_size_bits: int = 65_536,
    timeout_s: float = 5.0,
) -> Etsi014Device:
    """Build a source from the ``device`` section of a node's configuration.

    Raises:
        CallerError: ``CERTIFICATE``, a PEM file is missing or does not fit.
    """
    return Etsi014Device(
        url,
        peer_sae_id=sae_id,
        tls=client_context(ca, cert, key),
        key_size_bits=key_size_bits,
        timeout_s=timeout_s,
    )
