"""A simulated device's two faces: ETSI GS QKD 014 over mTLS at each end, and a loopback control port.

Decodes, calls :class:`~mesh.devices.buffer.DevicePair`, encodes. The 014 side is
what a real device's key manager shows (V1.1.1 clauses 5 and 6); nothing on it tells
that this is a simulator except the honest ``status_extension``.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Annotated, Any

import msgspec
from aiohttp import web

from mesh.devices.buffer import DevicePair, PairKey
from mesh.devices.config import MAX_KEY_BITS, MAX_KEYS_PER_REQUEST, DeviceConfig, EndConfig, Faults
from mesh.errors import CallerError, MeshError, ShortageError

_log = logging.getLogger(__name__)
_MAX_BODY = 64 * 1024

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _KeyRequest(msgspec.Struct):
    number: Annotated[int, msgspec.Meta(ge=1, le=MAX_KEYS_PER_REQUEST)] = 1
    size: Annotated[int, msgspec.Meta(ge=8, le=MAX_KEY_BITS, multiple_of=8)] | None = None
    extension_mandatory: list[dict[str, Any]] = []


class _KeyId(msgspec.Struct):
    key_ID: Annotated[str, msgspec.Meta(max_length=64)]  # noqa: N815 - the standard's name


class _KeyIds(msgspec.Struct):
    key_IDs: Annotated[list[_KeyId], msgspec.Meta(min_length=1, max_length=MAX_KEYS_PER_REQUEST)]  # noqa: N815


class _FaultChange(msgspec.Struct, forbid_unknown_fields=True):
    stall: bool | None = None
    hang: bool | None = None
    mismatch_keys: Annotated[int, msgspec.Meta(ge=0)] | None = None
    lose_keys: Annotated[int, msgspec.Meta(ge=0)] | None = None
    restart_s: Annotated[float, msgspec.Meta(ge=0, le=600)] | None = None


def peer_names(certificate: Mapping[str, Any] | None) -> set[str]:
    """Return the names in a verified client certificate (``SSLSocket.getpeercert()`` shape)."""
    if not certificate:
        return set()
    common = {value for rdn in certificate.get("subject", ()) for name, value in rdn if name == "commonName"}
    return common | {value for _, value in certificate.get("subjectAltName", ())}


class DeviceServer:
    """Both ends of one pair and its control port.

    Args:
        config: what to serve.
        pair: the shared state.
        now_s: monotonic clock.
        tls: builds the server context of an end.
    """

    def __init__(
        self,
        config: DeviceConfig,
        pair: DevicePair,
        *,
        now_s: Callable[[], float],
        tls: Callable[[EndConfig], ssl.SSLContext],
    ) -> None:
        self._config = config
        self._pair = pair
        self._now_s = now_s
        self._tls = tls
        self._ends = (config.a, config.b)
        self._down_until_s = 0.0
        self._runners: list[web.AppRunner] = []
        self._answering = asyncio.Event()
        self._follow_hang()

    def _follow_hang(self) -> None:
        if self._pair.faults.hang:
            self._answering.clear()
        else:
            self._answering.set()

    async def start(self) -> tuple[str, str, str]:
        """Listen; return ``host:port`` of end A, end B and the control port."""
        places = []
        for end, settings in enumerate(self._ends):
            places.append(await self._listen(self._end_app(end), settings.listen, self._tls(settings)))
        places.append(await self._listen(self._control_app(), self._config.control, None))
        return places[0], places[1], places[2]

    async def stop(self) -> None:
        """Close all listeners and connections."""
        for runner in self._runners:
            await runner.cleanup()

    async def _listen(self, app: web.Application, listen: str, context: ssl.SSLContext | None) -> str:
        host, _, port = listen.rpartition(":")
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=120)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, host.strip("[]"), int(port), ssl_context=context).start()
        return f"{host}:{runner.addresses[0][1]}"

    # --- the 014 face -----------------------------------------------------------------

    def _end_app(self, end: int) -> web.Application:
        app = web.Application(middlewares=[self._gate(end)], client_max_size=_MAX_BODY)
        base = "/api/v1/keys/{sae_id}"
        app.router.add_get(f"{base}/status", partial(self._status, end))
        for method in ("GET", "POST"):
            app.router.add_route(method, f"{base}/enc_keys", partial(self._enc_keys, end))
            app.router.add_route(method, f"{base}/dec_keys", partial(self._dec_keys, end))
        return app

    def _gate(self, end: int) -> Any:
        @web.middleware
        async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
            await self._answering.wait()
            if self._now_s() < self._down_until_s:
                if request.transport is not None:
                    request.transport.abort()
                return web.Response(status=503)
            names = peer_names(request.get_extra_info("peercert"))
            if self._ends[end].sae_id not in names:
                return web.Response(status=401)
            try:
                return await handler(request)
            except ShortageError as error:
                return _error(503, error.message)
            except MeshError as error:
                return _error(400, error.message)
            except (msgspec.ValidationError, msgspec.DecodeError, RecursionError) as error:
                return _error(400, f"request not understood: {error}")

        return gate

    def _check_other(self, end: int, request: web.Request) -> None:
        if request.match_info["sae_id"] != self._ends[1 - end].sae_id:
            raise CallerError("no such SAE at the other end of this link")

    async def _status(self, end: int, request: web.Request) -> web.Response:
        self._check_other(end, request)
        key_bytes = self._config.default_key_bits // 8
        level = self._pair.level_bytes(self._now_s())
        return _json(
            200,
            {
                "source_KME_ID": self._ends[end].kme_id,
                "target_KME_ID": self._ends[1 - end].kme_id,
                "master_SAE_ID": self._ends[end].sae_id,
                "slave_SAE_ID": self._ends[1 - end].sae_id,
                "key_size": self._config.default_key_bits,
                "stored_key_count": level // key_bytes,
                "max_key_count": self._pair.buffer_bytes // key_bytes,
                "max_key_per_request": MAX_KEYS_PER_REQUEST,
                "max_key_size": MAX_KEY_BITS,
                "min_key_size": 8,
                "max_SAE_ID_count": 0,
                "status_extension": {
                    "keymesh_simulated": True,
                    "keymesh_secret_key_rate_bps": 0.0 if self._pair.faults.stall else self._pair.rate_bps,
                    "keymesh_qber": 0.5 if self._pair.faults.stall else self._config.qber,
                },
            },
        )

    async def _enc_keys(self, end: int, request: web.Request) -> web.Response:
        self._check_other(end, request)
        if request.method == "GET":
            asked = msgspec.convert(dict(request.query), _KeyRequest, strict=False)
        else:
            asked = msgspec.json.decode(await request.read() or b"{}", type=_KeyRequest)
        if asked.extension_mandatory:
            raise CallerError("not all extension_mandatory parameters are supported")
        size_bytes = (asked.size or self._config.default_key_bits) // 8
        return _keys(self._pair.take(end, asked.number, size_bytes, self._now_s()))

    async def _dec_keys(self, end: int, request: web.Request) -> web.Response:
        self._check_other(end, request)
        if request.method == "GET":
            key_ids = [request.query.get("key_ID", "")]
        else:
            asked = msgspec.json.decode(await request.read(), type=_KeyIds)
            key_ids = [entry.key_ID for entry in asked.key_IDs]
        return _keys(self._pair.fetch(end, [key_id.lower() for key_id in key_ids]))

    # --- the control face ---------------------------------------------------------------

    def _control_app(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_get("/healthz", _healthy)
        app.router.add_get("/readyz", _healthy)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/faults", self._show_faults)
        app.router.add_post("/faults", self._change_faults)
        return app

    async def _metrics(self, request: web.Request) -> web.Response:
        del request
        lines = [
            f"keymesh_device_buffer_bytes {self._pair.level_bytes(self._now_s())}",
            f'keymesh_device_pending_bytes{{end="a"}} {self._pair.pending_bytes(0)}',
            f'keymesh_device_pending_bytes{{end="b"}} {self._pair.pending_bytes(1)}',
            f"keymesh_device_handed_out_bytes_total {self._pair.handed_out_bytes}",
            f"keymesh_device_lost_keys_total {self._pair.lost_keys}",
        ]
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")

    async def _show_faults(self, request: web.Request) -> web.Response:
        del request
        return _json(200, self._pair.faults)

    async def _change_faults(self, request: web.Request) -> web.Response:
        try:
            change = msgspec.json.decode(await request.read(), type=_FaultChange)
        except (msgspec.ValidationError, msgspec.DecodeError, RecursionError) as error:
            return _error(400, f"fault not understood: {error}")
        for name in Faults.__struct_fields__:
            value = getattr(change, name)
            if value is not None:
                setattr(self._pair.faults, name, value)
        self._follow_hang()
        if change.restart_s is not None:
            now_s = self._now_s()
            self._down_until_s = now_s + change.restart_s
            self._pair.restart(now_s)
        _log.warning("faults changed", extra={"faults": msgspec.to_builtins(change)})
        return _json(200, self._pair.faults)


async def _healthy(request: web.Request) -> web.Response:
    del request
    return web.Response(text="ok\n")


def _json(status: int, body: object) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")


def _error(status: int, message: str) -> web.Response:
    return _json(status, {"message": message})


def _keys(keys: list[PairKey]) -> web.Response:
    # msgspec writes bytes as standard padded base64, just what the Key container wants.
    return _json(200, {"keys": [{"key_ID": key.key_id, "key": key.value} for key in keys]})
