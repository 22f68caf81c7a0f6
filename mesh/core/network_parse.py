"""Building the network document from decoded JSON or YAML: strict, naming the wrong field.

Owns the shape of the format ``keymesh-network/1`` and the checks that hold when a
document is loaded (protocol 6.1: foreign prefixes may not overlap SAE homes). Unknown
fields are refused: a misspelt restriction must not silently permit. No I/O.

Shape of the parsed document (JSON or YAML, format ``keymesh-network/1``)::

    format: keymesh-network/1
    serial: 7                       # never falls
    domain: toronto
    failure_domains: [site, operator]   # what disjoint routes may not share
    nodes:
      kme-a: {site: north, operator: city}            # role: node is the default
      hub-1: {role: hub, site: cloud-1, operator: x}
      kme-c: {transit: false}                         # an end, never on another's route
    links:
      - {between: [kme-a, hub-1], cost: 1.0}
    saes:
      sae-a: {home: kme-a, previous: [{home: kme-c, until_s: 1767225600}]}
    foreign:
      - {prefix: "uk-", border: kme-c, domain: cambridge}
    grades:
      default: {grade: trusted-relay}
      pairs:
        - {between: [kme-a, kme-c], grade: "dske(2,3)", hubs: [hub-1, hub-2, hub-3], priority: 1}
        # hubs with multipath(k,n): routes over these may stand beside QKD paths
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from mesh.core.names import check_domain_id, check_kme_id, check_sae_id
from mesh.core.network import (
    MAX_ROUTES,
    ForeignPrefix,
    Grade,
    GradeKind,
    NetworkDocument,
    NetworkLink,
    Node,
    PairPolicy,
    PastHome,
    Role,
    SaeEntry,
    ordered,
)
from mesh.errors import CallerError, ConfigError, ErrorReason

FORMAT = "keymesh-network/1"
MAX_NODES = 20_000
MAX_LINKS = 200_000
MAX_SAES = 1_000_000
MAX_FOREIGN = 1_000

T = TypeVar("T")


def parse_document(data: object) -> NetworkDocument:
    """Checks a decoded JSON or YAML value and builds the document.

    Raises:
        ConfigError: DOCUMENT_INVALID; the message names the field and the remedy.
    """
    try:
        return _parse(data)
    except ConfigError as error:
        raise ConfigError(
            f"network document: {error.message}", reason=ErrorReason.DOCUMENT_INVALID, facts=error.facts
        ) from error


def _parse(data: object) -> NetworkDocument:
    known = ("format", "serial", "domain", "failure_domains", "nodes", "links", "saes", "foreign", "grades")
    top = _mapping(data, "document", known)
    if top.get("format") != FORMAT:
        raise _bad("format", f"must be {FORMAT!r}")
    nodes = _parse_nodes(_get(top, "nodes", dict, "nodes"))
    links, neighbours = _parse_links(_get(top, "links", list, "links", default=[]), nodes)
    saes = _parse_saes(_get(top, "saes", dict, "saes", default={}), nodes)
    foreign = _parse_foreign(_get(top, "foreign", list, "foreign", default=[]), nodes, saes)
    default, pairs = _parse_grades(_get(top, "grades", dict, "grades", default={}), nodes, neighbours)
    return NetworkDocument(
        serial=_integer(top, "serial", "serial", 1, 2**63 - 1),
        domain_id=_name(check_domain_id, top.get("domain"), "domain"),
        nodes=nodes,
        links=links,
        saes=saes,
        foreign=foreign,
        default_policy=default,
        pair_policies=pairs,
        failure_domains=_parse_failure_domains(top.get("failure_domains", ["site", "operator"])),
        _neighbours=neighbours,
    )


def _parse_failure_domains(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not set(value) <= {"site", "operator"} or len(set(value)) != len(value):
        raise _bad("failure_domains", "must be a list out of site, operator")
    return tuple(value)


def _parse_nodes(entries: dict[Any, Any]) -> dict[str, Node]:
    if not 1 <= len(entries) <= MAX_NODES:
        raise _bad("nodes", f"must hold 1 to {MAX_NODES} nodes")
    nodes: dict[str, Node] = {}
    for key, value in entries.items():
        kme_id = _name(check_kme_id, key, "nodes")
        where = f"nodes.{kme_id}"
        entry = _mapping({} if value is None else value, where, ("role", "site", "operator", "transit"))
        role = entry.get("role", "node")
        if role not in tuple(Role):
            raise _bad(f"{where}.role", "must be node or hub")
        nodes[kme_id] = Node(
            kme_id=kme_id,
            role=Role(role),
            site=_label(entry, "site", where),
            operator=_label(entry, "operator", where),
            transit=_get(entry, "transit", bool, f"{where}.transit", default=True),
        )
    return nodes


def _parse_links(
    entries: list[Any], nodes: Mapping[str, Node]
) -> tuple[tuple[NetworkLink, ...], dict[str, tuple[str, ...]]]:
    if len(entries) > MAX_LINKS:
        raise _bad("links", f"must hold at most {MAX_LINKS} links")
    links: dict[tuple[str, str], NetworkLink] = {}
    neighbours: dict[str, list[str]] = {kme_id: [] for kme_id in nodes}
    for index, value in enumerate(entries):
        where = f"links[{index}]"
        entry = _mapping(value, where, ("between", "cost"))
        a, b = _pair(entry, where, nodes)
        if (a, b) in links:
            raise _bad(where, f"repeats the link {a}--{b}")
        if nodes[a].role is Role.HUB and nodes[b].role is Role.HUB:
            raise _bad(where, "joins two hubs; a hub has links with its clients only")
        cost = entry.get("cost", 1.0)
        if isinstance(cost, bool) or not isinstance(cost, int | float) or not 1 <= cost <= 1000:
            raise _bad(f"{where}.cost", "must be a number from 1 to 1000 (in hops)")
        links[a, b] = NetworkLink(a, b, float(cost))
        neighbours[a].append(b)
        neighbours[b].append(a)
    return tuple(links.values()), {kme_id: tuple(sorted(peers)) for kme_id, peers in neighbours.items()}


def _parse_saes(entries: dict[Any, Any], nodes: Mapping[str, Node]) -> dict[str, SaeEntry]:
    if len(entries) > MAX_SAES:
        raise _bad("saes", f"must hold at most {MAX_SAES} SAEs")
    saes: dict[str, SaeEntry] = {}
    for key, value in entries.items():
        sae_id = _name(check_sae_id, key, "saes")
        where = f"saes.{sae_id}"
        entry = _mapping({"home": value} if isinstance(value, str) else value, where, ("home", "previous"))
        previous = []
        for index, past in enumerate(_get(entry, "previous", list, f"{where}.previous", default=[])):
            at = f"{where}.previous[{index}]"
            past_entry = _mapping(past, at, ("home", "until_s"))
            until_s = past_entry.get("until_s")
            if isinstance(until_s, bool) or not isinstance(until_s, int | float):
                raise _bad(f"{at}.until_s", "must be Unix seconds")
            previous.append(PastHome(_home(past_entry, at, nodes), float(until_s)))
        saes[sae_id] = SaeEntry(sae_id, _home(entry, where, nodes), tuple(previous))
    return saes


def _home(entry: Mapping[str, Any], where: str, nodes: Mapping[str, Node]) -> str:
    home = _member(entry.get("home"), f"{where}.home", nodes)
    if nodes[home].role is not Role.NODE:
        raise _bad(f"{where}.home", f"{home} is a hub; SAEs are homed at nodes")
    return home


def _parse_foreign(
    entries: list[Any], nodes: Mapping[str, Node], saes: Mapping[str, SaeEntry]
) -> tuple[ForeignPrefix, ...]:
    if len(entries) > MAX_FOREIGN:
        raise _bad("foreign", f"must hold at most {MAX_FOREIGN} prefixes")
    ours = sorted(saes)
    foreign: list[ForeignPrefix] = []
    for index, value in enumerate(entries):
        where = f"foreign[{index}]"
        entry = _mapping(value, where, ("prefix", "border", "domain"))
        prefix = _name(check_sae_id, entry.get("prefix"), f"{where}.prefix")
        border = _member(entry.get("border"), f"{where}.border", nodes)
        if nodes[border].role is not Role.NODE:
            raise _bad(f"{where}.border", f"{border} is a hub; a border is a node")
        domain = _name(check_domain_id, entry.get("domain"), f"{where}.domain")
        at = bisect_left(ours, prefix)
        if at < len(ours) and ours[at].startswith(prefix):
            raise _bad(f"{where}.prefix", f"covers our own SAE {ours[at]}; foreign prefixes may not")
        other = next((p for p in foreign if p.prefix.startswith(prefix) or prefix.startswith(p.prefix)), None)
        if other is not None:
            raise _bad(f"{where}.prefix", f"overlaps the prefix {other.prefix!r}")
        foreign.append(ForeignPrefix(prefix, border, domain))
    return tuple(foreign)


def _parse_grades(
    entry: dict[Any, Any], nodes: Mapping[str, Node], neighbours: Mapping[str, tuple[str, ...]]
) -> tuple[PairPolicy, dict[tuple[str, str], PairPolicy]]:
    grades = _mapping(entry, "grades", ("default", "pairs"))
    default = _parse_policy(
        _mapping(grades.get("default", {}), "grades.default", _POLICY_FIELDS), "grades.default", nodes
    )
    pairs: dict[tuple[str, str], PairPolicy] = {}
    for index, value in enumerate(_get(grades, "pairs", list, "grades.pairs", default=[])):
        where = f"grades.pairs[{index}]"
        pair_entry = _mapping(value, where, ("between", *_POLICY_FIELDS))
        pair = _pair(pair_entry, where, nodes)
        if pair in pairs:
            raise _bad(where, f"repeats the pair {pair[0]}, {pair[1]}")
        policy = _parse_policy(pair_entry, where, nodes)
        for end in pair:
            if nodes[end].role is not Role.NODE:
                raise _bad(f"{where}.between", f"{end} is a hub; a pair joins two nodes")
            for hub in policy.hubs:
                if hub not in neighbours[end]:
                    raise _bad(f"{where}.hubs", f"{hub} has no link with {end}")
        pairs[pair] = policy
    return default, pairs


_POLICY_FIELDS = ("grade", "hubs", "via", "priority")


def _parse_policy(entry: Mapping[str, Any], where: str, nodes: Mapping[str, Node]) -> PairPolicy:
    grade_text = entry.get("grade", "trusted-relay")
    if not isinstance(grade_text, str):
        raise _bad(f"{where}.grade", "must be trusted-relay, multipath(k,n) or dske(k,n)")
    try:
        grade = Grade.parse(grade_text)
    except ConfigError as error:
        raise _bad(f"{where}.grade", f"{error}") from error
    hubs = _ids(entry, "hubs", where, nodes)
    for hub in hubs:
        if nodes[hub].role is not Role.HUB:
            raise _bad(f"{where}.hubs", f"{hub} is not a hub")
    least = {GradeKind.DSKE: grade.n, GradeKind.MULTIPATH: 0}.get(grade.kind)
    if least is None and hubs:
        raise _bad(f"{where}.hubs", "must be given with grade dske(k,n), may be with multipath(k,n)")
    if least is not None and not least <= len(hubs) <= MAX_ROUTES:
        raise _bad(f"{where}.hubs", f"must name {least} to {MAX_ROUTES} hubs")
    via = frozenset(_ids(entry, "via", where, nodes)) if "via" in entry else None
    if via and (barred := [v for v in sorted(via) if nodes[v].role is Role.HUB]):
        raise _bad(f"{where}.via", f"{barred[0]} is a hub; name it under hubs")
    return PairPolicy(grade, hubs, via, _integer(entry, "priority", f"{where}.priority", 0, 9, default=0))


def _ids(entry: Mapping[str, Any], name: str, where: str, nodes: Mapping[str, Node]) -> tuple[str, ...]:
    values = _get(entry, name, list, f"{where}.{name}", default=[])
    ids = tuple(_member(value, f"{where}.{name}", nodes) for value in values)
    if len(set(ids)) != len(ids):
        raise _bad(f"{where}.{name}", "names a node twice")
    return ids


def _pair(entry: Mapping[str, Any], where: str, nodes: Mapping[str, Node]) -> tuple[str, str]:
    between = entry.get("between")
    if not isinstance(between, list) or len(between) != 2:
        raise _bad(f"{where}.between", "must be a list of two KME ids")
    a, b = (_member(kme_id, f"{where}.between", nodes) for kme_id in between)
    if a == b:
        raise _bad(f"{where}.between", f"names {a} twice")
    return ordered(a, b)


def _member(value: object, where: str, nodes: Mapping[str, Node]) -> str:
    kme_id = _name(check_kme_id, value, where)
    if kme_id not in nodes:
        raise _bad(where, f"{kme_id} is not among nodes")
    return kme_id


def _name(check: Callable[[str, str], str], value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _bad(where, "must be text")
    try:
        return check(value, where)
    except CallerError as error:
        raise ConfigError(error.message, facts=error.facts) from error


def _label(entry: Mapping[str, Any], name: str, where: str) -> str:
    value = _get(entry, name, str, f"{where}.{name}", default="")
    if len(value) > 128 or not value.isprintable():
        raise _bad(f"{where}.{name}", "must be at most 128 printable characters")
    return value


def _integer(
    entry: Mapping[str, Any], name: str, where: str, low: int, high: int, *, default: int | None = None
) -> int:
    value = entry.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _bad(where, f"must be a whole number from {low} to {high}")
    return value


def _get(entry: Mapping[str, Any], name: str, kind: type[T], where: str, *, default: T | None = None) -> T:
    value = entry.get(name, default)
    if not isinstance(value, kind):
        raise _bad(where, f"must be {_KINDS[kind]}")
    return value


_KINDS: Mapping[type, str] = {dict: "a mapping", list: "a list", str: "text", bool: "true or false"}


def _mapping(value: object, where: str, known: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _bad(where, "must be a mapping")
    unknown = next((key for key in value if key not in known), None)
    if unknown is not None:
        raise _bad(where, f"has the unknown field {str(unknown)[:64]!r}; known are {', '.join(known)}")
    return value


def _bad(where: str, problem: str) -> ConfigError:
    return ConfigError(f"{where} {problem}")
