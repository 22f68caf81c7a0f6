"""What the parts of a border need of each other and of the key plane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from mesh.core.border_rules import AckStatus, Association, BorderConfig
from mesh.core.network import NetworkDocument
from mesh.node.keyports import AlarmPort
from mesh.store.tables import CallRow, PostRow, Tables

ACK_PATH = "/kmapi/v1/ext_keys/ack"
KEYS_PATH = "/kmapi/v1/ext_keys"
VOID_PATH = "/kmapi/v1/ext_keys/void"
_PEER_PLACE = "020/"

T = TypeVar("T")


@dataclass(slots=True)
class After:
    """What happens in memory once the transaction is durable, and what if it never will be."""

    steps: list[Callable[[], object]] = field(default_factory=list)
    undo: list[Callable[[], object]] = field(default_factory=list)

    def run(self) -> None:
        """The disk has answered yes."""
        for step in self.steps:
            step()

    def revert(self) -> None:
        """The change failed: nothing of it is on disk."""
        for step in reversed(self.undo):
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

    def take_back(self, tables: Tables, after: After, key_id: bytes, *, border: str) -> bool:
        """Takes a key back that this node made and gave to a border; False if it was handed out."""
        ...

    def read(self, query: Callable[[Tables], T]) -> T:
        """Reads from the store, outside of any change."""
        ...

    def post_added(self, post: PostRow) -> None:
        """A request is durable."""
        ...

    def post_gone(self, job_id: bytes) -> None:
        """A request is done, or void."""
        ...

    def call_added(self, tables: Tables, call: CallRow) -> Callable[[], None]:
        """A sealed message is wanted; returns what to do about it once this change is durable."""
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
