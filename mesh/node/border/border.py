"""A border, put together: what gateways ask, what the key plane asks, what runs in the background.

Every change of the store runs with a ledger, and what follows from it in memory runs once it is durable,
whether or not the caller still waits (a commit that happened must not be half remembered).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mesh.core.border import Inbound, Outbound, OutboundEvent
from mesh.core.border_rules import AckStatus, Association, BorderConfig, Problem
from mesh.core.network import NetworkDocument
from mesh.errors import MeshError, NotAuthorizedError
from mesh.node.border.calls import Calls
from mesh.node.border.exchanges import Exchanges
from mesh.node.border.ledger import OPEN_OUTBOUND, Ledger
from mesh.node.border.messages import BorderMessages
from mesh.node.border.ports import Ack, After, Arrival, DocumentPort
from mesh.node.border.posts import Posts
from mesh.node.border.routing import Refused, Routing
from mesh.node.border.settlements import Settlements
from mesh.node.deposits import InboundDeposits
from mesh.node.jobs import Jobs
from mesh.node.keyports import AlarmPort, RoutePort, Surroundings
from mesh.node.redeem import Redeemer
from mesh.node.tasks import Background
from mesh.store.store import Store
from mesh.store.tables import CallRow, PostRow, Tables
from mesh.v1.border_pb2 import LeasedJob

_SWEEP_EVERY_S = 0.5
_FORGET_EVERY_S = 60.0
_FORGET_AT_ONCE = 256

T = TypeVar("T")
Results = dict[bytes, AckStatus]

_LOG = logging.getLogger("keymesh.border")


class LocalOwner(Protocol):
    """Where this node's own SAEs' exports wait (``mesh.node.handovers``)."""

    def tell_local(self, tables: Tables, after: After, export_id: bytes, failed: Sequence[bytes]) -> bool:
        """See ``LedgerPorts``."""
        ...

    def take_back(self, tables: Tables, after: After, key_id: bytes, *, border: str) -> bool:
        """See ``LedgerPorts``."""
        ...


@dataclass(slots=True)
class _Watch:
    """A synchronous request that waits for its keys."""

    open_ids: set[bytes]
    results: Results
    done: asyncio.Event


class Border:
    """One node's border.

    Args:
        has_material: whether sealed messages to a KME can be had without establishing any.
    """

    def __init__(
        self,
        around: Surroundings,
        config: BorderConfig,
        *,
        store: Store,
        document: DocumentPort,
        routes: RoutePort,
        has_material: Callable[[str], bool],
        deposits: InboundDeposits,
        jobs: Jobs,
        redeemer: Redeemer,
        tasks: Background,
        owner: LocalOwner,
        lifetime_s: float,
    ) -> None:
        self._around = around
        self.config = config
        self._store = store
        self._document = document
        self._deposits = deposits
        self._tasks = tasks
        self._owner = owner
        self._watches: dict[str, list[_Watch]] = {}
        self._checked: NetworkDocument | None = None
        self._forget_at_s = 0.0
        self._routing = Routing(
            around.own_id, config=config, document=document, routes=routes, has_material=has_material
        )
        self._exchanges = Exchanges(around, config=config, document=document, lifetime_s=lifetime_s)
        self._settlements = Settlements(self._exchanges, now_s=around.now_s, heard=self._heard)
        self._posts = Posts(around, config=config, store=store, settlements=self._settlements, run=self._run)
        self._calls = Calls(
            around,
            store=store,
            jobs=jobs,
            tasks=tasks,
            run=self._run,
            origin=self._origin,
            lifetime_s=lifetime_s,
        )
        self.messages = BorderMessages(
            around,
            ports=self,
            document=document,
            routing=self._routing,
            exchanges=self._exchanges,
            deposits=deposits,
            redeemer=redeemer,
            first_state=self._first_state,
        )

    # life

    def start(self) -> None:
        """Goes on with what a restart interrupted."""
        self._posts.resume()
        self._calls.resume()
        if self._store.read(lambda tables: tables.border.unsettled("local")):
            self._tasks.spawn(self._forsake_local())
        if self.config.gateways or self.counts():
            self._tasks.keep("border", self._sweep)

    async def _forsake_local(self) -> None:
        """Nobody waits any more for exports that this node's own SAEs asked for before the restart."""

        def change(ledger: Ledger) -> None:
            border = ledger.tables.border
            for exchange in border.unsettled("local"):
                for key in border.keys(exchange.exchange_id):
                    if key.state in OPEN_OUTBOUND:
                        ledger.outbound(key, OutboundEvent.GIVE_UP)

        await self._run(change)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_EVERY_S)
            for step in (self._posts.sweep, self._end_overdue_carries, self._check_prefixes, self._forget):
                try:
                    await step()
                except MeshError as exc:
                    _LOG.warning("border upkeep failed", extra={"cause": str(exc)})
                except Exception:  # noqa: BLE001 - the other steps, and the next round, must go on
                    _LOG.exception("border upkeep failed")

    async def _check_prefixes(self) -> None:
        """Peers' prefixes must not cover our own SAEs (protocol 6.1): they would never be heard for them."""
        document = self._document()
        if document is self._checked:
            return
        self._checked = document
        for peer in self.config.peers:
            alarm_id = f"border/{peer.kme_id}/prefixes"
            covered = next((sae for sae in document.saes if peer.serves(sae)), None)
            if covered is None:
                self._around.alarms.clear(alarm_id)
                continue
            self._around.alarms.raise_alarm(
                alarm_id,
                "warning",
                f"prefixes of {peer.kme_id} cover {covered}, which is homed here; it is not heard for it",
                "narrow border.peers[].prefixes, or rename that SAE",
            )

    async def _end_overdue_carries(self) -> None:
        now_ms = int(self._around.now_s() * 1000)
        overdue = self._store.read(
            lambda tables: tables.border.overdue(now_ms, is_outbound=False, states=(Inbound.HELD,))
        )
        if overdue:
            await self._run(lambda ledger: ledger.end_carries([one.exchange_id for one in overdue]))

    async def _forget(self) -> None:
        if self._around.monotonic_s() < self._forget_at_s:
            return
        self._forget_at_s = self._around.monotonic_s() + _FORGET_EVERY_S
        before_s = int(self._around.now_s() - self.config.keep_s)
        for peer in {peer for _, peer, _ in self.counts()}:

            def change(tables: Tables, peer: str = peer) -> int:
                return tables.border.forget_settled(peer, before_s, _FORGET_AT_ONCE)

            while await self._store.commit(change):
                pass

    # what gateways ask

    def check_gateway(self, gateway: str) -> None:
        """Only configured gateways may import keys (protocol 5.2).

        Raises:
            NotAuthorizedError: this one is not.
        """
        if gateway not in self.config.gateways:
            raise NotAuthorizedError("this gateway is not configured as border")

    async def import_keys(
        self,
        peer_id: str,
        association: Association,
        keys: Sequence[Arrival],
        *,
        callback: str,
        extension: bytes,
        wait_s: float = 0.0,
    ) -> Results:
        """Takes keys of a peer in, all or none, durably.

        Args:
            wait_s: above 0: waits for the outcome of every key.

        Returns:
            With ``wait_s``: what became of each key; empty otherwise.

        Raises:
            Refused: nothing was stored by this request; ``is_held`` says whether from an earlier one.
            ShortageError, UnavailableError: nothing is known; the peer tries again.
        """
        peer = self._routing.peer(peer_id)
        places: dict[str, list[str]] | Refused
        try:
            self._routing.check_callback(peer, callback, is_synchronous=wait_s > 0)
            _check_ids([key.key_id for key in keys])
            places = self._routing.places(peer, association)
        except Refused as refusal:
            places = refusal
        watch = self._watch(peer_id, [key.key_id for key in keys]) if wait_s > 0 else None

        def change(ledger: Ledger) -> None:
            self._exchanges.import_keys(
                ledger, peer, association, keys, callback=callback, extension=extension, places=places
            )

        return await self._run_watched(peer_id, change, watch, wait_s)

    async def ack_keys(self, peer_id: str, acks: Sequence[Ack]) -> None:
        """Applies a peer's acks, all or none.

        Raises:
            Refused: NOT_PRESENT.
        """
        peer = self._routing.peer(peer_id)
        try:
            await self._run(lambda ledger: self._settlements.apply_acks(ledger, peer, acks))
        except Refused:
            self._around.metrics.border_acks.labels(peer_id, "unknown").inc()
            raise

    async def void_keys(
        self,
        peer_id: str,
        association: Association,
        key_ids: Sequence[bytes],
        *,
        is_all: bool,
        callback: str,
        wait_s: float = 0.0,
    ) -> Results:
        """Voids a peer's keys; like ``import_keys`` otherwise."""
        peer = self._routing.peer(peer_id)
        self._routing.check_callback(peer, callback, is_synchronous=wait_s > 0)
        if not is_all:
            _check_ids(key_ids)
        if is_all:
            whole = (peer_id, association.initiator, association.targets)
            key_ids = self.read(lambda tables: [row.key_id for row in tables.border.keys_of(*whole)])
        watch = self._watch(peer_id, key_ids) if wait_s > 0 else None

        def change(ledger: Ledger) -> None:
            self._settlements.void(ledger, peer, association, key_ids, is_all=is_all, callback=callback)

        return await self._run_watched(peer_id, change, watch, wait_s)

    def holds(self, peer_id: str, key_ids: Sequence[bytes]) -> bool:
        """Whether anything is held from, or for, this peer under any of these key_IDs."""
        return self.read(lambda tables: self._exchanges.holds(tables, peer_id, key_ids))

    def lease(self, gateway: str, session_id: bytes, capacity: int) -> AsyncIterator[LeasedJob]:
        """Requests for a gateway to perform."""
        return self._posts.board.feed(gateway, session_id, capacity)

    async def complete(
        self,
        gateway: str,
        lease_id: bytes,
        *,
        http_status: int | None,
        was_sent: bool,
        retry_after_s: float = 0.0,
        acks: Sequence[Ack] = (),
    ) -> bool:
        """What became of a leased request; False when the lease had ended."""
        return await self._posts.complete(
            gateway,
            lease_id,
            http_status=http_status,
            was_sent=was_sent,
            retry_after_s=retry_after_s,
            acks=acks,
        )

    # what the key plane asks

    async def export_local(
        self,
        association: Association,
        keys: Sequence[Arrival],
        *,
        export_id: bytes,
        give_up_s: float,
    ) -> None:
        """Hands keys of an SAE homed here over; its owner is told by ``tell_local``.

        Raises:
            CallerError: a target is not behind this border.
        """
        places = self._routing.onward(association.targets)
        give_up_ms = int((self._around.now_s() + give_up_s) * 1000)

        def change(ledger: Ledger) -> None:
            for peer, targets in places.items():
                self._exchanges.export(
                    ledger,
                    peer,
                    Association(association.initiator, tuple(targets)),
                    keys,
                    owner="local",
                    source=self._around.own_id,
                    source_job=export_id,
                    extension=b"",
                    give_up_ms=give_up_ms,
                    state=self._first_state(),
                )

        await self._run(change)

    async def give_up_local(self, export_id: bytes) -> None:
        """Nobody wants the keys of a local export any more."""

        def change(ledger: Ledger) -> None:
            border = ledger.tables.border
            own = self._around.own_id
            for exchange in border.exchanges_for(own, export_id):
                for key in border.keys(exchange.exchange_id):
                    ledger.outbound(key, OutboundEvent.GIVE_UP)

        await self._run(change)

    async def void_local(self, key_ids: Sequence[bytes]) -> None:
        """Voids keys of this node's own that crossed here and were handed out to nobody."""

        def change(ledger: Ledger) -> None:
            for key_id in key_ids:
                for key in ledger.tables.border.everywhere(key_id):
                    if key.is_outbound and ledger.exchange(key.exchange_id).owner == "local":
                        ledger.outbound(key, OutboundEvent.GIVE_UP)

        await self._run(change)

    # LedgerPorts

    @property
    def own_id(self) -> str:
        """This KME."""
        return self._around.own_id

    @property
    def alarms(self) -> AlarmPort:
        """Where contradictions are raised."""
        return self._around.alarms

    def now_s(self) -> float:
        """Seconds since 1970."""
        return self._around.now_s()

    def randomness(self, count: int) -> bytes:
        """Random bytes, for ids."""
        return self._around.randomness(count)

    def read(self, query: Callable[[Tables], T]) -> T:
        """Reads from the store, outside of any change."""
        return self._store.read(query)

    def resolve(
        self, tables: Tables, after: After, source: str, job_id: bytes, failed: Sequence[bytes]
    ) -> None:
        """Answers a sealed message of ``source`` that waits for its outcome, if it does."""
        after.steps.append(self._deposits.resolve(tables, source, job_id, failed))

    def tell_local(self, tables: Tables, after: After, export_id: bytes, failed: Sequence[bytes]) -> bool:
        """Tells the outcome of an export of this node's own; False if nobody waits for it."""
        return self._owner.tell_local(tables, after, export_id, failed)

    def take_back(self, tables: Tables, after: After, key_id: bytes, *, border: str) -> bool:
        """Takes a key back that this node made and gave to a border; False if it was handed out."""
        return self._owner.take_back(tables, after, key_id, border=border)

    def post_added(self, post: PostRow) -> None:
        """A request is durable."""
        self._posts.board.add(post)

    def post_gone(self, job_id: bytes) -> None:
        """A request is done, or void."""
        self._posts.board.discard(job_id)

    def call_added(self, tables: Tables, call: CallRow) -> Callable[[], None]:
        """A sealed message is wanted; returns what to do about it once this change is durable."""
        return self._calls.added(tables, call)

    def answered(self, peer: str, key_ids: Sequence[bytes], status: AckStatus) -> None:
        """The result of a synchronous request, key by key."""
        for watch in self._watches.get(peer, ()):
            for key_id in key_ids:
                if key_id in watch.open_ids:
                    watch.open_ids.discard(key_id)
                    watch.results[key_id] = status
            if not watch.open_ids:
                watch.done.set()

    # inside

    def _heard(self, peer: str, status: AckStatus, exchange_id: bytes) -> None:
        self._posts.heard(peer, status, exchange_id)

    async def _run(self, change: Callable[[Ledger], None]) -> None:
        await self._tasks.unbroken(self._run_to_end(change))

    async def _run_to_end(self, change: Callable[[Ledger], None]) -> None:
        after = After()

        def whole(tables: Tables) -> None:
            ledger = Ledger(tables, self, after)
            change(ledger)
            ledger.settle()

        try:
            await self._store.commit(whole)
        except BaseException:
            after.revert()
            raise
        after.run()

    def _first_state(self) -> Outbound:
        """Posted at once where a gateway takes it at once: one commit less before it leaves."""
        return Outbound.POSTED if self._posts.board.has_room else Outbound.QUEUED

    def _origin(self, initiator: str) -> str:
        foreign = self._document().foreign_for(initiator)
        return "" if foreign is None else foreign.domain

    def _watch(self, peer: str, key_ids: Sequence[bytes]) -> _Watch:
        watch = _Watch(set(key_ids), {}, asyncio.Event())
        self._watches.setdefault(peer, []).append(watch)
        if not key_ids:
            watch.done.set()
        return watch

    async def _run_watched(
        self,
        peer: str,
        change: Callable[[Ledger], None],
        watch: _Watch | None,
        wait_s: float,
    ) -> Results:
        try:
            await self._run(change)
            if watch is None:
                return {}
            try:
                async with asyncio.timeout(wait_s):
                    await watch.done.wait()
            except TimeoutError:
                # What is left out must be retried or voided by the peer (020 on key association).
                _LOG.warning("a synchronous request was answered before its end", extra={"peer": peer})
            return watch.results
        finally:
            if watch is not None:
                self._watches[peer].remove(watch)

    def counts(self) -> dict[tuple[bool, str, str], int]:
        """Keys by (is_outbound, peer, state), for operators."""
        return self.read(lambda tables: tables.border.count_states())

    @property
    def open_posts(self) -> int:
        """Requests that are not done."""
        return len(self._posts.board)

    @property
    def connected_gateways(self) -> int:
        """Gateways that take requests now."""
        return self._posts.board.sessions


def _check_ids(key_ids: Sequence[bytes]) -> None:
    if not key_ids or len(set(key_ids)) != len(key_ids) or any(len(key_id) != 16 for key_id in key_ids):
        raise Refused(Problem.MALFORMED, "key_ids must be UUIDs, at least one, none twice", field="key_ids")
