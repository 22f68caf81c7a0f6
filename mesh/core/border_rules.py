"""What crosses a border, and what an HTTP answer means there: values and small decisions.

Owns the words that both sides of the node share with its gateways (associations, ack statuses, reasons to
refuse) and the retry rule of ETSI GS QKD 020 V1.1.1: only 400 and 401 to a request prove that the peer
holds nothing of it; every other outcome is retried, then voided. No I/O; chance is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import TypeVar

from mesh.core.border import OutboundEvent
from mesh.core.names import check_sae_id
from mesh.errors import CallerError

MAX_KEYS = 1024
"""Keys of one exchange, and key_IDs of one container (020 on ack_container)."""
MAX_EXCHANGE_BYTES = 64 * 1024
"""Key bytes of one exchange: what one sealed message carries (protocol 4.8)."""
MAX_URL_CHARS = 1024
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 30.0

T = TypeVar("T")


class AckStatus(StrEnum):
    """What became of keys, as ack containers say it."""

    RELAYED = "relayed"
    FAILED = "failed"
    VOIDED = "voided"
    FAILED_TO_VOID = "failed to void"
    KEY_NOT_PRESENT = "key not present"


class Problem(StrEnum):
    """Why a request of a foreign key manager is refused; the gateway's table turns it into 020's words."""

    FOREIGN_INITIATOR = "foreign-initiator"
    """The initiator lies in no prefix that is pinned to this peer."""
    UNKNOWN_TARGET = "unknown-target"
    BOUNCE = "bounce"
    """A target lies behind the peer that asks."""
    TOO_MANY_TARGETS = "too-many-targets"
    NO_ROUTE = "no-route"
    LOOP = "loop"
    """The key_ID was here before, another way."""
    HELD = "held"
    """Some key_ID is held with other bytes or another association."""
    VOIDED = "voided"
    """Some key_ID was voided here: it never comes back."""
    CALLBACK = "callback"
    """The callback URL is not at the configured peer."""
    NOT_PRESENT = "not-present"
    """No such key_IDs of this peer and association."""
    MALFORMED = "malformed"


class PostKind(StrEnum):
    """What a gateway is asked to POST."""

    KEYS = "keys"
    ACK = "ack"
    VOID = "void"


class Verdict(StrEnum):
    """What an answer means for the request that it answers."""

    TAKEN = "taken"
    REFUSED = "refused"
    """400 or 401: on ext_keys the proof that nothing is held."""
    RETRY = "retry"


@dataclass(frozen=True, slots=True)
class Association:
    """Initiator and targets of a key; targets sorted, without repetitions."""

    initiator: str
    targets: tuple[str, ...]

    @classmethod
    def of(cls, initiator: str, targets: Iterable[str]) -> Association:
        """Checks and normalises.

        Raises:
            CallerError: no target, the initiator among them, or an id that is none; names the field.
        """
        check_sae_id(initiator, "initiator_sae_id")
        wanted = tuple(sorted({check_sae_id(target, "target_sae_ids") for target in targets}))
        if not wanted or initiator in wanted:
            raise CallerError(
                "target_sae_ids must name at least one SAE, and not the initiator",
                facts={"field": "target_sae_ids"},
            )
        return cls(initiator, wanted)


@dataclass(frozen=True, slots=True)
class Peer:
    """A foreign key manager at this border.

    Attributes:
        kme_id: our name for it; its certificate is pinned under this name at the gateways.
        url: ``https://host[:port]``, without a path; callbacks must lie at this host and port.
        prefixes: SAE ids that live behind it.
    """

    kme_id: str
    url: str
    prefixes: tuple[str, ...]

    def serves(self, sae_id: str) -> bool:
        """Whether an SAE lives behind it."""
        return sae_id.startswith(self.prefixes)

    def admits_callback(self, url: str) -> bool:
        """Whether a callback lies at this peer: same scheme, host and port, no tricks (SSRF)."""
        rest = url.removeprefix(self.url)
        return (
            len(url) <= MAX_URL_CHARS
            and rest != url
            and rest.startswith("/")
            and rest.isascii()
            and rest.isprintable()
            and not set(rest) & set(" #\\")
        )


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
        max_open_keys: keys under way with one peer, each direction for itself.
        max_settled_keys: settled keys of one peer that are remembered; the oldest are forgotten first.
        keep_s: settled keys are remembered this long.
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
    max_settled_keys: int = 2_000_000
    keep_s: float = 2 * 86_400.0

    def peer(self, kme_id: str) -> Peer | None:
        """The configured peer of that name."""
        return next((peer for peer in self.peers if peer.kme_id == kme_id), None)

    def peer_for(self, sae_id: str) -> Peer | None:
        """The first configured peer behind which an SAE lives."""
        return next((peer for peer in self.peers if peer.serves(sae_id)), None)


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """Keys of one pair, whose slave is foreign, to keep ready; ``keys`` many, of one size."""

    master: str
    slave: str
    keys: int
    size_bytes: int


def judge(http_status: int | None) -> Verdict:
    """What the answer to a POST means; None for no answer."""
    if http_status in (HTTPStatus.OK, HTTPStatus.ACCEPTED, HTTPStatus.NO_CONTENT):
        return Verdict.TAKEN
    if http_status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED):
        return Verdict.REFUSED
    return Verdict.RETRY


ACK_EVENTS = {
    AckStatus.FAILED: OutboundEvent.ACK_FAILED,
    AckStatus.VOIDED: OutboundEvent.ACK_VOIDED,
    AckStatus.FAILED_TO_VOID: OutboundEvent.ACK_VOID_FAILED,
    AckStatus.KEY_NOT_PRESENT: OutboundEvent.ACK_NOT_PRESENT,
}
"""What an ack does to an outbound key; ``relayed`` counts once every target is acked."""


def pause_s(attempts: int, *, retry_after_s: float = 0.0, chance: float = 0.5) -> float:
    """How long to wait before the next attempt: doubling, bounded, spread by ``chance`` in [0, 1)."""
    own = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(attempts - 1, 16))
    return max(own * (0.75 + 0.5 * chance), min(retry_after_s, MAX_PAUSE_S))


def portions(items: Sequence[T], sizes: Sequence[int]) -> Iterator[Sequence[T]]:
    """Cuts items into runs of at most MAX_KEYS items and MAX_EXCHANGE_BYTES (one item at least)."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and (index - start >= MAX_KEYS or total + size > MAX_EXCHANGE_BYTES):
            yield items[start:index]
            start, total = index, 0
        total += size
    if start < len(items):
        yield items[start:]
