"""Network files: what a lab is made of, as YAML that users write.

Owns the shape of those files and what must hold within one. What decides over keys
(homes, neighbours, grades, foreign prefixes) is translated into the network document and
checked there, so that a lab cannot run what an operator could not sign. A file describes one
domain, or several key managers that meet at borders. Must not start anything.

Sizes are bytes, rates bit/s, delays milliseconds one way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec

from mesh.core.network import NetworkDocument
from mesh.core.network_parse import FORMAT, parse_document
from mesh.core.psrd import MIN_DIRECTION_BYTES
from mesh.core.sizes import parse_size
from mesh.errors import CallerError, ConfigError
from mesh.node.config import BufferedPair, Limits, Quota, Reserves
from mesh.ops.yamltext import decode_yaml

_Id = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
_SaeId = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,64}$")]
_Bytes = Annotated[int, msgspec.Meta(ge=0)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: unknown fields are refused."""


class GatewaySpec(_Section, frozen=True, kw_only=True):
    """One gateway and the SAEs that reach the mesh through it."""

    id: _Id
    saes: list[_SaeId] = []


class NodeSpec(_Section, frozen=True, kw_only=True):
    """One KME; ``site`` and ``operator`` are its failure domains."""

    id: _Id
    site: str = ""
    operator: str = ""
    transit: bool = True
    gateways: list[GatewaySpec] = []


class HubSpec(_Section, frozen=True, kw_only=True):
    """One security hub; ``site`` and ``operator`` are its failure domains."""

    id: _Id
    site: str = ""
    operator: str = ""


class LinkSpec(_Section, frozen=True, kw_only=True):
    """A link: what feeds it (a simulated QKD device pair, or a courier file), and the network path.

    Attributes:
        between: two nodes, or a node and a hub.
        psrd_bytes: pre-shared random data per lane, carried by courier at start, as bytes or with a
            unit ("64MiB"); two of them are for the lane from the first end of ``between`` to the
            second, and for the way back. The link then has no device.
        rate_bps: secret key rate of the device pair, bit/s.
        qber: its quantum bit error rate, a fraction.
        initial_bytes: key that the device pair holds at start.
        buffer_bytes: key that it holds at most; 0 takes 64 MiB, or ``initial_bytes`` if larger.
        pool_max_bytes: unused material that the nodes hold per lane; at least ``psrd_bytes``.
        window_bytes: the receiver's window; 0 leaves it to the pool's size.
        one_way_delay_ms: emulated delay of the classical channel.
        cost: what routing counts for it, in hops.
    """

    between: Annotated[list[_Id], msgspec.Meta(min_length=2, max_length=2)]
    psrd_bytes: int | str | Annotated[list[int | str], msgspec.Meta(min_length=2, max_length=2)] = 0
    rate_bps: Annotated[float, msgspec.Meta(ge=0)] = 3.95e6
    qber: Annotated[float, msgspec.Meta(ge=0, lt=0.5)] = 0.02
    initial_bytes: _Bytes = 8 << 20
    buffer_bytes: _Bytes = 0
    pool_max_bytes: Annotated[int, msgspec.Meta(ge=65_536)] = 64 << 20
    window_bytes: _Bytes = 0
    one_way_delay_ms: Annotated[float, msgspec.Meta(ge=0, le=10_000)] = 0.0
    cost: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 1.0

    @property
    def link_id(self) -> str:
        """``a--b``, the smaller id first."""
        return "--".join(sorted(self.between))

    @property
    def courier_bytes(self) -> tuple[int, int]:
        """``psrd_bytes`` in bytes, there and back; (0, 0) where a device feeds the link.

        Raises:
            ConfigError: not a size.
        """
        there, back = self.psrd_bytes if isinstance(self.psrd_bytes, list) else (self.psrd_bytes,) * 2
        try:
            return parse_size(str(there), field="psrd_bytes"), parse_size(str(back), field="psrd_bytes")
        except CallerError as error:
            raise ConfigError(error.message, facts=error.facts) from error

    @property
    def is_couriered(self) -> bool:
        """Whether courier files feed the link."""
        return any(self.courier_bytes)


class EtcdSpec(_Section, frozen=True, kw_only=True):
    """How many etcd members the domain runs."""

    members: Annotated[int, msgspec.Meta(ge=1, le=5)] = 1


class ForeignSpec(_Section, frozen=True, kw_only=True):
    """SAEs of another domain: their ids' prefix, our border towards them, and whom it meets there.

    Attributes:
        border: a node of this domain, with a gateway.
        peer: a border node of another domain of the same file; it names this border as its peer.
        domain: where those SAEs live, which may lie behind the peer's own domain.
    """

    prefix: _SaeId
    border: _Id
    peer: _Id
    domain: _Id


