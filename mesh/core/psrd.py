"""PSRD tables: which lane bytes a courier file holds, and whether they continue a lane.

Owns the header of a courier file (issue and import agree on it byte for byte) and the one
rule that keeps offsets single: a table continues both lanes exactly where they end, or it
is refused. Must not read files or draw randomness: ``mesh.sources.psrd_file`` and
``mesh.node.psrd`` do.

A header, version 1 (big-endian; names are ASCII after one byte of length):

====== ===== ========================================================
offset bytes
====== ===== ========================================================
0      16    table id, random
16     8     when it was made, seconds since 1970
24     28    hub-to-client lane: epoch (4), where the lane ended before
             (8), first offset (8), length (8)
52     28    client-to-hub lane, the same
80     ..    domain id, hub id, client id
====== ===== ========================================================

"Hub" is the end that issues. Between "where the lane ended before" and the first offset lie
tables that the hub discarded (their courier was lost): a hole at both ends.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mesh.core.names import check_domain_id, check_kme_id
from mesh.core.ranges import Range
from mesh.errors import CallerError, ErrorReason

TABLE_ID_BYTES = 16
#: A direction holds at least the root and a few hellos.
MIN_DIRECTION_BYTES = 4096
MAX_DIRECTION_BYTES = 1 << 40
MAX_HEADER_BYTES = 512
_MAX_OFFSET = 1 << 62
_FIXED = struct.Struct(">16sQIQQQIQQQ")


@dataclass(frozen=True, slots=True)
class LaneSpan:
    """The part of one lane that a table fills, in bytes.

    Attributes:
        epoch: of the lane.
        previous_end: where the lane ended at both ends before this table.
        start: first offset of the table; beyond ``previous_end`` only past discarded tables.
        length_bytes: how many.
    """

    epoch: int
    previous_end: int
    start: int
    length_bytes: int

    @property
    def stop(self) -> int:
        """First offset after the table."""
        return self.start + self.length_bytes

    @property
    def span(self) -> Range:
        """The lane offsets of the table."""
        return Range(self.start, self.stop)

    @property
    def hole(self) -> Range | None:
        """Offsets of discarded tables just before, None for none."""
        return Range(self.previous_end, self.start) if self.start > self.previous_end else None

    def check(self, name: str) -> None:
        """Refuse what no hub writes.

        Raises:
            CallerError: names the field.
        """
        checks = (
            ("epoch", 0 <= self.epoch < 1 << 32),
            ("previous_end", 0 <= self.previous_end <= self.start),
            ("length", MIN_DIRECTION_BYTES <= self.length_bytes <= MAX_DIRECTION_BYTES),
            ("start", self.stop <= _MAX_OFFSET),
        )
        for field, holds in checks:
            if not holds:
                raise header_error(f"{name} {field}", "is out of bounds")


@dataclass(frozen=True, slots=True)
class PsrdHeader:
    """What a courier file says of its table; nothing in it is secret.

    Attributes:
        table_id: 16 random bytes.
        domain_id: of both ends.
        hub_id: the issuing end.
        client_id: the importing end.
        from_hub: the lane that the hub writes.
        to_hub: the lane that the client writes.
        made_at_s: seconds since 1970.
    """

    table_id: bytes
    domain_id: str
    hub_id: str
    client_id: str
    from_hub: LaneSpan
    to_hub: LaneSpan
    made_at_s: int

    @property
    def total_bytes(self) -> int:
        """Table bytes of both directions."""
        return self.from_hub.length_bytes + self.to_hub.length_bytes

    def encode(self) -> bytes:
        """The canonical encoding."""
        spans: list[int] = []
        for span in (self.from_hub, self.to_hub):
            spans += (span.epoch, span.previous_end, span.start, span.length_bytes)
        fixed = _FIXED.pack(self.table_id, self.made_at_s, *spans)
        names = (self.domain_id, self.hub_id, self.client_id)
        return fixed + b"".join(bytes([len(name)]) + name.encode("ascii") for name in names)

    @classmethod
    def decode(cls, data: bytes) -> PsrdHeader:
        """Read a header strictly: one encoding per header, nothing left over.

        Raises:
            CallerError: names the field, the problem and the remedy.
        """
        if len(data) < _FIXED.size:
            raise header_error("header", "is too short")
        table_id, made_at_s, *numbers = _FIXED.unpack_from(data)
        names: list[str] = []
        at = _FIXED.size
        for field, check in (("domain", check_domain_id), ("hub", check_kme_id), ("client", check_kme_id)):
            length = data[at] if at < len(data) else 0
            raw = data[at + 1 : at + 1 + length]
            at += 1 + length
            try:
                names.append(check(raw.decode("ascii"), field))
            except (CallerError, UnicodeDecodeError) as error:
                raise header_error(f"{field} id", "is malformed") from error
        if at != len(data):
            raise header_error("header", "has bytes left over")
        if names[1] == names[2]:
            raise header_error("client id", "is the hub's own")
        header = cls(
            table_id, names[0], names[1], names[2], LaneSpan(*numbers[:4]), LaneSpan(*numbers[4:]), made_at_s
        )
        header.from_hub.check("hub-to-client")
        header.to_hub.check("client-to-hub")
        return header


def header_error(field: str, problem: str) -> CallerError:
    """A courier file whose header cannot be what a hub wrote."""
    return CallerError(
        f"courier file: {field} {problem}; the file is damaged or not a courier file: fetch it again"
    )


@dataclass(frozen=True, slots=True)
class LaneState:
    """What an end knows of one of its lanes before it takes a table.

    Attributes:
        epoch: present epoch.
        filled: end of all that was ever put on it in that epoch.
        is_unused: nothing was put on it and no byte of it was used.
    """

    epoch: int
    filled: int
    is_unused: bool


def check_parties(header: PsrdHeader, *, domain_id: str, own_id: str, peer_id: str) -> None:
    """Whether the file is for us and from the hub it is imported for.

    Raises:
        CallerError: it names another domain, hub or client.
    """
    checks = (
        ("domain", header.domain_id, domain_id, "import it in its own domain"),
        ("client", header.client_id, own_id, "it is meant for another node: import it there"),
        ("hub", header.hub_id, peer_id, "name the hub that issued it, and check who gave you the file"),
    )
    for field, found, wanted, remedy in checks:
        if found != wanted:
            raise CallerError(
                f"courier file: wrong {field}; {remedy}",
                facts={"field": field, "file": found, "here": wanted},
            )


def check_continues(span: LaneSpan, lane: LaneState, name: str) -> bool:
    """Whether a table continues a lane exactly where it ends.

    Returns:
        True when the lane has to begin the table's epoch first, which only an unused lane may.

    Raises:
        CallerError: it does not; says which way and what to do.
    """
    facts = {"lane": name, "file_epoch": span.epoch, "lane_epoch": lane.epoch}
    if span.epoch > lane.epoch:
        if not lane.is_unused:
            raise CallerError(
                "courier file: epoch is newer than the lane's, because the hub has reset the link; reset it "
                "here too (keymesh links reset), then import",
                facts=facts,
            )
        if span.previous_end:
            raise _missing(span.previous_end, 0, name)
        return True
    if span.epoch < lane.epoch:
        raise CallerError(
            "courier file: epoch is older than the lane's: the link was reset since; wipe the file and have "
            "the hub issue a new one",
            facts=facts,
        )
    if span.previous_end > lane.filled:
        raise _missing(span.previous_end, lane.filled, name)
    if span.previous_end < lane.filled:
        raise CallerError(
            "courier file: offset lies before the end of the lane: the file, or a later one, was imported "
            "already; wipe it (keymesh psrd wipe)",
            reason=ErrorReason.INVALID_ARGUMENT,
            facts={"lane": name, "offset": span.previous_end, "lane_end": lane.filled},
        )
    return False


def _missing(previous_end: int, filled: int, name: str) -> CallerError:
    return CallerError(
        "courier file: offset lies past the end of the lane: an earlier file of this hub is missing; import "
        "that one first, or have the hub discard it (keymesh psrd discard) and issue a new one",
        facts={"lane": name, "offset": previous_end, "lane_end": filled},
    )
