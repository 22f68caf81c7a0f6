"""The data formats of ETSI GS QKD 014 V1.1.1 (Tables 9 to 13), decoded strictly and encoded compactly.

The only file that speaks of masters, slaves and bits. Decoding takes bytes or a query string and
returns a value or raises ``CallerError`` (HTTP 400) that names the member. Unknown members are
ignored; known ones must have their exact type, appear once, and pass their limits. Values that a
client sent are never repeated in a message: an echoed key object may hold key bytes.
"""

from __future__ import annotations

import json
import re
from binascii import b2a_base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn
from urllib.parse import unquote_to_bytes
from uuid import UUID

import msgspec

from gateway.etsi014.errors import SIZE_NOT_BYTES, refuse
from gateway.identity import is_sae_id
from mesh.client import CallerError, DeliveredKey, KeyStatus

MAX_WIRE_INTEGER: Final = 2**31 - 1
MAX_ADDITIONAL_SLAVES: Final = 256
# The most that a node's limits.max_key_per_request can be set to.
MAX_KEY_IDS: Final = 1024
MAX_QUERY_CHARS: Final = 8192

_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_DECIMAL: Final = re.compile(r"[0-9]{1,10}")
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9a-fA-F]{2})")
_EXTENSION_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")

_KEY_REQUEST_MEMBERS: Final = frozenset(
    {"number", "size", "additional_slave_SAE_IDs", "extension_mandatory", "extension_optional"}
)
_KEY_IDS_MEMBERS: Final = frozenset({"key_IDs", "key_IDs_extension"})
_KEY_ID_MEMBERS: Final = frozenset({"key_ID", "key_ID_extension"})

Extension = tuple[str, object]


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """Table 10. ``size_bytes`` None asks for the default; extensions are (name, value) pairs in order."""

    number: int = 1
    size_bytes: int | None = None
    additional_slaves: tuple[str, ...] = ()
    mandatory: tuple[Extension, ...] = ()
    optional: tuple[Extension, ...] = ()


EMPTY_KEY_REQUEST: Final = KeyRequest()


class _Repeated(dict[str, object]):
    """A JSON object in which some member names occurred more than once."""

    __slots__ = ("repeated",)
    repeated: frozenset[str]


def decode_key_request(
    body: bytes, *, master: str, slave: str, refuse_empty_body: bool = False, refuse_empty_list: bool = False
) -> KeyRequest:
    """The body of POST ``enc_keys``; no body at all is an empty Key request.

    Args:
        body: the raw body.
        master: the caller's SAE ID, which may not be named as a slave.
        slave: the SAE ID of the path, which may not be named again.
        refuse_empty_body: answer 400 to a POST without a body.
        refuse_empty_list: answer 400 to ``"additional_slave_SAE_IDs": []``.

    Raises:
        CallerError: naming the member and what it must be.
    """
    if not body:
        if refuse_empty_body:
            raise refuse("the body is empty: send a Key request object")
        return EMPTY_KEY_REQUEST
    document = _decode_object(body, "the body", _KEY_REQUEST_MEMBERS)
    if not document:
        return EMPTY_KEY_REQUEST
    number = 1
    if "number" in document:
        number = _number(_integer(document["number"], "number"))
    size_bytes = None
    if "size" in document:
        size_bytes = _size_bytes(_integer(document["size"], "size"))
    slaves: tuple[str, ...] = ()
    if "additional_slave_SAE_IDs" in document:
        slaves = _additional_slaves(
            document["additional_slave_SAE_IDs"], master, slave, refuse_empty_list=refuse_empty_list
        )
    return KeyRequest(
        number,
        size_bytes,
        slaves,
        _extensions(document, "extension_mandatory"),
        _extensions(document, "extension_optional"),
    )


def decode_key_request_query(query: str) -> KeyRequest:
    """The query of GET ``enc_keys``: nothing, or ``number`` and ``size`` (clause 5.3).

    Raises:
        CallerError: for a malformed, repeated or out-of-range value, and for the members that need POST.
    """
    if not query:
        return EMPTY_KEY_REQUEST
    values: dict[str, int] = {}
    for name, value in parse_query(query):
        if name in ("number", "size"):
            if name in values:
                raise refuse(f"{name} is given more than once", parameter=name)
            if not _DECIMAL.fullmatch(value):
                raise refuse(f"{name} must be a decimal integer", parameter=name)
            values[name] = int(value)
        elif name in _KEY_REQUEST_MEMBERS:
            raise refuse(f"{name} cannot be given in a query: use POST", parameter=name)
    number = _number(values["number"]) if "number" in values else 1
    return KeyRequest(number, _size_bytes(values["size"]) if "size" in values else None)


