"""The data formats of ETSI GS QKD 020 V1.1.1, decoded strictly and encoded compactly.

Every limit of the schema is checked here; members that it does not name are ignored, as JSON Schema does,
and known ones may come once only. ``key_id_container`` is an array of objects, as the prose says (the
published schema's ``properties`` stand on the array). Values that a peer sent are never repeated in a
message: a misplaced member may hold key bytes.
"""

from __future__ import annotations

import json
import re
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, NoReturn
from uuid import UUID

import msgspec

from gateway.etsi020.errors import Kind, Refusal, malformed, missing
from gateway.identity import is_sae_id
from mesh.client.border import Ack, AckStatus, Association, ForeignKey, PostAcks, PostKeys, PostVoid

VERSION: Final = "v1"
SYNCHRONOUS: Final = "synchronous_mode"
MAX_ITEMS: Final = 1024
MAX_VERSIONS: Final = 1000
MAX_VERSION_CHARS: Final = 16
MAX_CAPABILITY_CHARS: Final = 128
MAX_URL_CHARS: Final = 1024
MAX_MESSAGE_CHARS: Final = 4096
MAX_PROPERTIES: Final = 1024
MAX_EXTENSION_BYTES: Final = 64 * 1024
MAX_KEY_EXTENSION_BYTES: Final = 4 * 1024

_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_ANY_UUID: Final = re.compile(_UUID.pattern.encode())
_URL: Final = re.compile(r"https://[!-~]+")
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ExtKeys:
    """``ext_key_container``. ``callback`` None asks for the synchronous mode."""

    association: Association
    keys: tuple[ForeignKey, ...]
    callback: str | None
    mandatory: tuple[str, ...] = ()
    extension: bytes = b""


@dataclass(frozen=True, slots=True)
class Void:
    """``void_container``; ``is_all`` with an empty list of key_ids and ``all_confirmation``."""

    association: Association
    key_ids: tuple[UUID, ...]
    callback: str | None
    is_all: bool


@dataclass(frozen=True, slots=True)
class Versions:
    """``version_container``."""

    versions: tuple[str, ...]
    capabilities: tuple[str, ...] = ()


# decoding


def decode_ext_keys(body: bytes) -> ExtKeys:
    """The body of POST ext_keys.

    Raises:
        Refusal: 400 naming what is missing or malformed.
    """
    document = _object(_parse(body, Kind.INVALID_PARAMETER, "malformed_property"), "the body")
    _require(document, ("keys", "initiator_sae_id", "target_sae_ids"), "")
    keys = _keys(document["keys"])
    mandatory = _extension(document, "extension_mandatory", at_least=1)
    optional = _extension(document, "extension_optional", at_least=1)
    return ExtKeys(
        _association(document),
        keys,
        _callback(document),
        () if mandatory is None else tuple(mandatory),
        b"" if optional is None else _encoded(optional, "extension_optional", MAX_EXTENSION_BYTES),
    )


def key_ids_of(body: bytes) -> list[UUID]:
    """Every UUID in a body that is refused, wherever it stands: too many rather than one too few."""
    return [UUID(text.decode()) for text in dict.fromkeys(_ANY_UUID.findall(body))]


def decode_acks(body: bytes) -> tuple[Ack, ...]:
    """The body of POST ext_keys/ack: a top-level array.

    Raises:
        Refusal: 400.
    """
    containers = _parse(body, Kind.ACK_NOT_UNDERSTOOD, "ack_not_understood")
    if not isinstance(containers, list):
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            Kind.ACK_NOT_UNDERSTOOD,
            "the body must be an array of ack containers",
            ack_not_understood="not an array",
        )
    if not 1 <= len(containers) <= MAX_ITEMS:
        raise malformed("ack_containers", f"must hold 1 to {MAX_ITEMS} containers")
    return tuple(_ack(one, f"[{index}]") for index, one in enumerate(containers))


def decode_void(body: bytes) -> Void:
    """The body of POST ext_keys/void.

    Raises:
        Refusal: 400.
    """
    parsed = _parse(body, Kind.VOID_NOT_UNDERSTOOD, "key_voiding_error")
    if not isinstance(parsed, dict):
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            Kind.VOID_NOT_UNDERSTOOD,
            "the body must be a void container",
            key_voiding_error="not an object",
        )
    _require(parsed, ("key_ids", "initiator_sae_id", "target_sae_ids"), "")
    texts = parsed["key_ids"]
    if not isinstance(texts, list):
        raise malformed("key_ids", "must be an array of UUIDs")
    confirmation = parsed.get("all_confirmation", False)
    if not isinstance(confirmation, bool):
        raise malformed("all_confirmation", "must be true or false")
    _extension(parsed, "extension")
    key_ids = _unique([_uuid(text, f"key_ids[{index}]") for index, text in enumerate(texts)], "key_ids")
    association = _association(parsed)
    if not key_ids and not confirmation:
        # The schema's text and its example disagree on the name: give both.
        words = "an empty key_ids voids all keys and needs all_confirmation: true"
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            Kind.NO_IDS_OR_CONFIRMATION,
            words,
            no_key_ids_or_confirmation=words,
            no_all_confirmation=words,
        )
    return Void(association, key_ids, _callback(parsed), not key_ids)


