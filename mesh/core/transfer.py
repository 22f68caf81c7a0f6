"""Transfers: the header every hop and the tag see, the secret's layout, the confirm.

Owns protocol 3.1 to 3.4: what a transfer is, and who may send which share over which link. When a
secret counts as established is ``mesh.core.collector``'s. The byte layouts stand in docs/formats.md
("Keys").
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from mesh.core import names
from mesh.core.gf128 import secret_tag
from mesh.core.network import MAX_ROUTE_NODES, Grade, NetworkDocument, check_routes
from mesh.errors import ErrorReason, MeshError, PeerError, ShortageError

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
    ``attachment`` is ciphertext under the attachment pad inside the secret. ``left_out`` are routes, by
    index and ascending, over which no share was sent: the source's doing, so nobody was silent there.
    """

    transfer: TransferId
    slot_count: int
    kind: SlotKind
    grade: Grade
    routes: tuple[tuple[str, ...], ...]
    expires_at_s: int
    attachment: bytes = b""
    left_out: tuple[int, ...] = ()

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
            ShortageError: GRADE_UNAVAILABLE: the routes and the attachment are too long for one header.
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
        if self.left_out:
            parts.append(_uint(sum(1 << route for route in self.left_out), 2))
        encoded = b"".join(parts)
        if len(encoded) > MAX_HEADER_BYTES:
            raise ShortageError(
                "the routes of the pair's grade are too long for a transfer's header",
                reason=ErrorReason.GRADE_UNAVAILABLE,
                facts={"header_bytes": len(encoded), "at_most": MAX_HEADER_BYTES},
                retry_after_s=2.0,
            )
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
        left_out = () if cursor.is_at_end else cursor.left_out(grade)
        cursor.end()
        if kind not in (SlotKind.KEYS, SlotKind.SEALED):
            raise _bad("kind", "neither keys nor sealed")
        header = cls(
            transfer, slot_count, SlotKind(kind), grade, tuple(routes), expires_at_s, attachment, left_out
        )
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
    if route in header.left_out:
        raise _bad("route", "was left out by the source")
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

    def left_out(self, grade: Grade) -> tuple[int, ...]:
        bits = self.uint(2)
        routes = tuple(route for route in range(16) if bits >> route & 1)
        if not routes or routes[-1] >= grade.n or grade.n - len(routes) < grade.k:
            raise _bad("left out", "does not leave k of the n routes")
        return routes

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._data)

    def end(self) -> None:
        if self._at != len(self._data):
            raise _bad("header", "bytes left over")
