"""What the chart writes is what the programs read: configurations, tables, lists, command lines, paths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from gateway.config import load_config as load_gateway_config
from gateway.identity import load_mapper
from mesh.cli import build_parser, main
from mesh.node.config import load_node_config
from mesh.node.node import load_access
from mesh.ops.denylist import DenyList
from tests.helm.chart import CI_VALUES, Object, name_of, of_kind, pod_specs, render, the

EACH_FILE = pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem)
_CONFIGS = {"node.yaml", "hub.yaml", "gateway.yaml", "device.yaml", "document"}


def unpack(objects: tuple[Object, ...], folder: Path) -> Iterator[tuple[Object, Path]]:
    """Writes each ConfigMap's files into a folder of its own, as a pod would see them."""
    for one in of_kind(objects, "ConfigMap"):
        mounted = folder / one["metadata"]["name"]
        mounted.mkdir()
        for name, text in one["data"].items():
            (mounted / name).write_text(text, encoding="utf-8")
        yield one, mounted


@EACH_FILE
def test_config_check_accepts_every_configuration(
    values: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        str(folder / name)
        for config, folder in unpack(render(values), tmp_path)
        for name in config["data"]
        if name in _CONFIGS
    ]
    assert files
    assert main(["config", "check", *files]) == 0, capsys.readouterr().err


@EACH_FILE
def test_the_programs_accept_the_tables_and_lists(values: Path, tmp_path: Path) -> None:
    for _, folder in unpack(render(values), tmp_path):
        if (folder / "deny.txt").exists():
            DenyList(folder / "deny.txt")
        if (folder / "node.yaml").exists():
            load_access(load_node_config(folder / "node.yaml"))
        if (folder / "gateway.yaml").exists():
            config = load_gateway_config(folder / "gateway.yaml")
            load_mapper(config.sae_mapping, domain_id=config.domain_id, base=folder)


def test_values_arrive_in_the_configuration(tmp_path: Path) -> None:
    """Fields of ``config`` beside those of the chart, whole numbers as such, lists where they belong."""
    by_name = {
        config["metadata"]["name"]: folder for config, folder in unpack(render(CI_VALUES[-1]), tmp_path)
    }
    node = load_node_config(by_name["km-keymesh-node-kme-a"] / "node.yaml")
    assert node.reserves.high_water_bytes == 16_777_216
    assert node.links[0].device is not None
    assert node.links[0].device.sae_id == "kme-b"
    assert node.links[1].low_water_bytes == 67_108_864
    assert node.border is not None
    assert (node.border.gateways, node.border.carry_timeout_s) == (["gw-a"], 20.0)
    assert len(load_access(node).rules) == 1
    gateway = load_gateway_config(by_name["km-keymesh-gateway-gw-a"] / "gateway.yaml")
    assert (gateway.profile.unknown_key_status, gateway.tls.min_version) == (404, "1.3")
    assert (gateway.limits.drain_s, gateway.limits.drain_delay_s) == (20.0, 5.0)
    assert gateway.etsi020 is not None
    assert gateway.etsi020.peers[0].names == ["uk-x.border.uk.keymesh.internal"]
    assert len(DenyList(by_name["km-keymesh-node-kme-a"] / "deny.txt")) == 1


@EACH_FILE
def test_keymesh_knows_every_command_line(values: Path) -> None:
    for name, _, spec in pod_specs(render(values)):
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            if "args" in container and "command" not in container:
                arguments = [str(word) for word in container["args"]]
                assert all(isinstance(word, str) for word in container["args"]), name
                assert build_parser(arguments[0]).parse_args(arguments).handler, name


@EACH_FILE
def test_every_path_lies_on_a_volume(values: Path) -> None:
    """Files are read where something is mounted, and written where a volume takes it."""
    objects = render(values)
    for name, _, spec in pod_specs(objects):
        container = spec["containers"][0]
        mounts = {mount["mountPath"]: not mount.get("readOnly", False) for mount in container["volumeMounts"]}
        words = [word.partition("=")[2] or word for word in container.get("args", [])]
        words += [text for config in _configs_of(objects, spec) for text in _strings(config)]
        for path in {word for word in words if word.startswith("/")}:
            if name.startswith("Job/") and path.startswith("/courier"):
                continue  # a path on the node, not on the job
            mount = max((one for one in mounts if path.startswith(one)), key=len, default=None)
            assert mount, f"{name}: nothing is mounted for {path}"
            is_written = path.startswith(("/var/", "/run/"))
            assert mounts[mount] == is_written, f"{name}: {path}"


def _configs_of(objects: tuple[Object, ...], spec: Object) -> Iterator[Object]:
    for volume in spec["volumes"]:
        if "configMap" in volume:
            for file, text in the(objects, "ConfigMap", volume["configMap"]["name"])["data"].items():
                if file in _CONFIGS - {"document"}:
                    yield yaml.safe_load(text)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


@EACH_FILE
def test_programs_listen_where_containers_and_services_say(values: Path) -> None:
    objects = render(values)
    pods = list(pod_specs(objects))
    for name, labels, spec in pods:
        container = spec["containers"][0]
        numbers = [port["containerPort"] for port in container.get("ports", ())]
        listens = [
            int(text.rpartition(":")[2])
            for config in _configs_of(objects, spec)
            for text in _strings(config)
            if text.startswith("0.0.0.0:")
        ]
        if listens:
            assert sorted(numbers) == sorted(listens), name
        assert labels["app.kubernetes.io/instance"] == "km"
    for service in of_kind(objects, "Service"):
        selector = service["spec"]["selector"].items()
        chosen = [spec for _, labels, spec in pods if selector <= labels.items()]
        assert chosen, f"{name_of(service)} selects nothing"
        for port in service["spec"]["ports"]:
            for spec in chosen:
                assert port["targetPort"] in {one["name"] for one in spec["containers"][0]["ports"]}


