"""Keys that others must hold before their master may: handed over first, released then.

Owns, where the master is homed, that it gets a key for several slaves, or for one of another owner, only
when all who must hold it have acknowledged it, and that otherwise all void it (protocol 4.9, 6.2), also
across a crash. What is under way is a durable job towards each of them; deleting these jobs, in one commit
with whatever keeps the keys here, is what decides that they are released. Keys that are released just as
their caller leaves are voided, too. Nothing here speaks to foreign key managers; ready-made keys are in
``mesh.node.buffers``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec

from mesh.core.border_rules import Association
from mesh.errors import ErrorReason, MeshError, PeerError, ShortageError, UnavailableError
from mesh.node.border.ports import After, Arrival
from mesh.node.jobs import Answered, Jobs
from mesh.node.keyports import Surroundings
from mesh.node.tasks import Background
from mesh.store.store import Store
from mesh.store.tables import Tables
from mesh.v1.peer_pb2 import ExportKeys, SealedAnswer, SealedMessage, VoidKeys

KIND = "handover"
#: The border ends first, so that its answer arrives before the caller gives up.
MARGIN_S = 0.5
_LEAST_S = 0.3
_VOID_TIMEOUT_S = 8.0
_LOCAL = b"local"

_LOG = logging.getLogger("keymesh.handovers")


@dataclass(frozen=True, slots=True)
class Parcel:
    """Keys that go to one KME, a border or the home of slaves, by sealed message."""

    border: str
    message: SealedMessage = field(repr=False)
    key_ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class LocalParcel:
    """Keys that cross the border at this very node."""

    association: Association
    keys: tuple[Arrival, ...]


class Exporter(Protocol):
    """A border at this very node (``mesh.node.border.Border``)."""

    async def export_local(
        self, association: Association, keys: Sequence[Arrival], *, export_id: bytes, give_up_s: float
    ) -> None:
        """Hands keys over; ``Handovers.tell_local`` is told how it ended."""
        ...

    async def give_up_local(self, export_id: bytes) -> None:
        """Nobody wants them any more."""
        ...


class _Context(msgspec.Struct, frozen=True, array_like=True):
    """What goes with a job: enough to void its keys after a crash."""

    group: bytes
    master: str
    key_ids: tuple[bytes, ...]


@dataclass(slots=True, repr=False)
class _Group:
    """Parcels that count together: all acknowledged and still wanted, or all voided.

    Attributes:
        holders: the KMEs that each key_ID went to.
        also: written in the commit that releases the keys.
        undo: takes that back.
        on_kept: called after it, if what ``also`` wrote has the keys from then on, whoever leaves.
        problem: what the first who refused said, if it said why.
        deciding: changes under way whose commit would release them.
    """

    group_id: bytes
    master: str
    parcels: tuple[Parcel, ...]
    is_local: bool
    holders: dict[bytes, set[str]]
    also: Callable[[Tables], object]
    undo: Callable[[Tables], object]
    on_kept: Callable[[], None] | None
    outcome: asyncio.Future[None]
    decided: asyncio.Future[bool]
    answers: dict[bytes, bool] = field(default_factory=dict)
    problem: MeshError | None = None
    is_waiting: bool = True
    is_recalled: bool = False
    deciding: int = 0

    @property
    def members(self) -> int:
        """How many must say yes."""
        return len(self.parcels) + self.is_local

    @property
    def is_wanted(self) -> bool:
        """Somebody waits, and nobody took a key back."""
        return self.is_waiting and not self.is_recalled

    @property
    def is_good(self) -> bool:
        """Everybody said yes, and somebody still wants the keys."""
        return self.is_wanted and len(self.answers) == self.members and all(self.answers.values())

    @property
    def is_lost(self) -> bool:
        """It can only end in voids."""
        return not self.is_wanted or not all(self.answers.values())


class Handovers:
    """Hands keys over and decides, once, whether they are released or voided.

    Args:
        exporter: the border at this very node, set once it is built.
    """

    def __init__(self, around: Surroundings, *, store: Store, jobs: Jobs, tasks: Background) -> None:
        self._around = around
        self._store = store
        self._jobs = jobs
        self._tasks = tasks
        self._groups: dict[bytes, _Group] = {}
        self._orphans: dict[bytes, set[str]] = {}
        self.exporter: Exporter | None = None
        #: Takes a ready-made key out of its buffer; False if it is in none.
        self.unbuffer: Callable[[Tables, After, bytes, str], bool] = lambda *_: False
        jobs.own(KIND, self._answered)

    def load(self) -> None:
        """Remembers what was under way before a restart: nobody waits for it, it will be voided."""
        rows = self._store.read(lambda tables: tables.jobs.list(kind=KIND))
        contexts = [(row.peer, msgspec.msgpack.decode(row.context, type=_Context)) for row in rows]
        for peer, context in contexts:
            for key_id in context.key_ids:
                self._orphans.setdefault(key_id, set()).add(peer)
        groups = {context.group for _, context in contexts}
        for group in self._store.read(lambda tables: self._crossed_here(tables, groups)):
            self._give_up_local(group)

    def _crossed_here(self, tables: Tables, groups: Iterable[bytes]) -> list[bytes]:
        return [one for one in groups if tables.border.exchanges_for(self._around.own_id, one)]

    async def hand_over(
        self,
        master: str,
        parcels: Sequence[Parcel],
        local: LocalParcel | None = None,
        *,
        timeout_s: float,
        also: Callable[[Tables], object] = lambda _: None,
        undo: Callable[[Tables], object] = lambda _: None,
        on_kept: Callable[[], None] | None = None,
    ) -> None:
        """Returns once everybody has them acknowledged; the keys are the caller's to release then.

        Args:
            also: written with the very decision.
            undo: takes that back, if the caller left just then.
            on_kept: called when that is durable; the keys then stay, even if the caller leaves.

        Raises:
            ShortageError, UnavailableError, PeerError: they are not released, and are voided.
        """
        loop = asyncio.get_running_loop()
        holders: dict[bytes, set[str]] = {}
        for parcel in parcels:
            for key_id in parcel.key_ids:
                holders.setdefault(key_id, set()).add(parcel.border)
        for key in local.keys if local else ():
            holders.setdefault(key.key_id, set()).add(self._around.own_id)
        group = _Group(
            group_id=self._around.randomness(16),
            master=master,
            parcels=tuple(parcels),
            is_local=local is not None,
            holders=holders,
            also=also,
            undo=undo,
            on_kept=on_kept,
            outcome=loop.create_future(),
            decided=loop.create_future(),
        )
        self._groups[group.group_id] = group
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(group, master, parcels, local, timeout_s)
                await asyncio.shield(group.outcome)
        except TimeoutError as exc:
            if not _is_released(group):
                raise UnavailableError(
                    "not everybody who must hold the keys acknowledged them in time",
                    reason=ErrorReason.DEADLINE_EXCEEDED,
                    retry_after_s=1.0,
                ) from exc
        except asyncio.CancelledError:
            if _is_released(group):
                self._void_released(group)
            raise
        finally:
            self._leave(group)

    async def _send(
        self,
        group: _Group,
        master: str,
        parcels: Sequence[Parcel],
        local: LocalParcel | None,
        timeout_s: float,
    ) -> None:
        contexts = [_Context(group.group_id, master, parcel.key_ids) for parcel in parcels]
        await asyncio.gather(
            *(
                self._jobs.submit(
                    parcel.border,
                    parcel.message,
                    timeout_s=timeout_s,
                    kind=KIND,
                    context=msgspec.msgpack.encode(context),
                )
                for parcel, context in zip(parcels, contexts, strict=True)
            )
        )
        if local is not None:
            if self.exporter is None:
                raise ShortageError("no border is configured at this node", reason=ErrorReason.NO_ROUTE)
            await self.exporter.export_local(
                local.association,
                local.keys,
                export_id=group.group_id,
                give_up_s=max(_LEAST_S, timeout_s - MARGIN_S),
            )
        if not group.members:
            await self._decide(group)

    def _leave(self, group: _Group) -> None:
        """Nobody waits any more: what is not released by now, nor just being released, never will be."""
        group.is_waiting = False
        group.outcome.cancel()
        if not group.deciding:
            self._end(group)

    def _end(self, group: _Group) -> None:
        if not group.decided.done():
            group.decided.set_result(False)
        is_known = self._groups.pop(group.group_id, None) is not None
        if is_known and group.is_local and not group.decided.result() and group.answers.get(_LOCAL, True):
            self._give_up_local(group.group_id)

    def _give_up_local(self, group_id: bytes) -> None:
        async def give_up() -> None:
            if self.exporter is not None:
                await self.exporter.give_up_local(group_id)

        self._tasks.insist("giving up what crosses the border here", give_up)

    # answers

    async def _answered(self, answered: Answered) -> None:
        """Takes over one answer: its job goes with the decision, whichever it is."""
        context = msgspec.msgpack.decode(answered.context, type=_Context)
        group = self._groups.get(context.group)
        if group is not None and not group.decided.done():
            group.answers[answered.job_id] = _is_good(answered.answer)
            group.problem = group.problem or _problem(answered.answer)
            await self._decide(group)
        is_released = group is not None and await asyncio.shield(group.decided)
        if not is_released:
            await self._undo(answered, context)
        for key_id in context.key_ids:
            left = self._orphans.get(key_id, set())
            left.discard(answered.peer)
            if not left:
                self._orphans.pop(key_id, None)

    async def _decide(self, group: _Group) -> None:
        """Once all have answered, or one said no."""
        if group.decided.done() or group.deciding:
            return
        if group.is_lost:
            group.decided.set_result(False)
            if not group.outcome.done():
                group.outcome.set_exception(group.problem or _refused())
        elif group.is_good:
            # A node that stops meanwhile must not leave keys that are released and nobody's.
            await self._tasks.unbroken(self._release(group))

    async def _release(self, group: _Group) -> None:
        jobs = [job_id for job_id in group.answers if job_id != _LOCAL]

        def change(tables: Tables) -> None:
            for job_id in jobs:
                tables.jobs.delete(job_id)
            group.also(tables)

        group.deciding += 1
        try:
            await self._store.commit(change)
        except BaseException:
            self._undecided(group)
            raise
        self._released(group)

    def _undecided(self, group: _Group) -> None:
        """The disk did not take the decision: the next answer decides again, if anybody still waits."""
        group.deciding -= 1
        if not group.deciding and not group.is_waiting:
            self._end(group)

    def _released(self, group: _Group) -> None:
        """The decision is durable; should the caller have left meanwhile, the keys are taken back."""
        group.deciding -= 1
        group.decided.set_result(True)
        self._groups.pop(group.group_id, None)
        if group.on_kept is not None:
            group.on_kept()
        if group.is_waiting:
            group.outcome.set_result(None)
        else:
            self._void_released(group)

    def _void_released(self, group: _Group) -> None:
        """Keys that were acknowledged just as their caller left: nobody learnt them."""
        if group.on_kept is not None:
            return
        _LOG.warning("keys were acknowledged as their caller left", extra={"keys": len(group.holders)})
        if group.is_local:
            self._give_up_local(group.group_id)
        for parcel in group.parcels:
            void = partial(self.void, parcel.border, group.master, parcel.key_ids)
            self._tasks.insist(f"voiding keys at {parcel.border}", void)
        self._tasks.insist("taking back what was kept here", lambda: self._store.commit(group.undo))

    async def void(
        self,
        border: str,
        master: str,
        key_ids: Sequence[bytes],
        *,
        also: Callable[[Tables, bytes], object] | None = None,
    ) -> None:
        """Has a KME void keys that nobody was given; durable when this returns.

        Raises:
            ShortageError, UnavailableError: the message could not be sealed.
        """
        message = SealedMessage(void_keys=VoidKeys(master_sae_id=master, key_ids=key_ids))
        await self._jobs.submit(border, message, timeout_s=_VOID_TIMEOUT_S, also=also)

    async def _undo(self, answered: Answered, context: _Context) -> None:
        """Voids what was acknowledged; the void is durable before the job is gone."""
        answer, job_id = answered.answer, answered.job_id
        relayed: list[bytes] = []
        if answer is not None and answer.applied:
            relayed = [key_id for key_id in context.key_ids if key_id not in answer.failed_key_ids]
        if not relayed:
            await self._store.commit(lambda tables: tables.jobs.delete(job_id))
            return
        await self.void(
            answered.peer, context.master, relayed, also=lambda tables, _: tables.jobs.delete(job_id)
        )

    # the border at this node

    def tell_local(self, tables: Tables, after: After, export_id: bytes, failed: Sequence[bytes]) -> bool:
        """How a local export ended; inside the border's transaction. False: nobody waits for it."""
        group = self._groups.get(export_id)
        if group is None or group.decided.done():
            return False
        is_held = not failed
        if group.members > 1 or not is_held or not group.is_wanted:
            after.steps.append(lambda: self._told(group, is_held=is_held))
            return is_held and not group.is_lost
        group.deciding += 1
        group.also(tables)
        after.steps.append(lambda: self._released(group))
        after.undo.append(lambda: self._undecided(group))
        return True

    def _told(self, group: _Group, *, is_held: bool) -> None:
        group.answers[_LOCAL] = is_held
        if not group.decided.done():
            self._tasks.spawn(self._decide(group))
        elif is_held and not group.decided.result():
            self._give_up_local(group.group_id)

    def take_back(self, tables: Tables, after: After, key_id: bytes, *, border: str) -> bool:
        """A border to which a key went wants it back: possible on its way, or in a buffer."""
        if self.unbuffer(tables, after, key_id, border):
            return True
        for group in self._groups.values():
            is_open = not group.decided.done() and not group.deciding
            if border in group.holders.get(key_id, ()) and is_open:
                group.is_recalled = True
                return True
        return border in self._orphans.get(key_id, ())


def export_message(master: str, slave: str, key_ids: Sequence[bytes], *, give_up_s: float) -> SealedMessage:
    """The message that lets a border redeem keys drawn towards it, and hand them over."""
    export = ExportKeys(
        master_sae_id=master,
        slave_sae_id=slave,
        key_ids=key_ids,
        give_up_s=max(_LEAST_S, give_up_s - MARGIN_S),
    )
    return SealedMessage(export_keys=export)


def _is_good(answer: SealedAnswer | None) -> bool:
    return answer is not None and answer.applied and not answer.failed_key_ids


def _is_released(group: _Group) -> bool:
    return group.outcome.done() and not group.outcome.cancelled() and group.outcome.exception() is None


def _refused() -> PeerError:
    return PeerError("a target did not take the keys", reason=ErrorReason.PEER_REFUSED, retry_after_s=1.0)


def _problem(answer: SealedAnswer | None) -> MeshError | None:
    if answer is None or answer.reason not in (ErrorReason.NOT_AUTHORIZED, ErrorReason.UNKNOWN_SAE):
        return None
    # The two ends hold different network documents for now.
    return UnavailableError(
        "a target does not know the master or a slave as we do",
        reason=ErrorReason.PEER_REFUSED,
        retry_after_s=5.0,
    )
