"""Sites for link tests: device pairs in memory, nodes with real stores, and a wire one can attack.

``DevicePair`` keeps to ``mesh.sources.port``. ``Site`` is one node's link plane on a real store.
``Wire`` joins two sites by streams in memory through an adversary who holds the TLS keys: every
message passes through ``Wire.tamper`` in clear.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mesh.core.secret import Secret
from mesh.errors import CallerError, ErrorReason, UnavailableError
from mesh.node.ingest import IngestSettings
from mesh.node.link import Link
from mesh.node.links import LinkConfig, LinkPlane
from mesh.node.transport import Transport
from mesh.ops.alarms import Alarms
from mesh.sources.port import DeviceKey, DeviceReport
from mesh.store.files import OsFiles
from mesh.store.store import Store
from mesh.v1.link_pb2 import ShareItem


@contextmanager
def proof_folder() -> Iterator[Path | None]:
    """A folder on tmpfs for proofs of restarts, None where there is no tmpfs."""
    shm = Path("/dev/shm")
    if not OsFiles().is_tmpfs(shm):
        yield None
        return
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


FAST_INGEST = IngestSettings(
    poll_min_s=0.005, poll_max_s=0.02, resend_s=0.1, first_contact_per_s=50.0, first_contact_burst=8
)


class DeviceEnd:
    """One end of a device pair in memory; a ``KeySource``."""

    def __init__(self, pair: DevicePair, *, is_leader: bool) -> None:
        self._pair = pair
        self._is_leader = is_leader
        self.fetched: list[str] = []

    @property
    def state(self) -> str:
        return "unavailable" if self._pair.is_down else "ready"

    async def take(self, max_bytes: int) -> list[DeviceKey]:
        assert self._is_leader
        return self._pair.make(max_bytes)

    async def fetch(self, key_ids: Sequence[str]) -> list[DeviceKey]:
        self.fetched += key_ids
        return self._pair.fetch(key_ids)

    async def level_bytes(self) -> int:
        return self._pair.budget_bytes

    @property
    def report(self) -> DeviceReport:
        return DeviceReport(self._pair.budget_bytes, capacity_bytes=1 << 20, qber=0.02)

    async def close(self) -> None:
        return


class DevicePair:
    """Two devices with the same keys by ID.

    Args:
        budget_bytes: key bytes it will ever make.
        key_bytes: size of one key.
    """

    def __init__(self, budget_bytes: int = 1 << 20, *, key_bytes: int = 1024, seed: int = 1) -> None:
        self.budget_bytes = budget_bytes
        self.key_bytes = key_bytes
        self.is_down = False
        self.lose_next = 0
        self.corrupt_next = 0
        self.made_bytes = 0
        self._random = random.Random(seed)
        self._kept: dict[str, bytes] = {}
        self.leader = DeviceEnd(self, is_leader=True)
        self.follower = DeviceEnd(self, is_leader=False)

    def make(self, max_bytes: int) -> list[DeviceKey]:
        if self.is_down:
            raise UnavailableError("the device is down", reason=ErrorReason.DEVICE_UNAVAILABLE)
        keys: list[DeviceKey] = []
        size = min(self.key_bytes, max_bytes)
        while (len(keys) + 1) * size <= min(max_bytes, self.budget_bytes):
            value = self._random.randbytes(size)
            key_id = str(uuid.UUID(int=self._random.getrandbits(128), version=4))
            self._kept[key_id] = value
            keys.append(DeviceKey(key_id, Secret(value)))
        self.budget_bytes -= len(keys) * size
        self.made_bytes += len(keys) * size
        return keys

    def fetch(self, key_ids: Sequence[str]) -> list[DeviceKey]:
        if self.is_down:
            raise UnavailableError("the device is down", reason=ErrorReason.DEVICE_UNAVAILABLE)
        values = [self._kept.pop(key_id, None) for key_id in key_ids]
        if self.lose_next:
            self.lose_next -= 1
            values[0] = None
        if any(value is None for value in values):
            raise CallerError("lost at the device", reason=ErrorReason.UNKNOWN_KEY)
        keys = [value for value in values if value is not None]
        if self.corrupt_next:
            self.corrupt_next -= 1
            keys[-1] = bytes([keys[-1][0] ^ 1]) + keys[-1][1:]
        return [DeviceKey(key_id, Secret(value)) for key_id, value in zip(key_ids, keys, strict=True)]


@dataclass(slots=True)
class Shares:
    """A ``SharesHandler`` that keeps what came."""

    got: list[tuple[str, ShareItem, bytes]] = field(default_factory=list)
    opened: int = 0
    closed: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def on_shares(self, came_from: str, shares: Sequence[tuple[ShareItem, bytes]]) -> None:
        self.got += [(came_from, share, value) for share, value in shares]
        self.wake.set()

    def on_link_open(self, peer: str) -> None:
        self.opened += 1
        self.wake.set()

    def on_link_closed(self, peer: str) -> None:
        self.closed += 1
        self.wake.set()


@dataclass(slots=True)
class Uses:
    """A ``PadRecorder`` that fails on any byte used twice by the writer, or accepted twice by the reader."""

    ranges: list[tuple[bool, int, int, int, str]] = field(default_factory=list)

    def record(
        self, link: str, *, is_outbound: bool, epoch: int, start: int, stop: int, purpose: str
    ) -> None:
        for was_out, was_epoch, first, last, what in self.ranges:
            if (was_out, was_epoch) == (is_outbound, epoch) and start < last and first < stop:
                raise AssertionError(f"{link}: {start}..{stop} ({purpose}) used by {what} {first}..{last}")
        self.ranges.append((is_outbound, epoch, start, stop, purpose))

    def spent(self, *purposes: str, is_outbound: bool = True) -> int:
        """Bytes used for these purposes."""
        return sum(
            stop - start
            for out, _, start, stop, what in self.ranges
            if out == is_outbound and what in purposes
        )


@dataclass(slots=True)
class Document:
    """A ``DocumentPort``."""

    number: int = 0
    body: bytes = b""

    def serial(self) -> int:
        return self.number

    def signed_bytes(self) -> bytes:
        return self.body

    def offer(self, document: bytes) -> None:
        self.number, self.body = int(document.split(b":")[0]), document


class Site:
    """One node's link plane on a real store, with one neighbour.

    Args:
        name, peer: KME ids.
        root: where ``name``'s data directory is.
        source: its end of the device pair.
        dial: opens a stream to the peer.
        proof: folder on tmpfs for the proof of a restart.
        pool: pool cap in bytes.
        uses: kept across restarts to check that no byte is used twice.
        open_timeout_s: given to a stream for its hellos. A second stream costs a hello, which tests count.
    """

    def __init__(
        self,
        name: str,
        peer: str,
        root: Path,
        *,
        source: DeviceEnd | None,
        dial: Callable[[str], Transport],
        proof: Path | None = None,
        pool: int = 1 << 20,
        uses: Uses | None = None,
        document: Document | None = None,
        open_timeout_s: float = 20.0,
    ) -> None:
        self.name = name
        self.peer = peer
        self.alarms = Alarms()
        self.shares = Shares()
        self.uses = uses or Uses()
        self.document = document or Document()
        self.store = Store.open(root / name, kme_id=name, proof_dir=proof)
        self.incarnation = random.randbytes(16)
        self.store.begin_incarnation(self.incarnation)
        self.plane = LinkPlane(
            name,
            "lab",
            self.store,
            self.incarnation,
            [
                LinkConfig(
                    peer,
                    source,
                    pool_max_bytes=pool,
                    redial_min_s=0.02,
                    redial_max_s=0.1,
                    open_timeout_s=open_timeout_s,
                    ingest=FAST_INGEST,
                )
            ],
            dial=dial,
            alarms=self.alarms,
            document=self.document,
            recorder=self.uses,
            handler=self.shares,
        )

    @property
    def link(self) -> Link:
        link = self.plane.link(self.peer)
        assert link is not None
        return link

    async def crash(self) -> None:
        """Stop without tidying, as far as one process can: what is on disk stays."""
        await self.plane.stop()
        self.store.close()

    async def until(self, check: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait for a condition."""
        async with asyncio.timeout(timeout_s):
            while not check():  # noqa: ASYNC110 - conditions are anything a test can see
                await asyncio.sleep(0.005)

    async def until_open(self) -> None:
        """Wait until the link is open here."""
        await self.until(lambda: self.link.is_open)


