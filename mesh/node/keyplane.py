"""The key plane's one face: what services call, and what runs in the background.

Owns admission (protocol 5.2: a gateway acts only for SAEs homed here and registered to it; access
table, quotas, limits) and the assembly of the parts. What a key is, is decided in the core; where its
bytes come from in ``supply``, ``redeem`` and ``keystore``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from mesh.core.border_rules import BorderConfig
from mesh.core.names import check_sae_id
from mesh.core.network import NetworkDocument
from mesh.core.policy import AccessRule, AccessTable, Quotas, check_registered
from mesh.core.reserve import slots_per_key
from mesh.core.sealed import MIN_SLOTS
from mesh.core.transfer import KEY_PART_BYTES
from mesh.errors import (
    NOTHING_HAPPENED,
    CallerError,
    ErrorReason,
    MeshError,
    NotAuthorizedError,
    RolledBackError,
    ShortageError,
)
from mesh.node.appends import Appender
from mesh.node.border.border import Border
from mesh.node.deposits import InboundDeposits
from mesh.node.establish import Establisher
from mesh.node.expiry import Expiry
from mesh.node.foreign import ForeignKeys
from mesh.node.handovers import Handovers
from mesh.node.jobs import Jobs, open_epoch_attachment
from mesh.node.keyports import DocumentView, Incarnation, KeyPlaneConfig, PeerCaller, RoutePort, Surroundings
from mesh.node.keystore import LOCAL_GRADE, StoredKeys
from mesh.node.paths import Paths
from mesh.node.ports import LinkPlanePort
from mesh.node.publishing import ALARM as DIRECTORY_DOUBTS
from mesh.node.redeem import Redeemer
from mesh.node.relay import Relay, ShareRouter
from mesh.node.reports import Reports
from mesh.node.reserves import RETIRE_ALL, Reserves
from mesh.node.retire import Retirer
from mesh.node.routewatch import CarefulRoutes, RouteWatch
from mesh.node.supply import Keys, Supply
from mesh.node.tasks import Background, unbroken
from mesh.ops.logging import clean_request_id, serving
from mesh.store.store import Store
from mesh.store.tables import Tables
from mesh.v1.admin_pb2 import ReserveStatus
from mesh.v1.keys_pb2 import KeyByIdRequest, KeyRequest, Level, StatusRequest, StatusResponse

_EXPIRE_EVERY_S = 2.0
_RETIRE_EVERY_S = 30.0
# For the way back, and for what one element takes beyond its own time.
_ANSWER_MARGIN_S = 0.5
_WATCH_EVERY_S = 0.5
_MAX_PAIRS = 16_384
_MAX_PREFILL_CHECKS = 100_000
_TOMBSTONE_DAYS = 2
_ALL_EXPIRED_S = 1 << 40

_LOG = logging.getLogger("keymesh.keyplane")


@dataclass(frozen=True, slots=True)
class DeliveredKeys:
    """Keys handed out, as (key_ID, value), and the grade under which they were made."""

    keys: Keys
    grade: str

    def __repr__(self) -> str:
        return f"DeliveredKeys({len(self.keys)} keys, {self.grade})"


Delivered = DeliveredKeys | MeshError


@dataclass(frozen=True, slots=True)
class _Pair:
    """What is known of a pair while document and table stay the same."""

    rule: AccessRule
    home: str
    """The slave's home; for a foreign one the border that its keys leave through."""
    is_foreign: bool = False


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A key request that passed every check."""

    request: KeyRequest
    size_bytes: int
    slaves: dict[str, list[str]]
    foreign: frozenset[str] = frozenset()

    @property
    def single_peer(self) -> str | None:
        """The peer of an addressed key; None for keys of the key store and for foreign ones."""
        if len(self.slaves) != 1 or self.foreign:
            return None
        peer, saes = next(iter(self.slaves.items()))
        return peer if len(saes) == 1 else None

    @property
    def single_border(self) -> str | None:
        """The border towards a foreign slave, if that is the only slave."""
        if len(self.slaves) != 1 or not self.foreign:
            return None
        border, saes = next(iter(self.slaves.items()))
        return border if len(saes) == 1 else None


class KeyPlane:
    """All of a node's key delivery. Build it, set ``links.handler`` to ``shares``, ``start`` it.

    Args:
        store: opened, with this start's incarnation begun.
        links: the link plane; its handler becomes ``shares``.
        directory: where the network document in force comes from.
        routes: finds routes over that document.
        peers: calls other nodes.
    """

    def __init__(
        self,
        around: Surroundings,
        config: KeyPlaneConfig,
        *,
        store: Store,
        links: LinkPlanePort,
        directory: DocumentView,
        routes: RoutePort,
        peers: PeerCaller,
        incarnation: Incarnation,
    ) -> None:
        self._around = around
        self._config = config
        self._store = store
        self._directory = directory
        self._incarnation = incarnation
        self.tasks = Background()
        self.watch = RouteWatch(around.alarms, around.metrics, around.monotonic_s)
        paths = Paths(
            around,
            links=links,
            routes=CarefulRoutes(routes, self.watch),
            directory=directory,
            watch=self.watch,
            lane_floor_bytes=config.lane_floor_bytes,
        )
        reports = Reports(around, peers, self.tasks.spawn)
        self.reserves = Reserves(
            store, around.own_id, lifetime_s=config.key_lifetime_s, spawn=self.tasks.spawn
        )
        self.deposits = InboundDeposits(
            around,
            store=store,
            reserves=self.reserves,
            directory=directory,
            incarnation=incarnation,
            lifetime_s=config.key_lifetime_s,
        )
        self.appender = Appender(
            around,
            store=store,
            reserves=self.reserves,
            directory=directory,
            peers=peers,
            deposits=self.deposits,
            tasks=self.tasks,
            incarnation=incarnation,
            inbound_max_bytes=config.inbound_max_bytes,
            watch=self.watch,
            reports=reports,
        )
        self.establisher = Establisher(
            around,
            paths=paths,
            directory=directory,
            reserves=self.reserves,
            peers=peers,
            tasks=self.tasks,
            watch=self.watch,
            open_epoch=lambda _peer, epoch: open_epoch_attachment(around.randomness(16), epoch),
        )
        self.jobs = Jobs(
            around,
            store=store,
            reserves=self.reserves,
            establisher=self.establisher,
            peers=peers,
            tasks=self.tasks,
        )
        self.handovers = Handovers(around, store=store, jobs=self.jobs, tasks=self.tasks)
        self.supply = Supply(
            around,
            reserves=self.reserves,
            paths=paths,
            establisher=self.establisher,
            tasks=self.tasks,
            config=config,
        )
        self.appender.renewed = self.supply.doubt
        self.stored = StoredKeys(
            around,
            links=links,
            supply=self.supply,
            handovers=self.handovers,
            lifetime_s=config.key_lifetime_s,
        )
        self.expiry = Expiry(around, store=store, lifetime_s=config.key_lifetime_s, spawn=self.tasks.spawn)
        self.redeemer = Redeemer(
            around, self.expiry, store=store, reserves=self.reserves, lifetime_s=config.key_lifetime_s
        )
        self.border = Border(
            around,
            config.border or BorderConfig(),
            store=store,
            document=self._document,
            routes=routes,
            has_material=self._has_sealed,
            deposits=self.deposits,
            jobs=self.jobs,
            redeemer=self.redeemer,
            tasks=self.tasks,
            owner=self.handovers,
            lifetime_s=config.key_lifetime_s,
        )
        self.handovers.exporter = self.border
        self.deposits.foreign = self.border.messages
        self.foreign = ForeignKeys(
            around,
            config.buffers,
            store=store,
            document=self._document,
            supply=self.supply,
            stored=self.stored,
            handovers=self.handovers,
            border=self.border,
            tasks=self.tasks,
            lifetime_s=config.key_lifetime_s,
        )
        self.retirer = Retirer(
            self.expiry, store=store, reserves=self.reserves, jobs=self.jobs, lifetime_s=config.key_lifetime_s
        )
        relay = Relay(around, links=links, directory=directory, bulk_floor_bytes=config.lane_floor_bytes)
        self.shares = ShareRouter(around, relay=relay, appender=self.appender, reports=reports)
        self._quotas = Quotas()
        self._pairs: dict[tuple[str, str], _Pair] = {}
        self._pairs_document: NetworkDocument | None = None
        self._is_stopping = False
        #: What forbids to serve, if anything does: a rolled-back disk would hand keys out twice.
        self.stopped_by: Callable[[], MeshError | None] = lambda: None

    # life

    async def start(self) -> None:
        """Reads the reserves back, goes on with open jobs, starts the background work."""
        self.reserves.load(
            self._incarnation.incarnation,
            is_proven=self._incarnation.is_proven,
            now_s=int(self._around.now_s()),
        )
        self.handovers.load()
        self.foreign.buffers.load()
        self.jobs.resume()
        self.border.start()
        self.tasks.keep("buffers", self.foreign.buffers.run)
        self.tasks.keep("supply", self.supply.run)
        self.tasks.keep("upkeep", self._maintain)

    async def stop(self) -> None:
        """Takes no more requests and ends the background work; what is under way is forfeited."""
        self._is_stopping = True
        await self.tasks.close()

    async def _maintain(self) -> None:
        last_retire_s = self._around.monotonic_s()
        while True:
            self.supply.prefilled = self._prefill_peers()
            self.appender.expire()
            self.watch.tidy()
            self.expiry.look()
            now_s = self._around.monotonic_s()
            if now_s - last_retire_s >= min(_RETIRE_EVERY_S, self._config.key_lifetime_s / 8):
                last_retire_s = now_s
                await self.retirer.run_once()
                await self._expire_stored()
            await asyncio.sleep(_EXPIRE_EVERY_S)

    async def _expire_stored(self) -> None:
        now_s = int(self.expiry.now_s)
        try:
            expired = await self._store.commit(lambda tables: tables.keystore.expire(now_s))
            self._around.metrics.stored_expired.inc(len(expired))
            await self._store.commit(
                lambda tables: tables.keystore.forget_tombstones(now_s - _TOMBSTONE_DAYS * 86_400)
            )
            await self._store.commit(lambda tables: tables.wrong_tags.forget_before(now_s // 86_400 - 1))
        except MeshError as exc:
            _LOG.warning("expiry failed", extra={"cause": str(exc)})

    def _prefill_peers(self) -> frozenset[str]:
        """Peers that are homes of SAEs which SAEs homed here may talk to."""
        document = self._directory.document
        if document is None or not self._config.prefill:
            return frozenset()
        own = document.saes_of(self._around.own_id)
        # Keys for foreign slaves are drawn towards their borders.
        peers = {prefix.border for prefix in document.foreign if own} - {self._around.own_id}
        checks = 0
        for entry in document.saes.values():
            if entry.home == self._around.own_id or entry.home in peers:
                continue
            for sae in own:
                checks += 1
                if checks > _MAX_PREFILL_CHECKS:
                    return frozenset(peers)
                if self._may(sae, entry.sae_id):
                    peers.add(entry.home)
                    break
        return frozenset(peers)

    def _has_sealed(self, peer: str) -> bool:
        """Whether sealed messages can leave to a peer without any establish."""
        book = self.establisher.current(peer)
        return book is not None and book.is_open and book.slots.sealed_slots >= MIN_SLOTS

    def _may(self, caller: str, peer: str) -> bool:
        try:
            self._config.access.rule(caller, peer)
        except NotAuthorizedError:
            return False
        return True

    # admission

    def set_access(self, access: AccessTable) -> None:
        """Takes over a changed access table; requests under way were admitted by the old one."""
        self._config = replace(self._config, access=access)
        self._pairs.clear()

    def check_serving(self) -> None:
        """Raises what forbids to serve, for instance RolledBackError (invariant 4)."""
        problem = self.stopped_by()
        if problem is not None:
            raise problem

    async def forget_after_rollback(self) -> None:
        """The operator goes on with a disk that was rolled back: keys held here may have been handed
        out already in the life that it forgot, so none of them is from now on (invariant 6).

        Raises:
            UnavailableError: that could not be made durable; the node stays stopped.
        """
        if isinstance(self.stopped_by(), RolledBackError):
            await unbroken(self._void_held())
            self._around.alarms.clear(DIRECTORY_DOUBTS)

    async def _void_held(self) -> None:
        books = list(self.reserves.inbound_books())
        retiring = [book.retiring(RETIRE_ALL) for book in books]

        def change(tables: Tables) -> list[list[str]]:
            tables.keystore.expire(_ALL_EXPIRED_S)
            return [retire(tables) for retire in retiring]

        files = await self._store.commit(change)
        for book, own in zip(books, files, strict=True):
            book.retired(RETIRE_ALL, own)
        _LOG.warning("keys held before a rollback are void", extra={"reserves": len(books)})

    def _document(self) -> NetworkDocument:
        self.check_serving()
        document = self._directory.document
        if document is None:
            raise ShortageError(
                "no network document yet", reason=ErrorReason.DIRECTORY_UNAVAILABLE, retry_after_s=1.0
            )
        if self._is_stopping:
            raise ShortageError(
                "the node is stopping", reason=ErrorReason.SHUTTING_DOWN, facts=NOTHING_HAPPENED
            )
        return document

    def _pair(self, document: NetworkDocument, master: str, slave: str) -> _Pair:
        """The access rule and the slave's home.

        Raises:
            NotAuthorizedError: the master is not homed here, or the table does not admit the pair.
            CallerError: UNKNOWN_SAE.
        """
        if document is not self._pairs_document or len(self._pairs) > _MAX_PAIRS:
            self._pairs.clear()
            self._pairs_document = document
        pair = self._pairs.get((master, slave))
        if pair is None:
            check_sae_id(master, "master_SAE_ID")
            check_sae_id(slave, "slave_SAE_ID")
            if document.home(master) != self._around.own_id:
                raise NotAuthorizedError("the calling SAE is not registered at this KME")
            rule = self._config.access.rule(master, slave)
            is_foreign = document.home(slave) is None
            home = document.border_for(slave) if is_foreign else document.home(slave)
            if home is None or slave == master:
                raise CallerError(
                    "slave_SAE_ID is not known in this network"
                    if home is None
                    else "an SAE needs another as peer",
                    reason=ErrorReason.UNKNOWN_SAE,
                    facts={"field": "slave_SAE_ID"},
                )
            pair = self._pairs[master, slave] = _Pair(rule, home, is_foreign)
        return pair

    def _admit(self, request: KeyRequest) -> _Admitted:
        document = self._document()
        master, slave = request.master_sae_id, request.slave_sae_id
        pair = self._pair(document, master, slave)
        additional = request.additional_slave_sae_ids
        size = self._config.limits.check(request.number, request.size_bytes or None, len(additional))
        pair.rule.check(request.number, size)
        slaves: dict[str, list[str]] = {pair.home: [slave]}
        foreign = {slave} if pair.is_foreign else set()
        for other in dict.fromkeys(additional):
            if other == slave:
                continue
            other_pair = self._pair(document, master, other)
            other_pair.rule.check(request.number, size)
            slaves.setdefault(other_pair.home, []).append(other)
            if other_pair.is_foreign:
                foreign.add(other)
        rate = pair.rule.rate or self._config.quota
        if rate is not None:
            self._quotas.take(master, slave, rate, request.number * size, self._around.monotonic_s())
        return _Admitted(request, size, slaves, frozenset(foreign))

    # delivering

    async def get_keys(
        self,
        requests: Sequence[KeyRequest],
        *,
        timeout_s: float | None = None,
        saes: Sequence[str] | None = None,
    ) -> list[Delivered]:
        """Keys for masters: one result per request, in order; one failure touches no other.

        Requests that the reserves can answer are answered without any wait, the others before
        ``timeout_s``: a caller that no longer waits would lose what was drawn for all of them.
        """
        self._around.metrics.keys_asked.labels("draw").inc(sum([one.number for one in requests]))
        results: list[Delivered | None] = []
        waiting: list[tuple[int, _Admitted]] = []
        for request in requests:
            result: Delivered | None = None
            try:
                check_registered(saes, request.master_sae_id)
                admitted = self._admit(request)
                result = self._deliver_now(admitted)
                if result is None:
                    waiting.append((len(results), admitted))
            except MeshError as exc:
                result = self._refused("draw", exc, request.request_id)
            results.append(result)
        if waiting:
            outcomes = await asyncio.gather(
                *(self._deliver(admitted, self._limit_s(timeout_s)) for _, admitted in waiting)
            )
            for (index, _), outcome in zip(waiting, outcomes, strict=True):
                results[index] = outcome
        return [result for result in results if result is not None]

    def _limit_s(self, timeout_s: float | None) -> float:
        """How long one request may take so that the answer for all reaches a caller who waits so long."""
        own_s = self._config.request_timeout_s
        return own_s if timeout_s is None else min(own_s, max(timeout_s - _ANSWER_MARGIN_S, timeout_s / 2))

    def _deliver_now(self, admitted: _Admitted) -> DeliveredKeys | None:
        peer = admitted.single_peer
        if peer is None or peer == self._around.own_id:
            return None
        request = admitted.request
        keys = self.supply.draw_now(
            peer, request.master_sae_id, request.slave_sae_id, request.number, admitted.size_bytes
        )
        if keys is None:
            return None
        return DeliveredKeys(keys, self.reserves.outbound[peer].grade)

    async def _deliver(self, admitted: _Admitted, timeout_s: float) -> Delivered:
        with serving(clean_request_id(admitted.request.request_id)):
            return await self._deliver_served(admitted, timeout_s)

    async def _deliver_served(self, admitted: _Admitted, timeout_s: float) -> Delivered:
        request = admitted.request
        peer = admitted.single_peer
        try:
            async with asyncio.timeout(timeout_s + min(_ANSWER_MARGIN_S, timeout_s) / 2):
                if (border := admitted.single_border) is not None:
                    keys, grade = await self.foreign.deliver(
                        request.master_sae_id,
                        request.slave_sae_id,
                        border,
                        request.number,
                        admitted.size_bytes,
                        timeout_s=timeout_s,
                        request_id=request.request_id,
                    )
                elif peer is None or peer == self._around.own_id:
                    keys, grade = await self.stored.create(
                        request.master_sae_id,
                        admitted.slaves,
                        request.number,
                        admitted.size_bytes,
                        timeout_s=timeout_s,
                        request_id=request.request_id,
                        foreign=admitted.foreign,
                    )
                else:
                    keys, grade = await self.supply.draw(
                        peer,
                        request.master_sae_id,
                        request.slave_sae_id,
                        request.number,
                        admitted.size_bytes,
                        timeout_s=timeout_s,
                        request_id=request.request_id,
                    )
        except MeshError as exc:
            return self._refused("draw", exc, request.request_id)
        except TimeoutError:
            late = ShortageError(
                "keys could not be had in time", reason=ErrorReason.DEADLINE_EXCEEDED, retry_after_s=1.0
            )
            return self._refused("draw", late, request.request_id)
        return DeliveredKeys(keys, grade)

    def _refused(self, method: str, error: MeshError, request_id: str) -> MeshError:
        self._around.metrics.keys_refused.labels(method, error.reason.value).inc()
        facts = {"method": method, "reason": error.reason.value, "request_id": clean_request_id(request_id)}
        _LOG.info("keys refused", extra={**facts, "cause": error.message})
        return error

    async def get_keys_by_id(
        self,
        requests: Sequence[KeyByIdRequest],
        *,
        timeout_s: float | None = None,
        saes: Sequence[str] | None = None,
    ) -> list[Delivered]:
        """Keys for slaves by ID: one result per request, in order; all share one durable commit."""
        self._around.metrics.keys_asked.labels("redeem").inc(sum([len(one.key_ids) for one in requests]))
        limit_s = self._limit_s(timeout_s)
        return list(await asyncio.gather(*(self._redeem(request, limit_s, saes) for request in requests)))

    async def _redeem(
        self, request: KeyByIdRequest, timeout_s: float, saes: Sequence[str] | None
    ) -> Delivered:
        try:
            check_registered(saes, request.slave_sae_id)
            document = self._document()
            slave, master = request.slave_sae_id, request.master_sae_id
            check_sae_id(slave, "slave_SAE_ID")
            check_sae_id(master, "master_SAE_ID")
            now_s = self._around.now_s()
            # An SAE that moved redeems older keys at its old home (4.7).
            if self._around.own_id not in document.homes_within(slave, now_s, self._config.key_lifetime_s):
                raise NotAuthorizedError("the calling SAE is not registered at this KME")
            self._config.access.rule(slave, master)
            if len(request.key_ids) > self._config.limits.max_keys_per_request:
                raise CallerError(
                    "too many key_IDs",
                    reason=ErrorReason.LIMIT_EXCEEDED,
                    facts={"field": "key_IDs", "at_most": self._config.limits.max_keys_per_request},
                )
            async with asyncio.timeout(timeout_s):
                keys, grade = await self.redeemer.redeem(document, slave, master, request.key_ids)
        except MeshError as exc:
            return self._refused("redeem", exc, request.request_id)
        except TimeoutError:
            late = ShortageError(
                "the disk did not answer in time", reason=ErrorReason.DEADLINE_EXCEEDED, retry_after_s=1.0
            )
            return self._refused("redeem", late, request.request_id)
        return DeliveredKeys(keys, grade)

    # levels

    def status(self, request: StatusRequest, *, saes: Sequence[str] | None = None) -> StatusResponse:
        """What the calling SAE, as master, can get for the other SAE now.

        Raises:
            NotAuthorizedError, CallerError: as for a key request.
        """
        check_registered(saes, request.caller_sae_id)
        document = self._document()
        pair = self._pair(document, request.caller_sae_id, request.peer_sae_id)
        limits = self._config.limits
        size = limits.default_key_size_bytes
        is_here = pair.home == self._around.own_id
        if pair.is_foreign:
            grade = LOCAL_GRADE if is_here else str(document.policy(self._around.own_id, pair.home).grade)
            held = self.foreign.buffers.level(request.caller_sae_id, request.peer_sae_id)
        elif is_here:
            grade = LOCAL_GRADE
            held = self.stored.local_level_bytes() // size
        else:
            grade = str(document.policy(self._around.own_id, pair.home).grade)
            book = self.establisher.current(pair.home)
            held = book.slots.available(slots_per_key(size)) if book is not None and book.is_open else 0
        ceiling = max(held, self._config.high_water_bytes // size)
        return StatusResponse(
            source_kme_id=self._around.own_id,
            target_kme_id=pair.home,
            key_size_bits=size * 8,
            min_key_size_bits=limits.min_key_size_bytes * 8,
            max_key_size_bits=limits.max_key_size_bytes * 8,
            stored_key_count=held,
            max_key_count=ceiling,
            max_key_per_request=limits.max_keys_per_request,
            max_sae_id_count=limits.max_additional_slaves,
            grade=grade,
        )

    def levels(self, peer: str = "") -> list[Level]:
        """Levels of the reserves, of one peer if named."""
        peers = {*self.reserves.outbound, *(book.source for book in self.reserves.inbound_books())}
        return [self._level(kme) for kme in sorted(peers) if not peer or kme == peer]

    def _level(self, kme: str) -> Level:
        book = self.reserves.outbound.get(kme)
        inbound = sum(one.slots.held_key_slots for one in self.reserves.inbound_books(kme))
        return Level(
            peer_kme_id=kme,
            epoch=0 if book is None else book.epoch,
            grade="" if book is None else book.grade,
            outbound_bytes=0 if book is None else book.level_bytes,
            inbound_bytes=inbound * KEY_PART_BYTES,
            high_water_bytes=self._config.high_water_bytes,
        )

    async def watch_levels(self, peer: str = "") -> AsyncIterator[Level]:
        """Levels now, and again whenever they changed; at most twice a second per peer."""
        last: dict[str, bytes] = {}
        while not self._is_stopping:
            for level in self.levels(peer):
                encoded = level.SerializeToString(deterministic=True)
                if last.get(level.peer_kme_id) != encoded:
                    last[level.peer_kme_id] = encoded
                    yield level
            await asyncio.sleep(_WATCH_EVERY_S)

    def reserve_levels(self) -> dict[str, int]:
        """Drawable key bytes by peer, for the directory."""
        return {peer: book.level_bytes for peer, book in self.reserves.outbound.items()}

    def reserve_status(self) -> list[ReserveStatus]:
        """Every reserve epoch, for operators; counts of slots only."""
        found = [
            ReserveStatus(
                peer_kme_id=peer,
                is_outbound=True,
                epoch=book.epoch,
                grade=book.grade,
                assigned_slots=book.slots.assign_position,
                drawn_slots=book.slots.draw_position,
                held_key_slots=book.slots.held_slots,
                held_sealed_slots=book.slots.sealed_slots,
            )
            for peer, book in sorted(self.reserves.outbound.items())
        ]
        found += [
            ReserveStatus(
                peer_kme_id=book.source,
                is_outbound=False,
                epoch=book.epoch,
                grade=book.grade,
                held_key_slots=book.slots.held_key_slots,
                held_sealed_slots=book.slots.held_sealed_slots,
                redeemed_slots=book.slots.redeemed_slots,
            )
            for book in sorted(self.reserves.inbound_books(), key=lambda one: (one.source, one.epoch))
        ]
        return found