def decode_key_ids(body: bytes) -> list[UUID]:
    """The body of POST ``dec_keys`` (Table 12): the key_IDs in request order.

    Unknown members of the elements, which may be echoed key objects, are ignored and never reported.

    Raises:
        CallerError: no body, no or too many IDs, an ID that is no UUID or is repeated, wrong types.
    """
    if not body:
        raise refuse("the body is empty: send a Key IDs object with key_IDs")
    document = _decode_object(body, "the body", _KEY_IDS_MEMBERS)
    if not isinstance(document.get("key_IDs_extension", {}), dict):
        raise refuse("key_IDs_extension must be an object", parameter="key_IDs_extension")
    elements = document.get("key_IDs")
    if not isinstance(elements, list):
        raise refuse("key_IDs must be given, as an array of objects", parameter="key_IDs")
    texts: list[str] = []
    for index, element in enumerate(elements):
        where = f"key_IDs[{index}]"
        if not isinstance(element, dict):
            raise refuse(f"{where} must be an object with key_ID", parameter=where)
        _refuse_repeated(element, where, _KEY_ID_MEMBERS)
        text = element.get("key_ID")
        if not isinstance(text, str):
            raise refuse(f"{where}.key_ID must be given, as a string", parameter=f"{where}.key_ID")
        # null as well as an object: clients that echo what they parsed write null for "absent"
        if not isinstance(element.get("key_ID_extension"), dict | None):
            raise refuse(f"{where}.key_ID_extension must be an object", parameter=f"{where}.key_ID_extension")
        texts.append(text)
    return _key_ids(texts)


def decode_key_ids_query(query: str) -> list[UUID]:
    """The query of GET ``dec_keys``: ``key_ID``, once by the standard; clients in the field repeat it.

    Raises:
        CallerError: no ID, an ID that is no UUID or is repeated, or an extension (which needs POST).
    """
    texts: list[str] = []
    for name, value in parse_query(query):
        if name == "key_ID":
            texts.append(value)
        elif name in ("key_IDs", "key_ID_extension", "key_IDs_extension"):
            raise refuse(f"{name} cannot be given in a query: use POST", parameter=name)
    return _key_ids(texts)


def refuse_body_parameters(query: str, names: frozenset[str] = _KEY_REQUEST_MEMBERS | {"key_ID"}) -> None:
    """Refuse a POST that carries its parameters in the query, where they would be ignored unseen."""
    for name, _ in parse_query(query):
        if name in names:
            raise refuse(f"{name} must be in the body of a POST, not in the query", parameter=name)


def parse_query(query: str) -> list[tuple[str, str]]:
    """Split and percent-decode a raw query.

    Raises:
        CallerError: broken percent-encoding, bytes that are no UTF-8, or an overlong query.
    """
    if not query:
        return []
    if len(query) > MAX_QUERY_CHARS:
        raise refuse(f"the query is longer than {MAX_QUERY_CHARS} characters: use POST")
    pairs: list[tuple[str, str]] = []
    for part in query.split("&"):
        if part:
            name, _, value = part.partition("=")
            pairs.append((percent_decode(name, "the query"), percent_decode(value, "the query")))
    return pairs


