"""The floor for REST figures: the same API over mutual TLS with no key management behind it.

One process, ``aiohttp``'s low-level server on uvloop, one fixed answer. Run as
``python -m benchmarks.stub CA CERT KEY``; prints its port.
"""

from __future__ import annotations

import asyncio
import ssl
import sys

import uvloop
from aiohttp import web

_BODY = (
    b'{"keys":[{"key_ID":"00000000-0000-8000-8000-000000000000",'
    b'"key":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}]}'
)


async def _answer(_request: web.BaseRequest) -> web.Response:
    return web.Response(body=_BODY, content_type="application/json")


async def _serve(ca: str, cert: str, key: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(cert, key)
    server = await asyncio.get_running_loop().create_server(
        web.Server(_answer, access_log=None), "127.0.0.1", 0, ssl=context
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(*sys.argv[1:4]))
