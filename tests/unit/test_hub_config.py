"""Hubs' configuration and policy: fewer fields than a node's, and rules that decide before pad is spent."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.core.policy import Rate
from mesh.errors import CallerError, ConfigError, ErrorReason, NotAuthorizedError, ShortageError
from mesh.hub.config import build_policy, load_hub_config
from mesh.hub.policy import HubRule, RulePolicy
from mesh.lab.configcheck import check_file

CONFIG = """
hub_id: hub-1
domain_id: lab
data_dir: data
listen: {grpc: "127.0.0.1:7001", http: "127.0.0.1:7002"}
tls: {ca: ca.pem, cert: hub.pem, key: hub.key}
directory: {static: directory.yaml}
network: {trust_directory: true}
links:
  - {peer: kme-a, pool_max_bytes: 1048576}
  - {peer: kme-b, pool_max_bytes: 1048576}
"""


def written(tmp_path: Path, more: str = "") -> Path:
    """The configuration with some more lines."""
    path = tmp_path / "hub.yaml"
    path.write_text(CONFIG + more)
    return path


def test_a_hub_is_a_node_with_nothing_that_ends_a_route(tmp_path: Path) -> None:
    settings, config = load_hub_config(written(tmp_path))
    assert (settings.hub_id, config.kme_id, config.domain_id) == ("hub-1", "hub-1", "lab")
    assert config.data_dir == str(tmp_path / "data")
    assert config.access == "deny"
    assert config.access_file is None
    assert check_file(tmp_path / "hub.yaml") == "hub configuration"


@pytest.mark.parametrize(
    "field",
    [
        "access: open",
        "reserves: {}",
        "limits: {}",
        "quota: {}",
        "access_file: x",
        "kme_id: kme-a",
        "audit_log: x",
    ],
)
def test_fields_of_nodes_are_unknown(tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown field `{field.split(':', maxsplit=1)[0]}`"):
        load_hub_config(written(tmp_path, field + "\n"))


def test_what_must_hold_together_is_checked_as_for_a_node(tmp_path: Path) -> None:
    path = tmp_path / "hub.yaml"
    path.write_text(CONFIG.replace("kme-b", "kme-a"))
    with pytest.raises(ConfigError, match="a peer is named twice"):
        load_hub_config(path)
    with pytest.raises(ConfigError, match=r"policy\[0\].sources"):
        load_hub_config(written(tmp_path, 'policy: [{sources: ["KME"], targets: ["*"]}]\n'))


def test_without_rules_the_document_alone_decides(tmp_path: Path) -> None:
    settings, _ = load_hub_config(written(tmp_path))
    build_policy(settings).check("kme-a", "kme-b", 1 << 30, 0.0)


def test_rules_decide_in_order_and_none_means_no(tmp_path: Path) -> None:
    settings, _ = load_hub_config(
        written(
            tmp_path,
            """
policy:
  - {sources: [kme-a], targets: ["kme-b"], max_share_bytes: 1000}
  - {sources: ["kme-*"], targets: ["kme-*"], bytes_per_s: 100}
""",
        )
    )
    policy = build_policy(settings)
    policy.check("kme-a", "kme-b", 1000, 0.0)
    with pytest.raises(CallerError) as caught:
        policy.check("kme-a", "kme-b", 1001, 0.0)
    assert caught.value.reason is ErrorReason.LIMIT_EXCEEDED
    policy.check("kme-b", "kme-a", 1000, 0.0)  # ten seconds' worth at once
    with pytest.raises(ShortageError) as short:
        policy.check("kme-b", "kme-a", 100, 0.5)
    assert short.value.reason is ErrorReason.QUOTA_EXCEEDED
    policy.check("kme-b", "kme-a", 100, 1.0)
    with pytest.raises(NotAuthorizedError):
        policy.check("other", "kme-a", 1, 1.0)


def test_buckets_are_per_source() -> None:
    policy = RulePolicy((HubRule(("*",), ("*",), rate=Rate(10, 100)),))
    policy.check("kme-a", "kme-c", 100, 0.0)
    with pytest.raises(ShortageError):
        policy.check("kme-a", "kme-d", 1, 0.0)
    policy.check("kme-b", "kme-c", 100, 0.0)
    with pytest.raises(ShortageError, match="larger than the source's bucket"):
        policy.check("kme-b", "kme-c", 101, 1e6)
