"""The signed network document: file format, signature, and the serial that never falls.

Owns protocol 5.1: a document counts when the operator's offline Ed25519 key signed it (a
computational claim) and its serial is not below one already seen, or when the node's own
configuration pins it. Labs may trust the directory instead. What the document *says* is
``mesh.core.network``. Must not write to disk: saving is a callback into the store.

File format ``keymesh-signed-network/1``, text up to the empty line, then the document::

    keymesh-signed-network/1\\n
    signer: <first 16 hex digits of SHA-256 over the raw public key>\\n
    signature: <base64 of 64 bytes>\\n
    \\n
    <document: JSON as in mesh.core.network_parse; every byte to the end of the file>

The signature covers ``CONTEXT`` and the document's bytes as they stand, so nothing is ever
re-encoded before it is checked, and nothing is parsed before either. ``signer`` only helps
to say which key was used; it decides nothing.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import yaml
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mesh.core.network import NetworkDocument
from mesh.core.network_parse import parse_document
from mesh.directory.listeners import Listeners
from mesh.errors import ConfigError, ErrorReason, IntegrityError, MeshError
from mesh.ops.yamltext import decode_yaml

MAX_DOCUMENT_BYTES = 1024 * 1024
"""Signed form included: fits a directory entry (etcd takes 1.5 MiB) and a frame between peers."""
MAGIC = b"keymesh-signed-network/1\n"
CONTEXT = b"keymesh network document 1\x00"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SignedDocument:
    """The parts of a signed file, not yet checked."""

    signer: str
    signature: bytes
    body: bytes


def fingerprint(key: Ed25519PublicKey) -> str:
    """Names a public key in 16 hex digits."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


def sign(body: bytes, key: Ed25519PrivateKey) -> bytes:
    """The signed file for a document's bytes."""
    signature = base64.b64encode(key.sign(CONTEXT + body))
    signer = fingerprint(key.public_key()).encode()
    return MAGIC + b"signer: " + signer + b"\nsignature: " + signature + b"\n\n" + body


def is_signed(data: bytes) -> bool:
    """Whether the bytes claim to be a signed file."""
    return data.startswith(MAGIC)


def split(data: bytes) -> SignedDocument:
    """Takes a signed file apart; checks its form only.

    Raises:
        ConfigError: DOCUMENT_INVALID.
    """
    head, separator, body = data.removeprefix(MAGIC).partition(b"\n\n")
    lines = head.split(b"\n")
    if not is_signed(data) or not separator or len(lines) != 2:
        raise _invalid("is not a keymesh-signed-network/1 file: sign it with 'keymesh network sign'")
    signer, signature = lines
    if not signer.startswith(b"signer: ") or not signature.startswith(b"signature: "):
        raise _invalid("has no signer and signature lines")
    try:
        raw = base64.b64decode(signature.removeprefix(b"signature: "), validate=True)
        name = signer.removeprefix(b"signer: ").decode("ascii")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise _invalid("has a signature that is not base64") from error
    return SignedDocument(name, raw, body)


def verify(data: bytes, key: Ed25519PublicKey) -> bytes:
    """The document's bytes, once the operator's signature over them verified.

    Raises:
        ConfigError: not a signed file.
        IntegrityError: DOCUMENT_INVALID, signed by another key or altered.
    """
    signed = split(data)
    try:
        key.verify(signed.signature, CONTEXT + signed.body)
    except InvalidSignature as error:
        raise IntegrityError(
            "network document: the signature is not the operator's",
            reason=ErrorReason.DOCUMENT_INVALID,
            facts={"signer": signed.signer[:16], "operator": fingerprint(key)},
        ) from error
    return signed.body


def decode_body(body: bytes) -> NetworkDocument:
    """Parses and checks a document's JSON.

    Raises:
        ConfigError: DOCUMENT_INVALID, naming the field.
    """
    try:
        data = json.loads(body, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"is not valid JSON: {str(error)[:120]}") from error
    return parse_document(data)


def encode_body(data: object) -> bytes:
    """JSON with sorted keys and one entry a line, as 'network sign' writes it."""
    return json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"


