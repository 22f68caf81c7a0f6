"""A link: two lanes, at most one open stream, and what both planes want to send.

Owns what outlives a stream: claims on the outbound lane (the only place where an offset is
chosen), the relay queue, control messages waiting for a frame, failure counts, alarms.
Everything that claims is sync: between choosing an offset and queueing the sealed frame
nothing else can run (protocol 1.1, 1.3, 1.7; house rules 8 to 10).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mesh.core import frame as frames
from mesh.core.budget import FailureBudget, RateCap
from mesh.core.frame import MAX_DOCUMENT_BYTES, MAX_META_BYTES, FrameKind
from mesh.core.lane import TAG_KEY_BYTES, LaneLimits, Purpose
from mesh.core.opening import Hello
from mesh.errors import (
    CallerError,
    ErrorReason,
    MeshError,
    PeerError,
    RolledBackError,
    ShortageError,
    UnavailableError,
)
from mesh.node.lanes import LinkLanes
from mesh.node.link_stream import LinkStream
from mesh.node.ports import Buffer, Claim, DocumentPort, LinkAlarms, PadRecorder, SharesHandler
from mesh.node.transport import wrap_frame
from mesh.store.store import Store
from mesh.v1 import link_pb2
from mesh.v1.admin_pb2 import LaneStatus, LinkStatus
from mesh.v1.link_pb2 import BlockAnswer, ShareItem

if TYPE_CHECKING:
    from mesh.node.ingest import Ingest

_LOG = logging.getLogger("keymesh.links")
MAX_RELAY_ITEMS = 4096
MAX_RELAY_BYTES = 8 << 20
#: A share that found no room on the lane for so long is of no use to anybody.
RELAY_LIFE_S = 10.0
MAX_STREAMS = 4
#: Openings in a row that got as far as greetings and no further, before an alarm.
FAILED_OPENINGS = 5
_META_ROOM = MAX_META_BYTES - 4096


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Sizes and times of one link.

    Attributes:
        limits: lane sizes.
        redial_min_s, redial_max_s: first and longest pause before dialling again.
        open_timeout_s: a stream whose hello does not come in this time is given up.
        tidy_interval_s: how often an idle stream wipes and looks at its marks.
    """

    limits: LaneLimits
    redial_min_s: float = 0.5
    redial_max_s: float = 60.0
    open_timeout_s: float = 10.0
    tidy_interval_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all links of a node are given.

    Attributes:
        own_id, domain_id: who we are.
        incarnation: id of this start, 16 bytes, on disk already.
        incarnations: our last 1 000, this one included.
        store: the node's.
        alarms, document, recorder: ports.
        randomness: cryptographic, by number of bytes.
        now_s: monotonic seconds.
        spawn: starts background work.
        handler: who takes shares, now.
        stop: a rollback was revealed: every link stops.
    """

    own_id: str
    domain_id: str
    incarnation: bytes
    incarnations: frozenset[bytes]
    store: Store
    alarms: LinkAlarms
    document: DocumentPort
    recorder: PadRecorder | None
    randomness: Callable[[int], bytes]
    now_s: Callable[[], float]
    spawn: Callable[[Coroutine[Any, Any, Any]], object]
    handler: Callable[[], SharesHandler]
    stop: Callable[[str, RolledBackError], None]


@dataclass(slots=True, repr=False)
class _Relayed:
    share: ShareItem
    value: Buffer
    until_s: float
    meta_bytes: int


def _bounded() -> deque[Any]:
    """All that waits here is sent again when it is lost: the oldest may give way."""
    return deque(maxlen=64)


class _RelayQueue:
    """Shares that wait for lane bytes: those on demand before bulk, each kind in order."""

    def __init__(self) -> None:
        self._urgent: deque[_Relayed] = deque()
        self._bulk: deque[_Relayed] = deque()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._urgent) + len(self._bulk)

    def put(self, one: _Relayed) -> None:
        (self._urgent if one.share.priority else self._bulk).append(one)
        self.nbytes += len(one.value)

    @property
    def first(self) -> _Relayed:
        return self._urgent[0] if self._urgent else self._bulk[0]

    def pop(self) -> _Relayed:
        one = self._urgent.popleft() if self._urgent else self._bulk.popleft()
        self.nbytes -= len(one.value)
        return one

    def drop_older(self, now_s: float) -> int:
        """Lets go of what waited too long; how many."""
        count = 0
        for queue in (self._urgent, self._bulk):
            while queue and queue[0].until_s < now_s:
                self.nbytes -= len(queue.popleft().value)
                count += 1
        return count

    def clear(self) -> None:
        self._urgent.clear()
        self._bulk.clear()
        self.nbytes = 0


@dataclass(slots=True)
class _Control:
    """What waits for the next frame."""

    offers: deque[bytes] = field(default_factory=_bounded)
    answers: deque[BlockAnswer] = field(default_factory=_bounded)
    discarded: deque[bytes] = field(default_factory=_bounded)
    wants_document: bool = False
    wants_report: bool = False

    def __bool__(self) -> bool:
        return bool(self.offers or self.answers or self.discarded or self.wants_document or self.wants_report)

    def clear(self) -> None:
        self.offers.clear()
        self.answers.clear()
        self.discarded.clear()
        self.wants_document = self.wants_report = False


class Link:
    """One link; implements :class:`~mesh.node.ports.LinkPort`. Made by ``mesh.node.links``.

    Args:
        around: what all links share.
        peer: KME id of the other end.
        settings: sizes and times.
    """

    ingest: Ingest

    def __init__(self, around: Surroundings, peer: str, settings: LinkSettings) -> None:
        self._around = around
        self.peer = peer
        self.settings = settings
        self.own_id = around.own_id
        self.domain_id = around.domain_id
        self.incarnation = around.incarnation
        self.incarnations = around.incarnations
        self.store = around.store
        self.document = around.document
        self.randomness = around.randomness
        self.now_s = around.now_s
        self.spawn = around.spawn
        self.alarms = around.alarms
        self.is_dialler = around.own_id < peer
        self.lanes = LinkLanes(
            around.store,
            around.own_id,
            peer,
            settings.limits,
            spawn=around.spawn,
            recorder=around.recorder,
        )
        self.peer_incarnation: bytes | None = None
        self.was_open = False
        self.is_resetting = False
        self.opened_at_s = float("-inf")
        self.stream: LinkStream | None = None
        self.streams: list[LinkStream] = []
        self.refusal: MeshError | None = None
        self.last_error = ""
        self.times_opened = 0
        self.blocked_until_s = 0.0
        self._failures = FailureBudget()
        self._failed_openings = 0
        self._window_is_alarmed = False
        self._first_hellos = RateCap(per_s=1.0, burst=4)
        self._relay = _RelayQueue()
        self._control = _Control()
        self._waiters: set[asyncio.Future[None]] = set()
        self._raising: asyncio.Future[None] | None = None

    async def load(self) -> None:
        """Read what the store knows of this link."""
        await self.lanes.load()
        row = self.store.read(lambda tables: tables.peers.peer(self.peer))
        self.peer_incarnation = row.incarnation or None

    # -- what the key plane uses (LinkPort) -----------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether both hellos of the present stream verified."""
        return self.stream is not None and self.stream.is_open

    @property
    def max_frame_bytes(self) -> int:
        """Lane bytes that a frame may span."""
        return self.lanes.tx.lane.limits.frame_bytes

    def claimable(self) -> int:
        """The largest raw + cipher that :meth:`claim` grants now."""
        if not self.is_open or self.stream is None or self.stream.is_full:
            return 0
        return max(0, self.lanes.tx.lane.claimable_bytes() - TAG_KEY_BYTES)

    async def ready(self, nbytes: int, *, timeout_s: float) -> None:
        """Wait until a claim of ``nbytes`` would be granted."""
        total = nbytes + TAG_KEY_BYTES
        deadline_s = self._around.now_s() + timeout_s
        while True:
            problem: MeshError
            try:
                if await self._try_ready(total):
                    return
                continue
            except (ShortageError, UnavailableError) as error:
                problem = error
            left_s = deadline_s - self._around.now_s()
            if left_s <= 0 or problem.reason is ErrorReason.ROLLED_BACK:
                raise problem
            await self._changed(left_s)

    async def _try_ready(self, total: int) -> bool:
        """Whether a claim would be granted; moves the mark if only that is missing."""
        if total > self.max_frame_bytes:
            raise CallerError("no frame is that large", facts={"bytes": total, "most": self.max_frame_bytes})
        if self.refusal is not None:
            raise self.refusal
        if not self.is_open or self.stream is None:
            raise UnavailableError("the link is not open", facts={"peer": self.peer}, retry_after_s=1.0)
        if self.stream.is_full:
            raise ShortageError("the link's queue is full", reason=ErrorReason.BUSY, retry_after_s=0.1)
        mark = self.lanes.tx.lane.mark_for(total, Purpose.DATA)
        if mark is None:
            return True
        await self._raise(mark)
        return False

    async def _raise(self, mark: int) -> None:
        """Move the outbound mark, one commit for all who ask meanwhile."""
        # A done one whose callback has not run yet would be awaited without ever yielding.
        if self._raising is not None and not self._raising.done():
            await asyncio.shield(self._raising)
            return
        work = asyncio.ensure_future(self.lanes.raise_mark(self.lanes.tx, mark))
        self._raising = work
        work.add_done_callback(self._raised)
        await asyncio.shield(work)

    def _raised(self, work: asyncio.Future[None]) -> None:
        if self._raising is work:
            self._raising = None
        if not work.cancelled() and work.exception() is not None:
            _LOG.warning(
                "a mark could not be moved", extra={"peer": self.peer, "cause": str(work.exception())}
            )
        self.notify()

    def claim(self, raw_bytes: int, cipher_bytes: int) -> Claim:
        """Burn 32 + raw + cipher lane bytes and return them."""
        if not self.is_open or self.stream is None or self.stream.is_full:
            raise ShortageError("the link takes no frames now", reason=ErrorReason.BUSY, retry_after_s=0.1)
        total = TAG_KEY_BYTES + raw_bytes + cipher_bytes
        if raw_bytes < 0 or cipher_bytes < 0 or total > self.max_frame_bytes:
            raise CallerError("no frame is that large", facts={"bytes": total, "most": self.max_frame_bytes})
        span, pad = self.lanes.claim(total, Purpose.DATA, "data")
        raw = pad[TAG_KEY_BYTES : TAG_KEY_BYTES + raw_bytes]
        return Claim(self.lanes.tx.lane.epoch, span.start, raw, cipher_bytes, pad)

    def send(self, claim: Claim, shares: Sequence[ShareItem], plaintext: Buffer) -> None:
        """Seal and queue the frame of a claim."""
        lane = self.lanes.tx.lane
        if claim.is_sent or claim.epoch != lane.epoch or claim.offset + len(claim.pad) != lane.position:
            raise CallerError("a claim is sent once, at once, before the next")
        claim.is_sent = True
        raw = sum(share.length_bytes for share in shares if share.is_raw)
        cipher = sum(share.length_bytes for share in shares if not share.is_raw)
        in_order = all(first.is_raw >= second.is_raw for first, second in pairwise(shares))
        if (raw, cipher) != (len(claim.raw), claim.cipher_bytes) or cipher != len(plaintext) or not in_order:
            raise CallerError("the shares do not fit the claim")
        meta = link_pb2.FrameMeta(shares=shares)
        self._queue_frame(FrameKind.DATA, claim.offset, claim.pad, meta, plaintext=plaintext)

    def enqueue(self, share: ShareItem, value: Buffer) -> None:
        """Queue one encrypted share for the sender."""
        if not self.is_open or self.stream is None:
            raise ShortageError("the link is not open", reason=ErrorReason.BUSY, retry_after_s=1.0)
        if share.is_raw or share.length_bytes != len(value):
            raise CallerError("a relayed share is encrypted and as long as it says")
        if TAG_KEY_BYTES + len(value) > self.max_frame_bytes:
            raise CallerError("no frame is that large", facts={"bytes": len(value)})
        # Bulk may not fill the queue: keys on demand still find room behind it, and overtake it.
        most = MAX_RELAY_BYTES if share.priority else MAX_RELAY_BYTES * 7 // 8
        if len(self._relay) >= MAX_RELAY_ITEMS or self._relay.nbytes + len(value) > most:
            raise ShortageError("the link's queue is full", reason=ErrorReason.BUSY, retry_after_s=0.1)
        until_s = self._around.now_s() + RELAY_LIFE_S
        self._relay.put(_Relayed(share, value, until_s, share.ByteSize() + 8))
        self.stream.wake()

    def take_local(self, nbytes: int) -> bytes:
        """Burn lane bytes that never leave this node."""
        if not self.is_open or nbytes < 1 or nbytes > self.max_frame_bytes:
            raise ShortageError("the lane gives no bytes now", retry_after_s=1.0)
        return self.lanes.claim(nbytes, Purpose.LOCAL, "local")[1]

    def status(self) -> LinkStatus:
        """Levels and state for operators."""
        tx, rx = self.lanes.tx.lane, self.lanes.rx.lane
        return LinkStatus(
            peer_kme_id=self.peer,
            state=self.state,
            transmit=LaneStatus(
                epoch=tx.epoch,
                position=tx.position,
                mark=tx.mark,
                filled=tx.filled,
                usable=tx.usable_bytes,
                reported=tx.reported,
                window=tx.limits.window_bytes,
                capacity=tx.limits.pool_bytes,
            ),
            receive=LaneStatus(
                epoch=rx.epoch,
                position=rx.position,
                mark=rx.mark,
                filled=rx.filled,
                usable=rx.usable_bytes,
                window=rx.limits.window_bytes,
                capacity=rx.limits.pool_bytes,
            ),
            failed_tags=self._failures.total,
            quarantined_blocks=self.ingest.quarantined_blocks,
            ingest_bytes_per_s=self.ingest.bytes_per_s,
            last_error=self.last_error,
            device_state=self.ingest.device_state,
            times_opened=self.times_opened,
            device=self.ingest.device_status,
        )

    @property
    def state(self) -> str:
        """ "open", "opening", "closed" or "refused"."""
        if self.refusal is not None:
            return "refused"
        if self.is_open:
            return "open"
        return "opening" if self.streams else "closed"

    # -- sending --------------------------------------------------------------------------

    def _queue_frame(
        self,
        kind: FrameKind,
        offset: int,
        pad: bytes,
        meta: link_pb2.FrameMeta,
        *,
        plaintext: Buffer = b"",
    ) -> None:
        """Seal claimed bytes and append the frame to the stream's queue; sync all through."""
        lanes = self.lanes
        reader = lanes.rx.lane
        meta.receive_position = reader.reportable
        meta.receive_epoch = reader.epoch
        meta.receive_filled = reader.filled
        self._control.wants_report = False
        encoded = meta.SerializeToString()
        if len(encoded) > MAX_META_BYTES + len(meta.network_document):
            raise CallerError("the frame's metadata is too large", facts={"bytes": len(encoded)})
        parts = frames.seal(
            kind,
            lanes.tx.lane.epoch,
            offset,
            pad=pad,
            root=lanes.root(lanes.tx),
            raw_bytes=len(pad) - TAG_KEY_BYTES - len(plaintext),
            plaintext=plaintext,
            meta=encoded,
        )
        reader.told = meta.receive_position
        if self.stream is not None:
            self.stream.post(wrap_frame(parts))

    def compose(self) -> None:
        """Make one frame of what waits: relayed shares first, control with them or alone."""
        if self._relay and (dropped := self._relay.drop_older(self._around.now_s())):
            _LOG.warning("relayed shares found no room in time", extra={"peer": self.peer, "shares": dropped})
        if self._relay:
            if self._compose_data():
                return
            self._want(TAG_KEY_BYTES + len(self._relay.first.value), Purpose.DATA)
        if self._control or self.lanes.rx.lane.is_report_due:
            self._compose_control()

    def _compose_data(self) -> bool:
        room = self.claimable()
        meta_room = _META_ROOM
        taken: list[_Relayed] = []
        while self._relay:
            first = self._relay.first
            if len(first.value) > room or first.meta_bytes > meta_room:
                break
            one = self._relay.pop()
            room -= len(one.value)
            meta_room -= one.meta_bytes
            taken.append(one)
        if not taken:
            return False
        size = sum(len(one.value) for one in taken)
        meta = link_pb2.FrameMeta(shares=[one.share for one in taken])
        self._add_control(meta, meta_room)
        span, pad = self.lanes.claim(TAG_KEY_BYTES + size, Purpose.DATA, "data")
        plaintext = taken[0].value if len(taken) == 1 else b"".join(one.value for one in taken)
        self._queue_frame(FrameKind.DATA, span.start, pad, meta, plaintext=plaintext)
        return True

    def _compose_control(self) -> None:
        if not self._want(TAG_KEY_BYTES, Purpose.CONTROL):
            return
        meta = link_pb2.FrameMeta()
        self._add_control(meta, _META_ROOM)
        span, pad = self.lanes.claim(TAG_KEY_BYTES, Purpose.CONTROL, "control")
        self._queue_frame(FrameKind.CONTROL, span.start, pad, meta)

    def _add_control(self, meta: link_pb2.FrameMeta, room: int) -> None:
        waiting = self._control
        while waiting.answers and room > 256:
            meta.answers.append(waiting.answers.popleft())
            room -= 64
        while waiting.discarded and room > 256:
            meta.discarded_block_ids.append(waiting.discarded.popleft())
            room -= 32
        while waiting.offers and len(waiting.offers[0]) + 16 <= room:
            offer = waiting.offers.popleft()
            meta.offers.append(offer)
            meta.transmit_decided_below, meta.receive_decided_below = self.ingest.decided()
            room -= len(offer) + 16
        if waiting.wants_document:
            waiting.wants_document = False
            document = self.document.signed_bytes()
            if 0 < len(document) <= MAX_DOCUMENT_BYTES:
                meta.network_document = document

    def _want(self, total: int, purpose: Purpose) -> bool:
        """Whether the claim would be granted; starts moving the mark if only that is missing."""
        try:
            mark = self.lanes.tx.lane.mark_for(total, purpose)
        except ShortageError as error:
            if error.reason is ErrorReason.WINDOW_FULL and purpose is Purpose.CONTROL:
                self.alarm_window("reports")
            return False
        if mark is None:
            return True
        if self._raising is None:
            self._around.spawn(self._raise(mark))
        return False

    # -- receiving ------------------------------------------------------------------------

    def deliver(self, stream: LinkStream, meta: link_pb2.FrameMeta, raw: Buffer, plaintext: Buffer) -> None:
        """Hand on what a verified frame carried; its mark is on disk."""
        if meta.receive_epoch == self.lanes.tx.lane.epoch:
            before = self.lanes.tx.lane.reported
            self.lanes.tx.lane.take_report(meta.receive_position)
            self.ingest.on_filled(meta.receive_filled)
            if self.lanes.tx.lane.reported > before:
                if self._window_is_alarmed:
                    self._window_is_alarmed = False
                    self._around.alarms.clear(f"link/{self.peer}/window")
                self.notify()
        if meta.discarded_block_ids:
            self.on_discarded(meta.discarded_block_ids)
        for answer in meta.answers:
            self.on_answer(answer, in_frame=True)
        decided = meta.transmit_decided_below, meta.receive_decided_below
        for offer in meta.offers:
            self.ingest.on_offer(offer, stream, decided)
        shares = _split(meta.shares, raw, plaintext)
        try:
            if meta.network_document:
                self.document.offer(meta.network_document)
            if shares:
                self._around.handler().on_shares(self.peer, shares)
        except MeshError as error:
            _LOG.warning("what a frame carried was not taken", extra={"peer": self.peer, "cause": str(error)})

    def on_clear_offer(self, offer: bytes, stream: LinkStream) -> None:
        """A block offer came in clear."""
        self.ingest.on_offer(offer, stream, None)

    def on_answer(self, answer: BlockAnswer, *, in_frame: bool) -> None:
        """A block answer came."""
        self.ingest.on_answer(answer, in_frame=in_frame)

    def on_discarded(self, block_ids: Iterable[bytes]) -> None:
        """The leader says, authenticated, which blocks it has discarded."""
        self.ingest.on_discarded(block_ids)

    def discarded_block_ids(self) -> list[bytes]:
        """The latest blocks that we as leader discarded."""
        return self.ingest.discarded_block_ids()

    def post_offer(self, offer: bytes) -> bool:
        """Send an offer in a frame, or in clear when no frame can go; whether it was sent."""
        stream = self.stream or (self.streams[-1] if self.streams else None)
        if stream is None or stream.theirs is None:
            return False
        if self.frames_can_go:
            if offer not in self._control.offers:
                self._control.offers.append(offer)
            stream.wake()
        else:
            stream.post(link_pb2.LinkMessage(offer=offer).SerializeToString())
        return True

    def post_answer(self, answer: BlockAnswer, stream: LinkStream) -> None:
        """Send an answer in a frame, or in clear on the stream that brought the offer."""
        if self.frames_can_go and self.stream is not None:
            self._control.answers.append(answer)
            self.stream.wake()
        elif stream in self.streams and not stream.is_full:
            stream.post(link_pb2.LinkMessage(answer=answer).SerializeToString())

    def post_discarded(self, block_id: bytes) -> None:
        """Tell the follower of a block discarded upon a verdict in clear."""
        if self.frames_can_go and self.stream is not None:
            self._control.discarded.append(block_id)
            self.stream.wake()

    def post_report(self) -> None:
        """Tell the writer, in the next frame or one of its own, where our copy of its lane ends."""
        self._control.wants_report = True
        self.wake_streams()

    @property
    def can_offer(self) -> bool:
        """Whether a stream is there to carry an offer, and our side may use it now."""
        if self.refusal is not None:
            return False
        if self.is_open:
            return self.frames_can_go
        return self.is_first_contact and any(one.theirs is not None for one in self.streams)

    @property
    def is_first_contact(self) -> bool:
        """Whether block messages in clear count: no stream is open, and a lane may be emptied (2.3)."""
        lanes = self.lanes
        return not self.is_open and (
            lanes.tx.lane.is_new or lanes.rx.lane.may_be_emptied(self.ingest.unaccepted_bytes)
        )

    @property
    def their_epochs(self) -> tuple[int, int] | None:
        """The epochs that the peer's greeting names for our outbound and inbound lane."""
        for stream in reversed(self.streams):
            if stream.theirs is not None:
                return stream.theirs.receive_epoch, stream.theirs.transmit_epoch
        return None

    @property
    def frames_can_go(self) -> bool:
        """Whether control messages can travel in frames."""
        if not self.is_open:
            return False
        try:
            self.lanes.tx.lane.find(TAG_KEY_BYTES, Purpose.CONTROL)
        except ShortageError as error:
            return error.reason is ErrorReason.WINDOW_FULL
        return True

    # -- streams --------------------------------------------------------------------------

    @property
    def is_proven(self) -> bool:
        """Whether our marks are those of a mere process restart, or of none since the last hello."""
        return self.lanes.is_settled

    def may_speak_first(self) -> bool:
        """Whether an acceptor may spend 32 bytes on a stranger's word (1.8)."""
        return self._first_hellos.take(self._around.now_s())

    def admit(self, stream: LinkStream) -> None:
        """A new stream begins; the oldest unverified one gives way when there are too many.

        Raises:
            UnavailableError: the link is refused, or backs off after failed tags.
        """
        if self.refusal is not None:
            raise self.refusal
        left_s = self.blocked_until_s - self._around.now_s()
        if left_s > 0 or self.is_resetting:
            raise UnavailableError("the link backs off", retry_after_s=max(0.0, left_s))
        self.streams.append(stream)
        if len(self.streams) > MAX_STREAMS:
            oldest = next(one for one in self.streams if one is not self.stream)
            oldest.close(UnavailableError("too many streams"))
            self.streams.remove(oldest)

    def ended(self, stream: LinkStream) -> None:
        """A stream ended; what waited for it is forfeited."""
        if stream in self.streams:
            self.streams.remove(stream)
        if stream.error is not None:
            self._note(stream.error)
        if stream.theirs is not None and not stream.has_opened:
            self._failed_openings += 1
            if self._failed_openings >= FAILED_OPENINGS and not self.is_open:
                self._alarm_opening()
        if self.stream is stream:
            self._let_go()

    def _let_go(self) -> None:
        """The present stream is over: its queues are forfeited."""
        self.stream = None
        self._relay.clear()
        self._control.clear()
        self._around.handler().on_link_closed(self.peer)
        self.notify()

    def on_greeted(self, stream: LinkStream) -> None:
        """Greetings are exchanged: block messages may pass at first contact."""
        self.ingest.on_greeted(stream)

    def on_verified(self, stream: LinkStream, hello: Hello) -> None:
        """A hello verified: this stream is the link now, an older one closes."""
        self.peer_incarnation = hello.incarnation
        self.lanes.is_settled = True
        self.lanes.has_met = True
        self.lanes.narrow(hello.window_bytes)
        older, self.stream = self.stream, None
        if older is not None and older is not stream:
            older.close(UnavailableError("a newer stream took over"))
            self._let_go()
        self.stream = stream
        self._control.wants_document = hello.document_serial < self.document.serial()

    def on_open(self, stream: LinkStream) -> None:
        """Both hellos verified."""
        if self.stream is not stream:
            return
        self.was_open = True
        self.times_opened += 1
        self.opened_at_s = self._around.now_s()
        self._failed_openings = 0
        self.last_error = ""
        for name in ("window", "opening", "peer-refused", "failed-tags"):
            self._around.alarms.clear(f"link/{self.peer}/{name}")
        for end in (self.lanes.tx, self.lanes.rx):
            self.lanes.mark_ahead(end)
        self._around.handler().on_link_open(self.peer)
        self.ingest.on_open()
        self.notify()

    def tidy(self) -> None:
        """Now and then on an open stream: wipe what is used, keep marks ahead.

        An emptied lane can carry no frame, not even an offer that would refill it: the stream
        closes, because only before hellos may offers pass in clear (2.3).
        """
        if self.lanes.tx.lane.is_new and self.stream is not None:
            self.stream.close(ShortageError("the outbound lane is emptied"))
            return
        for end in (self.lanes.tx, self.lanes.rx):
            self.lanes.wipe(end)
            self.lanes.mark_ahead(end)
        self.wake_streams()

    def material_changed(self) -> None:
        """Blocks came or went."""
        if self.is_open:
            for end in (self.lanes.tx, self.lanes.rx):
                self.lanes.mark_ahead(end)
        self.wake_streams()
        self.notify()

    def wake_streams(self) -> None:
        """Let streams look again at what they can send."""
        for stream in self.streams:
            stream.wake()

    def close_streams(self, error: MeshError) -> None:
        """End every stream."""
        for stream in self.streams:
            stream.close(error)
        if self.stream is not None:
            self._let_go()

    async def reset(self) -> tuple[int, int]:
        """New epochs for both lanes, at the operator's word."""
        self.is_resetting = True
        try:
            async with self.ingest.lock:
                self.close_streams(UnavailableError("the link is reset"))
                epochs = self.lanes.tx.lane.epoch + 1, self.lanes.rx.lane.epoch + 1
                await self.lanes.reset(transmit=epochs[0], receive=epochs[1], forget_peer=True)
                self.ingest.forget()
        finally:
            self.is_resetting = False
        self.lanes.is_settled = True
        self.peer_incarnation = None
        self.was_open = False
        self.refusal = None
        self.notify()
        return epochs

    # -- trouble --------------------------------------------------------------------------

    def count_failure(self, error: MeshError) -> None:
        """A frame that did not verify, or could not: nothing moved (1.7).

        Too many in an hour: every stream ends, the link backs off, an alarm is raised. No
        offset is refused for it.
        """
        if not self._failures.failed(self._around.now_s()):
            return
        self.blocked_until_s = self._around.now_s() + self.settings.redial_max_s
        self._around.alarms.raise_alarm(
            f"link/{self.peer}/failed-tags",
            "warning",
            "too many frames from this peer did not authenticate within an hour; the link backs off",
            "look for someone injecting traffic, or for differing pools at the two ends",
        )
        self.close_streams(PeerError("too many frames did not authenticate", facts={"last": error.message}))

    def alarm_window(self, what: str) -> None:
        """Too far past the last report for ``what``: stopped until one comes (1.3)."""
        self._window_is_alarmed = True
        self._around.alarms.raise_alarm(
            f"link/{self.peer}/window",
            "warning",
            f"the peer has not confirmed what was sent to it; no {what} can go",
            "see whether the peer is up and its traffic arrives; reset the link if it never recovers",
        )

    def _alarm_opening(self) -> None:
        tx, rx = self.lanes.tx.lane, self.lanes.rx.lane
        self._around.alarms.raise_alarm(
            f"link/{self.peer}/opening",
            "warning",
            f"the peer answers, but no hello verifies (lane epochs here {tx.epoch} and {rx.epoch})",
            "if the peer lost its data directory, reset the link at both ends; "
            "else look for someone changing traffic",
        )

    def _note(self, error: MeshError) -> None:
        self.last_error = error.message
        if isinstance(error, RolledBackError):
            self._around.stop(self.peer, error)
        elif error.reason is ErrorReason.PEER_REFUSED:
            self.blocked_until_s = self._around.now_s() + self.settings.redial_max_s
            self._around.alarms.raise_alarm(
                f"link/{self.peer}/peer-refused",
                "critical",
                error.message,
                "at the peer: stop the copy or the restored snapshot; then reset the link at both ends",
            )
        _LOG.info("a link's stream ended", extra={"peer": self.peer, "cause": str(error)})

    # -- waiting --------------------------------------------------------------------------

    def notify(self) -> None:
        """Something that waiters look at has changed."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()
        if self.stream is not None:
            self.stream.wake()

    async def _changed(self, timeout_s: float) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait([waiter], timeout=timeout_s)
        finally:
            self._waiters.discard(waiter)


def _split(shares: Iterable[ShareItem], raw: Buffer, plaintext: Buffer) -> list[tuple[ShareItem, bytes]]:
    """Cut the bytes of a verified frame into its shares, raw ones first.

    Raises:
        PeerError: lengths or order do not fit.
    """
    out: list[tuple[ShareItem, bytes]] = []
    at = {True: 0, False: 0}
    source = {True: memoryview(raw), False: memoryview(plaintext)}
    for share in shares:
        start = at[share.is_raw]
        at[share.is_raw] = start + share.length_bytes
        out.append((share, bytes(source[share.is_raw][start : start + share.length_bytes])))
    if at != {True: len(raw), False: len(plaintext)}:
        raise PeerError("the shares of a frame do not fit its bytes")
    return out
