"""Every parser that reads bytes from outside, and what it may raise.

Owns the list that ``tests/property/test_parsers_never_leak.py`` (Hypothesis, part of every test
run) and ``python -m tests.fuzz`` (atheris, as long as you like) both work through. A target's
``run`` raises nothing but what ``raises`` names; where a format has one encoding per value, it
also checks that what was read encodes to what was given.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gateway.etsi014 import schema
from gateway.etsi014.routes import METHODS, decode_sae_segment, split_target
from gateway.exchange import HttpRefusal
from gateway.identity import TableFile, read_certificate
from gateway.settings import read_settings
from mesh.core import blocks, frame, keyid, mac
from mesh.core.blocks import Block
from mesh.core.frame import FrameKind
from mesh.core.identity import parse_identity
from mesh.core.network import Grade, GradeKind
from mesh.core.network_parse import parse_document
from mesh.core.policy import AccessTable
from mesh.core.psrd import LaneSpan, PsrdHeader
from mesh.core.sealed import decode_attachment, encode_attachment
from mesh.core.secret import Buffer
from mesh.core.transfer import ConfirmMessage, SlotKind, TransferHeader, TransferId
from mesh.directory.document import MAGIC, decode_body, encode_body, read_source, sign, split, verify
from mesh.directory.etcd_directory import _entry
from mesh.directory.port import LinkLevel, MarksCopy, NodeLevels, NodeRecord
from mesh.directory.static import parse_static
from mesh.errors import MeshError
from mesh.lab.configcheck import check_file
from mesh.node.ingest import encode_offer, parse_offer
from mesh.node.transport import unwrap, wrap_frame
from mesh.ops.denylist import DenyList
from mesh.ops.diagnosis import Expectation, diagnose
from mesh.pki.authority import Pki
from mesh.rpc.identity import PeerReader
from mesh.sources.etsi014_device import Etsi014Device
from mesh.sources.psrd_file import CourierReader, CourierWriter
from mesh.store.files import OsFiles
from mesh.store.proof import ProofCopy
from mesh.v1 import link_pb2

_DOCUMENT: dict[str, Any] = {
    "format": "keymesh-network/1",
    "serial": 7,
    "domain": "toronto",
    "nodes": {"kme-a": {"site": "n"}, "kme-b": {"operator": "o"}, "hub-1": {"role": "hub"}},
    "links": [{"between": ["kme-a", "kme-b"], "cost": 1.5}, {"between": ["kme-a", "hub-1"]}],
    "saes": {"sae-a": {"home": "kme-a"}, "sae-b": {"home": "kme-b", "previous": []}},
    "foreign": [{"prefix": "uk-", "border": "kme-b", "domain": "cambridge"}],
    "grades": {"default": {"grade": "trusted-relay"}, "pairs": []},
}
_KEY_ID = UUID("00000000-0001-800f-abee-b2a6783f6e08")
_SECRET = b"neither logs nor messages show me"


@dataclass(frozen=True, slots=True)
class Target:
    """One parser.

    Attributes:
        name: for the command line and for test ids.
        run: parses bytes.
        seeds: inputs that are accepted; fuzzing starts from them.
        raises: what ``run`` may raise.
    """

    name: str
    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    raises: tuple[type[Exception], ...] = (MeshError,)

    def try_one(self, data: bytes) -> None:
        """Run; what the target documents is fine, anything else passes through."""
        with contextlib.suppress(*self.raises):
            self.run(data)


# -- links ------------------------------------------------------------------------------------


def _frame(data: bytes) -> None:
    parsed = frame.parse(data)
    frame.open_frame(parsed, pad=bytes(len(parsed.span)), root=bytes(32), greetings=(b"a", b"b"))


def _sealed_frame() -> bytes:
    meta = link_pb2.FrameMeta(receive_position=64).SerializeToString()
    parts = frame.seal(
        FrameKind.DATA, 1, 64, pad=bytes(52), root=bytes(32), raw_bytes=8, plaintext=bytes(12), meta=meta
    )
    return b"".join(bytes(part) for part in parts)


def _block_offer(data: bytes) -> None:
    block, tag = parse_offer(data)
    key = bytes(block.length_bytes + blocks.TAG_KEYS_BYTES)
    with contextlib.suppress(MeshError):
        blocks.verify_offer(block, key, tag)


def _offer() -> bytes:
    return encode_offer(Block(bytes(16), True, 1, 0, 1024, ("a" * 36, "b" * 36)), bytes(16))


# -- keys -------------------------------------------------------------------------------------


def _transfer_header(data: bytes) -> None:
    assert TransferHeader.decode(data).encode() == data


def _header() -> bytes:
    routes = (("kme-a", "hub-1", "kme-b"), ("kme-a", "hub-2", "kme-b"))
    grade = Grade(GradeKind.DSKE, 2, 2)
    transfer = TransferId("kme-a", "kme-b", 3, 4096)
    return TransferHeader(transfer, 2, SlotKind.KEYS, grade, routes, 1_767_225_600, b"attached").encode()


def _confirm(data: bytes) -> None:
    assert ConfirmMessage.decode(data).encode() == data


def _key_id(data: bytes) -> None:
    address = keyid.parse(data)
    assert address is None or (len(data) == 16 and 1 <= address.size_bytes <= 8192)
    keyid.matches(data, "sae-a", "sae-b", bytes(16))


# -- REST -------------------------------------------------------------------------------------


def _text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    """The HTTP layer hands queries over as Latin-1 text."""
    return lambda data: parse(data.decode("latin-1"))


def _key_request(data: bytes) -> None:
    request = schema.decode_key_request(data, master="sae-a", slave="sae-b", refuse_empty_list=True)
    assert 1 <= request.number <= schema.MAX_WIRE_INTEGER


class _Played(Etsi014Device):
    """A device whose answers are what the fuzzer says."""

    answer = (200, b"")

    async def _exchange(self, verb: str, method: str, body: object) -> tuple[int, bytes]:
        return self.answer


def _path(data: bytes) -> None:
    method, segment, _ = split_target(data.decode("latin-1"))
    assert method in METHODS
    decode_sae_segment(segment)


@lru_cache(maxsize=1)
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _device_answer(data: bytes) -> None:
    async def ask() -> None:
        device = _Played("https://device", peer_sae_id="kme-b", tls=_context())
        device.answer = ((200, 200, 400, 503)[data[0] % 4] if data else 200, data[1:])
        for call in (device.level_bytes(), device.fetch([str(_KEY_ID)]), device.take(64)):
            try:
                await call
            except MeshError as error:
                assert _SECRET.decode() not in str(error)
                device._retry_at_s = 0.0

    asyncio.run(ask())


# -- the operator's files ----------------------------------------------------------------------


def _file(read: Callable[[Path], object], name: str = "input") -> Callable[[bytes], object]:
    """A parser of files, on a file of its own."""

    def run(data: bytes) -> object:
        path = Path(_folder().name) / name
        path.write_bytes(data)
        return read(path)

    return run


@lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="keymesh-fuzz-")


@lru_cache(maxsize=1)
def _operator() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def _signed_document(data: bytes) -> None:
    split(data)
    decode_body(verify(data, _operator().public_key()))


def _directory_entry(data: bytes) -> None:
    _entry({}, "kme-a", data, NodeRecord)
    _entry({}, "kme-a", data, NodeLevels)
    _entry({}, "kme-a", data, MarksCopy)


def _proof_copy(data: bytes) -> None:
    folder = Path(_folder().name)
    copy = ProofCopy(folder, OsFiles(), folder)
    copy.path = folder / "proof"
    copy.path.write_bytes(data)
    assert not copy.proves(bytes(16), {"lane/kme-b/out": (0, 1)})


# -- certificates ------------------------------------------------------------------------------


def _certificate(data: bytes) -> None:
    facts = read_certificate(data)
    assert len(facts.fingerprint) == 32


def _certificate_file(path: Path) -> None:
    """The fuzzer changes the DER form; base64 around it would hide nearly every change."""
    der = base64.encodebytes(path.read_bytes())
    path.write_bytes(b"-----BEGIN CERTIFICATE-----\n" + der + b"-----END CERTIFICATE-----\n")
    for finding in diagnose(path, key=path, ca=path, expected=Expectation(is_server=True)).findings:
        assert finding.words
    reader = PeerReader("toronto", DenyList(None))
    reader.read({"x509_pem_cert": [path.read_bytes()]}, 0.0)


@lru_cache(maxsize=1)
def _issued() -> bytes:
    credential = Pki.create("toronto").node("kme-a", hosts=["localhost"])
    return base64.b64decode(credential.cert_pem.split(b"-----")[2])


# -- couriers ----------------------------------------------------------------------------------


class _Memory:
    """A file in memory."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def pwrite(self, data: Buffer, offset: int) -> None:
        self.data[offset : offset + len(data)] = data

    def sync(self) -> None:
        return

    def size(self) -> int:
        return len(self.data)


