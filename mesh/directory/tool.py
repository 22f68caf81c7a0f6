"""The operator's side of the network document: make a key, sign, show, publish, list SAEs; etcd's users.

What ``keymesh network`` and ``keymesh sae`` call. The private key is meant for a machine
that is offline; nothing here sends it anywhere, and it is never written over.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.core.names import check_domain_id, check_kme_id
from mesh.core.network import NetworkDocument
from mesh.core.network_parse import parse_document
from mesh.directory import document as files
from mesh.errors import CallerError, ConfigError


def generate_key(private_path: Path, public_path: Path) -> None:
    """Writes a new Ed25519 key pair as PEM, the private key with mode 0600.

    Raises:
        ConfigError: a file exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for path, data, mode in ((private_path, private, 0o600), (public_path, public, 0o644)):
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
        except FileExistsError as error:
            raise ConfigError(f"{path} exists; an operator key is not overwritten") from error
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def sign_source(source: bytes, key: Ed25519PrivateKey) -> bytes:
    """Checks what an operator wrote (YAML or JSON) and signs it.

    Raises:
        ConfigError: DOCUMENT_INVALID, naming the field.
    """
    data = files.read_source(source)
    parse_document(data)
    signed = files.sign(files.encode_body(data), key)
    if len(signed) > files.MAX_DOCUMENT_BYTES:
        raise ConfigError(f"network document: is longer than {files.MAX_DOCUMENT_BYTES} bytes when signed")
    return signed


def sign_file(source: Path, key: Path, out: Path) -> str:
    """Signs a document's source with the operator's private key; returns what to tell them."""
    private = files.load_private_key(_read(key))
    signed = sign_source(_read(source), private)
    document = files.decode_body(files.verify(signed, private.public_key()))
    try:
        out.write_bytes(signed)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from error
    return f"{out}: domain {document.domain_id}, serial {document.serial}, signed"


def show_file(path: Path, public: Path | None) -> str:
    """What a document holds, and whether its signature holds.

    Args:
        path: signed or not.
        public: the operator's public key; without it no signature is checked, and that is said.

    Raises:
        ConfigError: malformed.
        IntegrityError: ``public`` is given and did not sign it.
    """
    data = _read(path)
    if public is not None:
        key = files.load_public_key(_read(public))
        body, state = files.verify(data, key), f"signature verified ({files.fingerprint(key)})"
    elif files.is_signed(data):
        signed = files.split(data)
        body, state = signed.body, f"signed by {signed.signer[:16]}, NOT CHECKED: give the public key"
    else:
        body, state = data, "NOT SIGNED"
    return _summary(parse_document(files.read_source(body)), state)


def list_saes(path: Path) -> str:
    """One line per SAE: its id and home, sorted; the signature is not looked at."""
    document = _document(_read(path))
    width = max((len(sae_id) for sae_id in document.saes), default=0)
    return "\n".join(f"{sae_id:{width}}  {entry.home}" for sae_id, entry in sorted(document.saes.items()))


def publish_file(
    path: Path,
    *,
    endpoints: Sequence[str],
    ca: Path,
    cert: Path | None = None,
    key: Path | None = None,
    username: str | None = None,
    password_file: Path | None = None,
) -> int:
    """Puts a signed document into its domain's etcd; returns its serial.

    Raises:
        ConfigError: malformed, a serial that is not higher, or a user who may not.
        UnavailableError: etcd is away.
    """
    # Here, because gRPC is slow to import and signing does not need it.
    from mesh.directory.etcd import EtcdClient, EtcdTls  # noqa: PLC0415
    from mesh.directory.etcd_directory import publish_document  # noqa: PLC0415

    data = _read(path)
    own_cert, own_key = (None if file is None else _read(file) for file in (cert, key))
    tls = EtcdTls(_read(ca), own_cert, own_key)
    password = None if password_file is None else _read(password_file).decode().strip()

    async def publish() -> int:
        async with EtcdClient(endpoints, tls=tls, username=username, password=password) as client:
            return await publish_document(client, data)

    return asyncio.run(publish())


def set_up_users(
    domain: str, members: Sequence[str], *, endpoints: Sequence[str], ca: Path, cert: Path, key: Path
) -> None:
    """Gives each member an etcd user that may write its own entries, and turns authentication on.

    Nobody learns the users' passwords: everyone comes with a client certificate whose CN is the
    user, the caller with CN ``root``. May be repeated; users that exist keep what they have.

    Args:
        domain: whose entries.
        members: KME ids of nodes and hubs.
        endpoints: ``host:port`` of etcd's members.
        ca, cert, key: PEM files.

    Raises:
        ConfigError: a name or a file is unusable.
        MeshError: etcd is away or refuses.
    """
    # Here, because gRPC is slow to import and signing does not need it.
    from mesh.directory.etcd import EtcdClient, EtcdTls  # noqa: PLC0415
    from mesh.directory.etcd_setup import node_user, set_up_auth  # noqa: PLC0415

    try:
        check_domain_id(domain, "--domain")
        for kme_id in members:
            check_kme_id(kme_id, "--member")
    except CallerError as error:
        raise ConfigError(error.message, facts=error.facts) from error
    tls = EtcdTls(_read(ca), _read(cert), _read(key))
    users = [node_user(domain, kme_id, secrets.token_urlsafe(32)) for kme_id in members]

    async def set_up() -> None:
        async with EtcdClient(endpoints, tls=tls) as client:
            await set_up_auth(client, root_password=secrets.token_urlsafe(32), users=users)

    asyncio.run(set_up())


def _document(data: bytes) -> NetworkDocument:
    body = files.split(data).body if files.is_signed(data) else data
    return parse_document(files.read_source(body))


def _summary(document: NetworkDocument, state: str) -> str:
    lines = [
        f"domain {document.domain_id}, serial {document.serial}, {state}",
        f"nodes    {len(document.nodes)}, links {len(document.links)}, SAEs {len(document.saes)}",
        f"disjoint over nodes{''.join(f', {kind}s' for kind in document.failure_domains)}",
        f"default  {document.default_policy.grade}",
    ]
    for (a, b), policy in sorted(document.pair_policies.items()):
        hubs = f" over {', '.join(policy.hubs)}" if policy.hubs else ""
        lines.append(f"pair     {a} - {b}: {policy.grade}{hubs}")
    for prefix in document.foreign:
        lines.append(f"foreign  {prefix.prefix}* in {prefix.domain} through {prefix.border}")
    for kme_id, node in sorted(document.nodes.items()):
        lines.append(f"{node.role:8} {kme_id} (site {node.site or '-'}, operator {node.operator or '-'})")
    for link in document.links:
        lines.append(f"link     {link.a} - {link.b}")
    return "\n".join(lines)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