def read_source(data: bytes) -> object:
    """Decodes what an operator wrote: YAML (JSON is YAML), without aliases and repeated keys.

    Raises:
        ConfigError: DOCUMENT_INVALID, with line and column.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise _invalid(f"is longer than {MAX_DOCUMENT_BYTES} bytes")
    try:
        return decode_yaml(data, loader=_StrictLoader)
    except ConfigError as error:
        raise _invalid(f"is {error}") from error


def load_private_key(data: bytes) -> Ed25519PrivateKey:
    """Reads the operator's offline key from PEM (PKCS 8, not encrypted).

    Raises:
        ConfigError: not an Ed25519 key.
    """
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            "operator key: not an unencrypted PEM private key; make one with 'keymesh network keygen'"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError("operator key: must be Ed25519; make one with 'keymesh network keygen'")
    return key


def load_public_key(data: bytes) -> Ed25519PublicKey:
    """Reads the operator's public key from PEM.

    Raises:
        ConfigError: not an Ed25519 public key.
    """
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            "operator_public_key: not a PEM public key (the private one stays offline)"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError("operator_public_key: must be Ed25519")
    return key


class Verdict(StrEnum):
    """What became of an offered document."""

    ADOPTED = "adopted"
    KNOWN = "known"
    OLDER = "older"
    REFUSED = "refused"


Save = Callable[[int, bytes], Awaitable[None]]
"""Makes (serial, signed bytes) durable; returns once they are."""


class DocumentKeeper:
    """Holds the newest valid document of a node; its serial never falls, also across restarts.

    Args:
        domain_id: documents of other domains are refused.
        operator_key: None refuses every offer but a pinned one, unless the directory is trusted.
        trust_directory: labs only: signatures are not asked for. Show it in the status.
        save: called, and awaited, before a document is used; None keeps it in memory.
        refused: told about every refused document, for the alarm: (origin, error).
    """

    def __init__(
        self,
        domain_id: str,
        *,
        operator_key: Ed25519PublicKey | None = None,
        trust_directory: bool = False,
        save: Save | None = None,
        refused: Callable[[str, MeshError], None] | None = None,
    ) -> None:
        self.trusts_directory = trust_directory
        self._domain_id = domain_id
        self._operator_key = operator_key
        self._save = save
        self._refused = refused
        self._document: NetworkDocument | None = None
        self._data = b""
        self._floor = 0
        self._changing = asyncio.Lock()
        self._listeners = Listeners()

    @property
    def document(self) -> NetworkDocument | None:
        """The document in use, None before the first."""
        return self._document

    def serial(self) -> int:
        """Its serial, for hellos; 0 before the first."""
        return 0 if self._document is None else self._document.serial

    def data(self) -> bytes:
        """The bytes as they came, for a peer with a lower serial; empty before the first."""
        return self._data

    def subscribe(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Calls ``changed`` after each adoption; returns a function that ends it."""
        return self._listeners.add(changed)

    def restore(self, data: bytes, *, serial: int) -> None:
        """Takes up what ``save`` stored before the restart; call it first.

        The serial stays a floor even when the stored document no longer loads (new key). Without
        an operator's key only a pinned document can have been stored, which needs no signature.

        Raises:
            MeshError: the stored document is not valid under the present configuration.
        """
        self._floor = max(self._floor, serial)
        self._adopt(self._parsed(_body(data)) if self._operator_key is None else self._checked(data), data)

    async def pin(self, data: bytes) -> Verdict:
        """Takes a document from the node's own configuration; no signature is asked for.

        Raises:
            MeshError: it is malformed or for another domain: a configuration error.
        """
        return await self._take(self._parsed(_body(data)), data, "configuration")

    async def offer(self, data: bytes, origin: str = "directory") -> Verdict:
        """Considers a document from the directory or a peer; never raises for a bad one.

        Args:
            data: the bytes as received.
            origin: who offered it, for the log and the alarm.
        """
        if data == self._data:
            return Verdict.KNOWN
        try:
            document = self._checked(data)
        except MeshError as error:
            return self._refuse(origin, error)
        return await self._take(document, data, origin)

    async def _take(self, document: NetworkDocument, data: bytes, origin: str) -> Verdict:
        async with self._changing:
            floor = max(self._floor, self.serial())
            if document.serial < floor:
                facts = {"serial": document.serial, "held": floor, "origin": origin}
                error = IntegrityError("network document: the serial fell", reason=_REASON, facts=facts)
                self._refuse(origin, error)
                return Verdict.OLDER
            if self._document is not None and document.serial == self._document.serial:
                if document == self._document:
                    return Verdict.KNOWN
                facts = {"serial": document.serial, "origin": origin}
                text = "network document: another document with the same serial; sign it with a higher one"
                return self._refuse(origin, IntegrityError(text, reason=_REASON, facts=facts))
            if self._save is not None:
                await self._save(document.serial, data)
            self._adopt(document, data)
        _log.info("network document adopted", extra={"serial": document.serial, "origin": origin})
        self._listeners.tell()
        return Verdict.ADOPTED

    def _adopt(self, document: NetworkDocument, data: bytes) -> None:
        self._document, self._data = document, data
        self._floor = max(self._floor, document.serial)

    def _checked(self, data: bytes) -> NetworkDocument:
        if len(data) > MAX_DOCUMENT_BYTES:
            raise _invalid(f"is longer than {MAX_DOCUMENT_BYTES} bytes")
        if self.trusts_directory:
            return self._parsed(_body(data))
        if self._operator_key is None:
            raise _invalid("cannot be checked: network.operator_public_key is not configured")
        return self._parsed(verify(data, self._operator_key))

    def _parsed(self, body: bytes) -> NetworkDocument:
        document = decode_body(body)
        if document.domain_id != self._domain_id:
            raise _invalid(f"is for the domain {document.domain_id}, this node is in {self._domain_id}")
        return document

    def _refuse(self, origin: str, error: MeshError) -> Verdict:
        _log.warning("network document refused", extra={"origin": origin, "error": str(error)})
        if self._refused is not None:
            self._refused(origin, error)
        return Verdict.REFUSED


def _body(data: bytes) -> bytes:
    """The document's bytes, signed or not, unchecked."""
    return split(data).body if is_signed(data) else data


_REASON = ErrorReason.DOCUMENT_INVALID


def _invalid(problem: str) -> ConfigError:
    return ConfigError(f"network document: {problem}", reason=_REASON)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object repeats a key")
    return result


def _no_constants(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


class _StrictLoader(yaml.SafeLoader):
    """YAML without aliases (no bombs) and without repeated keys (no silent overrides)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            raise yaml.YAMLError(f"a mapping repeats a key{node.start_mark}")
        return mapping
