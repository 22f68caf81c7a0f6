"""What a target refused, kept so that a source which asks is told early (protocol 3.6, 3.7).

Owns how much one link may say: a refused share counts against its own link only, so that one liar
speaks for one share; and a link pushes out its own refusals, not those of others. Nobody
authenticates a refusal: it can only cost the transfer.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from mesh.core.transfer import TransferId
from mesh.errors import ErrorReason

_MAX_PER_LINK = 1024
#: In place of a link: the transfer as a whole was refused, its secret known.
WHOLE = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why, and the highest epoch of the source that was known then (-1: none)."""

    reason: ErrorReason
    highest_epoch: int


class Refusals:
    """Refused transfers and shares, by transfer id and tag: who does not know the tag refuses nothing."""

    def __init__(self) -> None:
        self._held: dict[str, OrderedDict[tuple[TransferId, bytes], Refusal]] = {}

    def add(self, transfer: TransferId, tag: bytes, refusal: Refusal, *, came_from: str = WHOLE) -> None:
        """Its share over that link, or without a link the transfer itself, was refused."""
        held = self._held.setdefault(came_from, OrderedDict())
        held[transfer, tag] = refusal
        while len(held) > _MAX_PER_LINK:
            held.popitem(last=False)

    def of_transfer(self, transfer: TransferId, tag: bytes) -> Refusal | None:
        """Why the transfer itself was refused; None if it was not."""
        held = self._held.get(WHOLE)
        return None if held is None else held.get((transfer, tag))

    def of_shares(self, transfer: TransferId, tag: bytes) -> list[Refusal]:
        """Why its shares were refused, one for each link that brought such a share."""
        key = transfer, tag
        return [held[key] for link, held in self._held.items() if link != WHOLE and key in held]
