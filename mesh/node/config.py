"""The node's configuration file: what an operator may set, with units and defaults.

A typo is an error: unknown fields are refused, and every message names the field
and the file. Values that must hold together (water marks, limits) are checked
here, so that a node never starts half configured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from mesh.core.names import check_domain_id, check_kme_id, check_sae_id
from mesh.errors import CallerError, ConfigError
from mesh.ops.tracing import TracingSection
from mesh.ops.yamltext import decode_yaml

_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Natural = Annotated[int, msgspec.Meta(ge=0)]
_Seconds = Annotated[float, msgspec.Meta(gt=0)]
_HostPort = Annotated[str, msgspec.Meta(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$")]


class _Section(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Base of all sections: unknown fields are refused."""


class Listen(_Section, frozen=True, kw_only=True):
    """Where the node listens: ``host:port``; port 0 is not allowed."""

    grpc: _HostPort
    http: _HostPort


class Tls(_Section, frozen=True, kw_only=True):
    """Node-plane certificates (PEM files); ``deny_list`` holds one serial or fingerprint a line."""

    ca: str
    cert: str
    key: str
    deny_list: str | None = None


class Etcd(_Section, frozen=True, kw_only=True):
    """The domain's etcd: TLS always, user and password when authentication is on."""

    endpoints: Annotated[list[_HostPort], msgspec.Meta(min_length=1, max_length=16)]
    ca: str
    cert: str | None = None
    key: str | None = None
    username: str | None = None
    password_file: str | None = None
    lease_ttl_s: Annotated[int, msgspec.Meta(ge=2, le=600)] = 10


class DirectorySection(_Section, frozen=True, kw_only=True):
    """Exactly one of ``etcd`` and ``static`` (a YAML file with the same face)."""

    etcd: Etcd | None = None
    static: str | None = None


class NetworkSection(_Section, frozen=True, kw_only=True):
    """The signed network document.

    ``document`` pins a file; without it the document comes from the directory.
    ``trust_directory`` accepts an unsigned one: labs only, and shown in the status.
    """

    document: str | None = None
    operator_public_key: str | None = None
    trust_directory: bool = False


class Device(_Section, frozen=True, kw_only=True):
    """The site's own QKD device on a link, behind its ETSI GS QKD 014 interface."""

    url: Annotated[str, msgspec.Meta(pattern=r"^https://")]
    ca: str
    cert: str
    key: str
    # The SAE ID by which the device knows the other end.
    sae_id: str
    # Bits per key asked for; clipped to what the device's status allows.
    key_size_bits: Annotated[int, msgspec.Meta(ge=64, le=1_048_576)] = 65_536
    timeout_s: _Seconds = 5.0


class LinkSection(_Section, frozen=True, kw_only=True):
    """One neighbour. ``device`` feeds the lanes, or courier files do; both ends name the same cap."""

    peer: str
    device: Device | None = None
    # Unused material held per lane, in bytes.
    pool_max_bytes: Annotated[int, msgspec.Meta(ge=65_536)] = 64 * 1024 * 1024
    # Receiver's window in bytes; 0 takes min(4 MiB, 1/16 of the pool).
    window_bytes: _Natural = 0
    # Without a device: alarm when a lane holds less, in bytes; 0 takes an eighth of the last table.
    low_water_bytes: _Natural = 0


class Reserves(_Section, frozen=True, kw_only=True):
    """Water marks of a reserve (bytes per direction and pair) and the life of a key."""

    high_water_bytes: _Natural = 4 * 1024 * 1024
    # 0 takes three quarters of the high-water mark.
    low_water_bytes: _Natural = 0
    # Key bytes that one source may have lying here unused: at least its high-water mark.
    inbound_max_bytes: Annotated[int, msgspec.Meta(ge=65_536)] = 64 * 1024 * 1024
    key_lifetime_s: _Seconds = 86_400.0
    # Most payload one transfer asks for, in bytes.
    transfer_max_bytes: Annotated[int, msgspec.Meta(ge=4_096)] = 256 * 1024
    # Fill reserves of pairs in the network document before anybody asks.
    prefill: bool = True


