"""The gateway's configuration file, one YAML document; paths are relative to it.

Defaults are the standard's. ``Profile`` holds the contradictions that clients in the field force,
each a switch away from the standard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from gateway.identity import MappingSettings
from gateway.settings import read_settings
from mesh.ops.http import split_host_port
from mesh.ops.tracing import TracingSection

PositiveInt = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class Listen(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``host:port`` of the REST interface (TLS), and of health and metrics (plain HTTP)."""

    https: str
    http: str | None = None


class NodeAddress(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The node this gateway speaks for."""

    address: str
    kme_id: str


class ClientTls(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Towards the node: node root, and this gateway's certificate and key."""

    ca: str
    cert: str
    key: str


class ServerTls(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Towards SAEs: SAE root, this KME's server certificate and key, refused certificates, oldest TLS.

    ``deny_list`` is a file of fingerprints and serials, see ``mesh.ops.denylist``.
    """

    ca: str
    cert: str
    key: str
    deny_list: str | None = None
    min_version: Literal["1.2", "1.3"] = "1.2"


class Profile(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Where clients contradict the standard or each other.

    ``unknown_key_status`` is 400 by the standard, ``self_pair_status`` (an SAE fetching keys whose
    master it names to be itself) 401.
    """

    unknown_key_status: Literal[400, 404] = 400
    self_pair_status: Literal[401, 400] = 401
    refuse_empty_post: bool = False
    refuse_empty_additional_slaves: bool = False


class Limits(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Bounds of this process; the key limits are the node's."""

    max_connections: PositiveInt = 4096
    max_requests_in_flight: PositiveInt = 2048
    max_body_bytes: PositiveInt = 256 * 1024
    max_body_bytes_in_flight: PositiveInt = 32 * 1024 * 1024
    max_header_bytes: PositiveInt = 16 * 1024
    request_timeout_s: Seconds = 8.0
    body_timeout_s: Seconds = 10.0
    handshake_timeout_s: Seconds = 10.0
    keepalive_s: Seconds = 75.0
    write_timeout_s: Seconds = 30.0
    drain_s: Seconds = 10.0
    drain_delay_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 0.0
    reload_poll_s: Seconds = 2.0


class KeyManager(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A foreign key manager: ``kme_id`` and ``url`` as in the node's ``border.peers``.

    Its certificate, as client and as server, is issued directly by one of those in ``ca`` and shows one of
    ``names`` (a URI or DNS name, exactly), or has one of ``fingerprints`` (SHA-256 of the DER form).
    ``server_name`` is what its server certificate is checked for, in place of the URL's host.
    """

    kme_id: str
    url: Annotated[str, msgspec.Meta(pattern=r"^https://[^/?#@\s]+$", max_length=512)]
    ca: str
    names: list[str] = []
    fingerprints: list[str] = []
    server_name: str | None = None


class Etsi020Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The listener and the client of ETSI GS QKD 020: TLS 1.3 only, one certificate for both."""

    listen: str
    cert: str
    key: str
    peers: Annotated[list[KeyManager], msgspec.Meta(min_length=1, max_length=256)]
    deny_list: str | None = None
    max_body_bytes: PositiveInt = 1024 * 1024
    # Answers to synchronous requests; 0 refuses them and leaves the capability out.
    synchronous_wait_s: Annotated[float, msgspec.Meta(ge=0, le=300)] = 40.0
    # Requests to peers at once, towards all of them.
    max_jobs: Annotated[int, msgspec.Meta(ge=1, le=256)] = 64
    # How often each peer is asked for its versions: keeps a connection warm. Below its idle time-out.
    warm_every_s: Seconds = 10.0


class LogSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Process log: level and an optional file (stderr otherwise)."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    file: str | None = None


class GatewayConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The whole file."""

    gateway_id: str
    domain_id: str
    listen: Listen
    node: NodeAddress
    node_tls: ClientTls
    tls: ServerTls
    audit_log: str
    sae_mapping: MappingSettings = MappingSettings()
    profile: Profile = Profile()
    limits: Limits = Limits()
    etsi020: Etsi020Settings | None = None
    log: LogSettings = LogSettings()
    tracing: TracingSection | None = None


def load_config(path: Path) -> GatewayConfig:
    """Read and check a gateway's configuration.

    Raises:
        ConfigError: names the file, the member and the problem.
    """
    config = read_settings(path, GatewayConfig)
    listen020 = None if config.etsi020 is None else config.etsi020.listen
    for text in (config.listen.https, config.listen.http, config.node.address, listen020):
        if text is not None:
            split_host_port(text)
    return config
