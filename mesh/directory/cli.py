"""``keymesh network keygen | sign | show | publish``: the operator's side of the network document.

Owns the commands; the format is ``mesh.directory.document``. The private key is meant for a
machine that is offline; nothing here sends it anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.core.network import NetworkDocument
from mesh.core.network_parse import parse_document
from mesh.directory import document as files
from mesh.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Adds ``network`` to the command line; each command sets ``run(args) -> exit code``."""
    network = subparsers.add_parser("network", help="the signed network document")
    commands = network.add_subparsers(dest="network_command", required=True)

    keygen = commands.add_parser("keygen", help="make the operator's Ed25519 key pair (keep the key offline)")
    keygen.add_argument(
        "--out", type=Path, required=True, help="private key, PEM; the public one gets .pub.pem"
    )
    keygen.set_defaults(run=_keygen)

    sign = commands.add_parser("sign", help="check a document (YAML or JSON) and sign it")
    sign.add_argument("document", type=Path)
    sign.add_argument("--key", type=Path, required=True, help="operator's private key, PEM")
    sign.add_argument("--out", type=Path, required=True, help="signed document")
    sign.add_argument("--serial", type=int, help="instead of the document's own serial")
    sign.set_defaults(run=_sign)

    show = commands.add_parser("show", help="check a signed document and say what it holds")
    show.add_argument("document", type=Path)
    show.add_argument("--key", type=Path, help="operator's public key, PEM: check the signature")
    show.add_argument("--json", action="store_true", help="print the document itself")
    show.set_defaults(run=_show)

    publish = commands.add_parser("publish", help="put a signed document into the domain's etcd")
    publish.add_argument("document", type=Path)
    publish.add_argument("--endpoints", required=True, help="https://host:port[,https://host:port...]")
    publish.add_argument("--ca", type=Path, required=True, help="PEM")
    publish.add_argument("--cert", type=Path, help="PEM")
    publish.add_argument("--key", type=Path, help="PEM")
    publish.add_argument("--user", help="etcd user that may write the document")
    publish.add_argument("--password-file", type=Path)
    publish.set_defaults(run=_publish)


def make_operator_key(path: Path) -> Path:
    """Writes a new private key (mode 0600, never over an existing file) and its public key.

    Returns:
        The public key's path: the private one's with the suffix ``.pub.pem``.

    Raises:
        ConfigError: the file exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    public_path = path.with_suffix(".pub.pem")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(private)
        public_path.write_bytes(public)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists; an operator key is not overwritten") from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    return public_path


def sign_source(source: bytes, key: Ed25519PrivateKey, *, serial: int | None = None) -> bytes:
    """Checks what an operator wrote and signs it.

    Args:
        source: YAML or JSON text.
        key: the operator's.
        serial: replaces the document's own.

    Raises:
        ConfigError: DOCUMENT_INVALID, naming the field.
    """
    data = files.read_source(source)
    if isinstance(data, dict) and serial is not None:
        data = {**data, "serial": serial}
    parse_document(data)
    signed = files.sign(files.encode_body(data), key)
    if len(signed) > files.MAX_DOCUMENT_BYTES:
        raise ConfigError(f"network document: is longer than {files.MAX_DOCUMENT_BYTES} bytes when signed")
    return signed


def _keygen(args: argparse.Namespace) -> int:
    public = make_operator_key(args.out)
    key = files.load_public_key(_read(public))
    _say(
        f"private key {args.out} (keep it offline)\npublic key  {public}\nfingerprint {files.fingerprint(key)}"
    )
    return 0


def _sign(args: argparse.Namespace) -> int:
    key = files.load_private_key(_read(args.key))
    signed = sign_source(_read(args.document), key, serial=args.serial)
    document = files.decode_body(files.verify(signed, key.public_key()))
    try:
        args.out.write_bytes(signed)
    except OSError as error:
        raise ConfigError(f"cannot write {args.out}: {error.strerror}") from error
    _say(f"signed {args.out}: domain {document.domain_id}, serial {document.serial}")
    return 0


def _show(args: argparse.Namespace) -> int:
    data = _read(args.document)
    if args.key is not None:
        body = files.verify(data, files.load_public_key(_read(args.key)))
        state = "signature verified"
    elif files.is_signed(data):
        signed = files.split(data)
        body, state = signed.body, f"signed by {signed.signer}, NOT CHECKED: give --key"
    else:
        body, state = data, "not signed"
    document = files.decode_body(body) if args.key or files.is_signed(data) else _unsigned(body)
    if args.json:
        _say(json.dumps(files.read_source(body), indent=2, sort_keys=True))
    else:
        _say(_summary(document, state))
    return 0


def _publish(args: argparse.Namespace) -> int:
    serial = asyncio.run(_publish_to_etcd(args, _read(args.document)))
    _say(f"published serial {serial}")
    return 0


async def _publish_to_etcd(args: argparse.Namespace, data: bytes) -> int:
    # Here, because gRPC takes half a second to import and signing does not need it.
    from mesh.directory.etcd import EtcdClient, EtcdTls  # noqa: PLC0415
    from mesh.directory.etcd_directory import publish_document  # noqa: PLC0415

    cert, key = (None if path is None else _read(path) for path in (args.cert, args.key))
    password = None if args.password_file is None else _read(args.password_file).decode().strip()
    client = EtcdClient(
        args.endpoints.split(","),
        tls=EtcdTls(_read(args.ca), cert, key),
        username=args.user,
        password=password,
    )
    async with client:
        return await publish_document(client, data)


def _unsigned(body: bytes) -> NetworkDocument:
    return parse_document(files.read_source(body))


def _summary(document: NetworkDocument, state: str) -> str:
    lines = [
        f"domain {document.domain_id}, serial {document.serial}, {state}",
        f"nodes    {len(document.nodes)}, links {len(document.links)}, SAEs {len(document.saes)}",
        f"disjoint over {', '.join(document.failure_domains) or 'nodes only'}",
        f"default  {document.default_policy.grade}",
    ]
    for (a, b), policy in sorted(document.pair_policies.items()):
        hubs = f" over {', '.join(policy.hubs)}" if policy.hubs else ""
        lines.append(f"pair     {a} - {b}: {policy.grade}{hubs}")
    lines += [f"foreign  {p.prefix}* in {p.domain} through {p.border}" for p in document.foreign]
    lines += [
        f"node     {n.kme_id} ({n.role}) site {n.site or '-'} operator {n.operator or '-'}"
        for n in sorted(document.nodes.values(), key=lambda n: n.kme_id)
    ]
    lines += [
        f"sae      {s.sae_id} at {s.home}" for s in sorted(document.saes.values(), key=lambda s: s.sae_id)
    ]
    return "\n".join(lines)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
