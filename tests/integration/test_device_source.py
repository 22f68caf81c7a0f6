"""The node's device adapter against a simulated device pair over mTLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import ssl
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

from mesh.devices.config import load_config
from mesh.devices.main import build
from mesh.errors import CallerError, ErrorReason, PeerError, UnavailableError
from mesh.pki.authority import Pki
from mesh.sources.etsi014_device import Etsi014Device, client_context, connect

pytestmark = pytest.mark.slow
INITIAL_BYTES = 4 << 20


@dataclass
class Pair:
    """A running device pair and what its clients need."""

    folder: Path
    urls: tuple[str, str]
    control: str

    def source(self, end: int, **options: float) -> Etsi014Device:
        return Etsi014Device(
            self.urls[end],
            peer_sae_id=("node-b", "node-a")[end],
            tls=client_context(*(str(self.folder / name) for name in self.client_files(end))),
            timeout_s=options.get("timeout_s", 20.0),
            now_s=time.monotonic,
        )

    @staticmethod
    def client_files(end: int) -> tuple[str, str, str]:
        stem = ("node-a", "node-b")[end]
        return "device-ca.pem", f"{stem}.pem", f"{stem}.key"

    async def faults(self, **change: object) -> None:
        await asyncio.to_thread(self._put_faults, change)

    def _put_faults(self, change: dict[str, object]) -> None:
        request = urllib.request.Request(
            f"{self.control}/faults", data=json.dumps(change).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=5) as response:
            assert response.status == 200


def write_config(folder: Path, *, initial_bytes: int) -> Path:
    """A device pair that makes no key beyond what it has, and the certificates of all concerned."""
    pki = Pki.create("lab")
    pki.save(folder)
    for sae_id in ("node-a", "node-b", "stranger"):
        pki.device_client(sae_id).save(folder, sae_id)
    ends = {}
    for letter in "ab":
        files = pki.device_server(f"qkd-{letter}").save(folder, f"qkd-{letter}")
        ends[letter] = {
            "kme_id": f"qkd-{letter}",
            "sae_id": f"node-{letter}",
            "listen": "127.0.0.1:0",
            "tls": {"ca": str(folder / "device-ca.pem"), "cert": str(files.cert), "key": str(files.key)},
        }
    config = folder / "device.yaml"
    own = {"device_id": "dev", "rate_bps": 0, "initial_bytes": initial_bytes, "control": "127.0.0.1:0"}
    config.write_text(yaml.safe_dump(own | ends))
    return config


@contextlib.asynccontextmanager
async def running_pair(folder: Path, *, initial_bytes: int = INITIAL_BYTES) -> AsyncIterator[Pair]:
    """A device pair on real sockets, in this process."""
    server = build(load_config(write_config(folder, initial_bytes=initial_bytes)))
    a, b, control = await server.start()
    try:
        yield Pair(folder, (f"https://{a}", f"https://{b}"), f"http://{control}")
    finally:
        await server.stop()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    async with running_pair(tmp_path) as running:
        yield running


@pytest.fixture
async def ends(pair: Pair) -> AsyncIterator[tuple[Etsi014Device, Etsi014Device]]:
    sources = pair.source(0), pair.source(1)
    yield sources
    for source in sources:
        await source.close()


async def test_a_process_of_its_own_serves_both_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mesh.cli", "qkd-device", "run", "--config"]
    config = write_config(tmp_path, initial_bytes=4096)
    process = await asyncio.create_subprocess_exec(*command, str(config), stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30):
            said: dict[str, str] = {}
            while said.get("event") != "serving":
                said = json.loads(await process.stderr.readline())
        pair = Pair(tmp_path, (f"https://{said['end_a']}", f"https://{said['end_b']}"), "")
        a, b = pair.source(0), pair.source(1)
        taken = await a.take(4096)
        assert await b.fetch([key.key_id for key in taken]) == taken
        await a.close()
        await b.close()
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_both_ends_get_the_same_keys(ends: tuple[Etsi014Device, Etsi014Device]) -> None:
    a, b = ends
    assert await a.level_bytes() == INITIAL_BYTES
    taken = await a.take(256 * 1024)
    assert sum(len(key.value) for key in taken) == 256 * 1024
    fetched = await b.fetch([key.key_id for key in taken[::-1]])
    assert [key.key_id for key in fetched] == [key.key_id for key in taken[::-1]]
    assert fetched[::-1] == taken
    assert a.state == "ready"
    assert await b.level_bytes() == INITIAL_BYTES - 256 * 1024


async def test_a_device_tells_of_itself_and_what_it_told_gets_old(
    ends: tuple[Etsi014Device, Etsi014Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = ends
    assert [a.report] == [None]
    await a.level_bytes()
    report = a.report
    assert report is not None
    assert (report.stored_bytes, report.secret_key_rate_bits_per_s, report.qber) == (INITIAL_BYTES, 0.0, 0.02)
    assert report.capacity_bytes >= INITIAL_BYTES
    for word in ("0.03", True, float("nan"), -1):
        monkeypatch.setattr(a._limits, "status_extension", {"keymesh_qber": word})
        assert a.report is not None
        assert a.report.qber is None
    monkeypatch.setattr(a, "_now_s", lambda: time.monotonic() + 61)
    assert [a.report] == [None]


async def test_a_certificate_that_was_replaced_is_taken_up_without_a_restart(pair: Pair) -> None:
    files = [str(pair.folder / name) for name in pair.client_files(0)]
    stranger = [files[0], *(str(pair.folder / f"stranger.{kind}") for kind in ("pem", "key"))]
    replaced: list[ssl.SSLContext] = []
    clock = [0.0]
    source = Etsi014Device(
        pair.urls[0],
        peer_sae_id="node-b",
        tls=client_context(*stranger),
        now_s=lambda: clock[0],
        renew=lambda: replaced.pop() if replaced else None,
    )
    with pytest.raises(UnavailableError, match="refuses our certificate"):
        await source.level_bytes()
    clock[0] += 60
    replaced.append(client_context(*files))
    assert await source.level_bytes() == INITIAL_BYTES
    await source.close()


async def test_several_calls_fill_a_take_larger_than_one_request(
    ends: tuple[Etsi014Device, Etsi014Device],
) -> None:
    a, b = ends
    taken = await a.take(3 << 20)
    assert sum(len(key.value) for key in taken) == 3 << 20
    assert await b.fetch([key.key_id for key in taken]) == taken


async def test_an_empty_device_gives_nothing_and_says_so(
    ends: tuple[Etsi014Device, Etsi014Device],
) -> None:
    a, _ = ends
    assert sum(len(key.value) for key in await a.take(2 * INITIAL_BYTES)) == INITIAL_BYTES
    assert await a.take(65536) == []
    assert a.state == "empty"


async def test_a_key_is_fetched_once_and_a_stranger_key_is_unknown(
    ends: tuple[Etsi014Device, Etsi014Device],
) -> None:
    a, b = ends
    (key,) = await a.take(1024)
    assert await b.fetch([key.key_id]) == [key]
    for key_id in (key.key_id, str(uuid4())):
        with pytest.raises(CallerError) as caught:
            await b.fetch([key_id])
        assert caught.value.reason is ErrorReason.UNKNOWN_KEY


async def test_lost_keys_are_unknown_at_the_other_end(
    pair: Pair, ends: tuple[Etsi014Device, Etsi014Device]
) -> None:
    a, b = ends
    await pair.faults(lose_keys=1)
    first, second = await a.take(16384)
    with pytest.raises(CallerError) as caught:
        await b.fetch([first.key_id, second.key_id])
    assert caught.value.reason is ErrorReason.UNKNOWN_KEY
    assert await b.fetch([second.key_id]) == [second]


KEYS_GONE = b'{"message": "one or more keys specified are not found on KME"}'
STATUS = {
    "key_size": 256,
    "stored_key_count": 64,
    "max_key_per_request": 8,
    "max_key_size": 8192,
    "min_key_size": 8,
}


@pytest.mark.parametrize(
    ("method", "status", "body", "is_lost"),
    [
        ("dec_keys", 400, KEYS_GONE, True),
        ("dec_keys", 404, KEYS_GONE, True),
        ("dec_keys", 404, b"", False),
        ("dec_keys", 404, b"<html>404 Not Found</html>", False),
        ("dec_keys", 404, b'{"message": "no such SAE"}', False),
        ("dec_keys", 404, b'{"error": "Not Found", "path": "/api/v1/keys/x/dec_keys"}', False),
        ("dec_keys", 400, b"[]", False),
        ("status", 404, KEYS_GONE, False),
        ("status", 404, b"", False),
        ("enc_keys", 400, KEYS_GONE, False),
        ("enc_keys", 404, KEYS_GONE, False),
    ],
)
async def test_only_a_device_that_says_so_has_lost_keys(
    pair: Pair, method: str, status: int, body: bytes, is_lost: bool
) -> None:
    """Anything else is a wrong URL, a wrong SAE ID or a proxy: key must not be thrown away for it."""

    async def answer(request: web.Request) -> web.Response:
        if request.path.endswith(method):
            return web.Response(status=status, body=body)
        return web.json_response(STATUS)

    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", answer)
    async with TestServer(app, host="127.0.0.1") as server:
        source = pair.source(1)
        source._base = f"http://127.0.0.1:{server.port}/api/v1/keys/node-a"
        work = source.take(4096) if method == "enc_keys" else source.fetch([str(uuid4())])
        with pytest.raises(CallerError if is_lost else PeerError):
            await work
        assert source.state == ("ready" if is_lost else "unavailable")
        await source.close()


async def test_a_mismatch_shows_in_the_bytes_only(
    pair: Pair, ends: tuple[Etsi014Device, Etsi014Device]
) -> None:
    a, b = ends
    await pair.faults(mismatch_keys=1)
    taken = await a.take(16384)
    fetched = await b.fetch([key.key_id for key in taken])
    assert [mine == theirs for mine, theirs in zip(taken, fetched, strict=True)] == [False, True]


async def test_a_hanging_device_is_unavailable_then_backed_off_then_back(pair: Pair) -> None:
    source = pair.source(0, timeout_s=2.0)
    now_s = 1000.0
    source._now_s = lambda: now_s
    await source.level_bytes()  # connects
    await pair.faults(hang=True)
    with pytest.raises(UnavailableError) as caught:
        await source.take(1024)
    assert caught.value.reason is ErrorReason.DEVICE_UNAVAILABLE
    assert source.state == "unavailable"
    await pair.faults(hang=False)
    with pytest.raises(UnavailableError) as caught:
        await source.take(1024)
    assert caught.value.retry_after_s > 0, "it would answer, but is not asked yet"
    now_s += caught.value.retry_after_s
    assert len(await source.take(1024)) == 1
    await source.close()


async def test_a_restart_cuts_connections_and_loses_what_was_buffered(
    pair: Pair, ends: tuple[Etsi014Device, Etsi014Device]
) -> None:
    a, b = ends
    (key,) = await a.take(1024)
    await pair.faults(restart_s=1.5)
    with pytest.raises(UnavailableError):
        await a.take(1024)
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(UnavailableError):
                assert await a.take(1024) == []
                break
            await asyncio.sleep(0.1)
    with pytest.raises(CallerError):
        await b.fetch([key.key_id])


async def test_another_certificate_is_not_served(pair: Pair) -> None:
    source = connect(
        pair.urls[0],
        ca=str(pair.folder / "device-ca.pem"),
        cert=str(pair.folder / "stranger.pem"),
        key=str(pair.folder / "stranger.key"),
        sae_id="node-b",
    )
    with pytest.raises(UnavailableError, match="certificate"):
        await source.take(1024)
    await source.close()


async def test_a_missing_certificate_names_the_files(pair: Pair) -> None:
    with pytest.raises(CallerError, match=r"missing\.pem"):
        connect(pair.urls[0], ca="missing.pem", cert="c.pem", key="c.key", sae_id="node-b")
