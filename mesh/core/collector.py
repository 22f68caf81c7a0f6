"""The target's collector: shares come in, a secret that its tag verifies comes out, and who disagreed.

Owns protocol 3.7 (bounds per incoming link) and 3.8 (who is named, and as what). Decides only; it
holds no clock, no randomness and no I/O.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from mesh.core import sharing
from mesh.core.search import Search
from mesh.core.sharing import Blame
from mesh.core.transfer import TransferHeader, TransferId, transfer_tag

_Key = tuple[bytes, bytes]

#: Share bytes combined at one go: some 20 ms.
_SLICE_BYTES = 4 << 20


class Verdict(Enum):
    """What a route is named for (3.8).

    LIED: proven, given fewer than k liars. SUSPECTED: it may have lied, or been framed. SILENT: no
    share came over it although k others did.
    """

    LIED = "lied"
    SUSPECTED = "suspected"
    SILENT = "silent"


@dataclass(frozen=True, slots=True)
class Verified:
    """A secret whose tag fits."""

    header: TransferHeader
    tag: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"Verified({self.header.transfer})"


@dataclass(frozen=True, slots=True)
class Failed:
    """All shares are here, or those that will come, and no k of them fit the tag."""

    header: TransferHeader
    tag: bytes


@dataclass(frozen=True, slots=True)
class Named:
    """Routes of a transfer, by index, and what they did."""

    header: TransferHeader
    verdict: Verdict
    routes: tuple[int, ...]


Outcome = Verified | Failed | Named


@dataclass(slots=True, repr=False)
class _Pending:
    """The shares of one transfer under one header and tag.

    Attributes:
        shares: by route; emptied once verified and over the bound on checked bytes.
        links: the link that each route's share came on; also of shares that were let go.
        search: for the subset that verifies; None once found.
        used: its share indices; empty before.
        blame: who was named last.
    """

    header: TransferHeader
    encoded: bytes
    tag: bytes
    drop_at_s: float
    search: Search | None
    shares: dict[int, bytes] = field(default_factory=dict)
    links: dict[int, str] = field(default_factory=dict)
    used: tuple[int, ...] = ()
    blame: Blame = field(default_factory=Blame)

    @property
    def is_searched(self) -> bool:
        """Whether there is nothing to try among the shares that came."""
        return self.search is None or self.search.is_over

    @property
    def is_complete(self) -> bool:
        return len(self.links) == self.header.grade.n - len(self.header.left_out)

    def indexed(self) -> dict[int, bytes]:
        return {route + 1: share for route, share in self.shares.items()}


class Collector:
    """Gathers the shares of transfers that end here until k of them fit the tag.

    Bounded per incoming link (count and bytes); the oldest share of the *same* link is dropped
    first, so one link cannot push out another's shares (protocol 3.7). Shares of a verified transfer
    wait only so that late ones can be compared with them; over ``max_checked_bytes`` the oldest go.

    Args:
        max_pending: shares held per incoming link.
        max_pending_bytes: bytes held per incoming link.
        max_checked_bytes: bytes held of verified transfers, in all.
        keep_s: how long shares wait for their siblings, by the caller's clock (a header's expiry is
            the source's clock, which may differ).
        randomness: n -> n fresh bytes, for the consistency check of bulk shares.
    """

    def __init__(
        self,
        *,
        max_pending: int,
        max_pending_bytes: int,
        max_checked_bytes: int,
        keep_s: float,
        randomness: Callable[[int], bytes],
    ) -> None:
        self._max_pending = max_pending
        self._max_pending_bytes = max_pending_bytes
        self._max_checked_bytes = max_checked_bytes
        self._keep_s = keep_s
        self._randomness = randomness
        self._pending: dict[_Key, _Pending] = {}
        self._by_transfer: dict[TransferId, list[_Key]] = {}
        self._by_link: dict[str, OrderedDict[tuple[_Key, int], int]] = {}
        self._bytes: dict[str, int] = {}
        self._checked: OrderedDict[_Key, int] = OrderedDict()
        self._checked_bytes = 0
        self._light: OrderedDict[_Key, None] = OrderedDict()
        self._searching: dict[_Key, int] = {}

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def is_searching(self) -> bool:
        """Whether :meth:`work` has something to do."""
        return bool(self._searching)

    def work(self) -> list[Outcome]:
        """Goes on, for a slice of time, with what ``add`` could not finish; keys on demand first."""
        if not self._searching:
            return []
        key = min(self._searching, key=self._searching.__getitem__)
        return self._advance(key, self._pending[key])

    def pending(self, transfer: TransferId, tag: bytes) -> tuple[int, ...] | None:
        """The routes whose shares are here while no k of them fit; None if that is not the state."""
        entries = (self._pending[key] for key in self._by_transfer.get(transfer, ()))
        arrived = [tuple(sorted(entry.links)) for entry in entries if entry.tag == tag and not entry.used]
        return max(arrived, key=len, default=None)

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
    ) -> list[Outcome]:
        """Takes one share that passed ``check_hop`` and ``check_target``.

        Shares of one transfer whose headers or tags differ are kept apart, so a liar cannot spoil
        the honest group. A second share for the same route or over the same link is ignored. Where
        many subsets have to be tried, call ``work`` while ``is_searching``.
        """
        if header.grade.n == 1:
            if transfer_tag(encoded, share) == tag:
                return [Verified(header, tag, share)]
            return [Failed(header, tag), Named(header, Verdict.SUSPECTED, (0,))]
        key = (encoded, tag)
        entry = self._pending.get(key)
        if entry is None:
            search = Search(
                header.grade.k,
                lambda secret: transfer_tag(encoded, secret) == tag,
                randomness=self._randomness,
            )
            entry = self._pending[key] = _Pending(header, encoded, tag, now_s + self._keep_s, search)
            self._by_transfer.setdefault(header.transfer, []).append(key)
        if route in entry.links or came_from in entry.links.values():
            return []
        entry.links[route] = came_from
        if entry.search is not None or entry.shares:
            entry.shares[route] = share
            self._account(key, route, came_from, len(share))
        if entry.search is not None:
            entry.search.add(route + 1, share)
        return self._advance(key, entry)

    def expire(self, now_s: float) -> list[Outcome]:
        """Drops every transfer that waited too long, naming routes where k shares came.

        With fewer, liars alone may have invented the transfer, and would frame the others as silent.
        """
        outcomes: list[Outcome] = []
        due = [(key, entry) for key, entry in self._pending.items() if entry.drop_at_s <= now_s]
        for _, entry in due:
            if len(entry.links) >= entry.header.grade.k:
                outcomes += self._missing(entry)
        for key, _ in due:
            self._drop(key)
        return outcomes

    # judging

    def _advance(self, key: _Key, entry: _Pending) -> list[Outcome]:
        """A slice of work on the shares so far; what they say, and the end when all of them are here."""
        outcomes = self._compare(entry) if entry.search is None else self._search(key, entry, entry.search)
        if entry.is_complete and entry.is_searched and key in self._pending:
            if not entry.used:
                outcomes += self._failed(entry)
            self._drop(key)
        return outcomes

    def _search(self, key: _Key, entry: _Pending, search: Search) -> list[Outcome]:
        """Whether the shares so far hold a secret that fits."""
        found = search.run(_SLICE_BYTES)
        self._searching.pop(key, None)
        if found is None:
            if not search.is_over:
                self._searching[key] = entry.header.length_bytes
            return []
        entry.search, entry.used = None, found.used
        blame = sharing.blame(entry.indexed(), entry.header.grade.k, entry.used, randomness=self._randomness)
        outcomes = [Verified(entry.header, entry.tag, found.secret), *self._blamed(entry, blame)]
        if not entry.is_complete:
            outcomes += self._keep_checked(key, entry)
        return outcomes

    def _keep_checked(self, key: _Key, entry: _Pending) -> list[Outcome]:
        """Keeps a verified transfer for its late shares; the oldest such give way."""
        self._checked[key] = sum(map(len, entry.shares.values()))
        self._checked_bytes += self._checked[key]
        while self._checked_bytes > self._max_checked_bytes:
            oldest = next(iter(self._checked))
            self._let_go(self._pending[oldest], oldest)
        outcomes: list[Outcome] = []
        while len(self._checked) + len(self._light) > self._max_pending:
            oldest = next(iter(self._light or self._checked))
            outcomes += self._missing(self._pending[oldest])
            self._drop(oldest)
        return outcomes

    def _compare(self, entry: _Pending) -> list[Outcome]:
        """A share came after the secret had verified; unjudged if those before it were let go."""
        if not entry.shares:
            return []
        indexed = entry.indexed()
        late = next(reversed(indexed))
        expected = sharing.evaluate({x: indexed[x] for x in entry.used}, late)
        if expected == indexed[late] and not entry.blame.named:
            return []
        blame = sharing.blame(indexed, entry.header.grade.k, entry.used, randomness=self._randomness)
        return self._blamed(entry, blame)

    @staticmethod
    def _blamed(entry: _Pending, blame: Blame) -> list[Outcome]:
        if blame == entry.blame:
            return []
        entry.blame = blame
        verdict = Verdict.LIED if blame.is_certain else Verdict.SUSPECTED
        return [Named(entry.header, verdict, tuple(x - 1 for x in blame.named))]

    @staticmethod
    def _failed(entry: _Pending) -> list[Outcome]:
        suspects = tuple(sorted(entry.links))
        return [Failed(entry.header, entry.tag), Named(entry.header, Verdict.SUSPECTED, suspects)]

    def _missing(self, entry: _Pending) -> list[Outcome]:
        """What is left to say of a transfer that waits no longer: k or more of its shares came."""
        header = entry.header
        outcomes: list[Outcome] = []
        if not entry.used:
            outcomes += self._failed(entry)
        missing = set(range(header.grade.n)) - set(header.left_out) - set(entry.links)
        siblings = (self._pending[key] for key in self._by_transfer[header.transfer])
        relabelled = missing & {route for other in siblings if other is not entry for route in other.links}
        # A share under another header or tag: the route's doing, or the source's own.
        for verdict, routes in ((Verdict.SUSPECTED, relabelled), (Verdict.SILENT, missing - relabelled)):
            if routes:
                outcomes.append(Named(header, verdict, tuple(sorted(routes))))
        return outcomes

    # bounds

    def _account(self, key: _Key, route: int, came_from: str, size: int) -> None:
        held = self._by_link.setdefault(came_from, OrderedDict())
        held[key, route] = size
        self._bytes[came_from] = self._bytes.get(came_from, 0) + size
        while len(held) > 1 and (
            len(held) > self._max_pending or self._bytes[came_from] > self._max_pending_bytes
        ):
            old_key, old_route = next(iter(held))
            old = self._pending[old_key]
            if old.used:
                self._let_go(old, old_key)
                continue
            self._release(old_key, old_route, came_from)
            del old.shares[old_route], old.links[old_route]
            if old.search is not None:
                old.search.remove(old_route + 1)
            if not old.links:
                self._drop(old_key)

    def _let_go(self, entry: _Pending, key: _Key) -> None:
        """Forgets the shares of a verified transfer; which routes came stays known."""
        for route in entry.shares:
            self._release(key, route, entry.links[route])
        entry.shares.clear()
        if key in self._checked:
            self._checked_bytes -= self._checked.pop(key)
            self._light[key] = None

    def _release(self, key: _Key, route: int, came_from: str) -> None:
        self._bytes[came_from] -= self._by_link[came_from].pop((key, route), 0)

    def _drop(self, key: _Key) -> None:
        entry = self._pending[key]
        self._let_go(entry, key)
        del self._pending[key]
        self._light.pop(key, None)
        self._searching.pop(key, None)
        keys = self._by_transfer[entry.header.transfer]
        keys.remove(key)
        if not keys:
            del self._by_transfer[entry.header.transfer]
