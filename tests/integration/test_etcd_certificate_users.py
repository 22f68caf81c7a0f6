"""etcd users that come with a certificate and no password: what the Helm chart sets up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.directory.document import DocumentKeeper, encode_body, sign
from mesh.directory.etcd import EtcdClient, EtcdTls
from mesh.directory.etcd_directory import EtcdDirectory, document_key, domain_prefix
from mesh.directory.port import NodeRecord
from mesh.directory.tool import publish_file, set_up_users
from mesh.errors import ConfigError, MeshError
from mesh.pki.authority import CredentialFiles, Pki
from tests.etcd_fixture import DOMAIN, EtcdCluster, eventually, running_etcd

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def saved(etcd: EtcdCluster, name: str) -> CredentialFiles:
    return etcd.pki.etcd_client(name).save(etcd.root, f"client-{name}")


def tls_of(etcd: EtcdCluster, name: str) -> EtcdTls:
    files = saved(etcd, name)
    return EtcdTls(etcd.pki.roots["etcd"].pem, files.cert.read_bytes(), files.key.read_bytes())


def as_client(etcd: EtcdCluster, name: str) -> EtcdClient:
    return EtcdClient(etcd.endpoints, tls=tls_of(etcd, name), timeout_s=10.0, heartbeat_s=2.0)


async def set_up(etcd: EtcdCluster, *members: str) -> None:
    root = saved(etcd, "root")
    ca = etcd.root / "etcd-ca.pem"
    await asyncio.to_thread(
        set_up_users, DOMAIN, members, endpoints=etcd.endpoints, ca=ca, cert=root.cert, key=root.key
    )


async def test_members_need_their_certificate_only_and_write_their_own_entries_only(tmp_path: Path) -> None:
    document = {"format": "keymesh-network/1", "serial": 1, "domain": DOMAIN, "nodes": {"kme-a": {}}}
    signed = tmp_path / "document.signed"
    signed.write_bytes(sign(encode_body(document), KEY))
    async with running_etcd(tmp_path, auth=False) as etcd:
        await set_up(etcd, "kme-a")
        await set_up(etcd, "kme-a", "kme-b")  # again, with one more
        root, ca = saved(etcd, "root"), etcd.root / "etcd-ca.pem"
        for _ in range(2):
            serial = await asyncio.to_thread(
                publish_file, signed, endpoints=etcd.endpoints, ca=ca, cert=root.cert, key=root.key
            )
            assert serial == 1

        keeper = DocumentKeeper(DOMAIN, operator_key=KEY.public_key())
        directory = EtcdDirectory(as_client(etcd, "kme-a"), DOMAIN, keeper, lease_s=2)
        await directory.start()
        await directory.publish_node(NodeRecord("kme-a", "127.0.0.1:7001"))
        await eventually(lambda: directory.document is not None and "kme-a" in directory.peers())
        await directory.stop()

        right = tls_of(etcd, "kme-a")
        stranger = Pki.create("elsewhere").etcd_client("kme-a").save(tmp_path, "elsewhere")
        wrong = EtcdTls(right.ca, stranger.cert.read_bytes(), stranger.key.read_bytes())
        replaced: list[EtcdTls] = []  # a certificate that is refused, until its file is replaced
        async with EtcdClient(
            etcd.endpoints, tls=wrong, timeout_s=5.0, renew=lambda: replaced[0] if replaced else None
        ) as client:
            with pytest.raises(MeshError):
                await client.put(domain_prefix(DOMAIN) + b"nodes/kme-a", b"new")
            replaced.append(right)
            await client.put(domain_prefix(DOMAIN) + b"nodes/kme-a", b"new")

        for name in ("kme-b", "stranger"):
            async with as_client(etcd, name) as client:
                for key in (domain_prefix(DOMAIN) + b"nodes/kme-a", document_key(DOMAIN)):
                    with pytest.raises(MeshError):
                        await client.put(key, b"forged")


def test_names_are_checked_before_anything_is_asked(tmp_path: Path) -> None:
    nowhere = tmp_path / "none"
    with pytest.raises(ConfigError, match="--member"):
        set_up_users(DOMAIN, ["no/name"], endpoints=["localhost:1"], ca=nowhere, cert=nowhere, key=nowhere)
