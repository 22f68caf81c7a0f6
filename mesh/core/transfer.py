"""Transfers: the header every hop and the tag see, the secret's layout, and the target's collector.

Owns protocol 3.1 to 3.4, 3.7 and 3.8: what a transfer is, who may send which share over which
link, and when a secret counts as established. Decides only; it holds no clock, no randomness and
no I/O. The byte layouts stand in docs/formats.md ("Keys").
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from mesh.core import names, sharing
from mesh.core.gf128 import secret_tag
from mesh.core.network import Grade, NetworkDocument, check_routes
from mesh.errors import MeshError, PeerError

TAG_KEY_BYTES = 48
CONFIRM_KEY_BYTES = 32
PREFIX_BYTES = TAG_KEY_BYTES + CONFIRM_KEY_BYTES
TAG_PART_BYTES = 16
KEY_PART_BYTES = 32
SLOT_BYTES = TAG_PART_BYTES + KEY_PART_BYTES
TAG_BYTES = 16

MAX_EPOCH = (1 << 12) - 1
MAX_SLOT = (1 << 36) - 1
MAX_SLOT_COUNT = 1 << 20
MAX_ROUTE_NODES = 32
MAX_ATTACHMENT_BYTES = 8 * 1024
MAX_HEADER_BYTES = 16 * 1024

_MAGIC = b"KMT\x01"
_CONFIRM_MAGIC = b"KMC\x01"


class SlotKind(IntEnum):
    """What the slots of one append may be used for (protocol 4.1); a tag part has one purpose."""

    KEYS = 1
    SEALED = 2


@dataclass(frozen=True, slots=True)
class TransferId:
    """Names one transfer for ever: slots are never assigned twice (protocol 3.1, 3.5)."""

    source: str
    target: str
    epoch: int
    first_slot: int


@dataclass(frozen=True, slots=True)
class TransferHeader:
    """The core header: everything that the secret-authenticating tag covers besides the secret.

    ``routes`` are whole paths, source and target included; share i travels on ``routes[i - 1]``.
    ``attachment`` is ciphertext under the attachment pad inside the secret.
    """

    transfer: TransferId
    slot_count: int
    kind: SlotKind
    grade: Grade
    routes: tuple[tuple[str, ...], ...]
    expires_at_s: int
    attachment: bytes = b""

    @property
    def length_bytes(self) -> int:
        """Bytes of the secret, and so of each share."""
        return PREFIX_BYTES + len(self.attachment) + SLOT_BYTES * self.slot_count

    @property
    def stop_slot(self) -> int:
        """First slot after the transfer's."""
        return self.transfer.first_slot + self.slot_count

    def encode(self) -> bytes:
        """The canonical encoding, at most 16 KiB.

        Raises:
            ValueError: a field is out of range (a fault of ours, never input).
        """
        t = self.transfer
        parts = [_MAGIC, _text(t.source), _text(t.target), _uint(t.epoch, 2), _uint(t.first_slot, 8)]
        parts += [_uint(self.slot_count, 4), _uint(self.kind, 1), _text(str(self.grade))]
        parts += [_uint(self.grade.k, 1), _uint(self.grade.n, 1)]
        for route in self.routes:
            parts.append(_uint(len(route), 1))
            parts += [_text(node) for node in route]
        parts += [_uint(self.expires_at_s, 8), _uint(self.length_bytes, 4)]
        parts += [_uint(len(self.attachment), 4), self.attachment]
        encoded = b"".join(parts)
        if len(encoded) > MAX_HEADER_BYTES:
            raise ValueError("transfer header is longer than 16 KiB")
        return encoded

    @classmethod
    def decode(cls, data: bytes) -> TransferHeader:
        """Reads a header strictly: one encoding per header, nothing left over, routes well formed.

        Raises:
            PeerError: PROTOCOL_VIOLATION, naming the field.
        """
        if len(data) > MAX_HEADER_BYTES:
            raise _bad("header", "longer than 16 KiB")
        cursor = _Cursor(data)
        if cursor.take(4) != _MAGIC:
            raise _bad("version", "not a transfer header of version 1")
        transfer = TransferId(cursor.name(), cursor.name(), cursor.uint(2), cursor.uint(8))
        slot_count, kind = cursor.uint(4), cursor.uint(1)
        grade = cursor.grade()
        routes = []
        for _ in range(grade.n):
            nodes = cursor.uint(1)
            if not 2 <= nodes <= MAX_ROUTE_NODES:
                raise _bad("routes", "a route has 2 to 32 nodes")
            routes.append(tuple(cursor.name() for _ in range(nodes)))
        expires_at_s, length_bytes = cursor.uint(8), cursor.uint(4)
        attachment = cursor.take(cursor.uint(4))
        cursor.end()
        if kind not in (SlotKind.KEYS, SlotKind.SEALED):
            raise _bad("kind", "neither keys nor sealed")
        header = cls(transfer, slot_count, SlotKind(kind), grade, tuple(routes), expires_at_s, attachment)
        header._check(length_bytes)
        return header

    def _check(self, length_bytes: int) -> None:
        t = self.transfer
        if t.source == t.target:
            raise _bad("target", "is the source")
        if t.epoch > MAX_EPOCH or not 1 <= self.slot_count <= MAX_SLOT_COUNT or self.stop_slot > MAX_SLOT + 1:
            raise _bad("slots", "outside the reserve's numbering")
        if len(self.attachment) > MAX_ATTACHMENT_BYTES:
            raise _bad("attachment", "longer than 8 KiB")
        if length_bytes != self.length_bytes:
            raise _bad("length", "does not fit attachment and slots")
        for route in self.routes:
            if route[0] != t.source or route[-1] != t.target or len(set(route)) != len(route):
                raise _bad("routes", "must run from source to target without a loop")


