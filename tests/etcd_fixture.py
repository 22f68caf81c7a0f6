"""Real etcd for tests: TLS with client certificates, users, one member or more.

async with running_etcd(tmp_path) as etcd:
    client = etcd.client("kme-a")
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from mesh.directory.etcd import EtcdClient, EtcdTls
from mesh.directory.etcd_setup import node_user, operator_user, set_up_auth
from mesh.errors import MeshError
from mesh.lab.ground import free_ports
from mesh.pki.authority import Pki

DOMAIN = "toronto"
NODES = ("kme-a", "kme-b", "kme-c")
OPERATOR = "operator"
PASSWORD = "test-only-password"
START_S = 60.0


@dataclass(slots=True)
class Member:
    """One etcd process."""

    name: str
    client_port: int
    peer_port: int
    argv: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"https://127.0.0.1:{self.client_port}"


class EtcdCluster:
    """A running cluster; ``client`` makes clients that the cluster closes at the end."""

    def __init__(self, root: Path, *, size: int, options: tuple[str, ...]) -> None:
        self.root = root
        self.pki = Pki.create(DOMAIN)
        ports = list(free_ports(2 * size))
        self.members = [Member(f"etcd-{i + 1}", ports[2 * i], ports[2 * i + 1]) for i in range(size)]
        credential = self.pki.etcd_client("tests")
        self.tls = EtcdTls(self.pki.roots["etcd"].pem, credential.cert_pem, credential.key_pem)
        self._clients: list[EtcdClient] = []
        for member in self.members:
            member.argv = self._argv(member, options)

    @property
    def endpoints(self) -> list[str]:
        return [member.endpoint for member in self.members]

    def client(
        self,
        user: str | None,
        *,
        endpoints: list[str] | None = None,
        timeout_s: float = 10.0,
        heartbeat_s: float = 0.5,
    ) -> EtcdClient:
        """A client as a KME id, as ``OPERATOR``, as ``root``, or without a user."""
        client = EtcdClient(
            endpoints or self.endpoints,
            tls=self.tls,
            username=user,
            password=None if user is None else PASSWORD,
            timeout_s=timeout_s,
            heartbeat_s=heartbeat_s,
        )
        self._clients.append(client)
        return client

    def start(self, index: int = 0) -> None:
        """Starts a member on its data, new or kept."""
        member = self.members[index]
        with (self.root / f"{member.name}.log").open("ab") as log:
            member.process = subprocess.Popen(member.argv, stdout=log, stderr=log)

    def kill(self, index: int = 0) -> None:
        """Kills a member and waits until it is gone."""
        process = self.members[index].process
        assert process is not None
        process.kill()
        process.wait()

    def freeze(self, index: int = 0) -> None:
        """Stops a member without closing its connections, like a cut cable."""
        self._signal(index, signal.SIGSTOP)

    def thaw(self, index: int = 0) -> None:
        """Ends ``freeze``."""
        self._signal(index, signal.SIGCONT)

    async def wait_ready(self, *, user: str | None = None, index: int | None = None) -> None:
        """Waits until a range call succeeds; at a member: it has then caught up with the others."""
        client = self.client(user, endpoints=None if index is None else [self.members[index].endpoint])
        async with asyncio.timeout(START_S):
            while True:
                try:
                    await client.get(b"/keymesh/toronto/ready")
                except MeshError:
                    await asyncio.sleep(0.05)
                else:
                    return

    async def close(self) -> None:
        """Closes clients and kills what runs."""
        for client in self._clients:
            await client.close()
        for member in self.members:
            if member.process is not None and member.process.poll() is None:
                member.process.kill()
                member.process.wait()

    def _signal(self, index: int, number: signal.Signals) -> None:
        process = self.members[index].process
        assert process is not None
        process.send_signal(number)

    def _argv(self, member: Member, options: tuple[str, ...]) -> list[str]:
        files = self.pki.etcd_server(member.name).save(self.root, member.name)
        ca = self.root / "etcd-ca.pem"
        ca.write_bytes(self.pki.roots["etcd"].pem)
        peer = f"https://127.0.0.1:{member.peer_port}"
        cluster = ",".join(f"{m.name}=https://127.0.0.1:{m.peer_port}" for m in self.members)
        return [
            str(Path(sys.executable).parent / "etcd"),
            f"--name={member.name}",
            f"--data-dir={self.root / member.name}.etcd",
            f"--listen-client-urls={member.endpoint}",
            f"--advertise-client-urls={member.endpoint}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={cluster}",
            "--client-cert-auth",
            f"--trusted-ca-file={ca}",
            f"--cert-file={files.cert}",
            f"--key-file={files.key}",
            "--peer-client-cert-auth",
            f"--peer-trusted-ca-file={ca}",
            f"--peer-cert-file={files.cert}",
            f"--peer-key-file={files.key}",
            "--log-level=warn",
            "--unsafe-no-fsync",
            # Several members on a busy machine: none may take another's pause for its death.
            *(("--heartbeat-interval=200", "--election-timeout=2000") if len(self.members) > 1 else ()),
            *options,
        ]


@contextlib.asynccontextmanager
async def running_etcd(
    root: Path, *, size: int = 1, auth: bool = True, options: tuple[str, ...] = ()
) -> AsyncIterator[EtcdCluster]:
    """A cluster with users for ``NODES`` and ``OPERATOR``, all with the password ``PASSWORD``."""
    cluster = EtcdCluster(root, size=size, options=options)
    try:
        for index in range(size):
            cluster.start(index)
        await cluster.wait_ready()
        if auth:
            users = [node_user(DOMAIN, kme_id, PASSWORD) for kme_id in NODES]
            users.append(operator_user(DOMAIN, OPERATOR, PASSWORD))
            await set_up_auth(cluster.client(None), root_password=PASSWORD, users=users)
        yield cluster
    finally:
        await cluster.close()


async def eventually(predicate: Callable[[], bool], within_s: float = 60.0) -> None:
    """Waits until ``predicate`` holds."""
    async with asyncio.timeout(within_s):
        while not predicate():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.02)
