"""The rendered objects: no privilege, no token, no second writer, nothing secret where it can be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.helm.chart import (
    CI_VALUES,
    VERSIONS,
    Object,
    containers,
    name_of,
    of_kind,
    pod_specs,
    render,
    schemas,
    the,
)

_SITE = CI_VALUES[0].parent / "site-values.yaml"
EACH_FILE = pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem)
# Volume types that Pod Security "restricted" admits.
_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"
}  # fmt: skip


def _breaches(spec: Object) -> list[str]:
    """What breaks the Pod Security Standard "restricted" (1.37) in a pod."""
    pod = spec.get("securityContext", {})
    found = [field for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]
    for volume in spec.get("volumes", ()):
        found += [f"volume {kind}" for kind in volume.keys() - {"name"} - _VOLUMES]
    if pod.get("runAsUser") == 0 or not pod.get("runAsNonRoot"):
        found.append("root")
    for container in containers(spec):
        own = container.get("securityContext", {})
        where = container["name"]
        if own.get("privileged") or own.get("allowPrivilegeEscalation", True):
            found.append(f"{where}: privilege")
        if own.get("capabilities", {}).get("drop") != ["ALL"] or own.get("capabilities", {}).get("add"):
            found.append(f"{where}: capabilities")
        if own.get("runAsUser") == 0 or own.get("runAsNonRoot") is False:
            found.append(f"{where}: root")
        if own.get("seccompProfile", pod.get("seccompProfile", {})).get("type") != "RuntimeDefault":
            found.append(f"{where}: seccomp")
        if any("hostPort" in port for port in container.get("ports", ())):
            found.append(f"{where}: host port")
    return found


@EACH_FILE
def test_pods_keep_to_the_standard_that_the_values_name(values: Path) -> None:
    standard = yaml.safe_load(values.read_text(encoding="utf-8")).get("security", {}).get("podStandard")
    for name, _, spec in pod_specs(render(values)):
        allowed = [] if standard in (None, "restricted") else ["volume hostPath"]
        assert [one for one in _breaches(spec) if one not in allowed] == [], name


@EACH_FILE
def test_nothing_talks_to_the_kubernetes_api(values: Path) -> None:
    objects = render(values)
    assert of_kind(objects, "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding") == []
    for name, _, spec in pod_specs(objects):
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        assert spec["serviceAccountName"] == "km-keymesh"
    assert the(objects, "ServiceAccount", "km-keymesh")["automountServiceAccountToken"] is False


@EACH_FILE
def test_containers_write_to_volumes_only_and_have_bounds(values: Path) -> None:
    for name, _, spec in pod_specs(render(values)):
        for container in containers(spec):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
            if container["name"] != "ship-audit":
                assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert "memory" in container["resources"]["limits"], name
            assert "cpu" not in container["resources"]["limits"], f"{name}: a CPU limit stalls whole links"
        for volume in spec["volumes"]:
            if "secret" in volume:
                assert volume["secret"]["defaultMode"] == 0o440, name
            if "emptyDir" in volume:
                assert "sizeLimit" in volume["emptyDir"], name


@EACH_FILE
def test_no_key_lies_in_an_object(values: Path) -> None:
    """The chart writes no Secret, and ConfigMaps hold configuration and public keys."""
    objects = render(values)
    assert of_kind(objects, "Secret") == []
    assert re.search("PRIVATE KEY|psrd-table", yaml.safe_dump_all(objects)) is None
    for name, _, spec in pod_specs(objects):
        for container in containers(spec):
            words = " ".join([*container.get("command", ()), *container.get("args", ())])
            assert "password=" not in words, name
            assert all("value" in one or "fieldRef" in one["valueFrom"] for one in container.get("env", ()))


def test_a_medium_that_is_plugged_in_is_seen_by_the_pod_that_runs() -> None:
    (one,) = of_kind(render(CI_VALUES[0].parent / "hub-values.yaml"), "StatefulSet")
    mounts = one["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    (courier,) = (mount for mount in mounts if mount["name"] == "courier")
    assert courier["mountPropagation"] == "HostToContainer"
    assert [mount for mount in mounts if "mountPropagation" in mount] == [courier]


@EACH_FILE
def test_a_volume_has_one_writer_outlives_the_release_and_stays_out_of_backups(values: Path) -> None:
    for one in of_kind(render(values), "StatefulSet"):
        spec = one["spec"]
        (claim,) = spec["volumeClaimTemplates"]
        assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"], name_of(one)
        assert spec["persistentVolumeClaimRetentionPolicy"] == {
            "whenDeleted": "Retain",
            "whenScaled": "Retain",
        }
        # kubernetes/kubernetes#67250: else a pod that never gets ready waits for a hand.
        assert spec["podManagementPolicy"] == "Parallel"
        if one["metadata"]["labels"]["app.kubernetes.io/component"] == "etcd":
            continue
        assert spec["replicas"] == 1
        assert "one-time pads" in claim["metadata"]["annotations"]["keymesh.io/never-snapshot"]
        assert claim["metadata"]["labels"]["velero.io/exclude-from-backup"] == "true"
        annotations = spec["template"]["metadata"]["annotations"]
        assert annotations["backup.velero.io/backup-volumes-excludes"] == "data"


def test_the_guard_names_every_volume_of_pads_and_no_other() -> None:
    objects = render(_SITE, sets=('etcd.source="bundled"',))
    (guard,) = of_kind(objects, "ValidatingAdmissionPolicy")
    (binding,) = of_kind(objects, "ValidatingAdmissionPolicyBinding")
    assert binding["spec"] == {"policyName": guard["metadata"]["name"], "validationActions": ["Deny"]}
    patterns = {
        found
        for rule in guard["spec"]["validations"]
        for found in re.findall(r"matches\('([^']+)'\)", rule["expression"])
    }
    (pattern,) = patterns
    volumes = {f"data-{one['metadata']['name']}-0" for one in of_kind(objects, "StatefulSet")}
    assert {name for name in volumes if re.search(pattern, name)} == {"data-km-keymesh-node-kme-a-0"}
    # A snapshot of many volumes names none: its selector is refused whatever it says.
    guarded = {
        name for rule in guard["spec"]["matchConstraints"]["resourceRules"] for name in rule["resources"]
    }
    assert guarded == {"volumesnapshots", "volumegroupsnapshots", "persistentvolumeclaims"}
    assert [rule["expression"] for rule in guard["spec"]["validations"] if "group" in rule["expression"]] == [
        "request.resource.resource != 'volumegroupsnapshots' || !has(object.spec.source.selector)"
    ]


@EACH_FILE
def test_what_serves_is_probed_in_the_plain(values: Path) -> None:
    """HTTP on the health port: Kubernetes' gRPC probe speaks no TLS, and nothing has a shell."""
    for name, labels, spec in pod_specs(render(values)):
        container = spec["containers"][0]
        probes = {kind: container[kind] for kind in container if kind.endswith("Probe")}
        if labels["app.kubernetes.io/component"] in {"node", "hub", "gateway", "etcd"}:
            assert probes.keys() == {"startupProbe", "livenessProbe", "readinessProbe"}, name
            assert all(probe["httpGet"]["port"] == "ops" for probe in probes.values()), name
        if labels["app.kubernetes.io/component"] == "etcd":
            # A full quota makes etcd unhealthy; a restart would not help, but take it away.
            for kind in ("startupProbe", "livenessProbe"):
                assert probes[kind]["httpGet"]["path"] == "/health?serializable=true&exclude=NOSPACE"
        if labels["app.kubernetes.io/component"] == "gateway":
            patience = (
                probes["readinessProbe"]["periodSeconds"] * probes["readinessProbe"]["failureThreshold"]
            )
            assert patience == 60, "a node that restarts must not take its gateways out of their Service"
        assert not any("exec" in probe or "grpc" in probe for probe in probes.values()), name
        assert "lifecycle" not in container, f"{name}: the image has nothing to run in a hook; programs drain"


