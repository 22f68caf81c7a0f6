"""Alert rules and dashboard name metrics and labels that the programs have, and alerts have runbooks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mesh.ops.metrics import Metrics
from tests.helm.chart import CI_VALUES, ROOT, Object, of_kind, render, the

_SITE = CI_VALUES[0].parent / "site-values.yaml"
# Rules of the directory belong to the release that hosts it.
_BUNDLED = ('etcd.source="bundled"', 'certificates.issuers.etcd.name="e"')
_PROMTOOL = shutil.which("promtool")
# What Prometheus, the kubelet and etcd say; not ours to register.
_FOREIGN: dict[str, set[str]] = {
    "up": set(),
    "etcd_server_has_leader": set(),
    "kubelet_volume_stats_available_bytes": {"persistentvolumeclaim"},
    "kubelet_volume_stats_capacity_bytes": {"persistentvolumeclaim"},
}
# What scraping adds.
_SCRAPED = {"namespace", "job", "pod", "instance", "le", "domain"}
_WORDS = {
    "and",
    "by",
    "delta",
    "histogram_quantile",
    "increase",
    "max",
    "min",
    "on",
    "count",
    "or",
    "rate",
    "sum",
}
_WORDS |= {"time", "unless", "group_left", "Inf", "absent", "label_replace"}


def rules() -> Object:
    (one,) = of_kind(render(_SITE, sets=_BUNDLED), "PrometheusRule")
    spec: Object = one["spec"]
    return spec


def alerts() -> list[Object]:
    (group,) = rules()["groups"]
    found: list[Object] = group["rules"]
    return found


def dashboard() -> Any:
    return json.loads(the(render(_SITE), "ConfigMap", "km-keymesh-dashboard")["data"]["keymesh.json"])


def _registered() -> dict[str, set[str]]:
    """Metrics and their labels, from the table that tests/unit/test_docs.py holds against the registry."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(keymesh_\w+)` \|([^|]*)\|", text, re.MULTILINE)
    found = {name: set(filter(None, labels.strip().split(", "))) for name, labels in rows}
    histograms = {f"{name}_bucket": labels for name, labels in found.items()}
    own = {
        line.split("{")[0].split()[0] for line in Metrics().render().decode().splitlines() if line[0] != "#"
    }
    return {**histograms, **found, **_FOREIGN, **{name: set() for name in own if name.startswith("process_")}}


def _uses(expression: str) -> Iterator[tuple[str | None, set[str]]]:
    """Metrics with the labels that they are matched by; None for labels of groupings and joins."""
    for labels in re.findall(r"\b(?:by|on|ignoring|group_left|without)\s*\(([^)]*)\)", expression):
        yield None, set(filter(None, re.split(r"[,\s]+", labels)))
    rest = re.sub(r"\b(by|on|ignoring|group_left|without)\s*\([^)]*\)", "", expression)
    rest = re.sub(r"\[\d+[smhd]\]", "", rest)
    for name, matchers in re.findall(r"([A-Za-z_]\w*)(?:\{([^}]*)\})?", rest):
        if name not in _WORDS:
            yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))


def _problems(expression: str) -> list[str]:
    registered = _registered()
    matched = re.sub(r'"[^"]*"', '""', expression)
    uses = list(_uses(matched))
    names = {name for name, _ in uses if name is not None}
    known = {label for name in names for label in registered.get(name, ())} | _SCRAPED
    found = [f"{name} is no metric" for name in sorted(names - registered.keys())]
    for name, labels in uses:
        allowed = known if name is None else registered.get(name, set()) | _SCRAPED
        found += [f"{name or 'a grouping'}: no label {label}" for label in sorted(labels - allowed)]
    return found


