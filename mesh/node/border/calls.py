"""Sealed messages about border keys: carrying inbound keys on, voiding them there, recalling outbound ones.

Owns how a wanted message becomes a durable job, once, and what its answer does to the keys, in the
commit that ends the job (protocol 4.8). A message that cannot be sealed yet is tried again until it has
lost its reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from mesh.core.border import Inbound, Outbound
from mesh.core.border_rules import pause_s
from mesh.errors import CallerError, MeshError
from mesh.node.border.ledger import Ledger
from mesh.node.jobs import Answered, Jobs
from mesh.node.keyports import Surroundings
from mesh.node.tasks import Background
from mesh.store.store import Store
from mesh.store.tables import CallRow, Tables
from mesh.v1.peer_pb2 import KeyDeposit, RecallKeys, SealedAnswer, SealedMessage, StoredKey, VoidKeys

KIND = "border"
_SUBMIT_TIMEOUT_S = 8.0

_LOG = logging.getLogger("keymesh.border")

Run = Callable[[Callable[[Ledger], None]], Awaitable[None]]


class Calls:
    """Sends the sealed messages of a border.

    Args:
        run: runs a change with a ledger, durably, and then what follows in memory.
        origin: the foreign domain of an SAE, for the record at the target.
    """

    def __init__(
        self,
        around: Surroundings,
        *,
        store: Store,
        jobs: Jobs,
        tasks: Background,
        run: Run,
        origin: Callable[[str], str],
        lifetime_s: float,
    ) -> None:
        self._around = around
        self._store = store
        self._jobs = jobs
        self._tasks = tasks
        self._run = run
        self._origin = origin
        self._lifetime_s = lifetime_s
        jobs.own(KIND, self._answered)

    def resume(self) -> None:
        """Starts what a restart left unsealed; sealed ones go on as jobs."""
        for call in self._store.read(lambda tables: tables.border.calls()):
            if call.job_id is None:
                self.start(call)

    def added(self, tables: Tables, call: CallRow) -> Callable[[], None]:
        """Keys on their way are sealed in the change that stores them, if slots are at hand.

        Returns:
            what to do once that change is durable.
        """
        if call.purpose == "carry":
            found = self._message(tables, call.call_id)
            sealed = found and self._jobs.seal_now(tables, call.kme, found[1], kind=KIND)
            if sealed:
                job_id, durable = sealed
                tables.border.submit_call(call.call_id, job_id)
                return durable
        return lambda: self.start(call)

    def start(self, call: CallRow) -> None:
        """A message is wanted, durably."""
        self._tasks.spawn(self._submit(call.call_id))

    async def _submit(self, call_id: int) -> None:
        attempts = 0
        while True:
            found = self._store.read(lambda tables: self._message(tables, call_id))
            if found is None:
                return
            call, message = found
            try:
                await self._jobs.submit(
                    call.kme,
                    message,
                    timeout_s=_SUBMIT_TIMEOUT_S,
                    kind=KIND,
                    also=lambda tables, job_id, call=call: _sealed(tables, call, job_id),  # type: ignore[misc]  # bound now
                )
            except CallerError as exc:
                _LOG.info("sealed message changed before it left", extra={"cause": str(exc)})
            except MeshError as exc:
                _LOG.warning(
                    "sealed message cannot leave yet",
                    extra={"peer": call.kme, "purpose": call.purpose, "cause": str(exc)},
                )
            else:
                return
            attempts += 1
            await asyncio.sleep(pause_s(attempts))

    def _message(self, tables: Tables, call_id: int) -> tuple[CallRow, SealedMessage] | None:
        """What the message says now; None when it has lost its reason."""
        call = tables.border.call(call_id)
        if call is None or call.job_id is not None:
            return None
        exchange = tables.border.exchange(call.exchange_id)
        if call.purpose == "void":
            void = VoidKeys(master_sae_id=exchange.initiator, key_ids=call.key_ids, reports=True)
            return call, SealedMessage(void_keys=void)
        if call.purpose == "recall":
            recall = RecallKeys(master_sae_id=exchange.initiator, key_ids=call.key_ids)
            return call, SealedMessage(recall_keys=recall)
        targets = next(
            carry.targets for carry in tables.border.carries(call.exchange_id) if carry.place == call.kme
        )
        keys = [
            StoredKey(key_id=key.key_id, value=key.value, extension=key.extension)
            for key in tables.border.keys(call.exchange_id)
            if key.key_id in call.key_ids and key.state == Inbound.HELD
        ]
        if not keys:
            return None
        deposit = KeyDeposit(
            master_sae_id=exchange.initiator,
            slave_sae_ids=targets,
            keys=keys,
            expires_at_s=int(exchange.created_s + self._lifetime_s),
            origin_domain_id=self._origin(exchange.initiator),
            grade="etsi020",
            give_up_s=max(0.5, exchange.give_up_ms / 1000 - self._around.now_s()),
            extension_optional=exchange.extension,
        )
        return call, SealedMessage(keys=deposit)

    async def _answered(self, answered: Answered) -> None:
        def change(ledger: Ledger) -> None:
            ledger.tables.jobs.delete(answered.job_id)
            call = ledger.tables.border.call_of(answered.job_id)
            if call is not None:
                ledger.tables.border.delete_call(call.call_id)
                _apply(ledger, call, answered.answer)

        await self._run(change)


def _sealed(tables: Tables, call: CallRow, job_id: bytes) -> None:
    """In the commit that makes the job durable: the call must still stand as it was read."""
    now = tables.border.call(call.call_id)
    held = {key.key_id for key in tables.border.keys(call.exchange_id) if key.state == Inbound.HELD}
    if now != call or (call.purpose == "carry" and not set(call.key_ids) <= held):
        raise CallerError("the border's keys moved on")
    tables.border.submit_call(call.call_id, job_id)


def _apply(ledger: Ledger, call: CallRow, answer: SealedAnswer | None) -> None:
    """What an answer does; None: the target lost its state, so it holds none of the keys."""
    border = ledger.tables.border
    exchange = ledger.exchange(call.exchange_id)
    failed = set(call.key_ids) if answer is None or not answer.applied else set(answer.failed_key_ids)
    if call.purpose == "carry" and failed >= set(call.key_ids):
        carry = next(one for one in border.carries(exchange.exchange_id) if one.place == call.kme)
        border.put_carry(type(carry)(carry.exchange_id, carry.place, carry.targets, "failed"))
    for key_id in call.key_ids:
        key = border.key(key_id, exchange.peer, is_outbound=exchange.is_outbound)
        if key is None:
            continue
        if call.purpose == "carry":
            ledger.carried(key, call.kme, is_held=key_id not in failed, is_clean=True)
        elif call.purpose == "void":
            # A target that lost its state, or never knew the keys, holds none.
            is_kept = answer is not None and answer.applied and key_id in failed
            ledger.place_voided(key, is_kept=is_kept)
        elif key.state == Outbound.RECALLING:
            # Who cannot say that it took a key back may have handed it out.
            ledger.recalled(key, is_back=key_id not in failed)
