"""The target's end of one reserve epoch: bytes and durability around ``core.reserve.InboundReserve``.

Owns protocol 3.5 and 3.6 (append durably, once), 4.4 (redeem durable before the answer) and 4.7
(retire) as far as bytes are concerned. Large appends lie in reserve files, small ones inside the
database row, so that an on-demand key costs its target one commit and no file. Payload layout: tag
parts of all slots, then key parts of all slots (docs/formats.md "Keys").
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mesh.core.ranges import Range
from mesh.core.reserve import Held, InboundReserve
from mesh.core.transfer import KEY_PART_BYTES, TAG_PART_BYTES, SlotKind
from mesh.store.store import Store
from mesh.store.tables import AppendKind, AppendRow, ReserveRow, Tables

INLINE_MAX_BYTES = 4096
_COLUMN_CACHE = 8


@dataclass(slots=True, repr=False)
class _Piece:
    """One append: its slots and where its payload lies."""

    first: int
    count: int
    kind: SlotKind
    file: str
    file_offset: int
    inline: bytearray | None

    @property
    def stop(self) -> int:
        return self.first + self.count

    def __lt__(self, other: _Piece) -> bool:
        return self.first < other.first

    def __repr__(self) -> str:
        return f"_Piece({self.first}, {self.count}, {self.kind.name})"


class InboundBook:
    """One inbound reserve epoch with its bytes."""

    def __init__(self, store: Store, row: ReserveRow, *, spawn: Callable[..., object]) -> None:
        self.reserve_id = row.reserve_id
        self.source = row.source
        self.epoch = row.epoch
        self.grade = row.grade
        self.slots = InboundReserve(row.source, row.epoch, retired_below=row.retired_below)
        self._store = store
        self._spawn = spawn
        self._pieces: list[_Piece] = []
        self._tag_columns: dict[int, bytes] = {}

    def restore(self, rows: Sequence[AppendRow], used: Sequence[Range]) -> None:
        """Brings appends and the used set back at start-up."""
        for row in rows:
            self._add(row)
        self.slots.restore_used(used)

    def appended(self, span: Range, row: AppendRow) -> None:
        """The append is durable: its slots can be redeemed from now on."""
        self._add(row, span)

    def _add(self, row: AppendRow, span: Range | None = None) -> None:
        kind = SlotKind.KEYS if row.kind is AppendKind.KEYS else SlotKind.SEALED
        inline = None if row.inline is None else bytearray(row.inline)
        insort(self._pieces, _Piece(row.first_slot, row.count, kind, row.file, row.file_offset, inline))
        if span is None:
            self.slots.restore(Range(row.first_slot, row.stop_slot), kind)
        else:
            self.slots.end_append(span, kind, is_durable=True)

    # reading

    def tag_part(self, slot: int) -> bytes | None:
        """The tag part of a slot that is present, redeemed or not; None if its bytes are gone."""
        piece = self._piece_at(slot)
        if piece is None:
            return None
        column = self._tag_columns.get(piece.first)
        if column is None:
            column = self._column(piece, piece.first, piece.stop, keys=False)
            while len(self._tag_columns) >= _COLUMN_CACHE:
                self._tag_columns.pop(next(iter(self._tag_columns)))
            self._tag_columns[piece.first] = column
        at = (slot - piece.first) * TAG_PART_BYTES
        return column[at : at + TAG_PART_BYTES]

    def tag_parts(self, span: Range) -> bytes:
        """Tag parts of consecutive slots that are all present."""
        return self._gather(span, keys=False)

    def key_parts(self, span: Range) -> bytes:
        """Key parts of consecutive slots that are all held, across appends."""
        return self._gather(span, keys=True)

    def state(self, span: Range) -> Held:
        """What a key_ID's slots are (4.3)."""
        return self.slots.state(span)

    def _gather(self, span: Range, *, keys: bool) -> bytes:
        parts = []
        at = span.start
        while at < span.stop:
            piece = self._piece_at(at)
            if piece is None:
                raise KeyError(at)
            stop = min(piece.stop, span.stop)
            parts.append(self._column(piece, at, stop, keys=keys))
            at = stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _column(self, piece: _Piece, start: int, stop: int, *, keys: bool) -> bytes:
        offset, length = _extent(piece, start, stop, keys=keys)
        if piece.inline is not None:
            return bytes(piece.inline[offset : offset + length])
        return self._store.reserve_files.read(piece.file, piece.file_offset + offset, length)

    def _piece_at(self, slot: int) -> _Piece | None:
        index = bisect_right(self._pieces, slot, key=lambda piece: piece.first) - 1
        piece = self._pieces[index] if index >= 0 else None
        return piece if piece is not None and slot < piece.stop else None

    # using

    def using(self, spans: Sequence[Range]) -> Callable[[Tables], None]:
        """A change that makes slots used for ever and wipes key parts that lie in rows.

        The change raises CallerError (and rolls back as a whole) when some are used already.
        """
        wipes = [
            (piece.first, *_extent(piece, start, stop, keys=True))
            for span in spans
            for piece, start, stop in self._cut(span)
            if piece.inline is not None
        ]

        def change(tables: Tables) -> None:
            for span in spans:
                tables.slots.add_used(self.reserve_id, span.start, span.stop)
            for first, offset, length in wipes:
                tables.appends.wipe_inline(self.reserve_id, first, offset, length)

        return change

    def reload_used(self) -> None:
        """Takes over the disk's word on what is used: it outranks memory's."""
        self.slots.restore_used(self._store.read(lambda tables: tables.slots.used_ranges(self.reserve_id)))

    def wipe(self, spans: Iterable[Range]) -> None:
        """After the commit: overwrites the key parts of used slots; drops appends no longer needed."""
        for span in spans:
            for piece, start, stop in self._cut(span):
                offset, length = _extent(piece, start, stop, keys=True)
                if piece.inline is not None:
                    piece.inline[offset : offset + length] = bytes(length)
                else:
                    self._store.reserve_files.wipe(piece.file, piece.file_offset + offset, length)
        while self._pieces and self.slots.is_spent(Range(self._pieces[0].first, self._pieces[0].stop)):
            self._forget(self._pieces[0])

    def retiring(self, below: int) -> Callable[[Tables], list[str]]:
        """A change that retires everything below a slot; returns files to remove after the commit."""
        wipes = [
            (piece.first, *_extent(piece, piece.first, below, keys=keys))
            for piece in self._pieces
            if piece.first < below < piece.stop and piece.inline is not None
            for keys in (False, True)
        ]

        def change(tables: Tables) -> list[str]:
            tables.reserves.set_retired_below(self.reserve_id, below)
            tables.slots.forget_used_below(self.reserve_id, below)
            for first, offset, length in wipes:
                tables.appends.wipe_inline(self.reserve_id, first, offset, length)
            return tables.appends.delete_below(self.reserve_id, below)

        return change

    def retired(self, below: int, files: Sequence[str]) -> None:
        """After the commit: forgets in memory and removes files; cut appends are wiped below the slot."""
        if below <= self.slots.retired_below:
            return
        for piece in [one for one in self._pieces if one.first < below < one.stop]:
            for keys in (False, True):
                offset, length = _extent(piece, piece.first, below, keys=keys)
                if piece.inline is not None:
                    piece.inline[offset : offset + length] = bytes(length)
                else:
                    self._store.reserve_files.wipe(piece.file, piece.file_offset + offset, length)
            self._tag_columns.pop(piece.first, None)
        # Pieces lie apart and in order: those wholly below come first, and there may be a million.
        gone = bisect_right(self._pieces, below, key=lambda piece: piece.stop)
        for piece in self._pieces[:gone]:
            self._tag_columns.pop(piece.first, None)
        del self._pieces[:gone]
        self.slots.retire(below)
        for file in files:
            self._spawn(self._store.reserve_files.remove(file))

    def _forget(self, piece: _Piece) -> None:
        self._pieces.remove(piece)
        self._tag_columns.pop(piece.first, None)
        if piece.file:
            self._spawn(self._forget_file(piece))

    async def _forget_file(self, piece: _Piece) -> None:
        files = await self._store.commit(lambda tables: tables.appends.delete(self.reserve_id, piece.first))
        for file in files:
            await self._store.reserve_files.remove(file)

    def _cut(self, span: Range) -> list[tuple[_Piece, int, int]]:
        cuts = []
        at = span.start
        while at < span.stop:
            piece = self._piece_at(at)
            if piece is None:
                break
            stop = min(piece.stop, span.stop)
            cuts.append((piece, at, stop))
            at = stop
        return cuts


def _extent(piece: _Piece, start: int, stop: int, *, keys: bool) -> tuple[int, int]:
    """Offset and length, within the payload, of a column of slots."""
    size = KEY_PART_BYTES if keys else TAG_PART_BYTES
    base = piece.count * TAG_PART_BYTES if keys else 0
    return base + (start - piece.first) * size, (stop - start) * size
