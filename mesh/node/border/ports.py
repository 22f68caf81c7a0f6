"""Settings of a border, and what its parts need of each other and of the key plane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mesh.core.border_rules import AckStatus, Association, Peer
from mesh.core.network import NetworkDocument
from mesh.errors import ErrorReason
from mesh.node.keyports import AlarmPort
from mesh.store.tables import CallRow, PostRow, Tables

ACK_PATH = "/kmapi/v1/ext_keys/ack"
KEYS_PATH = "/kmapi/v1/ext_keys"
VOID_PATH = "/kmapi/v1/ext_keys/void"
_PEER_PLACE = "020/"


@dataclass(frozen=True, slots=True)
class BorderConfig:
    """Settings of a border; times in seconds.

    Attributes:
        gateways: the only gateways that may import keys and perform requests (protocol 5.2).
        url: base URL of our own 020 listener, ``https://host[:port]``: peers call back there.
        peers: foreign key managers.
        carry_timeout_s: an inbound key reaches its targets within this time, or fails.
        ack_give_up_s: an ack that cannot be delivered for so long ends in a void.
        void_give_up_s: a void that is not confirmed for so long ends in an alarm.
        void_repeat_s: a void that was taken and is not acked is posted again after this time.
        max_targets: SAEs of one association, initiator not counted.
        max_open_keys: keys of one peer about which anything is remembered.
        keep_s: tombstones are kept this long.
    """

    gateways: frozenset[str] = frozenset()
    url: str = ""
    peers: tuple[Peer, ...] = ()
    carry_timeout_s: float = 30.0
    ack_give_up_s: float = 600.0
    void_give_up_s: float = 3600.0
    void_repeat_s: float = 10.0
    max_targets: int = 9
    max_key_bytes: int = 8192
    max_open_keys: int = 200_000
    keep_s: float = 2 * 86_400.0

    def peer(self, kme_id: str) -> Peer | None:
        """The configured peer of that name."""
        return next((peer for peer in self.peers if peer.kme_id == kme_id), None)

    def peer_for(self, sae_id: str) -> Peer | None:
        """The first configured peer behind which an SAE lives."""
        return next((peer for peer in self.peers if peer.serves(sae_id)), None)


@dataclass(slots=True)
class After:
    """What happens in memory once the transaction is durable."""

    steps: list[Callable[[], object]] = field(default_factory=list)

    def run(self) -> None:
        """The disk has answered yes."""
        for step in self.steps:
            step()


class LedgerPorts(Protocol):
    """What the ledger needs of the parts around it."""

    config: BorderConfig

    @property
    def own_id(self) -> str:
        """This KME."""
        ...

    @property
    def alarms(self) -> AlarmPort:
        """Where contradictions are raised."""
        ...

    def now_s(self) -> float:
        """Seconds since 1970."""
        ...

    def randomness(self, count: int) -> bytes:
        """Random bytes, for ids."""
        ...

    def resolve(
        self, tables: Tables, after: After, source: str, job_id: bytes, failed: Sequence[bytes]
    ) -> None:
        """Answers a sealed message of ``source`` that waits for its outcome, if it does."""
        ...

    def tell_local(self, tables: Tables, after: After, export_id: bytes, failed: Sequence[bytes]) -> bool:
        """Tells the outcome of an export of this node's own; False if nobody waits for it."""
        ...

    def take_back(self, tables: Tables, after: After, key_id: bytes) -> bool:
        """Takes a key of this node's own back; False if it was handed out."""
        ...

    def post_added(self, post: PostRow) -> None:
        """A request is durable."""
        ...

    def post_gone(self, job_id: bytes) -> None:
        """A request is done, or void."""
        ...

    def call_added(self, call: CallRow) -> None:
        """A sealed message is wanted."""
        ...

    def answered(self, peer: str, key_ids: Sequence[bytes], status: AckStatus) -> None:
        """The result of a synchronous request, key by key."""
        ...


class DocumentPort(Protocol):
    """The network document in force, or why nothing can be decided."""

    def __call__(self) -> NetworkDocument:
        """Raises ShortageError before there is one, and what forbids to serve."""
        ...


def peer_place(kme_id: str) -> str:
    """How a carry names a further peer of this border."""
    return _PEER_PLACE + kme_id


def peer_of_place(place: str) -> str | None:
    """The further peer that a place stands for; None for a KME of ours."""
    return place.removeprefix(_PEER_PLACE) if place.startswith(_PEER_PLACE) else None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a sealed message about border keys ends inside its transaction.

    Attributes:
        reason: why nothing was applied; None when it was.
        failed: keys for which it could not be done.
        is_pending: the answer comes later.
    """

    reason: ErrorReason | None = None
    failed: tuple[bytes, ...] = ()
    is_pending: bool = False


@dataclass(frozen=True, slots=True)
class Arrival:
    """A key as a peer posts it."""

    key_id: bytes
    value: bytes = field(repr=False)
    extension: bytes = b""


@dataclass(frozen=True, slots=True)
class Ack:
    """One ack container."""

    status: AckStatus
    key_ids: tuple[bytes, ...]
    association: Association
    message: str = ""
