"""The worked example for other vendors is one that our own programs take, and no setting is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from gateway.config import Etsi020Settings, GatewayConfig, KeyManager
from mesh.core.network_parse import parse_document
from mesh.node.config import BorderPeer, BorderSection, BufferedPair, NodeConfig

PAGE = (Path(__file__).parents[2] / "docs/interworking.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n# (\S+?\.yaml)(.*?)```", PAGE, re.DOTALL)


def blocks(name: str) -> list[dict[str, Any]]:
    """The example files of that name."""
    return [yaml.safe_load("#" + text) for found, text in BLOCKS if found == name]


def test_the_example_fits_together() -> None:
    (document,), (border, home), (file,) = (blocks(f"{name}.yaml") for name in ("network", "node", "gateway"))
    network = parse_document(document)
    node = msgspec.convert(border, NodeConfig)
    gateway = msgspec.convert(file, GatewayConfig)
    assert node.border
    assert gateway.etsi020
    (peer,), (pinned,) = node.border.peers, gateway.etsi020.peers
    assert (peer.kme_id, peer.url) == (pinned.kme_id, pinned.url)
    assert [gateway.gateway_id] == node.border.gateways
    assert gateway.node.kme_id == node.kme_id == network.border_for("uk-b")
    assert peer.prefixes == ["uk-"]
    (pair,) = msgspec.convert({**border, **home}, NodeConfig).foreign_buffers
    assert network.home(pair.master)
    assert network.border_for(pair.slave)


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        (BorderSection, "border."),
        (Etsi020Settings, "etsi020."),
        (BorderPeer, ""),
        (KeyManager, ""),
        (BufferedPair, ""),
    ],
)
def test_every_setting_is_there(kind: type[msgspec.Struct], prefix: str) -> None:
    table = PAGE.partition("## Every setting")[2].partition("\n## ")[0]
    assert [name for name in kind.__struct_fields__ if f"`{prefix}{name}`" not in table] == []
