"""Every values file of ``ci/`` lints, renders, and is valid for every Kubernetes version."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helm.chart import CHART, CI_VALUES, VERSIONS, Object, helm, name_of, render, schemas

EACH_FILE = pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem)


@EACH_FILE
def test_helm_lints(values: Path) -> None:
    done = helm("lint", "--strict", str(CHART), "-f", str(values))
    assert done.returncode == 0, done.stdout


@EACH_FILE
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_fits_its_schema(values: Path, version: str) -> None:
    known = schemas(version)
    problems = [problem for one in render(values) for problem in known.problems(one)]
    assert problems == []


def test_every_cluster_gets_the_same() -> None:
    assert render(CI_VALUES[0], VERSIONS[0]) == render(CI_VALUES[0], VERSIONS[-1])


@EACH_FILE
def test_no_object_is_rendered_twice(values: Path) -> None:
    names = [name_of(one) for one in render(values)]
    assert sorted(names) == sorted(set(names))


def test_the_validation_finds_what_is_wrong() -> None:
    known = schemas(VERSIONS[0])
    good: Object = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": []}}
    assert known.problems(good) == []
    assert "ports" in known.problems({**good, "spec": {"ports": "none"}})[0]
    assert "unknown" in known.problems({**good, "spec": {"unknown": 1}})[0]
    assert "no schema" in known.problems({**good, "apiVersion": "example.com/v1"})[0]
    certificate: Object = {
        "apiVersion": "cert-manager.io/v1",
        "kind": "Certificate",
        "metadata": {"name": "a"},
        "spec": {"secretName": "a"},
    }
    assert any("commonName" in problem for problem in known.problems(certificate))


def test_an_older_cluster_is_refused() -> None:
    done = helm("template", str(CHART), "-f", str(CI_VALUES[0]), "--kube-version", "1.29.0")
    assert done.returncode != 0
    assert "kubeVersion" in done.stderr
