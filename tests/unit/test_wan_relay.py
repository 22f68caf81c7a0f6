"""The emulated wide-area path: order and content kept, every byte delayed, ends passed on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from mesh.lab.wan import WanConfig, WanPath, WanRelay

#: Two clocks that are read one after the other need not agree better.
CLOCK_MS = 2

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def relayed(handler: Handler, delay_ms: float) -> AsyncIterator[int]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    relay = WanRelay(
        WanConfig(wan_id="wan", one_way_delay_ms=delay_ms, paths=[WanPath("127.0.0.1:0", target)])
    )
    (place,) = await relay.start()
    try:
        yield int(place.rpartition(":")[2])
    finally:
        await relay.stop()
        server.close()


@pytest.mark.parametrize("delay_ms", [0.0, 20.0])
async def test_a_round_trip_takes_two_delays_and_connecting_two_more(delay_ms: float) -> None:
    async with relayed(echo, delay_ms) as port:
        began_s = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for expected_ms in (4 * delay_ms, 2 * delay_ms):
            writer.write(b"ping")
            assert await reader.readexactly(4) == b"ping"
            # A lower bound is a fact of the relay; an upper one would be of the machine.
            assert (time.monotonic() - began_s) * 1000 >= expected_ms - CLOCK_MS
            began_s = time.monotonic()
        writer.close()


async def test_bulk_arrives_in_order_and_is_not_slowed_to_one_chunk_a_delay() -> None:
    payload = b"".join(number.to_bytes(4) for number in range(1 << 20))
    took_s = {}
    for delay_ms in (0.0, 250.0):
        async with relayed(echo, delay_ms) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            reading = asyncio.create_task(reader.readexactly(len(payload)))
            began_s = time.monotonic()
            writer.write(payload)
            assert await reading == payload
            took_s[delay_ms] = time.monotonic() - began_s
            writer.close()
    # 4 MiB in chunks of 256 KiB at most, one per delay, would need 16 delays more than without any.
    assert took_s[250.0] - 2 * took_s[0.0] < 16 * 0.25


async def test_an_end_of_one_side_reaches_the_other_after_its_bytes() -> None:
    got = asyncio.get_running_loop().create_future()

    async def sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.set_result(await reader.read())
        writer.write(b"bye")
        writer.close()

    async with relayed(sink, 5.0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"all of it")
        writer.write_eof()
        assert await got == b"all of it"
        assert await reader.read() == b"bye"
        writer.close()


async def test_an_unreachable_target_closes_the_connection() -> None:
    relay = WanRelay(
        WanConfig(wan_id="wan", one_way_delay_ms=1, paths=[WanPath("127.0.0.1:0", "127.0.0.1:1")])
    )
    (place,) = await relay.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(place.rpartition(":")[2]))
    assert await reader.read() == b""
    writer.close()
    await relay.stop()


async def test_the_echo_of_a_path_is_its_round_trip() -> None:
    paths = [WanPath("127.0.0.1:0", "127.0.0.1:1")]
    relay = WanRelay(WanConfig(wan_id="wan", one_way_delay_ms=20.0, paths=paths, echo="127.0.0.1:0"))
    *_, place = await relay.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(place.rpartition(":")[2]))
        for expected_ms in (80.0, 40.0):
            began_s = time.monotonic()
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            assert (time.monotonic() - began_s) * 1000 >= expected_ms - CLOCK_MS
        writer.close()
    finally:
        await relay.stop()
