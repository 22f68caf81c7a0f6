"""Trouble around real processes of a metro: each has a defined answer, an alarm where one helps, and an end.

One lab for the file. Tests leave it healed; what one of them did to the pads is judged at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.core.transfer import KEY_PART_BYTES, SLOT_BYTES
from mesh.directory.document import encode_body, sign
from mesh.directory.etcd import EtcdClient, EtcdTls
from mesh.directory.etcd_directory import document_key, domain_prefix
from mesh.lab.ground import free_ports
from tests.torture.client import Answer, CutError, Key, NotSentError, Sae
from tests.torture.history import History
from tests.torture.lab import KEYMESH, LabUnderTest, pid_of, write_network
from tests.torture.pads import audit_pads
from tests.torture.traffic import wait_until_healed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
X, Y, Z = "can-site-x", "can-site-y", "can-site-z"
HIGH_WATER_BYTES = 65_536
REQUEST_TIMEOUT_S = 5.0
"""Far below the 10 s within which a 503 must have come, on a loaded machine, too."""
POOL = {"pool_max_bytes": 4 << 20, "initial_bytes": 8 << 20}
"""Pools that a test can empty."""


class Metro:
    """The lab, its SAEs, and what an operator sees.

    Args:
        folder: for the lab.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.under_test = LabUnderTest(folder / "lab")
        network = write_network(
            folder, high_water_bytes=HIGH_WATER_BYTES, links=POOL, request_timeout_s=REQUEST_TIMEOUT_S
        )
        self.under_test.up(str(network))
        lab = self.under_test.lab
        self.new_history()
        self.x, self.z = Sae(lab, "sae-x-1"), Sae(lab, "sae-z-1")
        self.clones: list[subprocess.Popen[bytes]] = []

    def new_history(self) -> None:
        """Judge from here on only."""
        self.history = History({sae["id"]: sae["node"] for sae in self.under_test.lab["saes"]})

    def close(self) -> None:
        """Stop everything."""
        for clone in self.clones:
            clone.kill()
            clone.wait()
        self.under_test.down()

    def heal(self) -> None:
        """Wait until every pair of SAEs gets keys again."""
        wait_until_healed(self.under_test.lab, self.history, timeout_s=120)
        assert not self.history.notes

    def keys(self, number: int = 1) -> list[Key]:
        """Keys for x and z, which must be had."""
        return until_ok(lambda: self.x.enc_keys("sae-z-1", number=number)).keys

    def fetch(self, *keys: Key) -> Answer:
        """What z gets for them."""
        return self.z.dec_keys("sae-x-1", [key.key_id for key in keys])

    def config_of(self, process_id: str) -> tuple[Path, dict[str, Any]]:
        """A configuration file and its content."""
        path = self.under_test.folder / "config" / f"{process_id}.yaml"
        return path, dict(yaml.safe_load(path.read_text()))

    def log_of(self, process_id: str) -> str:
        """A process's log."""
        return (self.under_test.folder / "log" / f"{process_id}.log").read_text()

    def alarms(self, node: str) -> dict[str, dict[str, Any]]:
        """Open alarms of a node by id."""
        answer = self.under_test.ask("alarms").get(node, {"alarms": []})
        return {alarm["alarm_id"]: alarm for alarm in answer["alarms"]}

    def until_alarm(self, node: str, alarm_id: str, *, is_open: bool = True) -> dict[str, Any]:
        """Wait for an alarm to be raised, or cleared."""
        deadline_s = time.monotonic() + 90
        while True:
            alarms = self.alarms(node)
            if (alarm_id in alarms) is is_open:
                return alarms.get(alarm_id, {})
            assert time.monotonic() < deadline_s, alarms
            time.sleep(0.3)

    def data_of(self, node: str) -> Path:
        """A node's data directory."""
        return Path(next(entry["dir"] for entry in self.under_test.lab["nodes"] if entry["id"] == node))