class Network(_Section, frozen=True, kw_only=True):
    """One domain: a whole network file, or one of several in it.

    ``pad_audit`` lets every node record each pad range that it uses (never bytes), for audits.
    """

    name: _Id
    domain: _Id
    nodes: Annotated[list[NodeSpec], msgspec.Meta(min_length=2, max_length=64)]
    hubs: Annotated[list[HubSpec], msgspec.Meta(max_length=16)] = []
    links: Annotated[list[LinkSpec], msgspec.Meta(min_length=1, max_length=256)]
    grades: dict[str, Any] = {}
    etcd: EtcdSpec = EtcdSpec()
    reserves: Reserves = Reserves()
    limits: Limits = Limits()
    quota: Quota = Quota()
    pad_audit: bool = False
    foreign: Annotated[list[ForeignSpec], msgspec.Meta(max_length=64)] = []
    foreign_buffers: Annotated[list[BufferedPair], msgspec.Meta(max_length=64)] = []

    @property
    def borders(self) -> list[str]:
        """Ids of the nodes that meet other domains."""
        return [node.id for node in self.nodes if any(one.border == node.id for one in self.foreign)]

    @property
    def members(self) -> list[str]:
        """Ids of all nodes and hubs."""
        return [*(node.id for node in self.nodes), *(hub.id for hub in self.hubs)]

    @property
    def homes(self) -> list[str]:
        """Ids of the nodes that have SAEs."""
        return [node.id for node in self.nodes if any(gateway.saes for gateway in node.gateways)]

    def issuer(self, link: LinkSpec) -> str:
        """Which end issues the link's courier file: its hub, else the first end."""
        hubs = {hub.id for hub in self.hubs}
        return next((end for end in link.between if end in hubs), link.between[0])

    def talks(self, a: str, b: str) -> bool:
        """Whether two members ever call each other: over a link, or as homes of SAEs and borders."""
        is_linked = any({a, b} == set(link.between) for link in self.links)
        return is_linked or {a, b} <= {*self.homes, *self.borders}

    def document_source(self, serial: int = 1) -> dict[str, Any]:
        """The network document of this network, unsigned, as ``mesh.core.network_parse`` reads it."""
        return {
            "format": FORMAT,
            "serial": serial,
            "domain": self.domain,
            "nodes": {
                node.id: {"site": node.site, "operator": node.operator, "transit": node.transit}
                for node in self.nodes
            }
            | {hub.id: {"role": "hub", "site": hub.site, "operator": hub.operator} for hub in self.hubs},
            "links": [{"between": sorted(link.between), "cost": link.cost} for link in self.links],
            "saes": {
                sae: {"home": node.id}
                for node in self.nodes
                for gateway in node.gateways
                for sae in gateway.saes
            },
            "foreign": [
                {"prefix": one.prefix, "border": one.border, "domain": one.domain} for one in self.foreign
            ],
            "grades": self.grades,
        }

    def document(self) -> NetworkDocument:
        """The same, checked."""
        return parse_document(self.document_source())

    def delay_ms(self, a: str, b: str) -> float:
        """One-way delay between two nodes: along the links with the least total delay."""
        best = {a: 0.0}
        queue = [a]
        while queue:
            here = min(queue, key=best.__getitem__)
            queue.remove(here)
            if here == b:
                return best[here]
            for link in self.links:
                if here in link.between:
                    there = link.between[1 - link.between.index(here)]
                    delay_ms = best[here] + link.one_way_delay_ms
                    if delay_ms < best.get(there, float("inf")):
                        best[there] = delay_ms
                        queue.append(there)
        return 0.0


@dataclass(frozen=True, slots=True)
class Lab:
    """What a network file describes: one domain, or several that meet at borders."""

    name: str
    domains: tuple[Network, ...]

    @classmethod
    def of(cls, network: Network) -> Lab:
        """A lab of one domain."""
        return cls(network.name, (network,))


