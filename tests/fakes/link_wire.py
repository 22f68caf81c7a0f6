"""A link plane in memory: lanes of real random bytes, burnt as claimed, frames delivered on the next turn.

Counts every lane byte, refuses to hand out a byte twice, and lets a test sit in the middle of each hop
(drop, hold back, replace, inject). It promises what ``mesh.node.ports`` promises and nothing more.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mesh.core.otp import xor
from mesh.errors import CallerError, ErrorReason, ShortageError, UnavailableError
from mesh.node.ports import Buffer, Claim, SharesHandler
from mesh.v1.admin_pb2 import LaneStatus, LinkStatus
from mesh.v1.link_pb2 import ShareItem

TAG_KEY_BYTES = 32
Delivery = list[tuple[ShareItem, bytes]]


class Silent:
    """A handler for links whose node is not there."""

    def on_shares(self, came_from: str, shares: Sequence[tuple[ShareItem, bytes]]) -> None:
        """Nobody is there."""

    def on_link_open(self, peer: str) -> None:
        """Nobody is there."""

    def on_link_closed(self, peer: str) -> None:
        """Nobody is there."""


@dataclass
class Lane:
    """One direction of a link: ``filled`` bytes exist, ``position`` are burnt."""

    filled: int
    position: int = 0
    local: int = 0
    material: dict[int, bytes] = field(default_factory=dict, repr=False)


class FakeLink:
    """One end of a link, as the key plane sees it."""

    def __init__(self, wire: Wire, own: str, peer: str, lane: Lane) -> None:
        self._wire = wire
        self._own = own
        self.peer = peer
        self.lane = lane
        self.is_open = True
        self.max_frame_bytes = 1024 * 1024
        self.window_bytes = 1 << 40
        self._newest: Claim | None = None

    def claimable(self) -> int:
        """Bytes of raw and cipher that ``claim`` grants now."""
        if not self.is_open:
            return 0
        usable = min(self.lane.filled - self.lane.position, self.max_frame_bytes, self.window_bytes)
        return max(0, usable - TAG_KEY_BYTES)

    async def ready(self, nbytes: int, *, timeout_s: float) -> None:
        """Waits until that much is claimable."""
        if nbytes + TAG_KEY_BYTES > self.max_frame_bytes:
            raise CallerError("no frame can be that large")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.claimable() < nbytes:
            if loop.time() >= deadline:
                if not self.is_open:
                    raise UnavailableError("link is closed", reason=ErrorReason.PEER_UNREACHABLE)
                raise ShortageError("out of material")
            await asyncio.sleep(0.005)

    def claim(self, raw_bytes: int, cipher_bytes: int) -> Claim:
        """Burns lane bytes."""
        if raw_bytes + cipher_bytes > self.claimable():
            raise ShortageError("not claimable")
        size = TAG_KEY_BYTES + raw_bytes + cipher_bytes
        offset = self.lane.position
        self.lane.position += size
        pad = self._wire.fresh(size)
        raw = pad[TAG_KEY_BYTES : TAG_KEY_BYTES + raw_bytes]
        self._newest = Claim(0, offset, raw, cipher_bytes, pad)
        return self._newest

    def send(self, claim: Claim, shares: Sequence[ShareItem], plaintext: Buffer) -> None:
        """Sends the frame of the newest claim."""
        if claim is not self._newest or claim.is_sent:
            raise CallerError("not the newest claim")
        claim.is_sent = True
        values: Delivery = []
        raw, cipher = claim.raw, bytes(plaintext)
        if len(cipher) != claim.cipher_bytes:
            raise CallerError("plaintext does not fit the claim")
        for share in shares:
            source = raw if share.is_raw else cipher
            values.append((share, source[: share.length_bytes]))
            if share.is_raw:
                raw = raw[share.length_bytes :]
            else:
                cipher = cipher[share.length_bytes :]
        pad = claim.pad[TAG_KEY_BYTES + len(claim.raw) :]
        if pad:
            self._wire.ciphertexts.append(xor(bytes(plaintext), pad))
        self._wire.deliver(self._own, self.peer, values)

    def enqueue(self, share: ShareItem, value: Buffer) -> None:
        """Sends one encrypted share in a frame of its own."""
        if len(value) > self.claimable():
            raise ShortageError("queue is full", reason=ErrorReason.BUSY)
        self.send(self.claim(0, len(value)), [share], value)

    def take_local(self, nbytes: int) -> bytes:
        """Burns lane bytes that stay here."""
        if nbytes > self.claimable():
            raise ShortageError("not claimable")
        self.lane.position += nbytes
        self.lane.local += nbytes
        return self._wire.fresh(nbytes)

    def status(self) -> LinkStatus:
        """Levels."""
        usable = self.lane.filled - self.lane.position
        lane = LaneStatus(position=self.lane.position, filled=self.lane.filled, usable=usable)
        return LinkStatus(peer_kme_id=self.peer, state="open" if self.is_open else "closed", transmit=lane)


class FakeLinks:
    """All links of one node."""

    def __init__(self, wire: Wire, own: str) -> None:
        self._wire = wire
        self.own = own
        self.handler: SharesHandler = Silent()
        self.ends: dict[str, FakeLink] = {}

    @property
    def links(self) -> Mapping[str, FakeLink]:
        """By peer."""
        return self.ends

    def link(self, peer: str) -> FakeLink | None:
        """One of them."""
        return self.ends.get(peer)

    async def reset_link(self, peer: str) -> tuple[int, int]:
        """Starts over."""
        if peer not in self.ends:
            raise CallerError("no such link")
        return 1, 1


class Wire:
    """All links of a test network.

    ``meddle`` sees every delivery (sender, receiver, shares) and returns what arrives, None for nothing.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], *, filled: int) -> None:
        self.planes: dict[str, FakeLinks] = {}
        self.ciphertexts: list[bytes] = []
        self.seen: list[tuple[str, str, Delivery]] = []
        self.meddle: Callable[[str, str, Delivery], Delivery | None] = lambda _a, _b, shares: shares
        for a, b in pairs:
            for own, peer in ((a, b), (b, a)):
                plane = self.planes.setdefault(own, FakeLinks(self, own))
                plane.ends[peer] = FakeLink(self, own, peer, Lane(filled))

    def fresh(self, size: int) -> bytes:
        """Lane bytes: never the same twice."""
        return os.urandom(size)

    def burnt(self, own: str, peer: str) -> int:
        """Lane bytes that ``own`` used towards ``peer``."""
        return self.planes[own].ends[peer].lane.position

    def deliver(self, sender: str, receiver: str, shares: Delivery) -> None:
        """Hands a frame over on the next turn of the loop."""
        self.seen.append((sender, receiver, shares))
        arriving = self.meddle(sender, receiver, shares)
        if arriving:
            self.inject(sender, receiver, arriving)

    def inject(self, sender: str, receiver: str, shares: Delivery) -> None:
        """Delivers shares as if ``sender`` had framed them on its link."""
        asyncio.get_running_loop().call_soon(lambda: self.planes[receiver].handler.on_shares(sender, shares))

    def cut(self, a: str, b: str, *, is_open: bool = False) -> None:
        """Closes (or opens) a link."""
        self.planes[a].ends[b].is_open = self.planes[b].ends[a].is_open = is_open