class Limits(_Section, frozen=True, kw_only=True):
    """What one request may ask for. Sizes of keys in bits, as ETSI GS QKD 014 counts them."""

    key_size_bits: _Positive = 256
    min_key_size_bits: _Positive = 8
    max_key_size_bits: Annotated[int, msgspec.Meta(ge=8, le=65_536)] = 65_536
    max_key_per_request: Annotated[int, msgspec.Meta(ge=1, le=1_024)] = 128
    max_sae_id_count: Annotated[int, msgspec.Meta(ge=0, le=64)] = 8
    max_bytes_per_request: _Positive = 1_048_576
    request_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=9)] = 8.0


class Quota(_Section, frozen=True, kw_only=True):
    """Token bucket per SAE pair; 0 means no limit."""

    bytes_per_s: _Natural = 0
    burst_bytes: _Natural = 0


class BorderPeer(_Section, frozen=True, kw_only=True):
    """Another owner's key manager, met at this node over ETSI GS QKD 020.

    ``prefixes``: SAE ids behind it; it may name only those as initiators.
    """

    kme_id: str
    # Without a path; callbacks are accepted at this host and port only.
    url: Annotated[str, msgspec.Meta(pattern=r"^https://[^/?#@\s]+$", max_length=512)]
    prefixes: Annotated[list[str], msgspec.Meta(min_length=1, max_length=256)]


class BorderSection(_Section, frozen=True, kw_only=True):
    """A border: which gateways speak ETSI GS QKD 020 for this node, and with whom."""

    gateways: Annotated[list[str], msgspec.Meta(min_length=1, max_length=64)]
    # Base URL of our own listener as peers reach it: acks come back there, whichever gateway posted.
    url: Annotated[str, msgspec.Meta(pattern=r"^https://[^/?#@\s]+$", max_length=512)]
    peers: Annotated[list[BorderPeer], msgspec.Meta(min_length=1, max_length=256)]
    # An inbound key reaches its targets within this time, or fails.
    carry_timeout_s: _Seconds = 30.0
    # An ack that cannot be delivered for so long ends in a void; a void in an alarm.
    ack_give_up_s: _Seconds = 600.0
    void_give_up_s: _Seconds = 3600.0
    # A void that was taken and is not acked is posted again.
    void_repeat_s: _Seconds = 10.0
    max_targets: Annotated[int, msgspec.Meta(ge=1, le=64)] = 9
    # Keys under way with one peer, each direction for itself.
    max_open_keys: _Positive = 200_000
    # Settled keys of one peer that are remembered; beyond, the oldest are forgotten early.
    max_settled_keys: _Positive = 2_000_000
    # How long a settled key is remembered: at least twice reserves.key_lifetime_s.
    keep_s: _Seconds = 172_800.0


class BufferedPair(_Section, frozen=True, kw_only=True):
    """Keys for a foreign slave that are acknowledged before they are asked for."""

    master: str
    slave: str
    buffer: Annotated[int, msgspec.Meta(ge=0, le=65_536)]
    key_size_bits: Annotated[int, msgspec.Meta(ge=8, le=65_536, multiple_of=8)] = 256


class LogSection(_Section, frozen=True, kw_only=True):
    """JSON lines; ``file`` is null for standard error."""

    level: Annotated[str, msgspec.Meta(pattern="^(debug|info|warning|error)$")] = "info"
    file: str | None = None