def shipped_networks() -> list[str]:
    """Names of the networks that come with the package."""
    folder = resources.files("mesh.lab") / "networks"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_lab(name_or_file: str) -> Lab:
    """Read a shipped network by name, or a file of the user's.

    Raises:
        ConfigError: no such network, or a field is wrong: names file, field and remedy.
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9-]*", name_or_file) and name_or_file in shipped_networks():
        text = (resources.files("mesh.lab") / "networks" / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name_or_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"no network {name_or_file!r}: give a YAML file, or one of {', '.join(shipped_networks())}"
            ) from error
    return parse_lab(text, name_or_file)


def load_network(name_or_file: str) -> Network:
    """The same, of a file that describes one domain.

    Raises:
        ConfigError: as ``load_lab``, and if there are several.
    """
    lab = load_lab(name_or_file)
    if len(lab.domains) != 1:
        raise ConfigError(f"network {name_or_file} has several domains; name one with a single domain")
    return lab.domains[0]


def parse_lab(text: str, where: str) -> Lab:
    """Check a network file's text; ``where`` names it in messages.

    Raises:
        ConfigError: names the field, the problem and the remedy.
    """
    try:
        top = decode_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"network {where} is {error.message}", facts=error.facts) from error
    if not isinstance(top, dict) or "domains" not in top:
        network = _convert(top, f"network {where}")
        return _checked(Lab(network.name, (network,)), where)
    name, sections = top.get("name"), top["domains"]
    if set(top) != {"name", "domains"} or not isinstance(name, str) or not isinstance(sections, list):
        raise ConfigError(f"network {where}: with domains, a list of networks, there is a name and no more")
    networks = [
        _convert(
            {"name": name, **section} if isinstance(section, dict) else section,
            f"network {where}: domains[{index}]",
        )
        for index, section in enumerate(sections)
    ]
    return _checked(Lab(name, tuple(networks)), where)


def _convert(data: object, where: str) -> Network:
    try:
        return msgspec.convert(data, Network)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error


def _checked(lab: Lab, where: str) -> Lab:
    try:
        _check_together(lab.domains)
        for network in lab.domains:
            _check(network)
            network.document()
    except ConfigError as error:
        raise ConfigError(f"network {where}: {error.message}", facts=error.facts) from error
    return lab


def _check_together(domains: Sequence[Network]) -> None:
    """What must hold over all domains of a lab: ids, enough SAEs, and borders that name each other."""
    gateways = [gateway for one in domains for node in one.nodes for gateway in node.gateways]
    ids = [
        ("domains", [one.domain for one in domains]),
        ("nodes, hubs", [member for one in domains for member in one.members]),
        ("gateways", [gateway.id for gateway in gateways]),
        ("saes", [sae for gateway in gateways for sae in gateway.saes]),
    ]
    for kind, names in ids:
        if twice := next((entry for entry in names if names.count(entry) > 1), None):
            raise ConfigError(f"{kind}: {twice} is there twice; give each its own id")
    homes = [home for one in domains for home in one.homes]
    if len(homes) < 2:
        raise ConfigError("nodes: SAEs at two different nodes are needed; add gateways with saes")
    if not domains or domains[0].nodes[0].id not in homes:
        raise ConfigError("nodes[0].gateways: the first node needs a gateway with an SAE")
    meetings = {(one.border, one.peer) for network in domains for one in network.foreign}
    for network in domains:
        with_gateway = {node.id for node in network.nodes if node.gateways}
        for index, one in enumerate(network.foreign):
            where = f"{network.domain}.foreign[{index}]"
            if one.border not in with_gateway:
                raise ConfigError(f"{where}.border: {one.border} is no node with a gateway of this domain")
            if one.peer in network.members or (one.peer, one.border) not in meetings:
                raise ConfigError(
                    f"{where}.peer: {one.peer} is no border of another domain that names {one.border} "
                    "as its peer"
                )


def _check(network: Network) -> None:
    links = [link.link_id for link in network.links]
    if twice := next((entry for entry in links if links.count(entry) > 1), None):
        raise ConfigError(f"links: {twice} is there twice; give each its own id")
    for index, link in enumerate(network.links):
        for end in link.between:
            if end not in network.members:
                raise ConfigError(
                    f"links[{index}].between: {end} is not among nodes and hubs; add it or correct the id"
                )
        if link.buffer_bytes and link.buffer_bytes < link.initial_bytes:
            raise ConfigError(
                f"links[{index}].buffer_bytes: less than initial_bytes; raise it or leave it out"
            )
        if link.is_couriered and min(link.courier_bytes) < MIN_DIRECTION_BYTES:
            raise ConfigError(
                f"links[{index}].psrd_bytes: at least {MIN_DIRECTION_BYTES} per lane, or 0 for a device"
            )
    if network.reserves.low_water_bytes > network.reserves.high_water_bytes:
        raise ConfigError("reserves.low_water_bytes: must not exceed reserves.high_water_bytes")