@EACH_FILE
def test_gateways_drain_before_they_are_killed(values: Path) -> None:
    objects = render(values)
    for one in of_kind(objects, "Deployment"):
        if one["metadata"]["labels"]["app.kubernetes.io/component"] != "gateway":
            continue
        config = yaml.safe_load(the(objects, "ConfigMap", one["metadata"]["name"])["data"]["gateway.yaml"])
        needed = config["limits"]["drain_delay_s"] + config["limits"].get("drain_s", 10.0)
        assert config["limits"]["drain_delay_s"] >= 3, "shorter than load balancers take to notice"
        assert one["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > needed
        assert one["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        budget = the(objects, "PodDisruptionBudget", one["metadata"]["name"])
        scaler = [
            x
            for x in of_kind(objects, "HorizontalPodAutoscaler")
            if name_of(x).endswith(budget["metadata"]["name"])
        ]
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        if scaler:
            (metric,) = scaler[0]["spec"]["metrics"]
            assert (
                metric["containerResource"]["container"]
                == one["spec"]["template"]["spec"]["containers"][0]["name"]
            )
        fewest = scaler[0]["spec"]["minReplicas"] if scaler else one["spec"]["replicas"]
        assert (
            budget["spec"]["minAvailable"] == 0
            if fewest == 1
            else 0 < budget["spec"]["minAvailable"] < fewest
        )
        assert ("replicas" in one["spec"]) == (not scaler), "the autoscaler decides, not the next upgrade"
        keys = [x["topologyKey"] for x in one["spec"]["template"]["spec"]["topologySpreadConstraints"]]
        assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]


def test_hubs_keep_apart_from_hubs_of_all_releases() -> None:
    hub = CI_VALUES[0].parent / "hub-values.yaml"
    terms = '{"nodeSelectorTerms":[{"matchExpressions":[{"key":"disk","operator":"Exists"}]}]}'
    elsewhere = f"hubs[0].affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution={terms}"
    for sets in ((), (elsewhere,)):
        (one,) = of_kind(render(hub, sets=sets), "StatefulSet")
        affinity = one["spec"]["template"]["spec"]["affinity"]
        (term,) = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["namespaceSelector"] == {}
        assert term["labelSelector"]["matchLabels"] == {
            "app.kubernetes.io/name": "keymesh",
            "app.kubernetes.io/component": "hub",
        }
        assert ("nodeAffinity" in affinity) == bool(sets)


@EACH_FILE
def test_planes_have_roots_of_their_own(values: Path) -> None:
    issuers: dict[str, set[str]] = {}
    for one in of_kind(render(values), "Certificate"):
        spec = one["spec"]
        if spec.get("isCA"):
            continue
        uri = next(iter(spec.get("uris", ())), "")
        name = one["metadata"]["name"]
        plane = (
            "device" if "device" in name
            else "sae" if uri.startswith("sae://")
            else "node" if uri
            else "etcd" if "etcd" in name
            else "border" if "border" in name
            else "gateway"
        )  # fmt: skip
        issuers.setdefault(spec["issuerRef"]["name"], set()).add(plane)
        assert spec["privateKey"]["rotationPolicy"] == "Always"
    assert all(len(planes) == 1 for planes in issuers.values()), issuers


def test_a_new_chart_or_image_changes_no_job_and_no_label_of_a_node() -> None:
    """Jobs cannot be changed, only made anew under another name; nodes restart for a reason."""
    site = CI_VALUES[0].parent / "site-values.yaml"
    before, after = render(site), render(site, sets=('image.digest=""', 'image.tag="2"'))
    jobs = [{name_of(one) for one in of_kind(objects, "Job")} for objects in (before, after)]
    assert len(jobs[0]) == len(jobs[1]) == 1
    assert jobs[0].isdisjoint(jobs[1])
    assert jobs[0] == {name_of(one) for one in of_kind(render(site, sets=("priority.create=false",)), "Job")}
    for _, labels, _ in pod_specs(before):
        assert "helm.sh/chart" not in labels
        assert "app.kubernetes.io/version" not in labels


def test_a_new_root_of_the_collector_restarts_what_traces() -> None:
    hub = CI_VALUES[0].parent / "hub-values.yaml"
    sums = set()
    for text in ("MA==", "MQ=="):
        ca = f'tracing.ca="-----BEGIN CERTIFICATE-----\\n{text}\\n-----END CERTIFICATE-----"'
        (one,) = of_kind(render(hub, sets=(ca,)), "StatefulSet")
        sums.add(one["spec"]["template"]["metadata"]["annotations"]["checksum/config"])
    assert len(sums) == 2


def test_ids_that_look_like_numbers_stay_words() -> None:
    """`1` and `no` are ids; unquoted they would be a number and a truth value."""
    metro = CI_VALUES[0].parent / "lab-metro-values.yaml"
    sets = (
        'nodes=[{"id":"1","site":"a","operator":"x","access":"open"},{"id":"no","site":"b","operator":"y","access":"open"}]',
        'gateways=[{"id":"2","node":"1"},{"id":"on","node":"no"}]',
        'lab.links=[{"between":["1","no"]}]',
        'network.saes={"sae-x-1":"1","sae-z-1":"no"}',
        'domain="7"',
    )
    objects = render(metro, sets=sets)
    labels = [one["metadata"].get("labels", {}) for one in objects] + [
        found for _, found, _ in pod_specs(objects)
    ]
    assert all(isinstance(text, str) for found in labels for text in found.values())

    assert [problem for one in objects for problem in schemas(VERSIONS[-1]).problems(one)] == []
