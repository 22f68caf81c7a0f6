"""docs/kubernetes.md: its commands run, or are marked as needing a cluster and exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mesh.cli import build_parser
from tests.helm.chart import CHART, ROOT, helm, of_kind, pod_specs

_PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
_BLOCKS = re.findall(r"^```([^\n]+)\n(.*?)^```$", _PAGE, re.MULTILINE | re.DOTALL)
_HELM_WITHOUT_CLUSTER = ("lint", "template")


def commands(kind: str) -> list[list[str]]:
    """The words of each command in blocks of a kind."""
    text = "".join(block for marked, block in _BLOCKS if marked == kind).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def test_blocks_are_marked() -> None:
    assert {kind for kind, _ in _BLOCKS} == {"sh", "sh cluster"}


def test_commands_that_need_no_cluster_run(tmp_path: Path) -> None:
    """In the page's order, in one folder, as a reader would."""
    helm("version")
    (tmp_path / "helm").symlink_to(CHART.parent)
    script = "set -euo pipefail\n" + "".join(block for kind, block in _BLOCKS if kind == "sh")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["/usr/bin/env", "bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "signature" in done.stdout
    rendered = (tmp_path / "with-kme-c.yaml").read_text(encoding="utf-8")
    assert re.search(r"- --member\n +- kme-c\n", rendered)
    assert "path: /run/keymesh" in (tmp_path / "with-proof.yaml").read_text(encoding="utf-8")
    without = [
        one for one in yaml.safe_load_all((tmp_path / "without.yaml").read_text(encoding="utf-8")) if one
    ]
    assert of_kind(without, "Certificate") == []
    volumes = [volume for _, _, spec in pod_specs(without) for volume in spec["volumes"]]
    made = yaml.safe_load_all((tmp_path / "secrets.yaml").read_text(encoding="utf-8"))
    used = {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
    assert used
    assert used <= {one["metadata"]["name"] for one in made}
    assert "kind: Job" in (tmp_path / "import.yaml").read_text(encoding="utf-8")
    # What the page installs and upgrades renders from the files that the commands above wrote.
    changes = [
        words for words in commands("sh cluster") if words[:2] in (["helm", "install"], ["helm", "upgrade"])
    ]
    assert len(changes) > 4
    for words in changes:
        asked = [word for word in words[2:] if word not in {"--wait", "--timeout", "10m"}]
        done = helm("template", *asked, cwd=tmp_path)
        assert done.returncode == 0, f"{words}: {done.stderr}"


@pytest.mark.parametrize("words", commands("sh cluster"), ids=lambda words: " ".join(words[:4]))
def test_commands_for_a_cluster_exist(words: list[str]) -> None:
    program = words[0]
    assert program in {"helm", "kubectl", "keymesh", "etcdctl"}
    if program == "keymesh":
        assert build_parser(words[1]).parse_args(words[1:]).handler
    elif program == "helm":
        offered = helm(words[1], "--help").stdout
        for word in words[2:]:
            if word.startswith("--"):
                assert re.search(rf"(^|\s){word}\s", offered), f"helm {words[1]} has no {word}"
        assert words[1] not in _HELM_WITHOUT_CLUSTER, "it needs no cluster: run it"
    if "helm/keymesh" in words:
        values = words[words.index("--values") + 1]
        assert (ROOT / values).exists() or values in _PAGE


def test_what_it_names_is_what_the_chart_makes(tmp_path: Path) -> None:
    """Names of objects in commands are those of the releases that the page describes."""
    named = set(re.findall(r"km-keymesh-[a-z0-9-]+", _PAGE))
    etcd = {f"km-keymesh-etcd{end}" for end in ("", "-peers", "-root")}
    made = {"km-keymesh-node-kme-a", "km-keymesh-node-kme-c", "km-keymesh-hub-hub-1", *etcd}
    assert {re.sub("-0$|(?<=etcd)-1$", "", name) for name in named} == made
    rendered = helm("template", "km", str(CHART), "-f", str(CHART / "ci" / "hub-values.yaml")).stdout
    assert "name: km-keymesh-hub-hub-1" in rendered