class _Pipe:
    """One direction of a stream in memory."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=512)


class MemoryTransport:
    """One end of a stream through a ``Wire``."""

    def __init__(self, stream: WireStream, *, is_dialler: bool) -> None:
        self._stream = stream
        self._is_dialler = is_dialler

    async def send(self, data: bytes) -> None:
        """Hand the message to the adversary."""
        if self._stream.is_cut:
            raise UnavailableError("the stream is cut")
        await self._stream.pass_on(data, from_dialler=self._is_dialler)

    async def receive(self) -> bytes | None:
        """What the adversary lets through."""
        if self._stream.is_cut:
            return None
        return await self._stream.inbox(to_dialler=self._is_dialler).get()

    def close(self) -> None:
        """Cut the stream."""
        self._stream.cut()


class WireStream:
    """One stream: two pipes and the adversary between them."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._to_dialler: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._to_acceptor: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.is_cut = False

    def inbox(self, *, to_dialler: bool) -> asyncio.Queue[bytes | None]:
        """The queue that an end reads."""
        return self._to_dialler if to_dialler else self._to_acceptor

    async def pass_on(self, data: bytes, *, from_dialler: bool) -> None:
        """Let the adversary see and change one message; deliver what he returns."""
        self._wire.seen.append((from_dialler, data))
        for one in self._wire.tamper(self, data, from_dialler):
            self.inject(one, to_dialler=not from_dialler)

    def inject(self, data: bytes, *, to_dialler: bool) -> None:
        """Put a message of the adversary's own on the stream."""
        self.inbox(to_dialler=to_dialler).put_nowait(data)

    def cut(self) -> None:
        """Reset the stream at both ends."""
        if not self.is_cut:
            self.is_cut = True
            self._to_dialler.put_nowait(None)
            self._to_acceptor.put_nowait(None)