class NodeConfig(_Section, frozen=True, kw_only=True):
    """One node (KME). Paths are relative to the file's own folder."""

    kme_id: str
    domain_id: str
    data_dir: str
    listen: Listen
    # What other nodes dial; defaults to ``listen.grpc``.
    advertise: _HostPort | None = None
    # Where to dial a peer instead of at its address in the directory (labs: an emulated path).
    addresses: dict[str, _HostPort] = {}
    tls: Tls
    directory: DirectorySection
    network: NetworkSection = NetworkSection()
    links: Annotated[list[LinkSection], msgspec.Meta(max_length=256)] = []
    reserves: Reserves = Reserves()
    limits: Limits = Limits()
    quota: Quota = Quota()
    # YAML access table; null together with ``access: open`` (labs) admits every SAE pair.
    access_file: str | None = None
    access: Annotated[str, msgspec.Meta(pattern="^(deny|open)$")] = "deny"
    # Gateways that may ask for keys of the SAEs homed here, in a list; or by id with the SAEs (ids, or
    # prefixes followed by *) that each speaks for. Null admits every gateway of the domain.
    gateways: (
        Annotated[list[str], msgspec.Meta(max_length=256)]
        | Annotated[dict[str, list[str]], msgspec.Meta(max_length=256)]
        | None
    ) = None
    # tmpfs folder for the proof of a mere process restart; null looks for one.
    proof_dir: str | None = None
    # A character device mixed into keys for two SAEs at this KME; null uses the operating system.
    random_device: str | None = None
    # First pause before a link is dialled again, and the longest, in seconds.
    redial_min_s: _Seconds = 0.5
    redial_max_s: Annotated[float, msgspec.Meta(gt=0, le=60)] = 60.0
    # Another owner's key managers met here; null for none.
    border: BorderSection | None = None
    # SAE pairs with a foreign slave whose keys are kept ready; none by default.
    foreign_buffers: Annotated[list[BufferedPair], msgspec.Meta(max_length=4096)] = []
    audit_log: str | None = None
    log: LogSection = LogSection()
    # Spans of requests, to an OpenTelemetry collector; null for none.
    tracing: TracingSection | None = None
    # Records every used pad range (never bytes) for audits; for tests.
    pad_audit_file: str | None = None


_T = TypeVar("_T", bound=msgspec.Struct)


def load_yaml(path: Path, kind: type[_T]) -> _T:
    """Read a YAML file into ``kind``.

    Raises:
        ConfigError: names the file, the field and what is wrong with it.
    """
    try:
        return msgspec.convert(decode_yaml(path.read_bytes()), kind)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration: {error.strerror}", facts={"file": path}) from error
    except ConfigError as error:
        raise ConfigError(error.message, facts={**error.facts, "file": path}) from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"the configuration is not valid: {error}", facts={"file": path}) from error


def load_node_config(path: Path) -> NodeConfig:
    """Read, check and resolve a node's configuration.

    Returns:
        The configuration with every path absolute.

    Raises:
        ConfigError: names the file and the field.
    """
    return checked(load_yaml(path, NodeConfig), path)


def checked(config: NodeConfig, path: Path) -> NodeConfig:
    """Check what must hold together and make every path absolute, from the file's own folder.

    Raises:
        ConfigError: names the file and the field.
    """
    try:
        check_kme_id(config.kme_id, field="kme_id")
        check_domain_id(config.domain_id, field="domain_id")
        for index, link in enumerate(config.links):
            check_kme_id(link.peer, field=f"links[{index}].peer")
        for gateway, saes in (config.gateways if isinstance(config.gateways, dict) else {}).items():
            for pattern in saes:
                check_sae_id(pattern.removesuffix("*") or pattern, field=f"gateways.{gateway}")
        _check_border(config)
    except CallerError as error:
        raise ConfigError(error.message, facts={"file": path}) from error
    _check_together(config, path)
    return _resolve(config, path.resolve().parent)


