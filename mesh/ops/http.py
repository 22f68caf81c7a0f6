"""The plain HTTP port of a process: ``/healthz``, ``/readyz``, ``/metrics``.

Owns nothing secret and takes no input but a path: it is bound to an address of the
operator's network, without TLS. ``/healthz`` says the process is alive, ``/readyz``
whether it can serve, with a reason per thing that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from aiohttp import web

from mesh.errors import ConfigError
from mesh.ops.metrics import Metrics

# What is missing before the process can serve; empty when it is ready.
Readiness = Callable[[], Sequence[str]]


class OpsServer:
    """Serves health and metrics.

    Args:
        metrics: what ``/metrics`` shows.
        missing: what stands between the process and serving; empty means ready.
    """

    def __init__(self, metrics: Metrics, missing: Readiness) -> None:
        self._metrics = metrics
        self._missing = missing
        self._runner: web.ServerRunner | None = None

    async def start(self, host: str, port: int) -> int:
        """Starts listening; port 0 takes a free one.

        Returns:
            The port.

        Raises:
            ConfigError: the address cannot be bound.
        """
        runner = web.ServerRunner(web.Server(self._handle), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as exc:
            await runner.cleanup()
            raise ConfigError(
                "listen.http cannot be bound", facts={"host": host, "port": port, "cause": exc.strerror}
            ) from exc
        self._runner = runner
        bound: int = runner.addresses[0][1]
        return bound

    async def stop(self) -> None:
        """Stops listening."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, headers={"Allow": "GET, HEAD"})
        if request.path == "/healthz":
            return web.Response(text="ok\n")
        if request.path == "/readyz":
            missing = list(self._missing())
            body = msgspec.json.encode({"ready": not missing, "missing": missing})
            return web.Response(status=503 if missing else 200, body=body, content_type="application/json")
        if request.path == "/metrics":
            return web.Response(
                body=self._metrics.render(),
                headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
            )
        return web.Response(status=404)


def split_host_port(text: str) -> tuple[str, int]:
    """Splits ``host:port`` or ``[v6]:port``.

    Raises:
        ConfigError: there is no port between 0 and 65535.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65_535:
        raise ConfigError("address must be host:port", facts={"address": text[:200]})
    return host.removeprefix("[").removesuffix("]"), int(port)