Tamper = Callable[[WireStream, bytes, bool], list[bytes]]


def honest(stream: WireStream, data: bytes, from_dialler: bool) -> list[bytes]:
    """The adversary that only reads."""
    del stream, from_dialler
    return [data]


class Wire:
    """Streams between two sites, with an adversary in the middle.

    Attributes:
        tamper: what the adversary does with each message (stream, bytes, from the dialler).
        seen: everything ever sent.
        is_down: new streams fail.
    """

    def __init__(self) -> None:
        self.tamper: Tamper = honest
        self.seen: list[tuple[bool, bytes]] = []
        self.streams: list[WireStream] = []
        self.acceptor: Site | None = None
        self.is_down = False
        self._serving: set[asyncio.Task[None]] = set()

    def dial(self, peer: str) -> MemoryTransport:
        """Open a stream to the acceptor."""
        del peer
        if self.is_down or self.acceptor is None:
            raise UnavailableError("the wire is down")
        stream = WireStream(self)
        self.streams.append(stream)
        task = asyncio.get_running_loop().create_task(self._serve(self.acceptor, stream))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return MemoryTransport(stream, is_dialler=True)

    async def _serve(self, site: Site, stream: WireStream) -> None:
        try:
            await site.plane.accept(site.peer, MemoryTransport(stream, is_dialler=False))
        except Exception:  # noqa: BLE001 - the dialler sees a cut stream, as with a real server
            stream.cut()

    def cut(self) -> None:
        """Reset every stream."""
        for stream in self.streams:
            stream.cut()
        self.streams.clear()


@dataclass(slots=True)
class Pair:
    """Two sites, a wire and a device pair: kme-a leads and dials."""

    root: Path
    wire: Wire = field(default_factory=Wire)
    devices: DevicePair = field(default_factory=DevicePair)
    pool: int = 1 << 20
    proof: Path | None = None
    open_timeout_s: float = 20.0
    uses_a: Uses = field(default_factory=Uses)
    uses_b: Uses = field(default_factory=Uses)
    a: Site = field(init=False)
    b: Site = field(init=False)

    def make_a(self) -> Site:
        """A new process of kme-a on its directory."""
        return Site(
            "kme-a",
            "kme-b",
            self.root,
            source=self.devices.leader,
            dial=self.wire.dial,
            proof=self.proof,
            pool=self.pool,
            uses=self.uses_a,
            open_timeout_s=self.open_timeout_s,
        )

    def make_b(self) -> Site:
        """A new process of kme-b on its directory."""
        site = Site(
            "kme-b",
            "kme-a",
            self.root,
            source=self.devices.follower,
            dial=self.wire.dial,
            proof=self.proof,
            pool=self.pool,
            uses=self.uses_b,
            open_timeout_s=self.open_timeout_s,
        )
        self.wire.acceptor = site
        return site

    async def start(self) -> None:
        """Start both and wait until the link is open."""
        self.b = self.make_b()
        self.a = self.make_a()
        await self.b.plane.start()
        await self.a.plane.start()
        await self.until_open()

    async def until_open(self) -> None:
        """Wait until both ends are open."""
        await self.a.until_open()
        await self.b.until_open()

    async def restart_a(self) -> None:
        """Kill kme-a and start it again."""
        await self.a.crash()
        self.a = self.make_a()
        await self.a.plane.start()

    async def restart_b(self) -> None:
        """Kill kme-b and start it again."""
        await self.b.crash()
        self.wire.acceptor = None
        self.b = self.make_b()
        await self.b.plane.start()

    async def stop(self) -> None:
        """Stop both."""
        await self.a.crash()
        await self.b.crash()


def share_of(length: int, *, is_raw: bool = False, header: bytes = b"header") -> ShareItem:
    """A share item of some transfer."""
    return ShareItem(header=header, tag=bytes(16), length_bytes=length, is_raw=is_raw)


async def send_share(site: Site, value: bytes, *, timeout_s: float = 30.0) -> None:
    """Send one encrypted share as the key plane would."""
    await site.link.ready(len(value), timeout_s=timeout_s)
    claim = site.link.claim(0, len(value))
    site.link.send(claim, [share_of(len(value))], value)
