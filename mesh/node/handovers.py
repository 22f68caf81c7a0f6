"""Keys for SAEs of other owners, where their master is homed: handed over first, released then.

Owns that a master gets such a key only when the far end has acknowledged it, and that a ``relayed``
nobody waits for becomes a void (protocol 6.2), also across a crash. What is under way is a durable job
towards the border; deleting it, in one commit with whatever keeps the keys, is what decides that they
are released. Nothing here speaks to foreign key managers; ready-made keys are in ``mesh.node.buffers``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from mesh.core.border_rules import Association, pause_s
from mesh.errors import ErrorReason, MeshError, PeerError, ShortageError, UnavailableError
from mesh.node.border.ports import After, Arrival
from mesh.node.jobs import Answered, Jobs
from mesh.node.keyports import Surroundings
from mesh.node.tasks import Background, unbroken
from mesh.store.store import Store
from mesh.store.tables import BufferRow, Tables
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
    """Keys that go to one border by sealed message."""

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
    """Parcels that count together: all acknowledged and still wanted, or all voided."""

    group_id: bytes
    master: str
    parcels: tuple[Parcel, ...]
    key_ids: frozenset[bytes]
    members: int
    keep: tuple[BufferRow, ...]
    on_kept: Callable[[], None]
    outcome: asyncio.Future[None]
    decided: asyncio.Future[bool]
    answers: dict[bytes, bool] = field(default_factory=dict)
    is_waiting: bool = True
    is_recalled: bool = False
    is_deciding: bool = False

    @property
    def is_good(self) -> bool:
        """Everybody said yes, and somebody still wants the keys."""
        is_complete = len(self.answers) == self.members and all(self.answers.values())
        return is_complete and self.is_waiting and not self.is_recalled

    @property
    def is_lost(self) -> bool:
        """It can only end in voids."""
        return not self.is_waiting or self.is_recalled or not all(self.answers.values())


class Handovers:
    """Hands keys to borders and decides, once, whether they are released or voided.

    Args:
        exporter: the border at this very node, set once it is built.
    """

    def __init__(self, around: Surroundings, *, store: Store, jobs: Jobs, tasks: Background) -> None:
        self._around = around
        self._store = store
        self._jobs = jobs
        self._tasks = tasks
        self._groups: dict[bytes, _Group] = {}
        self._orphans: dict[bytes, str] = {}
        self.exporter: Exporter | None = None
        #: Takes a ready-made key out of its buffer; False if it is in none.
        self.unbuffer: Callable[[Tables, After, bytes, str], bool] = lambda *_: False
        jobs.own(KIND, self._answered)

    def load(self) -> None:
        """Remembers what was under way before a restart: nobody waits for it, it will be voided."""
        for row in self._store.read(lambda tables: tables.jobs.list(kind=KIND)):
            context = msgspec.msgpack.decode(row.context, type=_Context)
            self._orphans.update(dict.fromkeys(context.key_ids, row.peer))

    async def hand_over(
        self,
        master: str,
        parcels: Sequence[Parcel],
        local: LocalParcel | None = None,
        *,
        timeout_s: float,
        keep: Sequence[BufferRow] = (),
        on_kept: Callable[[], None] = lambda: None,
    ) -> None:
        """Returns once every border has them acknowledged; the keys are the caller's to release then.

        Args:
            keep: rows to put into a buffer with the very decision.
            on_kept: called when that is durable.

        Raises:
            ShortageError, UnavailableError, PeerError: they are not released, and are voided.
        """
        loop = asyncio.get_running_loop()
        key_ids = {key_id for parcel in parcels for key_id in parcel.key_ids}
        key_ids |= {key.key_id for key in (local.keys if local else ())}
        group = _Group(
            group_id=self._around.randomness(16),
            master=master,
            parcels=tuple(parcels),
            key_ids=frozenset(key_ids),
            members=len(parcels) + (local is not None),
            keep=tuple(keep),
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
                    "the other key manager did not acknowledge in time",
                    reason=ErrorReason.DEADLINE_EXCEEDED,
                    retry_after_s=1.0,
                ) from exc
        except asyncio.CancelledError:
            if _is_released(group):
                self._tasks.spawn(self._void_released(group))
            raise
        finally:
            await self._leave(group)

    async def _send(
        self,
        group: _Group,
        master: str,
        parcels: Sequence[Parcel],
        local: LocalParcel | None,
        timeout_s: float,
    ) -> None:
        for parcel in parcels:
            context = _Context(group.group_id, master, parcel.key_ids)
            await self._jobs.submit(
                parcel.border,
                parcel.message,
                timeout_s=timeout_s,
                kind=KIND,
                context=msgspec.msgpack.encode(context),
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

    async def _leave(self, group: _Group) -> None:
        """Nobody waits any more: what was not released by now never will be."""
        group.is_waiting = False
        if not group.outcome.done():
            group.outcome.cancel()
        if not group.decided.done() and not group.is_deciding:
            group.decided.set_result(False)
        if group.decided.done() and not group.decided.result() and group.answers.get(_LOCAL):
            await unbroken(self._give_up_local(group.group_id))
        if group.decided.done():
            self._groups.pop(group.group_id, None)

    async def _give_up_local(self, group_id: bytes) -> None:
        if self.exporter is not None:
            await self.exporter.give_up_local(group_id)

    # answers

    async def _answered(self, answered: Answered) -> None:
        """Takes over the answer of one border: the job goes with the decision, whichever it is."""
        context = msgspec.msgpack.decode(answered.context, type=_Context)
        group = self._groups.get(context.group)
        if group is not None and not group.decided.done():
            group.answers[answered.job_id] = _is_good(answered.answer)
            await self._decide(group)
        is_released = group is not None and await asyncio.shield(group.decided)
        if not is_released:
            await self._undo(answered, context)
        for key_id in context.key_ids:
            self._orphans.pop(key_id, None)

    async def _decide(self, group: _Group) -> None:
        """Once all have answered, or one said no."""
        if group.decided.done() or group.is_deciding:
            return
        if group.is_lost:
            group.decided.set_result(False)
            if not group.outcome.done():
                group.outcome.set_exception(_refused())
            return
        if not group.is_good:
            return
        group.is_deciding = True
        jobs = [job_id for job_id in group.answers if job_id != _LOCAL]

        def change(tables: Tables) -> None:
            for job_id in jobs:
                tables.jobs.delete(job_id)
            tables.border.put_buffered(group.keep)

        try:
            await unbroken(self._commit(change))
        finally:
            group.is_deciding = False
        self._released(group)

    async def _commit(self, change: Callable[[Tables], None]) -> None:
        await self._store.commit(change)

    def _released(self, group: _Group) -> None:
        """The decision is durable; should the caller have left meanwhile, the keys are taken back."""
        group.decided.set_result(True)
        if group.keep:
            group.on_kept()
        if group.is_waiting and not group.outcome.done():
            group.outcome.set_result(None)
            return
        self._groups.pop(group.group_id, None)
        if not group.keep:
            self._tasks.spawn(self._void_released(group))

    async def _void_released(self, group: _Group) -> None:
        """Keys that were acknowledged just as their caller left: nobody learnt them."""
        _LOG.warning("keys were acknowledged as their caller left", extra={"keys": len(group.key_ids)})
        if group.answers.get(_LOCAL):
            await self._give_up_local(group.group_id)
        for parcel in group.parcels:
            attempts = 0
            while True:
                try:
                    await self.void(parcel.border, group.master, parcel.key_ids)
                except MeshError as exc:
                    attempts += 1
                    _LOG.warning("void cannot leave yet", extra={"peer": parcel.border, "cause": str(exc)})
                    await asyncio.sleep(pause_s(attempts))
                else:
                    break

    async def void(
        self,
        border: str,
        master: str,
        key_ids: Sequence[bytes],
        *,
        also: Callable[[Tables, bytes], object] | None = None,
    ) -> None:
        """Has a border void keys that nobody was given; durable when this returns.

        Raises:
            ShortageError, UnavailableError: the message could not be sealed.
        """
        message = SealedMessage(void_keys=VoidKeys(master_sae_id=master, key_ids=key_ids))
        await self._jobs.submit(border, message, timeout_s=_VOID_TIMEOUT_S, also=also)

    async def _undo(self, answered: Answered, context: _Context) -> None:
        """Voids what the border has acknowledged; the void is durable before the job is gone."""
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
        group.answers[_LOCAL] = not failed
        if group.members > 1 or not group.is_good:
            after.steps.append(lambda: self._tasks.spawn(self._decide(group)))
            return not group.is_lost
        group.is_deciding = True
        tables.border.put_buffered(group.keep)

        def release() -> None:
            group.is_deciding = False
            self._released(group)

        after.steps.append(release)
        return True

    def take_back(self, tables: Tables, after: After, key_id: bytes, *, border: str) -> bool:
        """A border wants a key back: possible while it is on its way or in a buffer."""
        if self.unbuffer(tables, after, key_id, border):
            return True
        for group in self._groups.values():
            if key_id in group.key_ids and not group.decided.done() and not group.is_deciding:
                group.is_recalled = True
                return True
        return self._orphans.get(key_id) == border


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
    return PeerError(
        "the other key manager did not take the keys", reason=ErrorReason.PEER_REFUSED, retry_after_s=1.0
    )