def check_hop(
    header: TransferHeader, *, route: int, hop: int, came_from: str, own_id: str, length_bytes: int
) -> str | None:
    """Refuses a share that did not come on the link its route names (protocol 3.3).

    Args:
        route: index of the route, from 0.
        hop: index of the hop just travelled, from 0.
        came_from: the other end of the link that the share came on (authenticated by that link).
        length_bytes: bytes of the share as delivered.

    Returns:
        The next node of the route, or None when this node is the target.

    Raises:
        PeerError: PROTOCOL_VIOLATION.
    """
    if not 0 <= route < len(header.routes):
        raise _bad("route", "not in the header")
    nodes = header.routes[route]
    if not 0 <= hop < len(nodes) - 1:
        raise _bad("hop", "not on the route")
    if hop == 0 and came_from != header.transfer.source:
        raise _bad("source", "is not the other end of the link")
    if nodes[hop] != came_from or nodes[hop + 1] != own_id:
        raise _bad("route", "does not name the link that the share came on")
    if length_bytes != header.length_bytes:
        raise _bad("length", "does not fit the header")
    return nodes[hop + 2] if hop + 2 < len(nodes) else None


def check_target(header: TransferHeader, document: NetworkDocument) -> None:
    """Refuses a transfer that our own network document does not grant its source (protocol 3.3).

    Grade, k, n, permitted routes, hubs and failure domains come from ``document``, never from the
    header.

    Raises:
        PeerError: PROTOCOL_VIOLATION.
    """
    check_routes(document, header.transfer.source, header.transfer.target, header.grade, header.routes)


@dataclass(frozen=True, slots=True)
class SecretParts:
    """The pieces of an established secret, in order (protocol 3.1)."""

    tag_key: bytes
    confirm_key: bytes
    attachment_pad: bytes
    payload: bytes

    def __repr__(self) -> str:
        return f"SecretParts({len(self.attachment_pad)}+{len(self.payload)} bytes)"


def split_secret(secret: bytes, attachment_bytes: int) -> SecretParts:
    """Cuts a secret: u (48) ‖ confirm key (32) ‖ attachment pad ‖ reserve payload."""
    body = PREFIX_BYTES + attachment_bytes
    return SecretParts(
        secret[:TAG_KEY_BYTES], secret[TAG_KEY_BYTES:PREFIX_BYTES], secret[PREFIX_BYTES:body], secret[body:]
    )


def transfer_tag(header: bytes, secret: bytes) -> bytes:
    """The tag t (16 bytes) over the encoded header and all of the secret except u (protocol 3.2)."""
    return secret_tag(secret[:TAG_KEY_BYTES], header, memoryview(secret)[TAG_KEY_BYTES:])


