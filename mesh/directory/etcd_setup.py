"""Preparing an etcd cluster for a domain: users, roles, authentication. For labs and operators.

Owns who may touch which keys in etcd. That is a fence against accidents and strangers, not
what keys depend on: whoever owns etcd can deny service at most (protocol 5.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mesh.directory.etcd import A, EtcdClient, Pick, Q, prefix_end
from mesh.directory.etcd_directory import domain_prefix
from mesh.directory.etcdpb import rpc_pb2 as pb
from mesh.errors import MeshError


@dataclass(frozen=True, slots=True)
class EtcdUser:
    """A user with a role of the same name: prefixes it may read and prefixes it may write."""

    name: str
    password: str = field(repr=False)
    read: Sequence[bytes] = ()
    write: Sequence[bytes] = ()


def operator_user(domain_id: str, name: str, password: str) -> EtcdUser:
    """May write everything of a domain, the document included."""
    return EtcdUser(name, password, read=(domain_prefix(domain_id),), write=(domain_prefix(domain_id),))


def node_user(domain_id: str, kme_id: str, password: str) -> EtcdUser:
    """Named after its KME: may read the domain and write that KME's own entries."""
    prefix = domain_prefix(domain_id)
    own = tuple(prefix + f"{kind}/{kme_id}".encode() for kind in ("nodes", "levels", "marks"))
    return EtcdUser(kme_id, password, read=(prefix,), write=own)


async def set_up_auth(client: EtcdClient, *, root_password: str, users: Iterable[EtcdUser]) -> None:
    """Makes root, the users and their roles, and turns authentication on; may be repeated.

    Args:
        client: without a user while authentication is off, as root once it is on.
        root_password: of the user root, who may do everything.
        users: to add. Passwords of users that exist stay as they are.

    Raises:
        MeshError: etcd is away or refuses.
    """
    root = EtcdUser("root", root_password)
    for user in (root, *users):
        await _add(client, user)
    await client.call(lambda e: e.auth.AuthEnable, pb.AuthEnableRequest())


async def _add(client: EtcdClient, user: EtcdUser) -> None:
    await _unless_there(client, lambda e: e.auth.RoleAdd, pb.AuthRoleAddRequest(name=user.name))
    for keys, kind in ((user.read, pb.Permission.READ), (user.write, pb.Permission.READWRITE)):
        for key in keys:
            end = prefix_end(key) if key.endswith(b"/") else b""
            permission = pb.Permission(permType=kind, key=key, range_end=end)
            grant = pb.AuthRoleGrantPermissionRequest(name=user.name, perm=permission)
            await client.call(lambda e: e.auth.RoleGrantPermission, grant)
    add = pb.AuthUserAddRequest(name=user.name, password=user.password)
    await _unless_there(client, lambda e: e.auth.UserAdd, add)
    join = pb.AuthUserGrantRoleRequest(user=user.name, role=user.name)
    await client.call(lambda e: e.auth.UserGrantRole, join)


async def _unless_there(client: EtcdClient, pick: Pick[Q, A], request: Q) -> None:
    try:
        await client.call(pick, request)
    except MeshError as error:
        if "already exists" not in str(error):
            raise
