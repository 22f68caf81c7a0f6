"""A mesh in containers, driven from outside over mutual TLS: what goes wrong in networks and machines."""

from __future__ import annotations

import http.client
import itertools
import json
import ssl
import time
import urllib.request
from collections.abc import Iterator

import docker
import pytest

from mesh.client import operator
from mesh.lab.encryptor import RefusedError
from mesh.lab.ready import encryptor
from mesh.lab.traffic import run_traffic
from mesh.v1 import admin_pb2
from tests.containers.mesh import LABEL, ContainerMesh, wait
from tests.containers.traffic import Traffic

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SAES = ("sae-a", "sae-b", "sae-c")
PAIRS = list(itertools.permutations(SAES, 2))
# What a slow machine may answer, whatever else goes well.
SHORTAGES = {"out-of-material", "busy", "window-full"}


@pytest.fixture(scope="module")
def mesh(
    engine: docker.DockerClient, image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ContainerMesh]:
    mesh = ContainerMesh(engine, image, tmp_path_factory.mktemp("mesh"))
    try:
        mesh.start()
        yield mesh
    except BaseException:
        for member_id, log in mesh.logs():
            print(f"--- {member_id}\n{log}")
        raise


@pytest.fixture(autouse=True)
def whole(mesh: ContainerMesh) -> Iterator[None]:
    """Each test leaves the mesh whole again, and says in its report what the containers said."""
    yield
    mesh.wait_links()


def draw(mesh: ContainerMesh, master: str, slave: str, number: int = 1) -> dict[str, bytes]:
    with encryptor(mesh.lab, master) as sae:
        return {key.key_id: key.value for key in sae.enc_keys(slave, number=number)}


def fetch(mesh: ContainerMesh, slave: str, master: str, key_ids: list[str]) -> dict[str, bytes]:
    with encryptor(mesh.lab, slave) as sae:
        return {key.key_id: key.value for key in sae.dec_keys(master, key_ids)}


def stored(mesh: ContainerMesh, master: str, slave: str) -> int:
    with encryptor(mesh.lab, master) as sae:
        return int(sae.status(slave)["stored_key_count"])


def assert_serves(mesh: ContainerMesh, duration_s: float = 2.0) -> None:
    """Once reserves are no longer empty, every pair gets keys, the same at both ends, and no call fails."""
    for master, slave in PAIRS:
        wait_refilled(mesh, master, slave, 256)
    result = run_traffic(mesh.lab, duration_s)
    assert result.is_clean, result
    assert result.keys_checked > 0, result
    assert not result.failures, result


def test_both_ends_get_the_same_key_once(mesh: ContainerMesh) -> None:
    for master, slave in PAIRS:
        keys = draw(mesh, master, slave, 4)
        assert fetch(mesh, slave, master, list(keys)) == keys
        with pytest.raises(RefusedError) as refused:
            fetch(mesh, slave, master, list(keys))
        assert refused.value.status == 400
    keys = draw(mesh, "sae-a", "sae-b")
    with pytest.raises(RefusedError):
        fetch(mesh, "sae-c", "sae-a", list(keys))
    assert fetch(mesh, "sae-b", "sae-a", list(keys)) == keys
    assert_serves(mesh)


def test_strangers_are_refused(mesh: ContainerMesh) -> None:
    gateway = mesh.lab["gateways"][0]
    context = ssl.create_default_context(cafile=mesh.lab["ca"]["gateway"])
    with pytest.raises((OSError, http.client.HTTPException)):
        urllib.request.urlopen(f"{gateway['url']}/api/v1/keys/sae-b/status", context=context, timeout=5)


def test_every_container_is_alone_and_unprivileged(mesh: ContainerMesh) -> None:
    addresses = set()
    for member in mesh.members.values():
        facts = member.docker.attrs
        member.docker.reload()
        assert facts["HostConfig"]["ReadonlyRootfs"], member.id
        assert facts["HostConfig"]["CapDrop"] == ["ALL"], member.id
        assert not facts["HostConfig"]["Privileged"], member.id
        assert facts["Config"]["User"].startswith("10001"), member.id
        networks = member.docker.attrs["NetworkSettings"]["Networks"].values()
        addresses |= {network["IPAddress"] for network in networks}
        assert len(networks) == len(member.networks)
    assert len(addresses) == sum(len(member.networks) for member in mesh.members.values())


def test_a_node_cut_off_serves_from_its_reserves_and_joins_again(mesh: ContainerMesh) -> None:
    full = stored(mesh, "sae-b", "sae-a")
    mesh.disconnect("kme-b", "plane")
    try:
        # Neither end needs the other, a hub or the directory for what they hold already.
        for master, slave in (("sae-a", "sae-b"), ("sae-b", "sae-a")):
            keys = draw(mesh, master, slave, 128)
            assert fetch(mesh, slave, master, list(keys)) == keys
        assert stored(mesh, "sae-b", "sae-a") < full
    finally:
        mesh.connect("kme-b", "plane")
    mesh.wait_links()
    wait_refilled(mesh, "sae-b", "sae-a", low_water(full))
    assert_serves(mesh)


def test_a_node_held_still_answers_late_and_loses_nothing(mesh: ContainerMesh) -> None:
    keys = draw(mesh, "sae-a", "sae-b", 8)
    container = mesh.members["kme-b"].docker
    container.pause()
    try:
        assert draw(mesh, "sae-a", "sae-b")
        began_s = time.monotonic()
        with pytest.raises(RefusedError) as refused:
            draw(mesh, "sae-b", "sae-a")
        assert refused.value.status == 503
        # Ten seconds by the contract, and what a busy machine adds.
        assert time.monotonic() - began_s < 15
    finally:
        container.unpause()
    mesh.wait_ready("kme-b", "gw-b")
    assert fetch(mesh, "sae-b", "sae-a", list(keys)) == keys
    mesh.wait_links()
    assert_serves(mesh)