def decode_versions(body: bytes) -> Versions:
    """A peer's answer to GET versions.

    Raises:
        Refusal: it is none.
    """
    document = _object(_parse(body, Kind.INVALID_PARAMETER, "malformed_property"), "the body")
    _require(document, ("versions",), "")
    versions = _texts(document["versions"], "versions", MAX_VERSIONS, MAX_VERSION_CHARS)
    capabilities = _texts(
        document.get("capabilities", []), "capabilities", MAX_VERSIONS, MAX_CAPABILITY_CHARS
    )
    _extension(document, "extension")
    return Versions(versions, capabilities)


def problem_type(body: bytes) -> str:
    """The ``type`` of a peer's ``problem_details``; empty if there is none."""
    try:
        document = _parse(body, Kind.INVALID_PARAMETER, "malformed_property")
    except Refusal:
        return ""
    found = document.get("type") if isinstance(document, dict) else None
    return found[:MAX_URL_CHARS] if isinstance(found, str) else ""


# encoding


def encode_ext_keys(post: PostKeys) -> bytes:
    """The body of POST ext_keys, the same bytes for the same values."""
    keys = [
        {
            "key_id": str(key.key_id),
            "value": b2a_base64(key.value, newline=False).decode(),
            **({"extension": msgspec.Raw(key.extension)} if key.extension else {}),
        }
        for key in post.keys
    ]
    document: Document = {
        "keys": keys,
        "initiator_sae_id": post.association.initiator,
        "target_sae_ids": list(post.association.targets),
        "ack_callback_url": post.callback,
    }
    if post.extension:
        document["extension_optional"] = msgspec.Raw(post.extension)
    return msgspec.json.encode(document)


def encode_acks(post: PostAcks) -> bytes:
    """The body of POST ext_keys/ack."""
    return encode_ack_containers(post.acks)


def encode_ack_containers(acks: Sequence[Ack]) -> bytes:
    """``ack_containers``: also the answer to a synchronous request."""
    return msgspec.json.encode(
        [
            {
                "key_id_container": [{"key_id": str(key_id)} for key_id in ack.key_ids],
                "ack_status": ack.status.value,
                "initiator_sae_id": ack.association.initiator,
                "target_sae_ids": list(ack.association.targets),
                **({"message": ack.message[:MAX_MESSAGE_CHARS]} if ack.message else {}),
            }
            for ack in acks
        ]
    )


def encode_void(post: PostVoid) -> bytes:
    """The body of POST ext_keys/void."""
    return msgspec.json.encode(
        {
            "key_ids": [str(key_id) for key_id in post.key_ids],
            "initiator_sae_id": post.association.initiator,
            "target_sae_ids": list(post.association.targets),
            "ack_callback_url": post.callback,
        }
    )


def encode_versions(versions: Versions) -> bytes:
    """``version_container``."""
    document: Document = {"versions": list(versions.versions)}
    if versions.capabilities:
        document["capabilities"] = list(versions.capabilities)
    return msgspec.json.encode(document)


# parts


def _keys(value: object) -> tuple[ForeignKey, ...]:
    if not isinstance(value, list) or not value:
        raise malformed("keys", "must be an array of at least one key")
    keys = []
    for index, one in enumerate(value):
        where = f"keys[{index}]"
        key = _object(one, where)
        _require(key, ("key_id", "value"), where)
        extension = _extension(key, "extension", where)
        keys.append(
            ForeignKey(
                _uuid(key["key_id"], f"{where}.key_id"),
                _base64(key["value"], f"{where}.value"),
                b""
                if extension is None
                else _encoded(extension, f"{where}.extension", MAX_KEY_EXTENSION_BYTES),
            )
        )
    _unique([key.key_id for key in keys], "keys")
    return tuple(keys)


def _ack(value: object, where: str) -> Ack:
    container = _object(value, where)
    _require(container, ("key_id_container", "ack_status", "initiator_sae_id", "target_sae_ids"), where)
    listed = container["key_id_container"]
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_ITEMS:
        raise malformed(f"{where}.key_id_container", f"must be an array of 1 to {MAX_ITEMS} objects")
    key_ids = []
    for index, one in enumerate(listed):
        here = f"{where}.key_id_container[{index}]"
        element = _object(one, here)
        _require(element, ("key_id",), here)
        _extension(element, "extension", here)
        key_ids.append(_uuid(element["key_id"], f"{here}.key_id"))
    try:
        status = AckStatus(container["ack_status"])
    except ValueError:
        raise malformed(f"{where}.ack_status", "is none of the standard's") from None
    message = container.get("message", "")
    if not isinstance(message, str) or len(message) > MAX_MESSAGE_CHARS:
        raise malformed(f"{where}.message", f"must be text of at most {MAX_MESSAGE_CHARS} characters")
    _extension(container, "extension", where)
    unique = tuple(dict.fromkeys(key_ids))
    return Ack(status, unique, _association(container, where), message)


