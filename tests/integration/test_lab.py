"""A whole lab through its command line: what the contract promises to users and harnesses."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mesh.lab.encryptor import Encryptor, RefusedError
from mesh.lab.ready import encryptor
from mesh.lab.traffic import run_traffic

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
KEYMESH = [sys.executable, "-m", "mesh.cli"]


def keymesh(*words: str, timeout_s: float = 125.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KEYMESH, *words], capture_output=True, text=True, timeout=timeout_s, check=False)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def proof_folder(root: Path) -> Path | None:
    """The folder on tmpfs that the nodes of a lab are told to use; None on a machine without tmpfs."""
    told = {
        yaml.safe_load((root / "config" / f"{node['id']}.yaml").read_text()).get("proof_dir")
        for node in json.loads((root / "lab.json").read_text())["nodes"]
    }
    assert len(told) == 1
    folder = told.pop()
    return None if folder is None else Path(folder)


def pids(lab: dict[str, Any]) -> dict[str, int]:
    sections = ("nodes", "hubs", "gateways", "devices", "relays")
    found = {entry["id"]: entry["pid"] for section in sections for entry in lab[section]}
    for domain in lab["domains"]:
        found |= dict(zip(domain["etcd"]["members"], domain["etcd"]["pids"], strict=True))
    return found


@pytest.fixture(scope="module")
def lab_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("metro") / "lab"
    began_s = time.monotonic()
    up = keymesh("lab", "up", "--network", "metro", "--dir", str(root), "--detach")
    assert up.returncode == 0, up.stderr
    assert time.monotonic() - began_s < 120
    before = pids(json.loads((root / "lab.json").read_text()))
    yield root
    after = pids(json.loads((root / "lab.json").read_text()))
    proofs = proof_folder(root)
    assert proofs is None or list(proofs.glob("*.marks"))
    down = keymesh("lab", "down", "--dir", str(root))
    assert down.returncode == 0, down.stderr
    assert not [pid for pid in {*before.values(), *after.values()} if is_alive(pid)]
    assert not (root / "lab.json").exists()
    assert proofs is None or not proofs.exists()


@pytest.fixture
def lab(lab_dir: Path) -> dict[str, Any]:
    return dict(json.loads((lab_dir / "lab.json").read_text()))


def two_saes(lab: dict[str, Any]) -> tuple[str, str]:
    first = lab["saes"][0]
    other = next(sae for sae in reversed(lab["saes"]) if sae["node"] != first["node"])
    return first["id"], other["id"]


def test_lab_json_has_the_contracts_shape(lab: dict[str, Any]) -> None:
    assert lab["version"] == 1
    assert lab["network"] == "metro"
    shapes = {
        "domains": {"id", "ca", "etcd"},
        "nodes": {"id", "domain", "grpc", "http", "pid", "dir", "log", "cert", "key"},
        "gateways": {"id", "node", "url", "http", "pid", "log"},
        "saes": {"id", "node", "gateway", "cert", "key"},
        "devices": {"id", "pid"},
    }
    for section, fields in shapes.items():
        assert lab[section], section
        for entry in lab[section]:
            assert fields <= entry.keys(), section
    assert lab["hubs"] == []
    assert lab["relays"] == []
    assert lab["ca"] == lab["domains"][0]["ca"]
    assert lab["etcd"] == lab["domains"][0]["etcd"]
    assert {"sae", "node", "gateway"} <= lab["ca"].keys()
    assert {"endpoints", "ca", "cert", "key", "pids"} <= lab["etcd"].keys()
    files = [lab["ca"][name] for name in ("sae", "node", "gateway")]
    files += [entry[name] for entry in lab["nodes"] + lab["saes"] for name in ("cert", "key")]
    files += [entry["log"] for entry in lab["nodes"] + lab["gateways"]]
    assert all(Path(file).is_absolute() and Path(file).is_file() for file in files)
    assert all(Path(entry["dir"]).is_dir() for entry in lab["nodes"])
    assert any(sae["node"] != lab["saes"][0]["node"] for sae in lab["saes"])
    assert all("/api" not in gateway["url"] for gateway in lab["gateways"])


def test_every_pid_is_the_serving_process_in_a_session_of_its_own(lab: dict[str, Any]) -> None:
    for process_id, pid in pids(lab).items():
        assert is_alive(pid), process_id
        assert os.getsid(pid) == pid, process_id
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        assert any(process_id.encode() in word for word in command), process_id


def test_health_and_metrics_are_plain_http(lab: dict[str, Any]) -> None:
    for entry in lab["nodes"] + lab["gateways"]:
        for path in ("healthz", "readyz", "metrics"):
            with urllib.request.urlopen(f"http://{entry['http']}/{path}", timeout=5) as response:
                assert response.status == 200


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_gateways_pass_strict_x509_verification_by_either_name(lab: dict[str, Any], host: str) -> None:
    master, slave = two_saes(lab)
    sae = lab["saes"][0]
    gateway = next(entry for entry in lab["gateways"] if entry["id"] == sae["gateway"])
    url = gateway["url"].replace("127.0.0.1", host).replace("localhost", host)
    with Encryptor(url, ca=lab["ca"]["gateway"], cert=sae["cert"], key=sae["key"]) as plain:
        assert plain.status(slave)["master_SAE_ID"] == master


def test_a_client_without_a_certificate_is_turned_away(lab: dict[str, Any]) -> None:
    context = ssl.create_default_context(cafile=lab["ca"]["gateway"])
    url = f"{lab['gateways'][0]['url']}/api/v1/keys/{lab['saes'][-1]['id']}/status"
    with pytest.raises((OSError, ssl.SSLError)):
        urllib.request.urlopen(url, context=context, timeout=5).close()


def test_two_ends_get_the_same_key_once_and_nobody_else_does(lab: dict[str, Any]) -> None:
    master, slave = two_saes(lab)
    stranger = next(
        sae["id"]
        for sae in lab["saes"]
        if sae["id"] not in (master, slave) and sae["node"] != lab["saes"][0]["node"]
    )
    with encryptor(lab, master) as a, encryptor(lab, slave) as b, encryptor(lab, stranger) as c:
        keys = a.enc_keys(slave, number=3, size_bits=512)
        ids = [key.key_id for key in keys]
        with pytest.raises(RefusedError) as refused:
            c.dec_keys(master, ids)
        assert refused.value.status == 401
        assert sorted(b.dec_keys(master, ids), key=lambda key: ids.index(key.key_id)) == keys
        assert {len(key.value) for key in keys} == {64}
        with pytest.raises(RefusedError) as refused:
            b.dec_keys(master, ids)
        assert refused.value.status == 400


def test_operators_see_nodes_links_reserves_and_saes(lab_dir: Path, lab: dict[str, Any]) -> None:
    for what in ("status", "links", "reserves", "alarms"):
        table = keymesh(what, "--lab", str(lab_dir))
        assert table.returncode == 0, table.stderr
        assert table.stdout.startswith("NODE")
        answers = keymesh(what, "--lab", str(lab_dir), "--json")
        assert json.loads(answers.stdout).keys() == {node["id"] for node in lab["nodes"]}
    saes = keymesh("sae", "list", "--lab", str(lab_dir))
    assert all(sae["id"] in saes.stdout for sae in lab["saes"])
    public = lab_dir / "network" / "operator.pub.pem"
    shown = keymesh("network", "show", str(lab_dir / "network" / "document.signed"), "--public", str(public))
    assert "verified" in shown.stdout, shown.stderr


def test_a_second_lab_in_the_same_directory_is_refused(lab_dir: Path) -> None:
    second = keymesh("lab", "up", "--network", "metro", "--dir", str(lab_dir), "--detach")
    assert second.returncode != 0
    assert "lab down" in second.stderr


def test_a_killed_node_stays_dead_until_restarted_and_the_network_heals(
    lab_dir: Path, lab: dict[str, Any]
) -> None:
    master, slave = two_saes(lab)
    node = lab["nodes"][1]
    with encryptor(lab, master) as a:
        (kept,) = a.enc_keys(slave)
    os.kill(node["pid"], signal.SIGKILL)
    # What was acknowledged before is redeemed without the relay in the middle.
    with encryptor(lab, slave) as b:
        assert b.dec_keys(master, [kept.key_id]) == [kept]
    assert not is_alive(node["pid"])
    restarted = keymesh("lab", "restart", "--dir", str(lab_dir), node["id"])
    assert restarted.returncode == 0, restarted.stderr
    fresh = json.loads((lab_dir / "lab.json").read_text())
    assert pids(fresh)[node["id"]] != node["pid"]
    if proof_folder(lab_dir) is not None:
        status = keymesh("status", "--lab", str(lab_dir), "--node", node["id"], "--json")
        assert json.loads(status.stdout)[node["id"]]["is_proven_restart"] is True
    assert {k: v for k, v in pids(fresh).items() if k != node["id"]} == {
        k: v for k, v in pids(lab).items() if k != node["id"]
    }
    deadline_s = time.monotonic() + 90
    while True:
        result = run_traffic(fresh, 1.0)
        assert result.is_clean, str(result)
        if not result.failures and result.keys_checked:
            break
        assert time.monotonic() < deadline_s, str(result)


def test_traffic_through_the_command_is_clean(lab_dir: Path) -> None:
    run = keymesh("lab", "run", "--dir", str(lab_dir), "--traffic", "2")
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 differ, 0 lost" in run.stdout


def test_restarting_what_does_not_exist_lists_what_does(lab_dir: Path) -> None:
    wrong = keymesh("lab", "restart", "--dir", str(lab_dir), "no-such")
    assert wrong.returncode != 0
    assert "can-site-x" in wrong.stderr


def test_a_lab_that_cannot_start_stops_everything_and_says_why(tmp_path: Path) -> None:
    network = tmp_path / "broken.yaml"
    text = (Path(__file__).parents[2] / "mesh" / "lab" / "networks" / "metro.yaml").read_text()
    network.write_text(text + "limits: {key_size_bits: 7}\n")
    root = tmp_path / "lab"
    up = keymesh("lab", "up", "--network", str(network), "--dir", str(root), "--detach")
    assert up.returncode != 0
    assert "key_size_bits" in up.stderr
    processes = json.loads((root / "processes.json").read_text())
    assert any(process["pid"] for process in processes)
    assert not [process for process in processes if is_alive(process["pid"])]
