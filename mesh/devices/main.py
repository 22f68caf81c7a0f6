"""Compose and run one simulated device pair: ``keymesh qkd-device run --config FILE``."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import sys
import time
from pathlib import Path

from mesh.devices.buffer import DevicePair
from mesh.devices.config import DeviceConfig, EndConfig, load_config
from mesh.devices.server import DeviceServer
from mesh.errors import CallerError, ConfigError, ErrorReason
from mesh.ops.logging import setup_logging
from mesh.ops.runtime import EXIT_CONFIG
from mesh.ops.runtime import run as run_process

_log = logging.getLogger(__name__)


def server_context(end: EndConfig) -> ssl.SSLContext:
    """Build an end's TLS context: client certificates required, TLS 1.2 with AEAD or newer.

    Raises:
        CallerError: ``CERTIFICATE``, a PEM file is missing or does not fit.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cafile=end.tls.ca)
        context.load_cert_chain(end.tls.cert, end.tls.key)
    except (OSError, ssl.SSLError) as error:
        raise CallerError(
            f"cannot use the certificates of {end.kme_id}: {error}",
            reason=ErrorReason.CERTIFICATE,
            facts={"ca": end.tls.ca, "cert": end.tls.cert, "key": end.tls.key},
        ) from error
    return context


def build(config: DeviceConfig) -> DeviceServer:
    """Build the pair and its server from a configuration."""
    pair = DevicePair(
        rate_bps=config.rate_bps,
        buffer_bytes=config.buffer_bytes,
        pending_bytes=config.pending_bytes,
        initial_bytes=config.initial_bytes,
        now_s=time.monotonic(),
        randomness=os.urandom,
        faults=config.faults,
    )
    return DeviceServer(config, pair, now_s=time.monotonic, tls=server_context)


def run(config_file: Path) -> int:
    """Run the pair of ``config_file`` until it is told to stop; return the exit status."""
    try:
        config = load_config(config_file)
    except ConfigError as error:
        sys.stderr.write(f"keymesh: qkd-device: {error}\n")
        return EXIT_CONFIG

    async def main(stop: asyncio.Event) -> None:
        setup_logging(facts={"device": config.device_id})
        server = build(config)
        end_a, end_b, control = await server.start()
        _log.info("serving", extra={"end_a": end_a, "end_b": end_b, "control": control})
        try:
            await stop.wait()
        finally:
            await server.stop()

    return run_process(main, name=f"qkd-device {config_file.stem}")