def until_ok(call: Callable[[], Answer], *, timeout_s: float = 90.0) -> Answer:
    """Repeat until 200."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        said: object = None
        with contextlib.suppress(NotSentError, CutError):
            answer = call()
            if answer.status == 200:
                return answer
            said = answer.status, answer.reason
        assert time.monotonic() < deadline_s, said
        time.sleep(0.2)


@pytest.fixture(scope="module")
def metro(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Metro]:
    lab = Metro(tmp_path_factory.mktemp("metro"))
    try:
        yield lab
    finally:
        lab.close()


def test_a_second_process_on_the_same_directory_is_sent_away(metro: Metro) -> None:
    path, _ = metro.config_of(X)
    second = metro.under_test.run("node", "run", "--config", str(path))
    assert second.returncode == 1
    line = second.stderr.strip().splitlines()[-1]
    assert "another process runs on this data directory; stop it first" in line
    assert f"pid={pid_of(metro.under_test.lab, X)}" in line
    assert metro.fetch(*metro.keys()).status == 200


def set_hang(metro: Metro, end: str, *, value: bool) -> None:
    """Let the device pairs of a node's links hang, or answer again."""
    for device in metro.under_test.lab["devices"]:
        if end in device["id"]:
            faults = json.dumps({"hang": value}).encode()
            request = urllib.request.Request(f"{device['control']}/faults", data=faults)
            urllib.request.urlopen(request, timeout=5).close()


def link_of(metro: Metro, node: str, peer: str) -> dict[str, Any]:
    """What a node says of a link."""
    links = metro.under_test.ask("links")[node]["links"]
    return dict(next(link for link in links if link["peer_kme_id"] == peer))


def test_a_hanging_device_is_alarmed_the_lanes_serve_on_and_empty_pools_are_503(metro: Metro) -> None:
    set_hang(metro, X, value=True)
    try:
        # Full pools ask no device.
        for _ in range(16):
            until_ok(lambda: metro.x.enc_keys("sae-z-1", number=128, size_bits=4096))
        alarm = metro.until_alarm(X, f"link/{Y}/device")
        assert "device" in alarm["next_step"]
        assert metro.fetch(*metro.keys(4)).status == 200
        link = link_of(metro, X, Y)
        assert link["state"] == "open"
        assert link["device_state"] != "ready"
        kept = metro.keys(2)
        deadline_s = time.monotonic() + 120
        others: Counter[str] = Counter()
        while (answer := metro.x.enc_keys("sae-z-1", number=128, size_bits=4096)).reason != "out-of-material":
            assert answer.status in (200, 503)
            others[answer.reason] += answer.status == 503
            assert time.monotonic() < deadline_s, others
        assert answer.status == 503
        assert answer.took_s < 10
        assert int(answer.headers["retry-after"]) >= 1
        # What was promised is kept, what needs no pad of that link goes on, a tail stays for the link itself.
        assert metro.fetch(*kept).status == 200
        assert until_ok(lambda: metro.z.enc_keys("sae-y-1")).status == 200
        link = link_of(metro, X, Y)
        assert link["state"] == "open"
        assert int(link["transmit"]["usable"]) > 0
    finally:
        set_hang(metro, X, value=False)
    metro.until_alarm(X, f"link/{Y}/device", is_open=False)
    metro.heal()
    assert "Traceback" not in metro.log_of(X)


def put_in_etcd(lab: dict[str, Any], entries: dict[bytes, bytes]) -> None:
    """As whoever owns etcd: its own user root."""
    etcd = lab["etcd"]
    tls = EtcdTls(*(Path(etcd[name]).read_bytes() for name in ("ca", "cert", "key")))

    async def put() -> None:
        async with EtcdClient(etcd["endpoints"], tls=tls) as client:
            for key, value in entries.items():
                await client.put(key, value)

    asyncio.run(put())


def test_5_1_whoever_owns_etcd_moves_no_home_and_gets_no_key(metro: Metro) -> None:
    """It writes a newer document that moves z's SAE to y, and y's address into z's record."""
    lab = metro.under_test.lab
    domain = lab["domains"][0]["id"]
    source = yaml.safe_load((metro.under_test.folder / "network" / "document.yaml").read_text())
    source["serial"] += 1
    source["saes"]["sae-z-1"] = {"home": Y}
    stranger = sign(encode_body(source), Ed25519PrivateKey.generate())
    nodes = {one["id"]: one["grpc"] for one in lab["nodes"]}
    record = json.dumps({"kme_id": Z, "address": nodes[Y]}).encode()
    prefix = domain_prefix(domain)
    put_in_etcd(lab, {document_key(domain): stranger, prefix + b"nodes/" + Z.encode(): record})
    alarm = metro.until_alarm(X, "network/document")
    assert "keymesh network show" in alarm["next_step"]
    y = Sae(lab, "sae-y-1")
    for _ in range(3):
        (key,) = until_ok(lambda: metro.x.enc_keys("sae-z-1")).keys
        assert y.dec_keys("sae-x-1", [key.key_id]).status == 401
        assert metro.fetch(key).keys == [key]
    y.close()
    # A node puts its own record right again, and the operator the document.
    source["serial"] += 1
    source["saes"]["sae-z-1"] = {"home": Z}
    honest = metro.root / "honest.yaml"
    honest.write_text(yaml.safe_dump(source))
    signed = metro.root / "honest.signed"
    key_file = metro.under_test.folder / "network" / "operator.pem"
    done = metro.under_test.run("network", "sign", str(honest), "--key", str(key_file), "--out", str(signed))
    assert done.returncode == 0, done.stderr
    put_in_etcd(lab, {document_key(domain): signed.read_bytes()})
    metro.until_alarm(X, "network/document", is_open=False)
    metro.heal()
    assert not metro.under_test.alarms_for_operators()