def _association(document: Mapping[str, Any], where: str = "") -> Association:
    initiator = _sae(document["initiator_sae_id"], _at(where, "initiator_sae_id"))
    targets = document["target_sae_ids"]
    here = _at(where, "target_sae_ids")
    if not isinstance(targets, list) or not targets:
        raise malformed(here, "must be an array of at least one SAE ID")
    named = {_sae(target, f"{here}[{index}]") for index, target in enumerate(targets)}
    if initiator in named:
        raise malformed(here, "names the initiator")
    return Association(initiator, tuple(sorted(named)))


def _sae(value: object, where: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 64:
        raise malformed(where, "must be text of 1 to 64 characters")
    if not is_sae_id(value):
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            Kind.INVALID_PARAMETER,
            f"{where}: has a character that no URI has",
            invalid_character=where,
        )
    return value


def _callback(document: Mapping[str, Any]) -> str | None:
    if "ack_callback_url" not in document:
        return None
    url = document["ack_callback_url"]
    if not isinstance(url, str) or len(url) > MAX_URL_CHARS or not _URL.fullmatch(url):
        raise malformed("ack_callback_url", f"must be an https URL of at most {MAX_URL_CHARS} characters")
    return url


def _extension(
    document: Mapping[str, Any], name: str, where: str = "", *, at_least: int = 0
) -> Document | None:
    if name not in document:
        return None
    value = document[name]
    if not isinstance(value, dict):
        raise malformed(_at(where, name), "must be an object")
    # An empty ``extension`` says nothing; to refuse an ack over it would cost keys.
    if not at_least <= len(value) <= MAX_PROPERTIES:
        raise malformed(_at(where, name), f"must have {at_least} to {MAX_PROPERTIES} properties")
    return value


def _encoded(extension: Document, where: str, limit: int) -> bytes:
    encoded = msgspec.json.encode(extension)
    if len(encoded) > limit:
        raise malformed(where, f"is larger than {limit} bytes")
    return encoded


def _texts(value: object, where: str, items: int, chars: int) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > items:
        raise malformed(where, f"must be an array of at most {items} texts")
    if not all(isinstance(text, str) and len(text) <= chars for text in value):
        raise malformed(where, f"must hold texts of at most {chars} characters")
    return tuple(value)


def _uuid(value: object, where: str) -> UUID:
    if not isinstance(value, str) or not _UUID.fullmatch(value):
        raise malformed(where, "must be a UUID")
    return UUID(value)


def _base64(value: object, where: str) -> bytes:
    problem = "must be padded base64 (RFC 4648 table 1) of whole bytes"
    if not isinstance(value, str) or not value:
        raise malformed(where, problem)
    try:
        data = a2b_base64(value.encode("ascii"), strict_mode=True)
    except (Base64Error, UnicodeEncodeError) as error:
        raise malformed(where, problem) from error
    # Bits beyond the last byte would be key bits that nobody sees.
    if not data or b2a_base64(data, newline=False).decode() != value:
        raise malformed(where, problem)
    return data


def _unique(key_ids: Sequence[UUID], where: str) -> tuple[UUID, ...]:
    if len(set(key_ids)) != len(key_ids):
        raise malformed(where, "names a key_id twice")
    return tuple(key_ids)


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _object(value: object, where: str) -> Document:
    if not isinstance(value, dict):
        raise malformed(where, "must be an object")
    return value


def _require(document: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    absent = [_at(where, name) for name in names if name not in document]
    if absent:
        raise missing(*absent)


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


def _once(pairs: list[tuple[str, object]]) -> Document:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a member comes twice")
    return document


def _verbatim(number: str) -> msgspec.Raw:
    """No member of the standard is a number; those in extensions pass on digit by digit."""
    return msgspec.Raw(number.encode("ascii"))


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_once, parse_constant=_refuse_constant, parse_float=_verbatim, parse_int=_verbatim
)


def _parse(body: bytes, kind: Kind, detail: str) -> object:
    try:
        parsed = _DECODER.decode(body.decode("utf-8"))
        if b"\\ud" in body.lower():
            # Half of a surrogate pair is no character: nobody could pass it on.
            json.dumps(parsed, ensure_ascii=False, default=str).encode("utf-8")
    except (ValueError, RecursionError) as error:
        words = "the body is not JSON in UTF-8 with every member once"
        raise Refusal(HTTPStatus.BAD_REQUEST, kind, words, retry_after_s=0.0, **{detail: words}) from error
    return parsed