def _courier(data: bytes) -> None:
    reader = CourierReader(_Memory(data))
    left = reader.header.total_bytes
    while left:
        left -= len(reader.read(min(left, 1 << 16)))
    reader.finish()


def _psrd_header(data: bytes) -> None:
    assert PsrdHeader.decode(data).encode() == data


def _table() -> PsrdHeader:
    spans = LaneSpan(0, 0, 0, 4096), LaneSpan(1, 4096, 8192, 4096)
    return PsrdHeader(bytes(16), "toronto", "hub-1", "kme-a", *spans, 1_767_225_600)


def _courier_file() -> bytes:
    file = _Memory()
    writer = CourierWriter(file, _table(), bytes(range(32)))
    writer.write(bytes(8192))
    writer.finish()
    return bytes(file.data)


# -- all of them -------------------------------------------------------------------------------

_NODE_CONFIG = b"""\
kme_id: kme-a
domain_id: toronto
data_dir: data
listen: {grpc: "127.0.0.1:7001", http: "127.0.0.1:7002"}
tls: {ca: ca.pem, cert: c.pem, key: k.pem}
directory: {static: directory.yaml}
network: {trust_directory: true}
links: [{peer: kme-b, device: {url: "https://d:443", ca: ca, cert: c, key: k, sae_id: kme-b}}]
"""
_GATEWAY_CONFIG = b"""\
gateway_id: gw-a
domain_id: toronto
listen: {https: "0.0.0.0:8443", http: "127.0.0.1:9000"}
node: {address: "127.0.0.1:7001", kme_id: kme-a}
node_tls: {ca: a, cert: b, key: c}
tls: {ca: a, cert: b, key: c, min_version: "1.3"}
audit_log: audit.jsonl
sae_mapping: {sources: [cn], table: [{sae_id: s, serial: 17}]}
"""
_LAB_NETWORK = b"""\
name: small
domain: lab
nodes:
  - {id: kme-a, gateways: [{id: gw-a, saes: [app-1, app-2]}]}
  - {id: kme-b, gateways: [{id: gw-b, saes: [app-3]}]}
links: [{between: [kme-a, kme-b], rate_bps: 352000}]
"""
_MAPPING = b"version: 1\nentries: [{sae_id: sae-a, subject: 'CN=enc-a,O=X', issuer: 'CN=root'}]\n"
_ACCESS = b"rules: [{saes: [a, 'b-*'], peers: ['*'], rate: {bytes_per_s: 1.5}, max_keys_per_request: 4}]\n"
_STATIC = b"format: keymesh-directory/1\nnodes: {kme-a: '127.0.0.1:7001'}\ndocument: document.signed\n"
_DENIED = b"# stolen\n00:ab:12\n" + b"f" * 64 + b"\n"
_CONTAINER = json.dumps(
    {"keys": [{"key_ID": str(_KEY_ID), "key": base64.b64encode(_SECRET).decode()}]}
).encode()
_STATUS = (
    b'{"key_size":256,"stored_key_count":9,"max_key_per_request":8,"max_key_size":1024,"min_key_size":64}'
)
_PROOF = b'{"version":1,"incarnation":"' + b"ab" * 16 + b'","marks":{"lane/kme-b/out":[0,64]}}'


