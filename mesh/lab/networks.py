"""Network files: what a lab is made of, as YAML that users write.

Owns the shape of those files and what must hold within one. What decides over keys
(homes, neighbours, grades) is translated into the network document and checked there,
so that a lab cannot run what an operator could not sign. Must not start anything.

Sizes are bytes, rates bit/s, delays milliseconds one way.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec

from mesh.core.network import NetworkDocument
from mesh.core.network_parse import FORMAT, parse_document
from mesh.core.psrd import MIN_DIRECTION_BYTES
from mesh.core.sizes import parse_size
from mesh.errors import CallerError, ConfigError
from mesh.node.config import Limits, Quota, Reserves
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


class Network(_Section, frozen=True, kw_only=True):
    """A whole network file.

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
        """Whether two members ever call each other: over a link, or as homes of SAEs."""
        is_linked = any({a, b} == set(link.between) for link in self.links)
        return is_linked or {a, b} <= set(self.homes)

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


def shipped_networks() -> list[str]:
    """Names of the networks that come with the package."""
    folder = resources.files("mesh.lab") / "networks"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_network(name_or_file: str) -> Network:
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
    return parse_network(text, name_or_file)


def parse_network(text: str, where: str) -> Network:
    """Check a network file's text; ``where`` names it in messages.

    Raises:
        ConfigError: names the field, the problem and the remedy.
    """
    try:
        network = msgspec.convert(decode_yaml(text), Network)
    except ConfigError as error:
        raise ConfigError(f"network {where} is {error.message}", facts=error.facts) from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"network {where}: {error}") from error
    try:
        _check(network)
        network.document()
    except ConfigError as error:
        raise ConfigError(f"network {where}: {error.message}", facts=error.facts) from error
    return network


def _check(network: Network) -> None:
    gateways = [gateway for node in network.nodes for gateway in node.gateways]
    members = [
        ("nodes, hubs", network.members),
        ("gateways", [gateway.id for gateway in gateways]),
        ("saes", [sae for gateway in gateways for sae in gateway.saes]),
        ("links", [link.link_id for link in network.links]),
    ]
    for kind, ids in members:
        if twice := next((entry for entry in ids if ids.count(entry) > 1), None):
            raise ConfigError(f"{kind}: {twice} is there twice; give each its own id")
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
    if len(network.homes) < 2:
        raise ConfigError("nodes: SAEs at two different nodes are needed; add gateways with saes")
    if network.nodes[0].id not in network.homes:
        raise ConfigError("nodes[0].gateways: the first node needs a gateway with an SAE")
    if network.reserves.low_water_bytes > network.reserves.high_water_bytes:
        raise ConfigError("reserves.low_water_bytes: must not exceed reserves.high_water_bytes")
