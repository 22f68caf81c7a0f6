"""The floor for bulk figures: a bare gRPC stream over mutual TLS, nothing done with its bytes.

Run as ``python -m benchmarks.stream CA CERT KEY``; prints its port and swallows what comes.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

METHOD = "/bench/Swallow"
_SIZES = [("grpc.max_receive_message_length", 8 << 20), ("grpc.max_send_message_length", 8 << 20)]


Pem = tuple[bytes, bytes, bytes]


def read_pem(ca: str, cert: str, key: str) -> Pem:
    """Root, certificate and key from their files."""
    return Path(ca).read_bytes(), Path(cert).read_bytes(), Path(key).read_bytes()


async def _swallow(requests: AsyncIterator[bytes], _context: object) -> bytes:
    total = 0
    async for message in requests:
        total += len(message)
    return total.to_bytes(8, "big")


async def _serve(pem: Pem) -> None:
    ca_pem, cert_pem, key_pem = pem
    server = grpc.aio.server(options=_SIZES)
    handler: Any = grpc.stream_unary_rpc_method_handler(_swallow)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", {"Swallow": handler}),))
    credentials = grpc.ssl_server_credentials([(key_pem, cert_pem)], ca_pem, require_client_auth=True)
    print(server.add_secure_port("127.0.0.1:0", credentials), flush=True)
    await server.start()
    await asyncio.Event().wait()


async def send(port: int, pem: Pem, *, message_bytes: int, seconds: float) -> float:
    """Bytes per second through one stream of messages of that size."""
    ca_pem, cert_pem, key_pem = pem
    credentials = grpc.ssl_channel_credentials(ca_pem, key_pem, cert_pem)
    message = bytes(message_bytes)
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options=_SIZES) as channel:
        call: Any = channel.stream_unary(METHOD)()
        begun = time.perf_counter()
        sent = 0
        while time.perf_counter() - begun < seconds:
            await call.write(message)
            sent += message_bytes
        await call.done_writing()
        if int.from_bytes(await call, "big") != sent:
            raise RuntimeError("the stream lost bytes")
        return sent / (time.perf_counter() - begun)


if __name__ == "__main__":
    asyncio.run(_serve(read_pem(*sys.argv[1:4])))