@lru_cache(maxsize=1)
def targets() -> tuple[Target, ...]:
    """All targets; built on first use, because seeds are signed and issued."""
    body = encode_body(_DOCUMENT)
    der = _issued()
    pair = TransferId("kme-a", "kme-b", 3, 4096)
    confirm = ConfirmMessage(pair, 2, bytes(16), bytes(16), bytes(16), True).encode()
    public = (
        _operator()
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    records = (
        NodeRecord("kme-a", "127.0.0.1:7001"),
        NodeLevels("kme-a", {"kme-b": LinkLevel(65536, 131072, is_up=True)}, {"kme-b": 4096}),
        MarksCopy("ab" * 16, {"lane/kme-b/out/0": 64}),
    )
    query = b"number=3&size=256"
    key_ids = json.dumps({"key_IDs": [{"key_ID": str(_KEY_ID), "key_ID_extension": {}}]}).encode()
    requests = (
        b'{"number":3,"size":1024,"additional_slave_SAE_IDs":["sae-c"]}',
        b'{"extension_mandatory":[{"a":1}],"extension_optional":[{"b":null}]}',
    )
    return (
        Target("frame", _frame, (_sealed_frame(),)),
        Target("link-message", unwrap, (wrap_frame([_sealed_frame()]), _greeting(), _clear_offer())),
        Target("block-offer", _block_offer, (_offer(),)),
        Target("transfer-header", _transfer_header, (_header(),)),
        Target("confirm", _confirm, (confirm,)),
        Target("attachment", decode_attachment, (encode_attachment(bytes(16), 1, 1, b"body"),)),
        Target("key-id", _key_id, (_KEY_ID.bytes,), ()),
        Target("etsi014-key-request", _key_request, requests),
        Target("etsi014-key-ids", schema.decode_key_ids, (key_ids,)),
        Target("etsi014-key-request-query", _text(schema.decode_key_request_query), (query,)),
        Target("etsi014-key-ids-query", _text(schema.decode_key_ids_query), (f"key_ID={_KEY_ID}".encode(),)),
        Target("etsi014-path", _path, (b"/api/v1/keys/sae%2Db/status?x=1",), (MeshError, HttpRefusal)),
        Target("device-answer", _device_answer, (b"\x00" + _CONTAINER, b"\x00" + _STATUS, b"\x02{}")),
        Target("network-document", decode_body, (body,)),
        Target("network-document-yaml", lambda data: parse_document(read_source(data)), (body,)),
        Target("signed-document", _signed_document, (sign(body, _operator()), MAGIC + public)),
        Target("directory-entry", _directory_entry, tuple(map(msgspec.json.encode, records)), ()),
        Target("directory-file", parse_static, (_STATIC,)),
        Target("access-table", lambda data: AccessTable.parse(read_source(data)), (_ACCESS,)),
        Target("configuration", _file(check_file), (_NODE_CONFIG, _GATEWAY_CONFIG, _LAB_NETWORK)),
        Target("mapping-table", _file(lambda path: read_settings(path, TableFile)), (_MAPPING,)),
        Target("deny-list", _file(DenyList), (_DENIED,)),
        Target("proof-copy", _proof_copy, (_PROOF,), ()),
        Target("identity", _text(parse_identity), (b"keymesh://toronto/node/kme-a",)),
        Target("certificate", _certificate, (der,)),
        Target("certificate-file", _file(_certificate_file, "cert.pem"), (der,)),
        Target("courier-header", _psrd_header, (_table().encode(),)),
        Target("courier-file", _courier, (_courier_file(),)),
        Target("one-time-tag", _tagged, (struct.pack(">16s", b"") + b"message",)),
    )


def _tagged(data: bytes) -> None:
    mac.verify_one_time_tag(bytes(32), data[:16], data[16:])


def _greeting() -> bytes:
    greeting = link_pb2.Greeting(version_min=1, version_max=1, domain_id="toronto", kme_id="kme-a")
    return link_pb2.LinkMessage(greeting=greeting).SerializeToString()


def _clear_offer() -> bytes:
    return link_pb2.LinkMessage(offer=_offer()).SerializeToString()
