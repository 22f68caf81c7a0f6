"""What was asked and answered, and what that proves: lost, differing, doubled, reused keys.

A key is acknowledged when the 200 of ``enc_keys`` was read. It is lost if the first ``dec_keys``
for it that reached a node fails while it has not expired. A ``dec_keys`` whose answer was cut may
have happened: should the key be gone at the next try, it counts as indeterminate.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from mesh.core.keyid import parse
from mesh.core.ranges import Range
from tests.torture.client import Key
from tests.torture.pads import Overlaps

_MAX_NOTES = 50


class Fate(Enum):
    """Where one acknowledged key stands for one slave."""

    HELD = "held"
    UNSURE = "unsure"  # a dec_keys for it was cut
    FETCHED = "fetched"
    INDETERMINATE = "indeterminate"
    LOST = "lost"


@dataclass(slots=True)
class Issued:
    """An acknowledged key.

    Attributes:
        key_id, value: as the master got them.
        master: its SAE.
        fates: by slave.
    """

    key_id: str
    value: bytes = field(repr=False)
    master: str
    fates: dict[str, Fate]


@dataclass(frozen=True, slots=True)
class Fetchable:
    """Keys that one slave can ask for in one call."""

    master: str
    slave: str
    keys: tuple[Issued, ...]


class History:
    """All of a run's keys; safe to use from several threads.

    Args:
        homes: node of each SAE.
    """

    def __init__(self, homes: Mapping[str, str]) -> None:
        self._homes = homes
        self._lock = threading.Lock()
        self._issued: dict[str, Issued] = {}
        self._open: dict[tuple[str, str], dict[str, Issued]] = defaultdict(dict)
        self._slots: dict[tuple[str, str, int], Overlaps] = defaultdict(Overlaps)
        self._values: set[bytes] = set()
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []
        self.slowest_s = 0.0

    # -- what happened ----------------------------------------------------------------------

    def asked(self, what: str, took_s: float = 0.0) -> None:
        """One request was made; ``what`` says how it went."""
        with self._lock:
            self.counts["requests"] += 1
            self.counts[what] += 1
            self.slowest_s = max(self.slowest_s, took_s)

    def wrong(self, text: str) -> None:
        """Something was answered that never may be; never with key bytes."""
        with self._lock:
            self._wrong(text)

    def _wrong(self, text: str, kind: str = "wrong") -> None:
        self.counts[kind] += 1
        if len(self.notes) < _MAX_NOTES:
            self.notes.append(f"{kind}: {text}")

    def acknowledged(self, master: str, slaves: Sequence[str], keys: Iterable[Key]) -> None:
        """A 200 of ``enc_keys`` was read."""
        with self._lock:
            for key in keys:
                self.counts["keys"] += 1
                if key.key_id in self._issued or (len(key.value) >= 16 and key.value in self._values):
                    self._wrong(f"{key.key_id} was handed out before", "reused")
                self._values.add(key.value)
                self._note_slots(master, slaves[0], key)
                issued = Issued(key.key_id, key.value, master, dict.fromkeys(slaves, Fate.HELD))
                self._issued[key.key_id] = issued
                for slave in slaves:
                    self._open[master, slave][key.key_id] = issued

    def _note_slots(self, master: str, slave: str, key: Key) -> None:
        address = parse(uuid.UUID(key.key_id).bytes)
        if address is None:
            return
        lane = self._homes[master], self._homes[slave], address.epoch
        used = Range(address.slot, address.slot + address.slot_count)
        if self._slots[lane].add(used):
            self._wrong(f"{key.key_id} lies on slots that another key lies on", "reused")

    def fetched(self, batch: Fetchable, keys: Sequence[Key]) -> None:
        """A 200 of ``dec_keys`` was read."""
        with self._lock:
            got = {key.key_id: key.value for key in keys}
            if len(keys) != len(got) or got.keys() != {key.key_id for key in batch.keys}:
                self._wrong(f"{batch.slave} asked for {len(batch.keys)} keys and got others", "differing")
            for key in batch.keys:
                if key.fates[batch.slave] is Fate.FETCHED:
                    self._wrong(f"{key.key_id} was delivered twice to {batch.slave}", "doubled")
                if key.key_id in got and got[key.key_id] != key.value:
                    self._wrong(f"{key.key_id} differs at {batch.slave}", "differing")
                self.counts["fetched"] += key.fates[batch.slave] is not Fate.FETCHED
                self._settle(key, batch.slave, Fate.FETCHED)

    def cut(self, batch: Fetchable) -> None:
        """A ``dec_keys`` may have happened."""
        with self._lock:
            for key in batch.keys:
                if key.fates[batch.slave] is Fate.HELD:
                    key.fates[batch.slave] = Fate.UNSURE

    def refused(self, batch: Fetchable, status: int) -> None:
        """A ``dec_keys`` for one key, or for several none of which was tried before, was refused."""
        with self._lock:
            for key in batch.keys:
                fate = key.fates[batch.slave]
                if fate is Fate.HELD:
                    self._wrong(f"{key.key_id} is refused to {batch.slave} with {status}", "lost")
                    self._settle(key, batch.slave, Fate.LOST)
                elif fate is Fate.UNSURE:
                    self.counts["indeterminate"] += 1
                    self._settle(key, batch.slave, Fate.INDETERMINATE)

    def _settle(self, key: Issued, slave: str, fate: Fate) -> None:
        key.fates[slave] = fate
        self._open[key.master, slave].pop(key.key_id, None)

    # -- what to ask for next ---------------------------------------------------------------

    @property
    def open_count(self) -> int:
        """Keys not fetched yet, per slave."""
        with self._lock:
            return sum(len(group) for group in self._open.values())

    def take_open(self, rng: random.Random | None, at_most: int) -> Fetchable | None:
        """Keys to fetch: several that nobody tried before, or one that was tried. They are reserved.

        Args:
            rng: chooses; None takes the first.
            at_most: keys in one call.
        """
        with self._lock:
            groups = [pair for pair, group in self._open.items() if group]
            if not groups:
                return None
            master, slave = groups[0] if rng is None else rng.choice(groups)
            group = self._open[master, slave]
            ids = list(group)
            start = 0 if rng is None else rng.randrange(len(ids))
            first = group[ids[start]]
            chosen = [first]
            if first.fates[slave] is Fate.HELD:
                rest = (group[one] for one in ids[start + 1 : start + at_most])
                chosen += [key for key in rest if key.fates[slave] is Fate.HELD]
            for key in chosen:
                del group[key.key_id]
            return Fetchable(master, slave, tuple(chosen))

    def take_just(self, master: str, slave: str, keys: Iterable[Key]) -> Fetchable:
        """Reserve just these, for fetching at once; those that somebody else took are left out."""
        with self._lock:
            group = self._open[master, slave]
            return Fetchable(
                master, slave, tuple(group.pop(key.key_id) for key in keys if key.key_id in group)
            )

    def put_back(self, batch: Fetchable) -> None:
        """What is still to be fetched may be chosen again."""
        with self._lock:
            for key in batch.keys:
                if key.fates[batch.slave] in (Fate.HELD, Fate.UNSURE):
                    self._open[batch.master, batch.slave][key.key_id] = key

    def some(self, rng: random.Random, fate: Fate) -> tuple[Issued, str] | None:
        """A random key that stands so for a slave; looks at a bounded number of them."""
        with self._lock:
            ids = list(self._issued)
            for _ in range(32 if ids else 0):
                key = self._issued[rng.choice(ids)]
                slaves = [slave for slave, own in key.fates.items() if own is fate]
                if slaves:
                    return key, rng.choice(slaves)
            return None

    @property
    def values(self) -> list[bytes]:
        """The bytes of all keys: what must not be found in any log."""
        with self._lock:
            return [key.value for key in self._issued.values()]