@dataclass(frozen=True, slots=True)
class ConfirmMessage:
    """What the target says once, after its append is durable (protocol 3.6).

    ``lineage`` is the incarnation of the target's latest *unproven* start: a source that missed
    some restarts still learns that one of them was unproven.
    """

    transfer: TransferId
    slot_count: int
    tag: bytes
    incarnation: bytes
    lineage: bytes
    is_proven: bool

    def encode(self) -> bytes:
        t = self.transfer
        head = [_CONFIRM_MAGIC, _text(t.source), _text(t.target), _uint(t.epoch, 2), _uint(t.first_slot, 8)]
        return b"".join(
            [
                *head,
                _uint(self.slot_count, 4),
                self.tag,
                self.incarnation,
                self.lineage,
                _uint(self.is_proven, 1),
            ]
        )

    @classmethod
    def decode(cls, data: bytes) -> ConfirmMessage:
        """Raises PeerError (PROTOCOL_VIOLATION) unless the bytes are exactly one confirm."""
        cursor = _Cursor(data)
        if cursor.take(4) != _CONFIRM_MAGIC:
            raise _bad("confirm", "not a confirm of version 1")
        transfer = TransferId(cursor.name(), cursor.name(), cursor.uint(2), cursor.uint(8))
        count, tag = cursor.uint(4), cursor.take(16)
        incarnation, lineage, proven = cursor.take(16), cursor.take(16), cursor.uint(1)
        cursor.end()
        if proven > 1:
            raise _bad("confirm", "proven is neither 0 nor 1")
        return cls(transfer, count, tag, incarnation, lineage, bool(proven))


# -- the target's collector ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verified:
    """A secret whose tag fits. ``culprits`` are proven liars among the routes, by index."""

    header: TransferHeader
    tag: bytes
    secret: bytes
    culprits: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Verified({self.header.transfer}, culprits={self.culprits})"


@dataclass(frozen=True, slots=True)
class Failed:
    """No k shares fit the tag, or too few came in time: routes that are suspects, by index."""

    header: TransferHeader
    suspects: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Disagreed:
    """A share that came after the secret had verified does not lie on its polynomial."""

    header: TransferHeader
    culprits: tuple[int, ...]


Outcome = Verified | Failed | Disagreed


@dataclass(slots=True)
class _Pending:
    header: TransferHeader
    encoded: bytes
    tag: bytes
    shares: dict[int, bytes] = field(default_factory=dict)
    links: dict[int, str] = field(default_factory=dict)
    is_verified: bool = False
    drop_at_s: float = 0.0


