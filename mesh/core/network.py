"""The network document: who is homed where, who may carry what, for whom.

Owns the rules about what may decide over keys (protocol 5.1): SAE homes, foreign
prefixes, neighbours, hubs of a pair, failure domains and grades come from this one
document and from nowhere else. The document is a value: reading and verifying its
signature is ``mesh.directory.document``; building it from decoded JSON or YAML, and its
shape, is ``mesh.core.network_parse``. This module does no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from mesh.errors import ConfigError, PeerError

MAX_ROUTES = 16
"""Bound on n: at most C(16,8) = 12 870 subsets are searched (reference: DSKE reconstruction)."""
MAX_ROUTE_NODES = 32

Route = tuple[str, ...]
"""KME ids from source to target, both included."""


class Role(StrEnum):
    """What a node may do: a hub forwards shares and never ends a route."""

    NODE = "node"
    HUB = "hub"


class GradeKind(StrEnum):
    """How a pair's secrets travel (protocol 3.4)."""

    TRUSTED_RELAY = "trusted-relay"
    MULTIPATH = "multipath"
    DSKE = "dske"


_GRADE = re.compile(r"(multipath|dske)\((\d{1,2}),(\d{1,2})\)")


@dataclass(frozen=True, slots=True)
class Grade:
    """A kind with its threshold: k of n shares give the secret; trusted relay is (1,1)."""

    kind: GradeKind = GradeKind.TRUSTED_RELAY
    k: int = 1
    n: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.n <= MAX_ROUTES:
            raise ConfigError(
                "grade needs 1 <= k <= n", facts={"k": self.k, "n": self.n, "most_routes": MAX_ROUTES}
            )
        if self.kind is GradeKind.TRUSTED_RELAY and (self.k, self.n) != (1, 1):
            raise ConfigError(
                "grade trusted-relay has one route: k = n = 1", facts={"k": self.k, "n": self.n}
            )

    def __str__(self) -> str:
        return self.kind if self.kind is GradeKind.TRUSTED_RELAY else f"{self.kind}({self.k},{self.n})"

    @classmethod
    def parse(cls, text: str) -> Grade:
        """Reads ``trusted-relay``, ``multipath(k,n)`` or ``dske(k,n)``; raises ConfigError."""
        if text == GradeKind.TRUSTED_RELAY:
            return cls()
        match = _GRADE.fullmatch(text.replace(" ", ""))
        if match is None:
            raise ConfigError(
                "grade must be trusted-relay, multipath(k,n) or dske(k,n)", facts={"grade": text[:64]}
            )
        return cls(GradeKind(match[1]), int(match[2]), int(match[3]))


@dataclass(frozen=True, slots=True)
class Node:
    """One KME or hub. Empty site or operator: it shares that failure domain with nobody."""

    kme_id: str
    role: Role = Role.NODE
    site: str = ""
    operator: str = ""
    transit: bool = True
    """May carry other pairs' keys in clear memory (trusted relay, multipath). Hubs never do."""


@dataclass(frozen=True, slots=True)
class NetworkLink:
    """Two neighbours, ``a < b``; ``cost`` in hops, at least 1."""

    a: str
    b: str
    cost: float = 1.0


@dataclass(frozen=True, slots=True)
class PastHome:
    """A KME that was an SAE's home until ``until_s`` (Unix seconds)."""

    kme_id: str
    until_s: float


@dataclass(frozen=True, slots=True)
class SaeEntry:
    """Where an SAE is homed now, and was."""

    sae_id: str
    home: str
    previous: tuple[PastHome, ...] = ()


@dataclass(frozen=True, slots=True)
class ForeignPrefix:
    """SAE IDs that start with ``prefix`` live in ``domain``, behind our KME ``border``."""

    prefix: str
    border: str
    domain: str


@dataclass(frozen=True, slots=True)
class PairPolicy:
    """How keys of a KME pair are established; the same in both directions.

    ``hubs`` are the only hubs admitted (dske; multipath for mixed sets of routes); ``via`` the only
    transit nodes admitted (trusted-relay, multipath), None for every node with ``transit``.
    """

    grade: Grade = Grade()
    hubs: tuple[str, ...] = ()
    via: frozenset[str] | None = None
    priority: int = 0
    """0..9: the higher is served first when material is short."""