def burnt(metro: Metro, node: str) -> int:
    """Bytes of its outbound lanes that a node has used for data."""
    path = next(one for one in metro.under_test.pad_audits() if one.name.startswith(node))
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return sum(
        line["stop"] - line["start"] for line in lines if line["outbound"] and line["purpose"] == "data"
    )


def test_a_target_that_does_not_answer_is_503_in_time_and_costs_little(metro: Metro) -> None:
    """SIGSTOP: connections stay up and nothing comes back, the hardest kind of unreachable."""
    pid = pid_of(metro.under_test.lab, Z)
    kept = metro.keys(2)
    os.kill(pid, signal.SIGSTOP)
    try:
        while (answer := metro.x.enc_keys("sae-z-1", number=16)).status == 200:
            continue
        assert answer.status == 503
        assert answer.took_s < 10
        assert answer.reason
        assert int(answer.headers["retry-after"]) >= 1
        before = burnt(metro, X)
        assert metro.x.enc_keys("sae-z-1", number=16).status == 503
        # One transfer for the keys, and refills that shrink with each loss: nothing is retried in a loop,
        # which would burn twice what the reserve takes over and over.
        assert burnt(metro, X) - before < 2 * HIGH_WATER_BYTES // KEY_PART_BYTES * SLOT_BYTES
        # What does not need the target goes on.
        assert until_ok(lambda: metro.x.enc_keys("sae-y-1")).status == 200
    finally:
        os.kill(pid, signal.SIGCONT)
    assert until_ok(lambda: metro.fetch(*kept)).status == 200
    metro.heal()


def run_clone(metro: Metro, node: str, data: Path) -> dict[str, Any]:
    """A second machine with a copy of the node's directory: own ports, own folder on tmpfs."""
    _, config = metro.config_of(node)
    grpc, http = free_ports(2)
    folder = metro.root / f"second-machine-{len(metro.clones)}"
    (folder / "proofs").mkdir(parents=True)
    config["listen"] = {"grpc": f"127.0.0.1:{grpc}", "http": f"127.0.0.1:{http}"}
    config |= {
        "data_dir": str(data),
        "proof_dir": str(folder / "proofs"),
        "audit_log": str(folder / "audit.jsonl"),
        "pad_audit_file": str(metro.under_test.folder / "audit" / f"clone-{len(metro.clones)}.pads.jsonl"),
    }
    path = folder / "node.yaml"
    path.write_text(yaml.safe_dump(config))
    with (folder / "node.log").open("wb") as log:
        process = subprocess.Popen([*KEYMESH, "node", "run", "--config", str(path)], stdout=log, stderr=log)
    metro.clones.append(process)
    return config


def ask_alarms(metro: Metro, config: dict[str, Any]) -> str:
    """``keymesh alarms`` at one node, as an operator sees it."""
    tool = metro.under_test.lab["tool"]
    words = ["--address", config["listen"]["grpc"], "--node", config["kme_id"]]
    words += ["--domain", config["domain_id"], "--ca", config["tls"]["ca"]]
    return metro.under_test.run("alarms", *words, "--cert", tool["cert"], "--key", tool["key"]).stdout


def until_ready_says(http: str, text: str, *, timeout_s: float = 120.0) -> None:
    """Wait until a node says on /readyz why it does not serve."""
    deadline_s = time.monotonic() + timeout_s
    said = ""
    while text not in said:
        assert time.monotonic() < deadline_s, said
        try:
            urllib.request.urlopen(f"http://{http}/readyz", timeout=2).close()
        except urllib.error.HTTPError as error:
            said = error.read().decode()
        except OSError as error:
            said = str(error)
        time.sleep(0.2)


