"""One stream of a link: greetings, hellos, then frames in and out.

Owns the order of things on one stream (protocol 1.8): greetings in clear, who speaks first,
what may pass before hellos verify, and the one place where an arriving frame is verified,
made durable and delivered. Which offsets, which marks, and what a hello means is decided by
``mesh.core``; the state that outlives a stream belongs to ``mesh.node.link.Link``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from mesh.core import frame as frames
from mesh.core.frame import Frame, FrameKind
from mesh.core.lane import TAG_KEY_BYTES, Purpose, ReaderLane
from mesh.core.opening import INCARNATION_BYTES, NONCE_BYTES, Hello, OurSide, judge, speaks_first
from mesh.errors import (
    ErrorReason,
    MeshError,
    PeerError,
    ShortageError,
    TagMismatchError,
    UnavailableError,
)
from mesh.node.lanes import LaneEnd
from mesh.node.ports import Buffer
from mesh.node.transport import Transport, unwrap, wrap_frame
from mesh.store.tables import Tables
from mesh.v1 import link_pb2

if TYPE_CHECKING:
    from mesh.node.link import Link

_LOG = logging.getLogger("keymesh.links")
VERSION = 1
MAX_OUTBOX_FRAMES = 256
MAX_OUTBOX_BYTES = 4 << 20
#: Verified frames that may wait for the mark.
MAX_VERIFIED = 16
_PAUSE_S = 0.25
_LABELS = {FrameKind.HELLO: "hello", FrameKind.DATA: "data", FrameKind.CONTROL: "control"}


@dataclass(frozen=True, slots=True, repr=False)
class _Verified:
    """A frame whose tag fitted and whose bytes wait for the mark on disk."""

    stop: int
    meta: link_pb2.FrameMeta
    raw: Buffer
    plaintext: Buffer


class LinkStream:
    """One stream's life, from greeting to end.

    Args:
        link: the link it may carry.
        transport: where bytes go.
        is_dialler: our role.
    """

    def __init__(self, link: Link, transport: Transport, *, is_dialler: bool) -> None:
        self._link = link
        self._transport = transport
        self.is_dialler = is_dialler
        self.is_verified = False
        self.is_open = False
        self.has_opened = False
        self.theirs: link_pb2.Greeting | None = None
        self.error: MeshError | None = None
        self._closing = asyncio.Event()
        self._moved = asyncio.Event()
        self._wake = asyncio.Event()
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._verified: deque[_Verified] = deque()
        self._has_verified = asyncio.Event()
        self._has_room = asyncio.Event()
        self._hello_is_sent = False
        self._our_greeting = b""
        self._their_greeting = b""
        self._is_proven = link.is_proven
        self._known_incarnation = link.peer_incarnation or b""

    # -- life -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Carry the stream until it ends; the cause stays in ``error``."""
        if self.is_dialler:
            self._greet()
        tasks = [
            asyncio.create_task(work)
            for work in (
                self._receive(),
                self._make_durable(),
                self._send(),
                self._look_after(),
                self._closing.wait(),
            )
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.is_open = False
            self._transport.close()
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, MeshError):
                    self.error = self.error or result
                elif isinstance(result, Exception):
                    _LOG.error("a link's stream failed for an internal reason", exc_info=result)
                    self.error = self.error or UnavailableError("internal error", reason=ErrorReason.INTERNAL)

    def close(self, error: MeshError) -> None:
        """End the stream from outside."""
        self.error = self.error or error
        self.is_open = False
        self._closing.set()

    @property
    def is_full(self) -> bool:
        """Whether as much waits for the transport as may."""
        return len(self._outbox) >= MAX_OUTBOX_FRAMES or self._outbox_bytes >= MAX_OUTBOX_BYTES

    def wake(self) -> None:
        """Something to send, or material for a hello, may be there."""
        self._wake.set()
        self._moved.set()

    def post(self, data: bytes) -> None:
        """Queue one message, in order."""
        self._outbox.append(data)
        self._outbox_bytes += len(data)
        self._wake.set()

    async def _send(self) -> None:
        """The one sender: what is sealed leaves in the order of its offsets."""
        while True:
            if self.is_open and not self.is_full:
                self._link.compose()
            if not self._outbox:
                self._wake.clear()
                await self._wake.wait()
                continue
            was_full = self.is_full
            data = self._outbox.popleft()
            self._outbox_bytes -= len(data)
            await self._transport.send(data)
            if was_full and not self.is_full:
                self._link.notify()

    async def _look_after(self) -> None:
        """Send the hello when it can go, give up in time, then keep an open stream tidy."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._link.settings.open_timeout_s
        while not self.is_open:
            if self._may_hello():
                await self._send_hello()
            if self.is_verified and self._hello_is_sent:
                self._open()
                break
            if loop.time() > deadline and not self._is_first_contact():
                raise UnavailableError("the peer's hello did not come in time")
            self._moved.clear()
            await _wait(self._moved, _PAUSE_S)
        while True:
            self._link.tidy()
            await asyncio.sleep(self._link.settings.tidy_interval_s)

    async def _receive(self) -> None:
        while (data := await self._transport.receive()) is not None:
            try:
                message = unwrap(data)
            except PeerError as error:
                self._link.count_failure(error)
                continue
            if isinstance(message, memoryview):
                await self._on_frame(message)
            else:
                self._on_message(message, data)

    # -- greetings ------------------------------------------------------------------------

    def _greet(self) -> None:
        lanes = self._link.lanes
        greeting = link_pb2.Greeting(
            version_min=VERSION,
            version_max=VERSION,
            domain_id=self._link.domain_id,
            kme_id=self._link.own_id,
            nonce=self._link.randomness(NONCE_BYTES),
            incarnation=self._link.incarnation,
            proven=self._is_proven,
            transmit_epoch=lanes.tx.lane.epoch,
            receive_epoch=lanes.rx.lane.epoch,
            transmit_is_new=lanes.tx.lane.is_new,
            receive_is_new=lanes.rx.lane.is_new,
        )
        self._our_greeting = link_pb2.LinkMessage(greeting=greeting).SerializeToString()
        self.post(self._our_greeting)

    def _on_greeting(self, greeting: link_pb2.Greeting, data: bytes) -> None:
        """Take the peer's greeting: it moves and latches nothing."""
        if self.theirs is not None:
            raise PeerError("a second greeting on one stream")
        problems = (
            (greeting.version_min > VERSION or greeting.version_max < VERSION, "version_min"),
            (greeting.domain_id != self._link.domain_id, "domain_id"),
            (greeting.kme_id != self._link.peer, "kme_id"),
            (len(greeting.nonce) != NONCE_BYTES, "nonce"),
            (len(greeting.incarnation) != INCARNATION_BYTES, "incarnation"),
        )
        for is_wrong, name in problems:
            if is_wrong:
                raise PeerError(f"a greeting with an unacceptable {name}")
        self._their_greeting = data
        self.theirs = greeting
        if not self.is_dialler:
            self._greet()
        self._link.on_greeted(self)
        self._moved.set()

    def _on_message(self, message: link_pb2.LinkMessage, data: bytes) -> None:
        kind = message.WhichOneof("body")
        if kind == "greeting":
            self._on_greeting(message.greeting, data)
        elif self.theirs is None:
            raise PeerError("the first message must be a greeting")
        elif kind == "offer":
            self._link.on_clear_offer(message.offer, self)
        elif kind == "answer":
            self._link.on_answer(message.answer, in_frame=False)

    # -- hellos ---------------------------------------------------------------------------

    def _may_hello(self) -> bool:
        if self._hello_is_sent or self.theirs is None:
            return False
        if self.is_verified:
            return True
        is_first = speaks_first(
            is_dialler=self.is_dialler, is_proven=self._is_proven, peer_is_proven=self.theirs.proven
        )
        # Anyone may claim in clear to be unproven: an acceptor's first hellos are paced.
        return is_first and (self.is_dialler or self._link.may_speak_first())

    def _is_first_contact(self) -> bool:
        """Material must come in before hellos can: waiting is right."""
        lanes = self._link.lanes
        return self.theirs is not None and (
            lanes.tx.lane.is_new
            or lanes.rx.lane.is_new
            or self.theirs.transmit_is_new
            or self.theirs.receive_is_new
        )

    async def _send_hello(self) -> None:
        """Claim 32 bytes and send the hello; without material or window it waits."""
        lanes = self._link.lanes
        end = lanes.tx
        theirs = self.theirs
        if theirs is not None and theirs.receive_epoch == end.lane.epoch:
            self._link.ingest.before_hello(peer_has_material=not theirs.receive_is_new)
        try:
            while True:
                lane = end.lane
                mark = (
                    lane.mark_for(TAG_KEY_BYTES, Purpose.HELLO)
                    if self.is_verified
                    else lane.bare_mark_for(TAG_KEY_BYTES)
                )
                if mark is None:
                    break
                await lanes.raise_mark(end, mark)
            span, pad = lanes.claim(TAG_KEY_BYTES, Purpose.HELLO, "hello")
        except ShortageError as error:
            if error.reason is ErrorReason.WINDOW_FULL:
                self._link.alarm_window("hellos")
            return
        reader = lanes.rx.lane
        reader.told = reader.reportable
        meta = link_pb2.FrameMeta(
            hello=link_pb2.Hello(
                is_dialler=self.is_dialler,
                receive_position=reader.reportable,
                receive_mark=reader.mark,
                transmit_mark=end.lane.mark,
                known_incarnation=self._known_incarnation,
                document_serial=self._link.document.serial(),
                window_bytes=lanes.limits.window_bytes,
            ),
            discarded_block_ids=self._link.discarded_block_ids(),
            receive_epoch=reader.epoch,
            receive_filled=reader.filled,
        )
        parts = frames.seal(
            FrameKind.HELLO,
            end.lane.epoch,
            span.start,
            pad=pad,
            root=lanes.root(end),
            raw_bytes=0,
            plaintext=b"",
            meta=meta.SerializeToString(),
            greetings=self._both_greetings(),
        )
        self._hello_is_sent = True
        self.post(wrap_frame(parts))

    def _both_greetings(self) -> tuple[bytes, bytes]:
        if self.is_dialler:
            return self._our_greeting, self._their_greeting
        return self._their_greeting, self._our_greeting

    async def _on_hello(self, frame: Frame, meta: link_pb2.FrameMeta) -> None:
        """A hello verified: judge it, make durable what follows, then go on from there."""
        if self.is_verified:
            await self._on_later_hello(frame)
            return
        link, lanes, theirs = self._link, self._link.lanes, self.theirs
        if theirs is None or not meta.HasField("hello"):
            raise PeerError("a hello frame without a hello")
        hello = _hello_of(frame, meta.hello, theirs.incarnation)
        if meta.receive_epoch == lanes.tx.lane.epoch:
            link.ingest.on_filled(meta.receive_filled)
        position = judge(
            hello,
            OurSide(
                is_dialler=self.is_dialler,
                writer=lanes.tx.lane,
                reader=lanes.rx.lane,
                is_unproven=not self._is_proven,
                was_open=link.was_open,
                peer_incarnation=link.peer_incarnation,
                incarnations=link.incarnations,
            ),
        )

        jumped = position if position > lanes.tx.lane.position else 0

        def change(tables: Tables) -> None:
            lanes.put_mark(tables, lanes.rx, frame.span.stop)
            lanes.put_mark(tables, lanes.tx, jumped, base=jumped)
            for end in (lanes.tx, lanes.rx):
                tables.lanes.settle(end.lane_id)
            tables.peers.set_peer_incarnation(
                link.peer,
                hello.incarnation,
                is_proven=theirs.proven,
                document_serial=hello.document_serial,
            )

        await link.store.commit(change)
        lanes.accepted(frame.span, "hello")
        lanes.rx.lane.mark_moved(max(lanes.rx.lane.mark, frame.span.stop))
        lanes.tx.lane.mark_moved(max(lanes.tx.lane.mark, jumped))
        lanes.tx.lane.jump(position)
        lanes.tx.lane.take_report(hello.receive_position)
        self.is_verified = True
        if jumped:
            self._hello_is_sent = False  # one sent before the jump left the receiver behind
        link.on_verified(self, hello)
        link.on_discarded(meta.discarded_block_ids)
        self.wake()

    async def _on_later_hello(self, frame: Frame) -> None:
        """The peer jumped after its first hello (both unproven): its second one moves us along."""
        lanes = self._link.lanes
        if frame.span.start < lanes.rx.lane.position or frame.span.stop > lanes.rx.lane.hello_limit:
            return
        await lanes.raise_mark(lanes.rx, frame.span.stop)
        lanes.accepted(frame.span, "hello")

    def _open(self) -> None:
        self.is_open = self.has_opened = True
        self._link.on_open(self)
        self._wake.set()

    # -- frames ---------------------------------------------------------------------------

    async def _on_frame(self, data: Buffer) -> None:
        """Verify, make durable, deliver: nothing of a frame is believed before its tag fits."""
        lanes = self._link.lanes
        end = lanes.rx
        try:
            frame = frames.parse(data)
            is_hello = frame.kind is FrameKind.HELLO
            self._check(frame, end.lane.epoch)
            (end.lane.check_held if is_hello else end.lane.check_frame)(frame.span)
            raw, plaintext = frames.open_frame(
                frame,
                pad=lanes.read_inbound(frame.span),
                root=lanes.root(end),
                greetings=self._both_greetings() if is_hello else None,
            )
        except (PeerError, TagMismatchError) as error:
            self._link.count_failure(error)
            return
        try:
            meta = link_pb2.FrameMeta.FromString(bytes(frame.meta))
        except DecodeError as error:
            raise PeerError("a frame with metadata that cannot be read") from error
        if is_hello:
            await self._on_hello(frame, meta)
            return
        lanes.accepted(frame.span, _LABELS[frame.kind])
        if not self._verified and end.lane.mark_for(frame.span.stop) is None:
            self._deliver(end, meta, raw, plaintext)
            return
        self._verified.append(_Verified(frame.span.stop, meta, raw, plaintext))
        self._has_verified.set()
        while len(self._verified) >= MAX_VERIFIED:
            self._has_room.clear()
            await self._has_room.wait()

    async def _make_durable(self) -> None:
        """Deliver in order what verified beyond the mark, one commit for all that waits.

        The next frames are verified meanwhile, so that the disk and the processor overlap.
        """
        lanes = self._link.lanes
        while True:
            if not self._verified:
                self._has_verified.clear()
                await self._has_verified.wait()
            end = lanes.rx
            mark = end.lane.mark_for(self._verified[-1].stop)
            if mark is not None:
                await lanes.raise_mark(end, mark)
            while self._verified and self._verified[0].stop <= end.lane.mark:
                one = self._verified.popleft()
                self._deliver(end, one.meta, one.raw, one.plaintext)
            self._has_room.set()

    def _deliver(
        self, end: LaneEnd[ReaderLane], meta: link_pb2.FrameMeta, raw: Buffer, plaintext: Buffer
    ) -> None:
        self._link.deliver(self, meta, raw, plaintext)
        if end.lane.is_report_due:
            self._wake.set()

    def _check(self, frame: Frame, epoch: int) -> None:
        if frame.epoch != epoch:
            raise PeerError("a frame of another epoch", facts={"epoch": frame.epoch})
        if frame.kind is FrameKind.HELLO:
            if self.theirs is None:
                raise PeerError("a hello before the greeting")
        elif not self.is_verified:
            raise PeerError("a frame before the hello")


def _hello_of(frame: Frame, hello: link_pb2.Hello, incarnation: bytes) -> Hello:
    return Hello(
        is_dialler=hello.is_dialler,
        offset=frame.offset,
        receive_position=hello.receive_position,
        receive_mark=hello.receive_mark,
        transmit_mark=hello.transmit_mark,
        known_incarnation=hello.known_incarnation,
        document_serial=hello.document_serial,
        window_bytes=hello.window_bytes,
        incarnation=incarnation,
    )


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for the event, at most so long."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