@pytest.mark.parametrize("victim", ["kme-a", "kme-c"])
def test_a_killed_node_keeps_what_was_acknowledged(mesh: ContainerMesh, victim: str) -> None:
    own = victim.replace("kme", "sae")
    others = [sae for sae in SAES if sae != own]
    drawn = {(own, other): draw(mesh, own, other, 8) for other in others}
    drawn |= {(other, own): draw(mesh, other, own, 8) for other in others}
    assert mesh.kill(victim) == 137
    for other in others:
        # Their own reserves towards each other do not care.
        assert draw(mesh, other, next(sae for sae in others if sae != other))
    mesh.revive(victim)
    mesh.wait_ready(victim, victim.replace("kme", "gw"))
    for (master, slave), keys in drawn.items():
        assert fetch(mesh, slave, master, list(keys)) == keys
    mesh.wait_links()
    assert_serves(mesh)


def test_the_directorys_leader_is_lost(mesh: ContainerMesh) -> None:
    leader = etcd_leader(mesh)
    with Traffic(mesh.lab, PAIRS) as traffic:
        assert mesh.kill(leader) == 137
        wait(lambda: "" if etcd_leader(mesh, leader) else "a new leader", 30)
        # The directory's clients find the members that are left.
        wait(lambda: missing_directory(mesh), 30)
        mesh.revive(leader)
        wait(lambda: "" if leader in etcd_members_up(mesh) else f"{leader} again", 30)
    assert_all_delivered(traffic)
    assert all(tally.refusals.keys() <= SHORTAGES for tally in traffic.tallies.values()), traffic.tallies


def test_a_lost_hub_is_one_too_few_to_matter(mesh: ContainerMesh) -> None:
    assert mesh.kill("hub-2") == 137
    try:
        full = stored(mesh, "sae-a", "sae-b")
        for _ in range(4):
            keys = draw(mesh, "sae-a", "sae-b", 128)
            assert fetch(mesh, "sae-b", "sae-a", list(keys)) == keys
        # Two of three hubs carry the refill.
        wait_refilled(mesh, "sae-a", "sae-b", low_water(full))
        assert_serves(mesh)
    finally:
        mesh.revive("hub-2")
    mesh.wait_ready("hub-2")


def test_a_rolling_upgrade_fails_no_acknowledged_key(mesh: ContainerMesh, next_image: str) -> None:
    members = mesh.of_kind("hub", "node", "gateway")
    with Traffic(mesh.lab, PAIRS) as traffic:
        for member_id in members:
            assert mesh.replace(member_id, next_image) == 0, f"{member_id} did not end by itself"
            mesh.wait_ready(member_id)
            mesh.wait_links()
        time.sleep(1)
    assert_all_delivered(traffic)
    for member_id in members:
        assert next_image in mesh.members[member_id].docker.image.tags
    assert_serves(mesh)


@pytest.fixture
def next_image(engine: docker.DockerClient, image: str) -> str:
    """The same program as another image: what an upgrade starts."""
    container = engine.containers.create(image, labels={LABEL: ""})
    container.commit("keymesh-tests-next", "latest", conf={"Labels": {LABEL: "next"}})
    container.remove()
    return "keymesh-tests-next:latest"


def low_water(count: int) -> int:
    """Where refills begin: three quarters of what a full reserve holds."""
    return count * 3 // 4 - 1


def wait_refilled(mesh: ContainerMesh, master: str, slave: str, count: int) -> None:
    def missing() -> str:
        there = stored(mesh, master, slave)
        return "" if there >= count else f"{count - there} keys from {master} to {slave}"

    wait(missing, 60)


def assert_all_delivered(traffic: Traffic) -> None:
    for pair, tally in traffic.tallies.items():
        assert not tally.failed, f"{pair}: {tally.failed}"
        assert tally.delivered == tally.acknowledged > 0, f"{pair}: {tally}"


def missing_directory(mesh: ContainerMesh) -> str:
    """Which node has not heard of the directory for longer than a lease."""
    for node in mesh.lab["nodes"]:
        status = operator.ask(mesh.target(node["id"]), "status")
        assert isinstance(status, admin_pb2.NodeStatus)
        if status.directory_staleness_s > 10:
            return f"{node['id']} hears the directory"
    return ""


def etcd_members_up(mesh: ContainerMesh, but: str = "") -> dict[str, bool]:
    """Members of etcd that answer and know of a leader; whether each is the one."""
    etcd = mesh.lab["etcd"]
    context = ssl.create_default_context(cafile=etcd["ca"])
    context.load_cert_chain(etcd["cert"], etcd["key"])
    up = {}
    for member, endpoint in zip(etcd["members"], etcd["endpoints"], strict=True):
        if member == but:
            continue
        try:
            with urllib.request.urlopen(f"{endpoint}/health", context=context, timeout=5) as answer:
                is_healthy = json.load(answer)["health"] == "true"
            with urllib.request.urlopen(f"{endpoint}/metrics", context=context, timeout=5) as answer:
                is_leader = b"\netcd_server_is_leader 1\n" in answer.read()
        except OSError:
            continue
        if is_healthy:
            up[member] = is_leader
    return up


def etcd_leader(mesh: ContainerMesh, but: str = "") -> str:
    """The leading member, or ""."""
    return next((member for member, leads in etcd_members_up(mesh, but).items() if leads), "")
