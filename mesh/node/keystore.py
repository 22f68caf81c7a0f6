"""Keys whose ID is not an address: same-KME keys, and keys for several slaves.

Owns protocol 4.9. Their IDs are random UUIDs of version 4, so they never look like addressed ones.
Same-KME keys are lane bytes XOR operating-system randomness: the neighbour on that lane knows the
lane bytes, whoever predicts the system's generator knows the other half, and only both together know
the key. A hardware source, where one is configured, goes in, too, and is enough where no link is open.
With a slave elsewhere the bytes come from the reserve to that slave's KME instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mesh.core import otp
from mesh.core.border_rules import Association
from mesh.errors import ShortageError
from mesh.node.border.ports import Arrival
from mesh.node.handovers import MARGIN_S, Handovers, LocalParcel, Parcel
from mesh.node.keyports import Surroundings
from mesh.node.ports import LinkPlanePort
from mesh.node.supply import Keys, Supply
from mesh.store.tables import StoredKeyRow, Tables
from mesh.v1.peer_pb2 import KeyDeposit, SealedMessage, StoredKey

_MAX_DEPOSIT_BYTES = 128 * 1024
# What a hardware source is said to hold ready.
_HARDWARE_LEVEL_BYTES = 1 << 20
LOCAL_GRADE = "local"


class StoredKeys:
    """Makes stored keys and brings them to every slave's KME before the master learns them."""

    def __init__(
        self,
        around: Surroundings,
        *,
        links: LinkPlanePort,
        supply: Supply,
        handovers: Handovers,
        lifetime_s: float,
    ) -> None:
        self._around = around
        self._handovers = handovers
        self._links = links
        self._supply = supply
        self._lifetime_s = lifetime_s

    async def create(
        self,
        master: str,
        slaves: Mapping[str, Sequence[str]],
        number: int,
        size_bytes: int,
        *,
        timeout_s: float,
        request_id: str,
        foreign: Collection[str] = (),
    ) -> tuple[Keys, str]:
        """Keys for slaves at one or more KMEs; returned once all of those hold them durably.

        Args:
            slaves: slave SAE ids by the KME where they are homed; this one included.
            foreign: those of them that live behind that KME as a border: acknowledged by the far end.

        Raises:
            ShortageError, UnavailableError, PeerError: not all targets took the keys; those that
                did are told to void them, as they are when the caller leaves.
        """
        deadline = self._around.monotonic_s() + timeout_s
        remote = sorted(kme for kme in slaves if kme != self._around.own_id)
        if remote:
            drawn, grade = await self._supply.draw(
                remote[0],
                master,
                slaves[remote[0]][0],
                number,
                size_bytes,
                timeout_s=timeout_s,
                request_id=request_id,
            )
            values = [value for _, value in drawn]
        else:
            values, grade = await self.local_values(number, size_bytes, timeout_s), LOCAL_GRADE
        keys = [(random_id(self._around.randomness(16)), value) for value in values]
        expires_at_s = int(self._around.now_s() + self._lifetime_s)
        at_home = slaves.get(self._around.own_id, ())
        here = [sae for sae in at_home if sae not in foreign]
        rows = [
            StoredKeyRow(master, key_id, value, expires_at_s, "", grade, dict.fromkeys(here, False))
            for key_id, value in keys
            if here
        ]

        def keep_here(tables: Tables) -> None:
            tables.keystore.put_stored_keys(rows)

        def forget_here(tables: Tables) -> None:
            for row in rows:
                tables.keystore.void(master, row.key_id)

        left_s = max(0.1, deadline - self._around.monotonic_s())
        give_up_s = max(0.3, left_s - MARGIN_S)

        def message(part: Keys, saes: Sequence[str]) -> SealedMessage:
            deposit = KeyDeposit(
                master_sae_id=master,
                slave_sae_ids=saes,
                keys=[StoredKey(key_id=key_id, value=value) for key_id, value in part],
                expires_at_s=expires_at_s,
                grade=grade,
                give_up_s=give_up_s,
            )
            return SealedMessage(keys=deposit)

        parcels = [
            Parcel(kme, message(part, slaves[kme]), tuple(key_id for key_id, _ in part))
            for kme in remote
            for part in _parts(keys)
        ]
        crossing = [sae for sae in at_home if sae in foreign]
        arrivals = tuple(Arrival(key_id, value) for key_id, value in keys)
        local = LocalParcel(Association.of(master, crossing), arrivals) if crossing else None
        await self._handovers.hand_over(
            master, parcels, local, timeout_s=left_s, also=keep_here, undo=forget_here
        )
        return keys, grade

    async def local_values(self, number: int, size_bytes: int, timeout_s: float) -> list[bytes]:
        """Fresh keys of lane bytes mixed with this machine's randomness (4.9).

        Without an open link a configured hardware source is enough.

        Raises:
            ShortageError: neither is there, or no link has enough.
        """
        total = number * size_bytes
        lane_bytes = bytearray()
        deadline = self._around.monotonic_s() + timeout_s
        while len(lane_bytes) < total:
            link = max(
                (link for link in self._links.links.values() if link.is_open),
                key=lambda link: link.status().transmit.usable,
                default=None,
            )
            if link is None and self._around.has_random_device:
                return [self._around.randomness(size_bytes) for _ in range(number)]
            if link is None:
                raise ShortageError(
                    "no open link whose bytes a same-KME key could be made of", retry_after_s=2.0
                )
            piece = min(total - len(lane_bytes), max(1, link.max_frame_bytes - 32))
            if link.claimable() < piece:
                await link.ready(piece, timeout_s=max(0.0, deadline - self._around.monotonic_s()))
            if link.claimable() >= piece:
                lane_bytes += link.take_local(piece)
        mixed = otp.xor(lane_bytes, self._around.randomness(total))
        return [mixed[at : at + size_bytes] for at in range(0, total, size_bytes)]

    def local_level_bytes(self) -> int:
        """Bytes that same-KME keys could be made of now; a hardware source always has some."""
        own = _HARDWARE_LEVEL_BYTES if self._around.has_random_device else 0
        return own + sum(link.status().transmit.usable for link in self._links.links.values() if link.is_open)


def _parts(keys: Keys) -> list[Keys]:
    """Keys in pieces that one deposit carries."""
    each = max(1, _MAX_DEPOSIT_BYTES // (len(keys[0][1]) + 32))
    return [keys[at : at + each] for at in range(0, len(keys), each)]


def random_id(randomness: bytes) -> bytes:
    """A UUID of version 4 from 16 random bytes."""
    value = bytearray(randomness)
    value[6] = (value[6] & 0x0F) | 0x40
    value[8] = (value[8] & 0x3F) | 0x80
    return bytes(value)
