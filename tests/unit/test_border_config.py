"""A border's settings that do not fit together are refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mesh.errors import ConfigError
from mesh.node.config import NodeConfig, load_node_config


def peer(kme_id: str, *prefixes: str) -> dict[str, Any]:
    return {"kme_id": kme_id, "url": f"https://{kme_id}.example", "prefixes": list(prefixes)}


def loaded(
    tmp_path: Path, *peers: dict[str, Any], key_lifetime_s: float = 86_400.0, **border: Any
) -> NodeConfig:
    path = tmp_path / "node.yaml"
    document = {
        "kme_id": "can-z",
        "domain_id": "can",
        "data_dir": "data",
        "listen": {"grpc": "127.0.0.1:1", "http": "127.0.0.1:2"},
        "tls": {"ca": "ca.pem", "cert": "c.pem", "key": "c.key"},
        "directory": {"static": "directory.yaml"},
        "network": {"trust_directory": True},
        "reserves": {"key_lifetime_s": key_lifetime_s},
        "border": {"gateways": ["gw"], "url": "https://can.example", "peers": list(peers), **border},
    }
    path.write_text(yaml.safe_dump(document))
    return load_node_config(path)


@pytest.mark.parametrize(
    ("one", "other"), [(("uk-",), ("uk-",)), (("a", "uk-"), ("uk-x-", "z")), (("uk-x-",), ("b", "uk-"))]
)
def test_an_sae_lives_behind_one_peer(tmp_path: Path, one: tuple[str, ...], other: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"border\.peers: prefix .* overlaps"):
        loaded(tmp_path, peer("first", *one), peer("second", *other))


def test_prefixes_of_one_peer_may_overlap_and_others_may_be_alike(tmp_path: Path) -> None:
    config = loaded(tmp_path, peer("first", "uk-", "uk-x-"), peer("second", "ukraine-", "us-"))
    assert config.border is not None


def test_what_is_remembered_outlives_every_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"border\.keep_s.*reserves\.key_lifetime_s"):
        loaded(tmp_path, peer("first", "uk-"), key_lifetime_s=86_401.0)
    with pytest.raises(ConfigError, match=r"border\.keep_s"):
        loaded(tmp_path, peer("first", "uk-"), keep_s=172_799.0)
    assert loaded(tmp_path, peer("first", "uk-")).border is not None
