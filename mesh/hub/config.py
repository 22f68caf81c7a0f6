"""A hub's configuration file: a node's, without anything that would let it end a route.

No reserves, limits, quotas or access table: a hub has no SAEs, so those fields are unknown
here and refused. Its own part is the policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from mesh.core.names import check_kme_id
from mesh.core.policy import Rate
from mesh.errors import CallerError, ConfigError
from mesh.hub.policy import HubRule, RulePolicy
from mesh.node.config import (
    DirectorySection,
    LinkSection,
    Listen,
    LogSection,
    NetworkSection,
    NodeConfig,
    Tls,
    checked,
    load_yaml,
)
from mesh.ops.tracing import TracingSection

_Natural = Annotated[int, msgspec.Meta(ge=0)]
_HostPort = Annotated[str, msgspec.Meta(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$")]
_Patterns = Annotated[list[str], msgspec.Meta(min_length=1, max_length=1000)]


class RuleSection(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Sources may send to targets; ids, or prefixes followed by ``*``."""

    sources: _Patterns
    targets: _Patterns
    # Of one share, in bytes; 0 for no bound.
    max_share_bytes: _Natural = 0
    # Token bucket per source, in bytes of second-leg pad; 0 for no bound.
    bytes_per_s: _Natural = 0
    # 0 takes ten seconds' worth.
    burst_bytes: _Natural = 0


_EVERY_PAIR = RuleSection(sources=["*"], targets=["*"])


class HubConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """One hub. Paths are relative to the file's own folder. Fields as of ``NodeConfig``."""

    hub_id: str
    domain_id: str
    data_dir: str
    listen: Listen
    advertise: _HostPort | None = None
    addresses: dict[str, _HostPort] = {}
    tls: Tls
    directory: DirectorySection
    network: NetworkSection = NetworkSection()
    links: Annotated[list[LinkSection], msgspec.Meta(max_length=256)] = []
    # The first rule that covers a pair decides, none refuses it. Without rules: every pair that
    # the network document grants this hub to.
    policy: Annotated[list[RuleSection], msgspec.Meta(max_length=1000)] = msgspec.field(
        default_factory=lambda: [_EVERY_PAIR]
    )
    # Lane bytes that bulk shares leave for those on demand.
    bulk_floor_bytes: _Natural = 64 * 1024
    proof_dir: str | None = None
    redial_min_s: Annotated[float, msgspec.Meta(gt=0)] = 0.5
    redial_max_s: Annotated[float, msgspec.Meta(gt=0, le=60)] = 60.0
    log: LogSection = LogSection()
    tracing: TracingSection | None = None
    # Records every used pad range (never bytes) for audits; for tests.
    pad_audit_file: str | None = None


def load_hub_config(path: Path) -> tuple[HubConfig, NodeConfig]:
    """Read and check a hub's configuration.

    Returns:
        The configuration, and the same as a node's with every path absolute.

    Raises:
        ConfigError: names the file and the field.
    """
    config = load_yaml(path, HubConfig)
    for index, rule in enumerate(config.policy):
        for field, patterns in (("sources", rule.sources), ("targets", rule.targets)):
            _check_patterns(patterns, f"policy[{index}].{field}", path)
    return config, checked(as_node(config), path)


def as_node(config: HubConfig) -> NodeConfig:
    """The fields that a hub shares with a node; access stays denied to everybody."""
    return NodeConfig(
        kme_id=config.hub_id,
        domain_id=config.domain_id,
        data_dir=config.data_dir,
        listen=config.listen,
        advertise=config.advertise,
        addresses=config.addresses,
        tls=config.tls,
        directory=config.directory,
        network=config.network,
        links=config.links,
        proof_dir=config.proof_dir,
        redial_min_s=config.redial_min_s,
        redial_max_s=config.redial_max_s,
        log=config.log,
        tracing=config.tracing,
        pad_audit_file=config.pad_audit_file,
    )


def build_policy(config: HubConfig) -> RulePolicy:
    """The policy that the configuration states."""
    return RulePolicy(tuple(_rule(section) for section in config.policy))


def _rule(section: RuleSection) -> HubRule:
    rate = None
    if section.bytes_per_s:
        rate = Rate(section.bytes_per_s, section.burst_bytes or 10 * section.bytes_per_s)
    return HubRule(tuple(section.sources), tuple(section.targets), section.max_share_bytes, rate)


def _check_patterns(patterns: list[str], field: str, path: Path) -> None:
    for pattern in patterns:
        if pattern == "*":
            continue
        try:
            check_kme_id(pattern.removesuffix("*"), field)
        except CallerError as error:
            raise ConfigError(error.message, facts={"file": path}) from error