def test_a_cloned_directory_at_a_second_machine_is_refused_and_the_original_goes_on(metro: Metro) -> None:
    under_test = metro.under_test
    under_test.kill(X)
    copy = metro.root / "cloned"
    shutil.copytree(metro.data_of(X), copy)
    assert under_test.restart(X)
    metro.heal()
    clone = run_clone(metro, X, copy)
    until_ready_says(clone["listen"]["http"], "stopped")
    table = ask_alarms(metro, clone)
    assert "needs operator" in table
    assert "rolled-back" in table
    assert "keymesh links reset" in table
    metro.heal()
    # More than any reserve holds: the target's confirms find the original, not the copy.
    for _ in range(6):
        assert until_ok(lambda: metro.x.enc_keys("sae-z-1", number=128, size_bits=1024)).keys
    assert metro.fetch(*metro.keys(2)).status == 200
    assert not under_test.alarms_for_operators()
    clones_log = (metro.root / "second-machine-0" / "node.log").read_text()
    assert "Traceback" not in clones_log
    metro.clones[-1].kill()
    metro.clones[-1].wait()


def test_a_restored_snapshot_is_refused_until_the_operator_resets_its_links(metro: Metro) -> None:
    under_test = metro.under_test
    under_test.kill(Z)
    snapshot = metro.root / "snapshot"
    shutil.copytree(metro.data_of(Z), snapshot)
    assert under_test.restart(Z)
    metro.heal()
    redeemed = metro.keys(3)
    assert metro.fetch(*redeemed).status == 200
    under_test.kill(Z)
    shutil.rmtree(metro.data_of(Z))
    shutil.copytree(snapshot, metro.data_of(Z))
    assert under_test.restart(Z)
    seen = []
    deadline_s = time.monotonic() + 120
    revealed = f"link/{Y}/rolled-back"
    while revealed not in (alarms := metro.alarms(Z)) and time.monotonic() < deadline_s:
        with contextlib.suppress(NotSentError, CutError):
            seen.append(metro.fetch(redeemed[0]).status)
    # Redeemed before the snapshot was restored: it must not be handed out a second time.
    assert 200 not in seen
    alarm = alarms[revealed]
    assert alarm["needs_operator"]
    assert "keymesh links reset" in alarm["next_step"]
    assert metro.fetch(redeemed[1]).status == 503
    assert under_test.restart(Z)
    assert revealed in metro.alarms(Z), "a refusal outlives a restart"
    # The operator has looked: both ends of the link start afresh.
    for node, peer in ((Z, Y), (Y, Z)):
        words = ("links", "reset", peer, "--confirm", peer, "--lab", str(under_test.folder))
        reset = under_test.run(*words, "--node", node)
        assert reset.returncode == 0, reset.stderr
    assert until_ok(lambda: metro.z.enc_keys("sae-x-1")).status == 200
    assert metro.fetch(redeemed[2]).status in (400, 401)
    # What other nodes had in reserve for it is gone, too; they learn that at their next establish.
    for sae_id in ("sae-x-1", "sae-y-1"):
        sae = Sae(under_test.lab, sae_id)
        for _ in range(6):
            until_ok(lambda sae=sae: sae.enc_keys("sae-z-1", number=128, size_bits=1024))  # type: ignore[misc]
        sae.close()
    metro.new_history()
    metro.heal()
    assert not under_test.alarms_for_operators()


def test_a_full_disk_is_503_loses_nothing_and_ends_when_there_is_space(metro: Metro) -> None:
    """No file of the node's may grow: as on a full disk, logs and audit included."""
    under_test = metro.under_test
    path, config = metro.config_of(Z)
    del config["pad_audit_file"]
    path.write_text(yaml.safe_dump(config))
    assert under_test.restart(Z)
    metro.heal()
    kept = metro.keys(4)
    pid = pid_of(under_test.lab, Z)
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, hard))
    try:
        for _ in range(3):
            refused = metro.fetch(*kept)
            assert (refused.status, refused.reason) == (503, "disk-full")
            assert refused.took_s < 10
        back = Sae(under_test.lab, "sae-z-2")
        answers = [back.enc_keys("sae-x-2", number=16) for _ in range(3)]
        assert {answer.status for answer in answers} == {503}
        assert {answer.reason for answer in answers} == {"disk-full"}
        assert Path(f"/proc/{pid}").exists()
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert [key.value for key in until_ok(lambda: metro.fetch(*kept)).keys] == [key.value for key in kept]
    metro.heal()
    assert pid_of(under_test.lab, Z) == pid
    assert "Traceback" not in metro.log_of(Z)


def test_no_trouble_made_a_pad_byte_serve_twice(metro: Metro) -> None:
    metro.under_test.down()
    audit = audit_pads(metro.under_test.pad_audits())
    assert audit.reused_bytes == 0, audit.notes
