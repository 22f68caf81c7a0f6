"""Redeeming keys by their IDs: which ID means what, in which order it is checked, once and durably.

Owns protocol 4.3 (tag first; 401 before 400; all or nothing; the budget of wrong tags), 4.4 (durable
before the answer) and the reading side of 4.7 and 4.9. Answers never say which ID failed.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mesh.core.keyid import KEY_ID_BYTES, KeyAddress, parse, tagger
from mesh.core.network import NetworkDocument
from mesh.core.ranges import Range
from mesh.core.reserve import Held
from mesh.core.transfer import KEY_PART_BYTES, SlotKind
from mesh.errors import CallerError, ErrorReason, NotAuthorizedError, PeerError
from mesh.node.expiry import Expiry
from mesh.node.inbound import InboundBook
from mesh.node.keyports import Surroundings
from mesh.node.reserves import Reserves
from mesh.node.supply import Keys
from mesh.store.store import Store
from mesh.store.tables import KeyState, StoredKeyRow, Tables

WRONG_TAGS_PER_DAY = 1000
_DAY_S = 86_400
_MAX_PAIRS = 100_000


@dataclass(frozen=True, slots=True)
class _Addressed:
    """A key_ID whose tag fits slots that are held."""

    book: InboundBook
    span: Range
    size_bytes: int


@dataclass(slots=True)
class _Run:
    """Consecutive slots of one book, read and used together."""

    book: InboundBook
    start: int
    stop: int
    parts: bytes = b""

    @property
    def span(self) -> Range:
        return Range(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Redemption:
    """Addressed keys claimed for somebody else's transaction.

    Attributes:
        use: to run inside it.
        settled: to be told, in any case, whether it became durable.
    """

    keys: Keys
    grade: str
    use: Callable[[Tables], None]
    settled: Callable[[bool], None]

    def __repr__(self) -> str:
        return f"Redemption({len(self.keys)} keys)"


class Redeemer:
    """Redeems addressed and stored keys for slaves homed here."""

    def __init__(
        self, around: Surroundings, expiry: Expiry, *, store: Store, reserves: Reserves, lifetime_s: float
    ) -> None:
        self._around = around
        self._expiry = expiry
        self._store = store
        self._reserves = reserves
        self._lifetime_s = lifetime_s
        #: Keys redeemed since the start, by the KME that shares them (our own: of the key store).
        self.redeemed: dict[str, int] = {}
        self._wrong: dict[tuple[str, str], int] = {}
        self._wrong_day = -1

    async def redeem(
        self, document: NetworkDocument, slave: str, master: str, key_ids: Sequence[bytes]
    ) -> tuple[Keys, str]:
        """The keys behind ``key_ids``, in order, and their grade; all or none.

        Raises:
            CallerError: INVALID_ARGUMENT (malformed), UNKNOWN_KEY (redeemed, delivered or unknown).
            NotAuthorizedError: a key_ID was not issued to this pair, or the pair's budget is used up.
            UnavailableError: the use could not be made durable; nothing was handed out.
        """
        self._check(key_ids)
        budget = self._check_budget(slave, master)
        addressed: dict[int, _Addressed] = {}
        stored: dict[int, StoredKeyRow] = {}
        is_unknown = is_denied = False
        wrong = 0
        # A foreign master is looked up only in the key store (6.1).
        is_foreign = document.foreign_for(master) is not None
        # Every KME that was the master's home within the key lifetime (4.7, 5.1).
        homes = document.homes_within(master, self._expiry.now_s, self._lifetime_s)
        matches = tagger(master, slave).matches
        for index, key_id in enumerate(key_ids):
            address = None if is_foreign else parse(key_id)
            found: StoredKeyRow | _Addressed | Held
            if address is None:
                found = self._find_stored(slave, master, key_id)
            else:
                found, is_wrong = self._find_addressed(homes, matches, key_id, address)
                wrong += is_wrong
                if wrong >= budget:
                    is_denied = True
                    break
            if isinstance(found, _Addressed):
                addressed[index] = found
            elif isinstance(found, StoredKeyRow):
                stored[index] = found
            elif found is Held.REDEEMED:
                is_unknown = True
            else:
                is_denied = True
        if wrong and is_denied:
            await self._count_wrong(slave, master, wrong)
        if is_denied:
            raise _denied()
        if is_unknown:
            raise _unknown()
        return await self._take(slave, master, key_ids, addressed, stored)

    @staticmethod
    def _check(key_ids: Sequence[bytes]) -> None:
        if not key_ids:
            raise CallerError("key_IDs must name at least one key", facts={"field": "key_IDs"})
        if any(len(key_id) != KEY_ID_BYTES for key_id in key_ids):
            raise CallerError("a key_ID must be a UUID", facts={"field": "key_ID"})
        if len(set(key_ids)) != len(key_ids):
            raise CallerError("a key_ID is named twice", facts={"field": "key_IDs"})

    # finding

    def _find_addressed(
        self,
        homes: Sequence[str],
        matches: Callable[[bytes, bytes], bool],
        key_id: bytes,
        address: KeyAddress,
    ) -> tuple[_Addressed | Held, bool]:
        """The slots whose tag part fits, and whether a tag was wrong on slots that are present."""
        epoch, slot, size_bytes = address
        span = Range(slot, slot + address.slot_count)
        is_wrong = False
        for source in homes:
            book = self._reserves.inbound(source, epoch)
            if book is None:
                continue
            state = book.state(span)
            tag_part = None if state is Held.ABSENT else book.tag_part(slot)
            if tag_part is None:
                continue
            if not matches(key_id, tag_part):
                is_wrong = True
            elif state is Held.REDEEMED:
                return state, False
            else:
                return _Addressed(book, span, size_bytes), False
        return Held.ABSENT, is_wrong

    def _find_stored(self, slave: str, master: str, key_id: bytes) -> StoredKeyRow | Held:
        row = self._store.read(lambda tables: tables.keystore.stored_key(master, key_id))
        if row is None:
            return Held.REDEEMED
        if row.slaves and slave not in row.slaves:
            return Held.ABSENT
        is_open = row.state is KeyState.HELD and not row.slaves.get(slave, True)
        return row if is_open and row.expires_at_s > self._expiry.now_s else Held.REDEEMED

    # taking

    async def _take(
        self,
        slave: str,
        master: str,
        key_ids: Sequence[bytes],
        addressed: dict[int, _Addressed],
        stored: dict[int, StoredKeyRow],
    ) -> tuple[Keys, str]:
        taken: list[_Run] = []
        try:
            values, using = _claim(addressed, taken)
            values.update({index: row.value for index, row in stored.items()})

            def change(tables: Tables) -> None:
                for use in using:
                    use(tables)
                for index in stored:
                    tables.keystore.mark_delivered(master, key_ids[index], slave)

            committed = self._store.commit_soon(change)
        except BaseException:
            _settle(taken, is_durable=False)
            raise
        # The use may become durable although our caller gave up: its outcome settles the slots,
        # not our life (4.4: a key whose answer was lost counts as handed out).
        committed.add_done_callback(lambda done: self._committed(taken, done))
        try:
            await asyncio.shield(committed)
        except CallerError as exc:
            raise _unknown() from exc
        source = taken[0].book.source if taken else self._around.own_id
        self.redeemed[source] = self.redeemed.get(source, 0) + len(key_ids)
        grades = [one.book.grade for one in addressed.values()] + [row.grade for row in stored.values()]
        return [(key_id, values[index]) for index, key_id in enumerate(key_ids)], grades[0]

    @staticmethod
    def _committed(taken: Sequence[_Run], done: asyncio.Future[None]) -> None:
        """The disk has answered: used for ever, or free again."""
        error = done.exception()
        _settle(taken, is_durable=error is None)
        if error is None:
            for run in taken:
                run.book.wipe([run.span])
        elif isinstance(error, CallerError):
            # A commit that was reported as failed did reach the disk (a proof copy could not be written).
            for book in {run.book.reserve_id: run.book for run in taken}.values():
                book.reload_used()

    def prepare(
        self, document: NetworkDocument, slave: str, master: str, key_ids: Sequence[bytes]
    ) -> Redemption:
        """Claims addressed keys for a transaction of the caller's (protocol 6.2: a border's).

        Raises:
            CallerError: INVALID_ARGUMENT, or UNKNOWN_KEY for keys that are not held.
            NotAuthorizedError: a key_ID was not issued to this pair.
        """
        self._check(key_ids)
        homes = document.homes_within(master, self._around.now_s(), self._lifetime_s)
        matches = tagger(master, slave).matches
        addressed: dict[int, _Addressed] = {}
        for index, key_id in enumerate(key_ids):
            address = parse(key_id)
            if address is None:
                raise _unknown()
            found, is_wrong = self._find_addressed(homes, matches, key_id, address)
            if is_wrong:
                raise _denied()
            if not isinstance(found, _Addressed):
                raise _unknown()
            addressed[index] = found
        taken: list[_Run] = []
        try:
            values, using = _claim(addressed, taken)
        except BaseException:
            _settle(taken, is_durable=False)
            raise

        def use(tables: Tables) -> None:
            for one in using:
                one(tables)

        def settled(is_durable: bool) -> None:
            _settle(taken, is_durable=is_durable)
            for run in taken if is_durable else ():
                run.book.wipe([run.span])

        keys = [(key_id, values[index]) for index, key_id in enumerate(key_ids)]
        return Redemption(keys, addressed[0].book.grade, use, settled)

    # wrong tags

    def _check_budget(self, slave: str, master: str) -> int:
        """Wrong tags that the pair may still send today; raises when none are left."""
        self._turn_day()
        pair = (slave, master)
        count = self._wrong.get(pair)
        if count is None:
            day = self._wrong_day
            count = self._store.read(lambda tables: tables.wrong_tags.count(slave, master, day))
            if len(self._wrong) >= _MAX_PAIRS:
                self._wrong.clear()
            self._wrong[pair] = count
        if count >= WRONG_TAGS_PER_DAY:
            raise _denied()
        return WRONG_TAGS_PER_DAY - count

    async def _count_wrong(self, slave: str, master: str, wrong: int) -> None:
        """Counted at once, so that calls side by side share one budget; durable before the answer."""
        day = self._wrong_day
        self._wrong[slave, master] = self._wrong.get((slave, master), 0) + wrong
        total = await self._store.commit(lambda tables: tables.wrong_tags.add(slave, master, day, wrong))
        if total >= WRONG_TAGS_PER_DAY:
            self._around.alarms.raise_alarm(
                f"keys/{slave}/{master}/wrong-tags"[:200],
                "critical",
                f"{WRONG_TAGS_PER_DAY} wrong key_IDs today from {slave} for {master}; refused until tomorrow",
                "ask who operates this SAE: it guesses key_IDs",
            )

    def _turn_day(self) -> None:
        day = int(self._around.now_s()) // _DAY_S
        if day > self._wrong_day:
            self._wrong_day = day
            self._wrong.clear()


def _runs(addressed: Iterable[_Addressed]) -> list[_Run]:
    """Adjacent slots of one book as one run: one read, one row, one wipe."""
    found = sorted(addressed, key=lambda one: (one.book.reserve_id, one.span.start))
    runs: list[_Run] = []
    for one in found:
        last = runs[-1] if runs else None
        if last is not None and last.book is one.book and last.stop == one.span.start:
            last.stop = one.span.stop
        else:
            runs.append(_Run(one.book, one.span.start, one.span.stop))
    return runs


def _values(runs: Sequence[_Run], addressed: dict[int, _Addressed]) -> dict[int, bytes]:
    """The key of each address, cut from its run."""
    by_book: dict[int, list[_Run]] = {}
    for run in runs:
        by_book.setdefault(run.book.reserve_id, []).append(run)
    values = {}
    for index, one in addressed.items():
        found = by_book[one.book.reserve_id]
        run = found[bisect_right(found, one.span.start, key=lambda run: run.start) - 1]
        at = (one.span.start - run.start) * KEY_PART_BYTES
        values[index] = run.parts[at : at + one.size_bytes]
    return values


def _claim(
    addressed: dict[int, _Addressed], taken: list[_Run]
) -> tuple[dict[int, bytes], list[Callable[[Tables], None]]]:
    """Takes the slots (noting them in ``taken``), reads the keys; with the changes that use them up."""
    runs = _runs(addressed.values())
    for run in runs:
        try:
            run.book.slots.take([run.span], SlotKind.KEYS)
        except PeerError as exc:
            raise _unknown() from exc
        taken.append(run)
        run.parts = run.book.key_parts(run.span)
    return _values(runs, addressed), [run.book.using([run.span]) for run in runs]


def _settle(taken: Sequence[_Run], *, is_durable: bool) -> None:
    for run in taken:
        run.book.slots.settle([run.span], is_durable=is_durable)


def _denied() -> NotAuthorizedError:
    return NotAuthorizedError("not authorised for one or more of these keys")


def _unknown() -> CallerError:
    return CallerError("one or more keys specified are not found on KME", reason=ErrorReason.UNKNOWN_KEY)