@EACH_FILE
def test_what_peers_and_saes_dial_stands_in_the_certificates(values: Path) -> None:
    objects = render(values)
    names = {
        one["spec"]["secretName"]: {*one["spec"].get("dnsNames", ()), *one["spec"].get("ipAddresses", ())}
        for one in of_kind(objects, "Certificate")
    }
    if not names:
        pytest.skip("its certificates come from elsewhere")
    given = yaml.safe_load(values.read_text(encoding="utf-8"))
    for one in [*given.get("nodes", ()), *given.get("hubs", ())]:
        role = "hub" if one in given.get("hubs", ()) else "node"
        found = names[f"km-keymesh-{role}-{one['id']}-tls"]
        assert f"{one['id']}.{role}.{given['domain']}.keymesh.internal" in found
        config = json.loads(
            the(objects, "ConfigMap", f"km-keymesh-{role}-{one['id']}")["data"][f"{role}.yaml"]
        )
        assert config["advertise"].rpartition(":")[0] in found
        assert {*one.get("hosts", ())} <= found
    for one in given.get("gateways", ()):
        assert {*one.get("hosts", ())} <= names[f"km-keymesh-gateway-{one['id']}-tls"]


def test_members_of_a_site_dial_each_other_inside_the_cluster() -> None:
    """What peers elsewhere dial leads over a balancer, which the NetworkPolicies do not admit from inside."""
    second = (
        '{"id":"kme-c","advertise":"kme-c.example:7001","service":{"port":7101},"links":[{"peer":"kme-a"}]}'
    )
    sets = (f"nodes[1]={second}", 'nodes[0].links[2]={"peer":"kme-c"}')
    objects = render(CI_VALUES[-1], sets=sets)
    for own, other, port in (("kme-a", "kme-c", 7101), ("kme-c", "kme-a", 7001)):
        name = f"km-keymesh-node-{other}"
        text = the(objects, "ConfigMap", f"km-keymesh-node-{own}")["data"]["node.yaml"]
        assert json.loads(text)["addresses"] == {other: f"{name}.keys.svc.cluster.local:{port}"}
        assert [port] == [one["port"] for one in the(objects, "Service", name)["spec"]["ports"]]
        names = the(objects, "Certificate", f"{name}-tls")["spec"]["dnsNames"]
        assert {f"{name}.keys.svc.cluster.local", f"{other}.node.toronto.keymesh.internal"} <= {*names}


def test_audit_logs_lie_where_something_can_ship_them_from() -> None:
    """A folder of its own for each pod where pods share the volume; never the volume of the pads."""
    mounts = {
        values.stem: {
            name.partition("/")[2]: mount
            for name, _, spec in pod_specs(render(values))
            for mount in spec["containers"][0]["volumeMounts"]
            if mount["mountPath"] == "/var/log/keymesh"
        }
        for values in CI_VALUES
    }
    own = {"name": "audit", "mountPath": "/var/log/keymesh"}
    shared = {**own, "subPathExpr": "$(POD_NAME)"}
    site, existing = mounts["site-values"], mounts["site-existing-secrets-values"]
    assert site == {"km-keymesh-node-kme-a": own, "km-keymesh-gateway-gw-a": own}
    assert existing == {"km-keymesh-node-kme-b": shared, "km-keymesh-gateway-gw-b": shared}
    assert mounts["hub-values"] == {}
    security = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    shipper = {"name": "ship-audit", "image": "shipper", "securityContext": security}
    sets = (
        f"memberDefaults.extraContainers={json.dumps([shipper])}",
        'memberDefaults.auditVolume={"emptyDir":{}}',
    )
    ((_, _, hub),) = pod_specs(render(CI_VALUES[0].parent / "hub-values.yaml", sets=sets))
    assert [one["name"] for one in hub["containers"]] == ["keymesh"], "a hub has no audit log"
    for name, _, spec in pod_specs(render(CI_VALUES[-2])):
        if name.rpartition("/")[2] in existing:
            (variable,) = spec["containers"][0]["env"]
            assert variable["name"] == "POD_NAME", name


def test_everything_listens_on_ipv6_where_there_is_nothing_else(tmp_path: Path) -> None:
    for values in CI_VALUES:
        objects = render(values, sets=('listenHost="[::]"',))
        (tmp_path / values.stem).mkdir()
        files = [
            str(folder / name)
            for config, folder in unpack(objects, tmp_path / values.stem)
            for name in config["data"]
            if name in _CONFIGS
        ]
        assert main(["config", "check", *files]) == 0
        assert "0.0.0.0:" not in yaml.safe_dump_all(of_kind(objects, "ConfigMap", "StatefulSet"))


@EACH_FILE
def test_every_secret_is_made_here_or_named_in_the_values(values: Path) -> None:
    objects = render(values)
    made = {one["spec"]["secretName"] for one in of_kind(objects, "Certificate")}
    text = values.read_text(encoding="utf-8")
    used = {
        volume["secret"]["secretName"]
        for _, _, spec in pod_specs(objects)
        for volume in spec["volumes"]
        if "secret" in volume
    }
    assert used
    assert [name for name in used if name not in made and name not in text] == []
    assert [name for name in made - used if "-root-" not in name and "-sae-" not in name] == []