def test_the_check_sees_wrong_names_and_labels() -> None:
    assert _problems('sum by (pod) (rate(keymesh_keys_drawn_total{peer=~"a.*"}[5m])) > 1') == []
    assert _problems("keymesh_keys_drawn > 1") == ["keymesh_keys_drawn is no metric"]
    assert _problems('keymesh_link_open{via="a"}') == ["keymesh_link_open: no label via"]
    assert _problems("sum by (key_id) (keymesh_link_open)") == ["a grouping: no label key_id"]


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_names_what_exists_and_has_a_runbook(rule: Object) -> None:
    assert _problems(rule["expr"]) == []
    assert 'namespace="keys"' in rule["expr"]
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = re.search(
        rf"^### {rule['alert']}\n\n(Critical|Warning)\. .*?(?=^##)", text, re.MULTILINE | re.DOTALL
    )
    assert section, f"docs/operations.md has no section {rule['alert']}"
    assert section[1].lower() == rule["labels"]["severity"]
    assert "*Next:*" in section[0]
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_every_section_has_its_alert() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (Keymesh\w+)$", text, re.MULTILINE) == [rule["alert"] for rule in alerts()]


def test_etcd_is_watched_where_it_runs() -> None:
    (one,) = of_kind(render(_SITE), "PrometheusRule")
    assert not any("Etcd" in rule["alert"] for rule in one["spec"]["groups"][0]["rules"])
    assert any("Etcd" in rule["alert"] for rule in alerts())


def test_the_dashboard_shows_what_exists() -> None:
    shown = dashboard()
    panels = [panel for panel in shown["panels"] if panel["type"] != "row"]
    for panel in panels:
        for target in panel["targets"]:
            assert _problems(target["expr"]) == [], panel["title"]
            assert 'namespace="$namespace",job="$job"' in target["expr"], panel["title"]
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert not labels & {"le"}, panel["title"]
    ids = [panel["id"] for panel in shown["panels"]]
    assert len(ids) == len(set(ids))
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in shown["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert {one["name"] for one in shown["templating"]["list"]} == {"datasource", "namespace", "job"}


def test_what_is_alerted_on_can_be_looked_at() -> None:
    """What an alert compares is on the dashboard, but for what is an event or a bound."""
    shown = json.dumps(dashboard())
    expressions = [re.sub(r'"[^"]*"', '""', rule["expr"]) for rule in alerts()]
    compared = {name for one in expressions for name, _ in _uses(one) if name} - _FOREIGN.keys()
    compared -= {f"keymesh_link_{what}" for what in ("opened_total", "quarantined_blocks", "device_up")}
    compared -= {"keymesh_psrd_low_water_bytes", "keymesh_lane_capacity_bytes", "keymesh_rpc_refused_total"}
    assert [name for name in compared if name not in shown] == []


@pytest.mark.skipif(_PROMTOOL is None, reason="there is no promtool")
def test_promtool_accepts_the_rules_and_they_fire(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()), encoding="utf-8")
    shutil.copy(Path(__file__).parent / "alerts_test.yaml", tmp_path)
    for words in (("check", "rules", "rules.yaml"), ("test", "rules", "alerts_test.yaml")):
        done = subprocess.run(
            [str(_PROMTOOL), *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_finds_every_pod_that_has_metrics() -> None:
    objects = render(_SITE)
    (monitor,) = of_kind(objects, "ServiceMonitor")
    service = the(objects, "Service", "km-keymesh-metrics")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["jobLabel"] in service["metadata"]["labels"]
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "km", "the rules' job"
    assert service["spec"]["publishNotReadyAddresses"] is True
    # The label by which network documents of a domain's releases are compared.
    assert {"targetLabel": "domain", "replacement": "toronto"} in monitor["spec"]["endpoints"][0][
        "relabelings"
    ]


def test_every_pod_that_should_be_there_is_missed() -> None:
    """`up` says nothing of pods that are gone."""
    (down,) = (rule for rule in alerts() if rule["alert"] == "KeymeshTargetDown")
    missed = re.findall(r'pod=~?"([^"]+)"', down["expr"])
    objects = render(_SITE, sets=_BUNDLED)
    pods = [
        f"{one['metadata']['name']}-{number}"
        for one in of_kind(objects, "StatefulSet")
        for number in range(one["spec"]["replicas"])
    ]
    pods += [f"{one['metadata']['name']}-5f7d8c9b6-x2lq4" for one in of_kind(objects, "Deployment")]
    assert len(pods) == len(missed) == 5
    assert all(re.fullmatch(one, pod) for one, pod in zip(sorted(missed), sorted(pods), strict=True))
