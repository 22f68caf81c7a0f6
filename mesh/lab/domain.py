"""A lab domain's operator: signs the network document and sets up etcd with its users."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from mesh.directory.document import encode_body, load_private_key
from mesh.directory.etcd import EtcdClient, EtcdTls
from mesh.directory.etcd_directory import publish_document
from mesh.directory.etcd_setup import node_user, set_up_auth
from mesh.directory.tool import generate_key, sign_source
from mesh.errors import ErrorReason, UnavailableError
from mesh.lab.plan import DomainPlan
from mesh.lab.processes import Process
from mesh.pki.authority import write_file

_POLL_S = 0.1


def prepare_domain(plan: DomainPlan) -> None:
    """Make the operator's key, the signed network document, and the passwords of etcd's users."""
    folder = plan.folder.network
    private = folder / "operator.pem"
    generate_key(private, folder / "operator.pub.pem")
    signed = sign_source(encode_body(plan.network.document_source()), load_private_key(private.read_bytes()))
    write_file(folder / "document.signed", signed, mode=0o644)
    for user in ("root", *plan.network.members):
        write_file(plan.folder.password_file(user), secrets.token_urlsafe(24).encode(), mode=0o600)


async def prepare_etcd(plan: DomainPlan, processes: Sequence[Process], *, deadline_s: float) -> None:
    """Wait for etcd, turn authentication on, publish the document.

    Args:
        plan: the domain, its etcd members started.
        processes: etcd's, which must keep running.
        deadline_s: on the monotonic clock.

    Raises:
        MeshError: etcd did not come up in time, or refuses.
    """
    try:
        async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
            await _prepare_etcd(plan, processes, deadline_s)
    except TimeoutError as error:
        raise UnavailableError(
            "etcd did not take its users and the network document in time",
            reason=ErrorReason.DEADLINE_EXCEEDED,
        ) from error


async def _prepare_etcd(plan: DomainPlan, processes: Sequence[Process], deadline_s: float) -> None:
    etcd = plan.etcd
    tls, passwords, document = _secrets(plan)
    async with EtcdClient(etcd["endpoints"], tls=tls) as client:
        await _wait_for_members(processes, client, deadline_s)
        domain = plan.network.domain
        users = [node_user(domain, kme_id, passwords[kme_id]) for kme_id in plan.network.members]
        await set_up_auth(client, root_password=passwords["root"], users=users)
    as_root = EtcdClient(etcd["endpoints"], tls=tls, username="root", password=passwords["root"])
    async with as_root as client:
        await publish_document(client, document)


def _secrets(plan: DomainPlan) -> tuple[EtcdTls, dict[str, str], bytes]:
    """Root's certificate at etcd, all users' passwords, the signed document."""
    etcd = plan.etcd
    tls = EtcdTls(*(Path(etcd[name]).read_bytes() for name in ("ca", "cert", "key")))
    passwords = {
        user: plan.folder.password_file(user).read_text(encoding="ascii")
        for user in ("root", *plan.network.members)
    }
    return tls, passwords, (plan.folder.network / "document.signed").read_bytes()


async def _wait_for_members(processes: Sequence[Process], client: EtcdClient, deadline_s: float) -> None:
    while True:
        for process in processes:
            process.check_running()
        try:
            # Linearizable: answered only once the cluster has a leader.
            await client.get(b"/")
        except UnavailableError:
            if time.monotonic() > deadline_s:
                raise
            await asyncio.sleep(_POLL_S)
        else:
            return
