"""Gateways over the fake key service, on real sockets, in a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import uvloop

from gateway.app import Gateway
from gateway.config import GatewayConfig
from gateway.port import KeyService
from mesh.client.border import BorderClient
from mesh.pki.authority import Pki

DOMAIN = "metro"
T = TypeVar("T")


class GatewayThread:
    """An event loop with gateways, for tests that use blocking clients.

    Args:
        directory: for certificates and audit logs; roots are made here.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pki = Pki.create(DOMAIN)
        self.roots = self.pki.save(directory)
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateways", daemon=True)
        self._thread.start()
        self._gateways: list[Gateway] = []

    def start(
        self,
        gateway_id: str,
        service: KeyService,
        *,
        border: BorderClient | None = None,
        **sections: Mapping[str, Any],
    ) -> Gateway:
        """Start one gateway; ``sections`` add to or replace parts of its configuration."""
        self.pki.gateway_server(gateway_id).save(self.directory, gateway_id)
        config = msgspec.convert(
            {
                "gateway_id": gateway_id,
                "domain_id": DOMAIN,
                "listen": {"https": "127.0.0.1:0", "http": "127.0.0.1:0"},
                "node": {"address": "127.0.0.1:1", "kme_id": "unused"},
                "node_tls": {"ca": "unused", "cert": "unused", "key": "unused"},
                "tls": {"ca": "sae-ca.pem", "cert": f"{gateway_id}.pem", "key": f"{gateway_id}.key"},
                "audit_log": f"{gateway_id}.audit.log",
                **sections,
            },
            GatewayConfig,
        )
        gateway = self.run(_make(config, self.directory, service, border))
        self.run(gateway.start())
        self._gateways.append(gateway)
        return gateway

    def issue_sae(self, sae_id: str) -> tuple[Path, Path]:
        """A certificate of the SAE root; returns certificate and key files."""
        files = self.pki.sae(sae_id).save(self.directory, sae_id)
        return files.cert, files.key

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the gateways' loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def stop(self) -> None:
        """Stop all gateways and the loop."""
        for gateway in self._gateways:
            self.run(gateway.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


async def _make(
    config: GatewayConfig, base: Path, service: KeyService, border: BorderClient | None
) -> Gateway:
    return Gateway(config, base=base, service=service, border=border)
