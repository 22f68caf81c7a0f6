"""Keys for foreign slaves, made where their master is homed: which keys, towards which border.

Owns the choice of the path: from the buffer, drawn towards the border and exported (architecture 2.8), or
made here when this node is the border itself. Whether keys are released is decided in
``mesh.node.handovers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mesh.core.border_rules import Association, BufferSpec
from mesh.errors import ErrorReason, MeshError, ShortageError
from mesh.node.border.border import Border
from mesh.node.border.ports import Arrival, DocumentPort
from mesh.node.buffers import FILL_TIMEOUT_S, Buffers
from mesh.node.handovers import Handovers, LocalParcel, Parcel, export_message
from mesh.node.keyports import Surroundings
from mesh.node.keystore import LOCAL_GRADE, StoredKeys, random_id
from mesh.node.supply import Keys, Supply
from mesh.node.tasks import Background
from mesh.store.store import Store
from mesh.store.tables import BufferRow


class ForeignKeys:
    """Delivers keys for one foreign slave to masters homed here.

    Args:
        lifetime_s: buffered keys are used within half of it.
    """

    def __init__(
        self,
        around: Surroundings,
        specs: Iterable[BufferSpec],
        *,
        store: Store,
        document: DocumentPort,
        supply: Supply,
        stored: StoredKeys,
        handovers: Handovers,
        border: Border,
        tasks: Background,
        lifetime_s: float,
    ) -> None:
        self._around = around
        self._document = document
        self._supply = supply
        self._stored = stored
        self._handovers = handovers
        self._border = border
        self._lifetime_s = lifetime_s
        self.buffers = Buffers(
            around,
            specs,
            store=store,
            fill=self._fill,
            void=self._void,
            is_granted=self._is_granted,
            tasks=tasks,
        )
        handovers.unbuffer = self.buffers.unbuffer

    async def deliver(
        self,
        master: str,
        slave: str,
        border: str,
        number: int,
        size_bytes: int,
        *,
        timeout_s: float,
        request_id: str,
    ) -> tuple[Keys, str]:
        """Keys that the far end holds, ready-made if the pair has a buffer.

        Raises:
            ShortageError, UnavailableError, PeerError: they cannot be had in time; none is released.
        """
        ready = await self.buffers.take(master, slave, number, size_bytes)
        if ready is not None:
            return ready
        return await self._fresh(
            master, slave, border, number, size_bytes, timeout_s=timeout_s, request_id=request_id
        )

    async def _fresh(
        self,
        master: str,
        slave: str,
        border: str,
        number: int,
        size_bytes: int,
        *,
        timeout_s: float,
        request_id: str,
        on_kept: Callable[[Sequence[BufferRow]], None] | None = None,
    ) -> tuple[Keys, str]:
        deadline = self._around.monotonic_s() + timeout_s
        local = None
        parcels: list[Parcel] = []
        if border == self._around.own_id:
            values = await self._stored.local_values(number, size_bytes, timeout_s)
            keys = [(random_id(self._around.randomness(16)), value) for value in values]
            grade = LOCAL_GRADE
            arrivals = tuple(Arrival(key_id, value) for key_id, value in keys)
            local = LocalParcel(Association.of(master, [slave]), arrivals)
        else:
            keys, grade = await self._supply.draw(
                border, master, slave, number, size_bytes, timeout_s=timeout_s, request_id=request_id
            )
            ids = tuple(key_id for key_id, _ in keys)
            left_s = deadline - self._around.monotonic_s()
            parcels.append(Parcel(border, export_message(master, slave, ids, give_up_s=left_s), ids))
        rows: list[BufferRow] = []
        if on_kept is not None:
            expires_at_s = int(self._around.now_s() + self._lifetime_s / 2)
            rows = [BufferRow(master, slave, one, value, grade, border, expires_at_s) for one, value in keys]
        await self._handovers.hand_over(
            master,
            parcels,
            local,
            timeout_s=max(0.1, deadline - self._around.monotonic_s()),
            also=lambda tables: tables.border.put_buffered(rows),
            on_kept=None if on_kept is None else lambda: on_kept(rows),
        )
        return keys, grade

    async def _fill(
        self, spec: BufferSpec, number: int, on_kept: Callable[[Sequence[BufferRow]], None]
    ) -> None:
        document = self._document()
        border = document.border_for(spec.slave)
        if border is None or document.home(spec.master) != self._around.own_id:
            raise ShortageError(
                "a buffered pair needs a master homed here and a foreign slave",
                reason=ErrorReason.NO_ROUTE,
                facts={"master": spec.master, "slave": spec.slave},
            )
        await self._fresh(
            spec.master,
            spec.slave,
            border,
            number,
            spec.size_bytes,
            timeout_s=FILL_TIMEOUT_S,
            request_id="buffer",
            on_kept=on_kept,
        )

    def _is_granted(self, row: BufferRow) -> bool:
        """Whether a key that is kept ready has the grade of the way to its border (3.4)."""
        try:
            document = self._document()
        except MeshError:
            return True  # nobody gets a key now: nothing is to be decided
        own = self._around.own_id
        return row.grade == (
            LOCAL_GRADE if row.border == own else str(document.policy(own, row.border).grade)
        )

    async def _void(self, border: str, master: str, key_ids: Sequence[bytes]) -> None:
        if border == self._around.own_id:
            await self._border.void_local(key_ids)
        else:
            await self._handovers.void(border, master, key_ids)
