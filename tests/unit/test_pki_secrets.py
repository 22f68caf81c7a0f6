"""``keymesh pki secrets``: what cert-manager would have filled, from a rendered chart."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import yaml

from mesh.cli import main
from mesh.errors import ConfigError
from mesh.pki.explain import explain
from mesh.pki.secrets import issue_secrets

_HEAD = "apiVersion: cert-manager.io/v1\nkind: "
_MANIFESTS = f"""\
{_HEAD}Issuer
metadata: {{name: nodes}}
spec: {{ca: {{secretName: root}}}}
---
{_HEAD}Certificate
metadata: {{name: root}}
spec: {{secretName: root, commonName: the root, isCA: true, usages: [cert sign]}}
---
{_HEAD}Certificate
metadata: {{name: kme-a}}
spec:
  secretName: kme-a
  commonName: kme-a
  uris: ["keymesh://d/node/kme-a"]
  dnsNames: [kme-a.node.d.keymesh.internal]
  ipAddresses: [192.0.2.1]
  usages: [digital signature, server auth, client auth]
  issuerRef: {{name: nodes}}
"""


def test_leaves_chain_to_roots_that_stay_outside(tmp_path: Path) -> None:
    root, leaf = issue_secrets(_MANIFESTS, tmp_path)
    assert root["data"].keys() == {"ca.crt"}
    assert leaf["type"] == "kubernetes.io/tls"
    assert leaf["data"]["ca.crt"] == root["data"]["ca.crt"]
    for name, data in leaf["data"].items():
        (tmp_path / name).write_bytes(base64.b64decode(data))
    diagnosis = explain(
        tmp_path / "tls.crt",
        key=tmp_path / "tls.key",
        ca=tmp_path / "ca.crt",
        purpose="node",
        hosts=["kme-a.node.d.keymesh.internal", "192.0.2.1"],
    )
    assert not diagnosis.fatal
    again, _ = issue_secrets(_MANIFESTS, tmp_path)
    assert again == root, "a later call uses the same root"


def test_an_issuer_from_elsewhere_gets_a_root_of_its_name(tmp_path: Path) -> None:
    (leaf,) = issue_secrets(_MANIFESTS.split("---\n")[2], tmp_path)
    assert leaf["metadata"]["name"] == "kme-a"
    assert (tmp_path / "nodes.key").stat().st_mode & 0o777 == 0o600


def test_the_command_writes_a_private_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests, out = tmp_path / "rendered.yaml", tmp_path / "secrets.yaml"
    manifests.write_text(_MANIFESTS, encoding="utf-8")
    words = ["pki", "secrets", str(manifests), "--dir", str(tmp_path / "pki"), "--out", str(out)]
    assert main(words) == 0
    assert "2 Secrets" in capsys.readouterr().out
    assert out.stat().st_mode & 0o777 == 0o600
    assert len(list(yaml.safe_load_all(out.read_text(encoding="utf-8")))) == 2
    assert main([*words[:2], str(tmp_path / "nothing"), *words[3:]]) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "not YAML"),
        ("kind: Secret", "no Certificates"),
        (f"{_HEAD}Certificate\nmetadata: {{name: a}}\nspec: {{secretName: a}}", "lacks 'issuerRef'"),
    ],
)
def test_other_input_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        list(issue_secrets(text, tmp_path))
