"""Redeeming keys by their IDs: which ID means what, in which order it is checked, once and durably.

Owns protocol 4.3 (tag first; 401 before 400; all or nothing; the budget of wrong tags), 4.4 (durable
before the answer) and the reading side of 4.7 and 4.9. Answers never say which ID failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mesh.core.keyid import KEY_ID_BYTES, KeyAddress, parse, tagger
from mesh.core.network import NetworkDocument
from mesh.core.ranges import Range
from mesh.core.reserve import Held
from mesh.core.transfer import KEY_PART_BYTES, SlotKind
from mesh.errors import CallerError, ErrorReason, NotAuthorizedError, PeerError
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


class Redeemer:
    """Redeems addressed and stored keys for slaves homed here."""

    def __init__(self, around: Surroundings, *, store: Store, reserves: Reserves, lifetime_s: float) -> None:
        self._around = around
        self._store = store
        self._reserves = reserves
        self._lifetime_s = lifetime_s
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
        await self._check_budget(slave, master)
        addressed: dict[int, _Addressed] = {}
        stored: dict[int, StoredKeyRow] = {}
        is_unknown = is_denied = False
        wrong = 0
        for index, key_id in enumerate(key_ids):
            address = None if document.foreign_for(master) is not None else parse(key_id)
            if address is None:
                found = self._find_stored(slave, master, key_id)
                if isinstance(found, StoredKeyRow):
                    stored[index] = found
                elif found is Held.ABSENT:
                    is_denied = True
                else:
                    is_unknown = True
                continue
            outcome, mismatches = self._find_addressed(document, slave, master, key_id, address)
            wrong += mismatches
            if isinstance(outcome, _Addressed):
                addressed[index] = outcome
            elif outcome is Held.REDEEMED:
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
        self, document: NetworkDocument, slave: str, master: str, key_id: bytes, address: KeyAddress
    ) -> tuple[_Addressed | Held, int]:
        """Tries every KME that was the master's home within the key lifetime (4.7, 5.1)."""
        span = Range(address.slot, address.slot + address.slot_count)
        matches = tagger(master, slave).matches
        mismatches = 0
        for source in document.homes_within(master, self._around.now_s(), self._lifetime_s):
            book = self._reserves.inbound(source, address.epoch)
            if book is None:
                continue
            state = book.state(span)
            tag_part = None if state is Held.ABSENT else book.tag_part(address.slot)
            if tag_part is None:
                continue
            if not matches(key_id, tag_part):
                mismatches = 1
                continue
            if state is Held.REDEEMED:
                return state, 0
            return _Addressed(book, span, address.size_bytes), 0
        return Held.ABSENT, mismatches

    def _find_stored(self, slave: str, master: str, key_id: bytes) -> StoredKeyRow | Held:
        row = self._store.read(lambda tables: tables.keystore.stored_key(master, key_id))
        if row is None:
            return Held.REDEEMED
        if row.slaves and slave not in row.slaves:
            return Held.ABSENT
        is_open = row.state is KeyState.HELD and not row.slaves.get(slave, True)
        return row if is_open and row.expires_at_s > self._around.now_s() else Held.REDEEMED

    # taking

    async def _take(
        self,
        slave: str,
        master: str,
        key_ids: Sequence[bytes],
        addressed: dict[int, _Addressed],
        stored: dict[int, StoredKeyRow],
    ) -> tuple[Keys, str]:
        runs = _runs(addressed.values())
        taken: list[_Run] = []
        is_durable = False
        try:
            for run in runs:
                try:
                    run.book.slots.take([run.span], SlotKind.KEYS)
                except PeerError as exc:
                    raise _unknown() from exc
                taken.append(run)
                run.parts = run.book.key_parts(run.span)
            values = _values(runs, addressed)
            values.update({index: row.value for index, row in stored.items()})
            using = [run.book.using([run.span]) for run in runs]

            def change(tables: Tables) -> None:
                for use in using:
                    use(tables)
                for index in stored:
                    tables.keystore.mark_delivered(master, key_ids[index], slave)

            await self._store.commit(change)
            is_durable = True
        finally:
            for run in taken:
                run.book.slots.settle([run.span], is_durable=is_durable)
        for run in taken:
            run.book.wipe([run.span])
        grades = [one.book.grade for one in addressed.values()] + [row.grade for row in stored.values()]
        return [(key_id, values[index]) for index, key_id in enumerate(key_ids)], grades[0]

    # wrong tags

    async def _check_budget(self, slave: str, master: str) -> None:
        self._turn_day()
        pair = (slave, master)
        count = self._wrong.get(pair)
        if count is None and len(self._wrong) < _MAX_PAIRS:
            day = self._wrong_day
            count = self._wrong[pair] = self._store.read(
                lambda tables: tables.wrong_tags.count(slave, master, day)
            )
        if count is not None and count >= WRONG_TAGS_PER_DAY:
            raise _denied()

    async def _count_wrong(self, slave: str, master: str, wrong: int) -> None:
        """Durable before the answer: a restart must not give a prober a fresh budget."""
        day = self._wrong_day
        total = await self._store.commit(lambda tables: tables.wrong_tags.add(slave, master, day, wrong))
        self._wrong[slave, master] = total
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
    starts = {(run.book.reserve_id, slot): run for run in runs for slot in range(run.start, run.stop)}
    values = {}
    for index, one in addressed.items():
        run = starts[one.book.reserve_id, one.span.start]
        at = (one.span.start - run.start) * KEY_PART_BYTES
        values[index] = run.parts[at : at + one.size_bytes]
    return values


def _denied() -> NotAuthorizedError:
    return NotAuthorizedError("not authorised for one or more of these keys")


def _unknown() -> CallerError:
    return CallerError("one or more keys specified are not found on KME", reason=ErrorReason.UNKNOWN_KEY)