class Collector:
    """Gathers the shares of transfers that end here until k of them fit the tag.

    Bounded per incoming link (count and bytes); the oldest share of the *same* link is dropped
    first, so one link cannot push out another's shares (protocol 3.7).

    Args:
        max_pending: shares held per incoming link.
        max_pending_bytes: bytes held per incoming link.
        keep_s: how long shares wait for their siblings, by the caller's clock (a header's expiry is
            the source's clock, which may differ).
        randomness: 16 fresh bytes per call, for the consistency check of bulk shares.
    """

    def __init__(
        self, *, max_pending: int, max_pending_bytes: int, keep_s: float, randomness: Callable[[int], bytes]
    ) -> None:
        self._max_pending = max_pending
        self._max_pending_bytes = max_pending_bytes
        self._keep_s = keep_s
        self._randomness = randomness
        self._pending: dict[tuple[bytes, bytes], _Pending] = {}
        self._by_link: dict[str, OrderedDict[tuple[tuple[bytes, bytes], int], int]] = {}
        self._bytes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def pending(self, transfer: TransferId) -> bool:
        """Whether shares of this transfer are here, without a verified secret yet."""
        return any(
            entry.header.transfer == transfer and not entry.is_verified for entry in self._pending.values()
        )

    def add(
        self,
        header: TransferHeader,
        encoded: bytes,
        tag: bytes,
        *,
        route: int,
        came_from: str,
        share: bytes,
        now_s: float,
    ) -> Outcome | None:
        """Takes one share that passed ``check_hop`` and ``check_target``.

        Shares of one transfer whose headers or tags differ are kept apart, so a liar cannot spoil
        the honest group. A second share for the same route is ignored.
        """
        if header.grade.n == 1:
            if transfer_tag(encoded, share) == tag:
                return Verified(header, tag, share, ())
            return Failed(header, (0,))
        key = (encoded, tag)
        entry = self._pending.get(key)
        if entry is None:
            entry = self._pending[key] = _Pending(header, encoded, tag, drop_at_s=now_s + self._keep_s)
        if route in entry.shares or came_from in entry.links.values():
            return None
        entry.shares[route] = share
        entry.links[route] = came_from
        outcome = self._judge(entry)
        self._account(key, route, came_from, len(share))
        if len(entry.shares) == header.grade.n:
            self._drop(key)
        return outcome

    def expire(self, now_s: float) -> list[Outcome]:
        """Drops every transfer that waited too long; those that had k shares and no fit name suspects."""
        outcomes: list[Outcome] = []
        for key, entry in list(self._pending.items()):
            if entry.drop_at_s > now_s:
                continue
            if not entry.is_verified and len(entry.shares) >= entry.header.grade.k:
                outcomes.append(Failed(entry.header, tuple(sorted(entry.shares))))
            self._drop(key)
        return outcomes

    def _judge(self, entry: _Pending) -> Outcome | None:
        header = entry.header
        if len(entry.shares) < header.grade.k:
            return None
        indexed = {route + 1: share for route, share in entry.shares.items()}
        if entry.is_verified:
            return self._compare_late(entry, indexed)
        found = sharing.find_secret(
            indexed,
            header.grade.k,
            lambda secret: transfer_tag(entry.encoded, secret) == entry.tag,
            order=list(indexed),
            randomness=self._randomness,
        )
        if found is None:
            return (
                Failed(header, tuple(sorted(entry.shares))) if len(entry.shares) == header.grade.n else None
            )
        entry.is_verified = True
        culprits = tuple(x - 1 for x in found.disagreeing)
        # From here on the entry holds only what verified: late shares are judged against it.
        for route in culprits:
            del entry.shares[route]
        result = Verified(header, entry.tag, found.secret, culprits)
        for route in culprits:
            entry.shares[route] = b""
        return result

    @staticmethod
    def _compare_late(entry: _Pending, indexed: Mapping[int, bytes]) -> Outcome | None:
        good = [x for x, share in indexed.items() if share][: entry.header.grade.k]
        if len(good) < entry.header.grade.k:
            return None
        late = list(indexed)[-1]
        expected = sharing.evaluate({x: indexed[x] for x in good}, late)
        if expected == indexed[late]:
            return None
        entry.shares[late - 1] = b""
        return Disagreed(entry.header, (late - 1,))

    def _account(self, key: tuple[bytes, bytes], route: int, came_from: str, size: int) -> None:
        held = self._by_link.setdefault(came_from, OrderedDict())
        held[key, route] = size
        self._bytes[came_from] = self._bytes.get(came_from, 0) + size
        while len(held) > 1 and (
            len(held) > self._max_pending or self._bytes[came_from] > self._max_pending_bytes
        ):
            (old_key, old_route), old_size = held.popitem(last=False)
            self._bytes[came_from] -= old_size
            old = self._pending.get(old_key)
            if old is not None:
                old.shares.pop(old_route, None)
                old.links.pop(old_route, None)
                if not old.shares:
                    del self._pending[old_key]

    def _drop(self, key: tuple[bytes, bytes]) -> None:
        entry = self._pending.pop(key)
        for route, came_from in entry.links.items():
            size = self._by_link[came_from].pop((key, route), None)
            if size is not None:
                self._bytes[came_from] -= size


# -- encoding helpers -----------------------------------------------------------------------------


def _bad(name: str, problem: str) -> PeerError:
    return PeerError("transfer refused", facts={"field": name, "problem": problem})


def _uint(value: int, size: int) -> bytes:
    try:
        return int(value).to_bytes(size, "big")
    except OverflowError as exc:
        raise ValueError(f"{value} does not fit {size} bytes") from exc


def _text(value: str) -> bytes:
    raw = value.encode("ascii")
    return _uint(len(raw), 1) + raw


class _Cursor:
    """Reads a strict encoding: never past the end, nothing left over."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise _bad("length", "cut short")
        self._at += size
        return self._data[self._at - size : self._at]

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def text(self) -> str:
        try:
            return self.take(self.uint(1)).decode("ascii")
        except UnicodeDecodeError as exc:
            raise _bad("text", "not ASCII") from exc

    def name(self) -> str:
        value = self.text()
        try:
            return names.check_kme_id(value, "kme id")
        except MeshError as exc:
            raise _bad("kme id", "malformed") from exc

    def grade(self) -> Grade:
        text, k, n = self.text(), self.uint(1), self.uint(1)
        try:
            grade = Grade.parse(text)
        except MeshError as exc:
            raise _bad("grade", "unknown") from exc
        if str(grade) != text or (grade.k, grade.n) != (k, n):
            raise _bad("grade", "does not fit k and n")
        return grade

    def end(self) -> None:
        if self._at != len(self._data):
            raise _bad("header", "bytes left over")