def _check_border(config: NodeConfig) -> None:
    for index, pair in enumerate(config.foreign_buffers):
        check_sae_id(pair.master, field=f"foreign_buffers[{index}].master")
        check_sae_id(pair.slave, field=f"foreign_buffers[{index}].slave")
    if config.border is None:
        return
    ids = [peer.kme_id for peer in config.border.peers]
    for index, peer in enumerate(config.border.peers):
        check_kme_id(peer.kme_id, field=f"border.peers[{index}].kme_id")
        for prefix in peer.prefixes:
            check_sae_id(prefix, field=f"border.peers[{index}].prefixes")
    if len(set(ids)) != len(ids) or config.kme_id in ids:
        raise CallerError("border.peers: give each peer a kme_id of its own, and not this node's")
    claims = sorted((prefix, peer.kme_id) for peer in config.border.peers for prefix in peer.prefixes)
    for at, (prefix, kme_id) in enumerate(claims):
        for other, other_id in claims[at + 1 :]:
            if not other.startswith(prefix):
                break
            if other_id != kme_id:
                raise CallerError(
                    f"border.peers: prefix {other!r} of {other_id} overlaps {prefix!r} of {kme_id}; "
                    "an SAE lives behind one peer"
                )
    if config.border.keep_s < 2 * config.reserves.key_lifetime_s:
        raise CallerError(
            "border.keep_s: must be at least twice reserves.key_lifetime_s, "
            "or a key outlives the memory of it"
        )


def _check_together(config: NodeConfig, path: Path) -> None:
    peers = [link.peer for link in config.links]
    problems = [
        (len(set(peers)) != len(peers), "links: a peer is named twice; keep one entry for each"),
        (config.kme_id in peers, "links: a node cannot be its own neighbour; remove that entry"),
        (
            (config.directory.etcd is None) == (config.directory.static is None),
            "directory: give exactly one of etcd and static",
        ),
        (
            config.reserves.low_water_bytes > config.reserves.high_water_bytes,
            "reserves.low_water_bytes: must not exceed reserves.high_water_bytes",
        ),
        (
            not config.limits.min_key_size_bits
            <= config.limits.key_size_bits
            <= config.limits.max_key_size_bits,
            "limits.key_size_bits: must lie between min_key_size_bits and max_key_size_bits",
        ),
        (
            any(
                bits % 8
                for bits in (
                    config.limits.key_size_bits,
                    config.limits.min_key_size_bits,
                    config.limits.max_key_size_bits,
                )
            ),
            "limits: key sizes are multiples of 8 bits",
        ),
        (
            config.access == "open" and config.access_file is not None,
            "access: 'open' and access_file exclude each other; remove one",
        ),
        (
            not config.network.trust_directory and config.network.operator_public_key is None,
            "network.operator_public_key: needed to check the network document "
            "(trust_directory: true is for labs only)",
        ),
    ]
    for is_wrong, message in problems:
        if is_wrong:
            raise ConfigError(message, facts={"file": path})


def _resolve(config: NodeConfig, base: Path) -> NodeConfig:
    """Make every path in the configuration absolute, from the file's own folder."""

    def absolute(value: str | None) -> str | None:
        return None if value is None else str((base / value).resolve())

    def resolved(section: _T, *names: str) -> _T:
        changes = {name: absolute(getattr(section, name)) for name in names}
        return msgspec.structs.replace(section, **changes)

    etcd = config.directory.etcd
    return msgspec.structs.replace(
        resolved(config, "data_dir", "access_file", "proof_dir", "audit_log", "pad_audit_file"),
        tls=resolved(config.tls, "ca", "cert", "key", "deny_list"),
        directory=msgspec.structs.replace(
            resolved(config.directory, "static"),
            etcd=None if etcd is None else resolved(etcd, "ca", "cert", "key", "password_file"),
        ),
        network=resolved(config.network, "document", "operator_public_key"),
        links=[
            msgspec.structs.replace(
                link,
                device=None if link.device is None else resolved(link.device, "ca", "cert", "key"),
            )
            for link in config.links
        ],
        log=resolved(config.log, "file"),
        tracing=None if config.tracing is None else resolved(config.tracing, "ca"),
    )