@dataclass(frozen=True, slots=True)
class NetworkDocument:
    """The whole document, checked; build it with ``parse_document``."""

    serial: int
    domain_id: str
    nodes: Mapping[str, Node]
    links: tuple[NetworkLink, ...]
    saes: Mapping[str, SaeEntry]
    foreign: tuple[ForeignPrefix, ...] = ()
    default_policy: PairPolicy = PairPolicy()
    pair_policies: Mapping[tuple[str, str], PairPolicy] = field(default_factory=dict)
    failure_domains: tuple[str, ...] = ("site", "operator")
    _neighbours: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False, compare=False)

    def node(self, kme_id: str) -> Node | None:
        """The node of that id, None if the document does not know it."""
        return self.nodes.get(kme_id)

    def neighbours(self, kme_id: str) -> tuple[str, ...]:
        """Ids that share a link with ``kme_id``, sorted; empty if unknown."""
        return self._neighbours.get(kme_id, ())

    def home(self, sae_id: str) -> str | None:
        """The KME where the SAE is registered now; None if unknown or foreign."""
        entry = self.saes.get(sae_id)
        return None if entry is None else entry.home

    def homes_within(self, sae_id: str, now_s: float, lifetime_s: float) -> tuple[str, ...]:
        """Every KME that was the SAE's home within the last ``lifetime_s``, the present one first (4.7)."""
        entry = self.saes.get(sae_id)
        if entry is None:
            return ()
        past = (p.kme_id for p in entry.previous if p.until_s >= now_s - lifetime_s)
        return tuple(dict.fromkeys((entry.home, *past)))

    def saes_of(self, kme_id: str) -> tuple[str, ...]:
        """The SAEs homed at that KME now, sorted."""
        return tuple(sorted(s.sae_id for s in self.saes.values() if s.home == kme_id))

    def foreign_for(self, sae_id: str) -> ForeignPrefix | None:
        """The foreign prefix an SAE ID lies in, None for our own and for unknown ones."""
        return next((p for p in self.foreign if sae_id.startswith(p.prefix)), None)

    def border_for(self, sae_id: str) -> str | None:
        """The KME that keys for a foreign SAE leave and enter through; None if not foreign."""
        prefix = self.foreign_for(sae_id)
        return None if prefix is None else prefix.border

    def may_name_master(self, source: str, master: str, now_s: float, lifetime_s: float) -> bool:
        """Whether KME ``source`` may send keys in the name of SAE ``master`` (protocol 4.8, 5.1)."""
        if master in self.saes:
            return source in self.homes_within(master, now_s, lifetime_s)
        return self.border_for(master) == source

    def policy(self, kme_a: str, kme_b: str) -> PairPolicy:
        """The policy of an unordered pair: its own, or the default."""
        return self.pair_policies.get(ordered(kme_a, kme_b), self.default_policy)

    def labels(self, kme_id: str) -> frozenset[tuple[str, str]]:
        """The failure domains that a node is in: (kind, name); itself included."""
        node = self.nodes[kme_id]
        named = ((kind, str(getattr(node, kind))) for kind in self.failure_domains)
        return frozenset([("node", kme_id), *((kind, name) for kind, name in named if name)])


def ordered(a: str, b: str) -> tuple[str, str]:
    """An unordered pair as a key."""
    return (a, b) if a < b else (b, a)


def check_routes(
    document: NetworkDocument, source: str, target: str, grade: Grade, routes: Sequence[Route]
) -> None:
    """The target's (and a hub's) check that a header's routes are what its own configuration permits (3.3).

    Args:
        document: one's own network document, never the sender's words.
        source: KME that the transfer claims to come from.
        target: KME that it is for.
        grade: as the header states it; must equal the document's grade of the pair.
        routes: all n routes of the header, share i on route i - 1.

    Raises:
        PeerError: PROTOCOL_VIOLATION, naming what is not permitted.
    """
    for end in (source, target):
        if end not in document.nodes or document.nodes[end].role is not Role.NODE:
            raise _refused("routes end at nodes only", node=end)
    policy = document.policy(source, target)
    if grade != policy.grade:
        raise _refused("grade is not the pair's", stated=grade, configured=policy.grade)
    if len(routes) != grade.n:
        raise _refused("number of routes is not the grade's n", routes=len(routes), n=grade.n)
    seen: set[tuple[str, str]] = set()
    permitted = permitted_transit(document, policy)
    for index, route in enumerate(routes):
        if route[:1] != (source,) or route[-1:] != (target,):
            raise _refused("route does not lead from the source to the target", route=index)
        if policy.grade.kind is GradeKind.DSKE and len(route) != 3:
            raise _refused("a dske route has exactly one hub", route=index)
        _check_route(document, permitted, route, index)
        if len(route) != 3 and not set(route).isdisjoint(policy.hubs):
            raise _refused("a hub stands between the two ends and nobody else", route=index)
        labels = frozenset[tuple[str, str]]().union(*(document.labels(kme_id) for kme_id in route[1:-1]))
        if shared := seen & labels:
            raise _refused("routes share a failure domain", route=index, shared=sorted(shared)[0])
        seen |= labels
    direct = sum(len(route) == 2 for route in routes)
    if direct > 1:
        raise _refused("two routes use the same direct link", routes=direct)


def permitted_transit(document: NetworkDocument, policy: PairPolicy) -> frozenset[str]:
    """The ids that may lie inside a route of a pair with that policy."""
    if policy.grade.kind is GradeKind.DSKE:
        return frozenset(policy.hubs)
    return frozenset(policy.hubs) | frozenset(
        node.kme_id
        for node in document.nodes.values()
        if node.role is Role.NODE and node.transit and (policy.via is None or node.kme_id in policy.via)
    )


def _check_route(document: NetworkDocument, permitted: Container[str], route: Route, index: int) -> None:
    if not 2 <= len(route) <= MAX_ROUTE_NODES or len(set(route)) != len(route):
        raise _refused("route is too long or visits a node twice", route=index)
    for here, there in pairwise(route):
        if there not in document.neighbours(here):
            raise _refused("route uses a link that the document does not have", route=index)
    if foreign := [kme_id for kme_id in route[1:-1] if kme_id not in permitted]:
        raise _refused("the pair's policy does not admit a node of the route", route=index, node=foreign[0])


def _refused(problem: str, **facts: object) -> PeerError:
    return PeerError(problem, facts={name: str(value) for name, value in facts.items()})
