"""A hub's own policy: which pairs, how much, how fast; asked before second-leg pad is spent.

Owns protocol 3.9 at a hub beyond what the network document grants: the document says which
hubs a pair may use, the hub's operator says whom the hub serves. Pure: time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mesh.core.policy import Quotas, Rate
from mesh.errors import CallerError, ErrorReason, NotAuthorizedError, ShortageError


class PolicyHook(Protocol):
    """Decides about one share before anything is spent for it."""

    def check(self, source: str, target: str, nbytes: int, now_s: float) -> None:
        """Return to let the share pass; raise a MeshError to drop it.

        Args:
            source: KME that the share comes from, authenticated by its lane.
            target: KME that it is for.
            nbytes: of second-leg pad that forwarding it costs.
            now_s: monotonic seconds.
        """
        ...


@dataclass(frozen=True, slots=True)
class HubRule:
    """Sources (patterns) may send to targets (patterns), within bounds.

    A pattern is a KME id, or a prefix followed by ``*``.

    Attributes:
        max_share_bytes: of one share; 0 for no bound of this rule's.
        rate: token bucket per source; None for no bound.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    max_share_bytes: int = 0
    rate: Rate | None = None

    def covers(self, source: str, target: str) -> bool:
        """Whether the rule speaks about this source and target."""
        return _fits(self.sources, source) and _fits(self.targets, target)


class RulePolicy:
    """Rules in order; the first that covers (source, target) decides, none means no.

    Args:
        rules: as configured.
    """

    def __init__(self, rules: tuple[HubRule, ...]) -> None:
        self._rules = rules
        self._quotas = Quotas()

    def check(self, source: str, target: str, nbytes: int, now_s: float) -> None:
        """See :class:`PolicyHook`.

        Raises:
            NotAuthorizedError: no rule covers the pair.
            CallerError: ``LIMIT_EXCEEDED``, the share is larger than the rule allows.
            ShortageError: ``QUOTA_EXCEEDED``, the source's tokens are used up.
        """
        for number, rule in enumerate(self._rules):
            if rule.covers(source, target):
                if rule.max_share_bytes and nbytes > rule.max_share_bytes:
                    raise CallerError(
                        "the share is larger than this hub forwards",
                        reason=ErrorReason.LIMIT_EXCEEDED,
                        facts={"bytes": nbytes, "at_most": rule.max_share_bytes},
                    )
                self._take(source, number, rule.rate, nbytes, now_s)
                return
        raise NotAuthorizedError(
            "this hub does not serve the pair", facts={"source": source, "target": target}
        )

    def _take(self, source: str, number: int, rate: Rate | None, nbytes: int, now_s: float) -> None:
        if rate is not None and nbytes > rate.burst_bytes:
            raise ShortageError(
                "the share is larger than the source's bucket",
                reason=ErrorReason.QUOTA_EXCEEDED,
                facts={"bytes": nbytes, "at_most": rate.burst_bytes},
            )
        self._quotas.take(source, str(number), rate, nbytes, now_s)


def _fits(patterns: tuple[str, ...], kme_id: str) -> bool:
    return any(kme_id.startswith(p[:-1]) if p.endswith("*") else kme_id == p for p in patterns)
