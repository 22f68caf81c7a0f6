"""Writes the chart's README from its values: ``python -m tests.helm.readme``; a test keeps it fresh.

In ``values.yaml`` a comment that begins with ``# --`` describes the key below it, and a plain comment
directly above a section introduces that section.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "helm" / "keymesh"
README = CHART / "README.md"
_KEY = re.compile(r"^( *)([A-Za-z0-9]+):( .*)?$")
_LONGEST_DEFAULT = 60

_HEAD = """\
# keymesh chart

<!-- Written by `make helm-readme` from values.yaml and this chart's ci/ folder. -->

{description}. Chart {version}, for Kubernetes {kube}. How to install, upgrade, back up and retire:
[docs/kubernetes.md](../../docs/kubernetes.md). What the programs' own fields mean:
[docs/operations.md](../../docs/operations.md).

    helm install km helm/keymesh --namespace keys --create-namespace --values my-values.yaml
    helm test km --namespace keys --logs

Values are checked: unknown fields, two nodes with one id, hubs of one pair in one failure domain, more shares
than hubs, or anything without TLS do not render.

**Never snapshot, clone, back up, replicate or restore the volumes of nodes and hubs.** They hold one-time
pads; a restored copy uses them twice, and not every restored copy can be detected.

Examples, each rendered and checked by the tests:

{examples}
"""


def render() -> str:
    """The README as it should be."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    examples = "\n".join(
        f"- [`{path.name}`](ci/{path.name}): {_first_comment(path)}"
        for path in sorted((CHART / "ci").glob("*-values.yaml"))
    )
    head = _HEAD.format(
        description=chart["description"],
        version=chart["version"],
        kube=chart["kubeVersion"].removesuffix("-0"),
        examples=examples,
    )
    return head + "\n".join(_sections()) + "\n"


def undocumented() -> list[str]:
    """Keys of the values, or sections, that no comment describes."""
    described = {path for path, _ in _described()[0]}
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))

    def missing(value: Any, path: str) -> Iterator[str]:
        if path in described:
            return
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from missing(inner, f"{path}.{key}" if path else key)
        else:
            yield path

    return list(missing(values, ""))


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    words = []
    for line in lines:
        if not line.startswith("#"):
            break
        words.append(line.lstrip("# "))
    return " ".join(words)


def _described() -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Paths with their descriptions in order, and introductions of top-level sections."""
    found: list[tuple[str, str]] = []
    introductions: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    words: list[str] = []
    for line in (CHART / "values.yaml").read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("#"):
            words.append(line.lstrip().removeprefix("#").strip())
            continue
        key = _KEY.match(line)
        if key:
            while path and path[-1][0] >= len(key[1]):
                path.pop()
            path.append((len(key[1]), key[2]))
            name, text = ".".join(part for _, part in path), " ".join(words)
            if text.startswith("-- "):
                found.append((name, text.removeprefix("-- ")))
            elif words and len(path) == 1:
                introductions[name] = text
        words = []
    return found, introductions


def _sections() -> Iterator[str]:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    found, introductions = _described()
    section = None
    for path, text in found:
        top = path.partition(".")[0]
        title = "General" if top == path and not isinstance(values[top], list) else top
        if title != section:
            section = title
            yield f"\n## {title}\n"
            if title in introductions:
                yield f"{introductions[title]}\n"
            yield "| value | default | meaning |\n|---|---|---|"
        value = values
        for part in path.split("."):
            value = value[part]
        default = json.dumps(value, ensure_ascii=False)
        shown = f"`{default}`" if len(default) <= _LONGEST_DEFAULT else "see values.yaml"
        cells = [f"`{path}`", shown, text]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    README.write_text(render(), encoding="utf-8")
