"""The gateway's process: configuration in, exit status out."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

from gateway.app import Gateway
from gateway.config import GatewayConfig, load_config
from gateway.node_watch import NodeWatch
from mesh.client import ConfigError, MeshClient
from mesh.ops.logging import setup_logging
from mesh.ops.runtime import EXIT_CONFIG, run
from mesh.ops.tls import TlsFiles
from mesh.ops.tracing import close_tracing, setup_tracing


def main(config_path: str | Path) -> int:
    """Run a gateway until SIGTERM or SIGINT, then drain; SIGHUP reads the mapping table again.

    Returns:
        The exit status, see ``mesh.ops.runtime.run``.
    """
    path = Path(config_path)
    try:
        config = load_config(path)
        log_file = path.parent / config.log.file if config.log.file else None
        setup_logging(level=config.log.level, file=log_file, facts={"gateway": config.gateway_id})
        setup_tracing(config.tracing, role="gateway", member=config.gateway_id, base=path.parent)
    except ConfigError as error:
        sys.stderr.write(f"keymesh: gateway: {error}\n")
        return EXIT_CONFIG
    try:
        return run(lambda stop: _serve(config, path.parent, stop), name=f"gateway {config.gateway_id}")
    finally:
        close_tracing()


async def _serve(config: GatewayConfig, base: Path, stop: asyncio.Event) -> None:
    tls = config.node_tls
    client = MeshClient.connect(
        config.node.address,
        domain_id=config.domain_id,
        kme_id=config.node.kme_id,
        tls=TlsFiles(ca=base / tls.ca, cert=base / tls.cert, key=base / tls.key),
        roles=("gateway",),
    )
    async with client:
        watch = NodeWatch(client)
        gateway = Gateway(config, base=base, service=client, border=client.border, missing=watch.missing)
        following = asyncio.create_task(watch.follow(), name="watch node")
        try:
            await gateway.start()
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, gateway.reload)
            await stop.wait()
        finally:
            await gateway.stop()
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following
