"""An emulated wide-area path: a TCP relay that holds every byte back for a while.

Bytes leave in order, each at least ``one_way_delay_ms`` after it came; throughput is
bounded only by the buffer (bandwidth x delay) and by the machine. The handshake of TCP
costs one round trip on a real path, so a new connection waits that long before its
first byte travels. Must not look at what it carries.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec

from mesh.node.config import load_yaml
from mesh.ops.logging import setup_logging
from mesh.ops.runtime import run as run_process

_log = logging.getLogger(__name__)
_CHUNK = 256 * 1024
BUFFER_BYTES = 64 << 20
"""Held per direction and connection: 64 MiB carry 3 Gbit/s over a round trip of 340 ms."""

_Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[object, object, None]]
_HostPort = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9.\-]+:[0-9]{1,5}$")]


class WanPath(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Connections to ``listen`` are carried to ``target`` (both ``host:port``)."""

    listen: _HostPort
    target: _HostPort


class WanConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One relay process: an undirected path, usually with one listener per direction.

    What comes to ``echo`` goes there and back: the least that an answer over this path can take.
    """

    wan_id: str
    one_way_delay_ms: Annotated[float, msgspec.Meta(ge=0, le=10_000)]
    paths: Annotated[list[WanPath], msgspec.Meta(min_length=1)]
    echo: _HostPort | None = None


class _Pipe:
    """One direction of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        self._reader = reader
        self._writer = writer
        self._delay_s = delay_s
        self._queue: deque[tuple[float, bytes]] = deque()
        self._held = 0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read())
            group.create_task(self._write())

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.wait()
            data = await self._reader.read(_CHUNK)
            self._queue.append((loop.time() + self._delay_s, data))
            self._held += len(data)
            if self._held >= BUFFER_BYTES:
                self._room.clear()
            self._changed.set()
            if not data:
                return

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._queue:
                self._changed.clear()
                await self._changed.wait()
            due_s, data = self._queue[0]
            wait_s = due_s - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            self._queue.popleft()
            if not data:
                if self._writer.can_write_eof():
                    self._writer.write_eof()
                return
            self._writer.write(data)
            await self._writer.drain()
            self._held -= len(data)
            self._room.set()


class WanRelay:
    """All paths of one configuration."""

    def __init__(self, config: WanConfig) -> None:
        self._config = config
        self._delay_s = config.one_way_delay_ms / 1000
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> list[str]:
        """Listen on every path; return the ``host:port`` of each, in order, the echo's last."""
        places = [
            await self._listen(path.listen, partial(self._carry, path.target)) for path in self._config.paths
        ]
        if self._config.echo is not None:
            answering = await self._listen("127.0.0.1:0", _echo)
            places.append(await self._listen(self._config.echo, partial(self._carry, answering)))
        return places

    async def _listen(self, place: str, serve: _Serve) -> str:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.get_running_loop().create_task(serve(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        host, _, port = place.rpartition(":")
        server = await asyncio.start_server(accept, host, int(port), limit=_CHUNK)
        self._servers.append(server)
        return f"{host}:{server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Stop listening and cut every connection."""
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry(self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward: asyncio.StreamWriter | None = None
        try:
            await asyncio.sleep(2 * self._delay_s)
            host, _, port = target.rpartition(":")
            back, onward = await asyncio.open_connection(host, int(port), limit=_CHUNK)
            async with asyncio.TaskGroup() as group:
                group.create_task(_Pipe(reader, onward, self._delay_s).run())
                group.create_task(_Pipe(back, writer, self._delay_s).run())
        except* (OSError, asyncio.IncompleteReadError) as errors:
            _log.debug("connection to %s ended: %s", target, errors.exceptions[0])
        finally:
            for end in (writer, onward):
                if end is not None:
                    end.close()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
    except OSError as error:
        _log.debug("connection to the echo ended: %s", error)
    finally:
        writer.close()


def run(config_file: Path) -> int:
    """Run the relay of ``config_file`` until it is told to stop; return the exit status."""

    async def main(stop: asyncio.Event) -> None:
        config = load_yaml(config_file, WanConfig)
        setup_logging(facts={"wan": config.wan_id})
        relay = WanRelay(config)
        places = await relay.start()
        _log.info("relaying", extra={"paths": len(places), "one_way_delay_ms": config.one_way_delay_ms})
        try:
            await stop.wait()
        finally:
            await relay.stop()

    return run_process(main, name=f"wan {config_file.stem}", lock_memory=False)


if __name__ == "__main__":
    raise SystemExit(run(Path(sys.argv[1])))
