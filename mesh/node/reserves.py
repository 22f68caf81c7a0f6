"""All reserves of a node: which epochs exist, what of them survives a restart, what they hold.

Owns protocol 3.4 and 4.6 on the side of bookkeeping: one current outbound epoch per peer, any number
of older ones that only wait to be retired, and per source the epochs that keys can still be redeemed
from. Slots and bytes of one epoch are ``OutboundBook`` and ``InboundBook``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mesh.core.reserve import next_epoch
from mesh.core.transfer import MAX_EPOCH, MAX_SLOT
from mesh.node.inbound import InboundBook
from mesh.node.outbound import OutboundBook
from mesh.node.tasks import unbroken
from mesh.store.store import Store
from mesh.store.tables import ReserveRow, ReserveState, Tables

RETIRE_ALL = MAX_SLOT + 1
_LINEAGE = "lineage"
#: A quarter of all epochs is the most that a lie can cost.
_MAX_FIRST_SKIP = (MAX_EPOCH + 1) // 4


@dataclass(slots=True)
class OldEpoch:
    """A closed outbound epoch: after the key lifetime its source retires all of it."""

    reserve_id: int
    epoch: int
    closed_at_s: int


class Reserves:
    """The reserves of one node, loaded once and kept in step with the store.

    Args:
        store: opened, its incarnation begun (which closes outbound epochs after an unproven restart).
        own_id: this KME.
        lifetime_s: the key lifetime.
        spawn: starts a background task.
    """

    def __init__(self, store: Store, own_id: str, *, lifetime_s: float, spawn: Callable[..., object]) -> None:
        self._store = store
        self._own_id = own_id
        self._lifetime_s = lifetime_s
        self._spawn = spawn
        self._outbound: dict[str, OutboundBook] = {}
        self._inbound: dict[tuple[str, int], InboundBook] = {}
        self._highest_in: dict[str, int] = {}
        self._highest_out: dict[str, int] = {}
        self._old: dict[str, list[OldEpoch]] = {}
        self._peer_lineage: dict[str, bytes] = {}
        self._spent_files: list[str] = []
        self.lineage = b""

    def load(self, incarnation: bytes, *, is_proven: bool, now_s: int) -> None:
        """Reads everything back at start-up; the store's changes before it must be done.

        Args:
            incarnation: of this start, 16 bytes.
            is_proven: whether this is a mere process restart (protocol 1.10).
        """

        def read(tables: Tables) -> None:
            lineage = tables.meta.get(_LINEAGE)
            self.lineage = lineage if is_proven and lineage is not None else incarnation
            tables.meta.put(_LINEAGE, self.lineage)
            for row in tables.reserves.list():
                if row.is_outbound:
                    self._load_outbound(tables, row, now_s)
                else:
                    self._load_inbound(tables, row)
            for peer in {*self._outbound, *self._highest_out}:
                known = tables.meta.get(f"{_LINEAGE}/{peer}")
                if known is not None:
                    self._peer_lineage[peer] = known

        self._store.commit_now(read)
        self._store.reserve_files.remove_now(*self._spent_files)
        self._spent_files.clear()

    def _load_outbound(self, tables: Tables, row: ReserveRow, now_s: int) -> None:
        self._highest_out[row.target] = max(
            self._highest_out.get(row.target, -1), tables.reserves.highest_epoch(row.source, row.target)
        )
        times = tables.slots.draw_times(row.reserve_id)
        if row.state is ReserveState.CLOSED:
            closed_at_s = times[-1][1] if times and times[-1][0] == RETIRE_ALL else now_s
            tables.slots.put_draw_time(row.reserve_id, RETIRE_ALL, closed_at_s)
            self._old.setdefault(row.target, []).append(OldEpoch(row.reserve_id, row.epoch, closed_at_s))
            return
        book = OutboundBook(self._store, row, lifetime_s=self._lifetime_s, spawn=self._spawn)
        spent = book.restore(
            tables.appends.list(row.reserve_id), tables.slots.used_ranges(row.reserve_id), times
        )
        for first in spent:
            self._spent_files += tables.appends.delete(row.reserve_id, first)
        self._outbound[row.target] = book

    def _load_inbound(self, tables: Tables, row: ReserveRow) -> None:
        book = InboundBook(self._store, row, spawn=self._spawn)
        book.restore(tables.appends.list(row.reserve_id), tables.slots.used_ranges(row.reserve_id))
        self._inbound[row.source, row.epoch] = book
        self._highest_in[row.source] = max(
            self._highest_in.get(row.source, -1), tables.reserves.highest_epoch(row.source, row.target)
        )

    # outbound

    @property
    def outbound(self) -> dict[str, OutboundBook]:
        """The current outbound epoch by peer."""
        return self._outbound

    def old_epochs(self, peer: str) -> list[OldEpoch]:
        """Closed outbound epochs towards a peer that are not retired yet."""
        return self._old.get(peer, [])

    def old_peers(self) -> list[str]:
        """Peers that have closed epochs."""
        return [peer for peer, epochs in self._old.items() if epochs]

    def next_outbound_epoch(self, peer: str) -> int:
        """The epoch to open next, above all that this end knows.

        Raises:
            ShortageError: EPOCHS_EXHAUSTED.
        """
        return next_epoch(self._highest_out.get(peer, -1))

    def skip_epochs(self, peer: str, highest: int) -> None:
        """The target says that it knows higher epochs.

        Nobody authenticates that, so it is believed once in the life of a data directory: when the very
        first epoch is refused and the peer never confirmed anything, which is how a lost disk looks.
        """
        if self._highest_out.get(peer) == 0 and peer not in self._peer_lineage:
            self._highest_out[peer] = min(highest, _MAX_FIRST_SKIP)

    async def open_outbound(self, peer: str, epoch: int, grade: str) -> OutboundBook:
        """Makes a new outbound epoch durable and current.

        Raises:
            IntegrityError: the epoch was used before.
        """
        return await unbroken(self._open_outbound(peer, epoch, grade))

    async def _open_outbound(self, peer: str, epoch: int, grade: str) -> OutboundBook:
        row = await self._store.commit(
            lambda tables: tables.reserves.open(self._own_id, peer, epoch, grade, is_outbound=True)
        )
        self._highest_out[peer] = max(self._highest_out.get(peer, -1), epoch)
        book = OutboundBook(self._store, row, lifetime_s=self._lifetime_s, spawn=self._spawn)
        self._outbound[peer] = book
        return book

    def retire_outbound(self, book: OutboundBook, now_s: int) -> None:
        """Closes an outbound epoch: the undrawn rest is forfeited, the target learns after a lifetime."""
        if not book.is_open:
            return
        book.close()
        reserve_id = book.reserve_id
        self._old.setdefault(book.peer, []).append(OldEpoch(reserve_id, book.epoch, now_s))
        if self._outbound.get(book.peer) is book:
            del self._outbound[book.peer]
        self._spawn(
            self._store.commit(lambda tables: tables.slots.put_draw_time(reserve_id, RETIRE_ALL, now_s))
        )

    def closed_by(self, old: OldEpoch, now_s: int) -> None:
        """What was closed while the clock had leapt forward was closed by now at the latest."""
        if old.closed_at_s > now_s:
            old.closed_at_s = now_s
            self._spawn(
                self._store.commit(
                    lambda tables: tables.slots.put_draw_time(old.reserve_id, RETIRE_ALL, now_s)
                )
            )

    async def forget_old(self, peer: str, old: OldEpoch) -> None:
        """The target has retired all of a closed epoch."""
        files = await self._store.commit(lambda tables: tables.reserves.delete(old.reserve_id))
        self._old[peer].remove(old)
        await self._store.reserve_files.remove(*files)

    def note_lineage(self, peer: str, lineage: bytes) -> bool:
        """Records the target's latest unproven start; True when it is a new one (protocol 4.6)."""
        known = self._peer_lineage.get(peer)
        if known == lineage:
            return False
        self._peer_lineage[peer] = lineage
        self._spawn(self._store.commit(lambda tables: tables.meta.put(f"{_LINEAGE}/{peer}", lineage)))
        return known is not None

    # inbound

    def inbound(self, source: str, epoch: int) -> InboundBook | None:
        """The reserve of a source and epoch, None if unknown."""
        return self._inbound.get((source, epoch))

    def inbound_books(self, source: str | None = None) -> Iterator[InboundBook]:
        """All inbound epochs, of one source if given."""
        return (book for (owner, _), book in self._inbound.items() if source is None or owner == source)

    def highest_inbound(self, source: str) -> int | None:
        """The highest epoch known of a source, None if there never was one."""
        return self._highest_in.get(source)

    def opening_inbound(self, source: str, epoch: int, grade: str) -> Callable[[Tables], ReserveRow]:
        """A change that opens an inbound epoch and closes the earlier ones to appends."""
        earlier = [book.reserve_id for book in self.inbound_books(source)]

        def change(tables: Tables) -> ReserveRow:
            for reserve_id in earlier:
                tables.reserves.close(reserve_id)
            return tables.reserves.open(source, self._own_id, epoch, grade, is_outbound=False)

        return change

    def opened_inbound(self, row: ReserveRow) -> InboundBook:
        """The epoch's row is durable."""
        book = InboundBook(self._store, row, spawn=self._spawn)
        self._inbound[row.source, row.epoch] = book
        self._highest_in[row.source] = max(self._highest_in.get(row.source, -1), row.epoch)
        return book

    def forget_inbound(self, book: InboundBook) -> None:
        """A closed epoch that its source has retired as a whole; its number stays taken."""
        self._inbound.pop((book.source, book.epoch), None)

    def held_inbound_slots(self, source: str) -> int:
        """Slots of one source that lie here unused, appends in progress included."""
        return sum(book.slots.held_slots + book.slots.appending_slots for book in self.inbound_books(source))