def percent_decode(text: str, where: str) -> str:
    """Decode ``%HH`` exactly once; ``+`` stays ``+``.

    Raises:
        CallerError: a ``%`` without two hex digits, or bytes that are no UTF-8.
    """
    if "%" not in text:
        return text
    if _BAD_ESCAPE.search(text):
        raise refuse(f"{where} has a broken percent-encoding")
    try:
        return unquote_to_bytes(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(f"{where} is not UTF-8 after percent-decoding") from error


def encode_status(status: KeyStatus, *, master: str, slave: str) -> bytes:
    """Table 9. Sizes in bits; ``status_extension`` names the grade of the pair."""
    return msgspec.json.encode(
        {
            "source_KME_ID": status.source_kme_id,
            "target_KME_ID": status.target_kme_id,
            "master_SAE_ID": master,
            "slave_SAE_ID": slave,
            "key_size": status.key_size_bits,
            "stored_key_count": status.stored_key_count,
            "max_key_count": status.max_key_count,
            "max_key_per_request": status.max_key_per_request,
            "max_key_size": status.max_key_size_bits,
            "min_key_size": status.min_key_size_bits,
            "max_SAE_ID_count": status.max_sae_id_count,
            "status_extension": {"keymesh_grade": status.grade},
        }
    )


def encode_key_container(keys: Sequence[DeliveredKey], *, grade: str | None = None) -> bytes:
    """Table 11, compact, in the given order; ``grade`` adds ``key_container_extension``.

    Written by hand: two fields of known alphabets need no escaping, and this is the hot path.
    """
    items = ",".join(
        [
            f'{{"key_ID":"{key.key_id_text}","key":"{b2a_base64(key.value, newline=False).decode()}"}}'
            for key in keys
        ]
    )
    if grade is None:
        return f'{{"keys":[{items}]}}'.encode()
    extension = msgspec.json.encode({"keymesh_grade": grade}).decode()
    return f'{{"keys":[{items}],"key_container_extension":{extension}}}'.encode()


def printable_name(name: str) -> str:
    """An extension name fit for an error body, whatever the client sent."""
    return name if _EXTENSION_NAME.fullmatch(name) else "(unprintable name)"


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


def _collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    seen: set[str] = set()
    marked = _Repeated(plain)
    marked.repeated = frozenset(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    return marked


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_collect, parse_constant=_refuse_constant)


def _decode_object(body: bytes, where: str, known: frozenset[str]) -> dict[str, object]:
    try:
        document = _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise refuse(f"{where} is not UTF-8") from error
    except RecursionError as error:
        raise refuse(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise refuse(f"{where} is not valid JSON") from error
    if not isinstance(document, dict):
        raise refuse(f"{where} must be a JSON object")
    _refuse_repeated(document, where, known)
    return document


def _refuse_repeated(document: dict[str, object], where: str, known: frozenset[str]) -> None:
    if isinstance(document, _Repeated):
        for name in sorted(known & document.repeated):
            raise refuse(f"{name} is given more than once in {where}", parameter=name)


def _integer(value: object, name: str) -> int:
    if type(value) is not int:  # bool is an int to isinstance, and not to JSON
        raise refuse(f"{name} must be an integer", parameter=name)
    return value


def _number(value: int) -> int:
    if not 1 <= value <= MAX_WIRE_INTEGER:
        raise refuse("number must be at least 1 and at most max_key_per_request", parameter="number")
    return value


def _size_bytes(bits: int) -> int:
    if not 1 <= bits <= MAX_WIRE_INTEGER:
        raise refuse("size must be between min_key_size and max_key_size", parameter="size")
    if bits % 8:
        raise refuse(SIZE_NOT_BYTES, parameter="size")
    return bits // 8


def _additional_slaves(value: object, master: str, slave: str, *, refuse_empty_list: bool) -> tuple[str, ...]:
    name = "additional_slave_SAE_IDs"
    if not isinstance(value, list):
        raise refuse(f"{name} must be an array of strings", parameter=name)
    if not value and refuse_empty_list:
        raise refuse(f"{name} must not be empty: leave it out", parameter=name)
    if len(value) > MAX_ADDITIONAL_SLAVES:
        raise refuse(f"{name} has more entries than max_SAE_ID_count", parameter=name)
    seen = {slave, master}
    for index, sae_id in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(sae_id, str) or not is_sae_id(sae_id):
            raise refuse(f"{where} must be an SAE ID: 1 to 64 URI characters", parameter=where)
        if sae_id in seen:
            raise refuse(f"{where} repeats an SAE of this request", parameter=where)
        seen.add(sae_id)
    return tuple(value)


def _extensions(document: dict[str, object], name: str) -> tuple[Extension, ...]:
    if name not in document:
        return ()
    elements = document[name]
    if not isinstance(elements, list) or not all(isinstance(element, dict) for element in elements):
        raise refuse(f"{name} must be an array of objects", parameter=name)
    for element in elements:
        _refuse_repeated(element, name, frozenset(element))
    return tuple(pair for element in elements for pair in element.items())


def _key_ids(texts: Sequence[str]) -> list[UUID]:
    if not texts:
        raise refuse("at least one key_ID must be given", parameter="key_ID")
    if len(texts) > MAX_KEY_IDS:
        raise refuse("there are more key_IDs than max_key_per_request", parameter="key_IDs")
    key_ids: list[UUID] = []
    for index, text in enumerate(texts):
        if not _UUID.fullmatch(text):
            raise refuse(f"key_IDs[{index}].key_ID must be a UUID", parameter=f"key_IDs[{index}].key_ID")
        key_ids.append(UUID(text))
    if len(set(key_ids)) != len(key_ids):
        raise refuse("a key_ID is given more than once", parameter="key_IDs")
    return key_ids


__all__ = [
    "EMPTY_KEY_REQUEST",
    "CallerError",
    "Extension",
    "KeyRequest",
    "decode_key_ids",
    "decode_key_ids_query",
    "decode_key_request",
    "decode_key_request_query",
    "encode_key_container",
    "encode_status",
    "parse_query",
    "percent_decode",
    "printable_name",
    "refuse_body_parameters",
]
