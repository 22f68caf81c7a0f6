"""The standard's data formats as another implementer reads them: builders, and a reader that minds all.

A document is a plain dict or list. ``read_*`` raises ``Fault`` for whatever the standard's schema does not
allow, so that whoever listens to keymesh with it also checks what keymesh says.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

PROBLEMS = "https://qkd.etsi.org/gs020-interop-kms/"
VERSIONS, KEYS = "/kmapi/versions", "/kmapi/v1/ext_keys"
ACK, VOID = KEYS + "/ack", KEYS + "/void"

RELAYED, FAILED, VOIDED = "relayed", "failed", "voided"
FAILED_TO_VOID, NOT_PRESENT = "failed to void", "key not present"
STATUSES = {RELAYED, FAILED, VOIDED, FAILED_TO_VOID, NOT_PRESENT}

_SAE = re.compile(r"(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2}){1,64}")
_EXTENSION = re.compile(r"E[1-9][0-9]*_.+")


class Names(NamedTuple):
    """Whom a key joins."""

    initiator: str
    targets: frozenset[str]

    @classmethod
    def of(cls, initiator: str, *targets: str) -> Names:
        """Initiator and targets."""
        return cls(initiator, frozenset(targets))


class Fault(Exception):  # noqa: N818 - what the standard calls a problem
    """Something that is answered with ``problem_details``."""

    def __init__(self, status: int, suffix: str, **details: str) -> None:
        super().__init__(f"{status} {suffix} {details}")
        self.status = status
        self.suffix = suffix
        self.details = details

    def document(self) -> dict[str, Any]:
        """``problem_details``."""
        return {
            "type": PROBLEMS + self.suffix,
            "status": self.status,
            "title": self.suffix.replace("-", " "),
            "details": self.details,
        }


@dataclass(frozen=True)
class Keys:
    """``ext_key_container``."""

    names: Names
    values: Mapping[str, bytes]
    callback: str | None
    document: Mapping[str, Any]


@dataclass(frozen=True)
class Ack:
    """``ack_container``."""

    status: str
    key_ids: tuple[str, ...]
    names: Names


@dataclass(frozen=True)
class Void:
    """``void_container``; no key_ids: all of these names."""

    names: Names
    key_ids: tuple[str, ...]
    callback: str | None


# what is said


def keys_document(
    names: Names, values: Mapping[str, bytes], callback: str | None, **more: Any
) -> dict[str, Any]:
    """An ``ext_key_container``."""
    listed = [{"key_id": one, "value": base64.b64encode(value).decode()} for one, value in values.items()]
    return {"keys": listed, **_names(names), **_callback(callback), **more}


def ack_document(status: str, key_ids: Iterable[str], names: Names, **more: Any) -> dict[str, Any]:
    """One ``ack_container``."""
    listed = [{"key_id": one} for one in key_ids]
    return {"key_id_container": listed, "ack_status": status, **_names(names), **more}


def void_document(names: Names, key_ids: Iterable[str], callback: str | None, **more: Any) -> dict[str, Any]:
    """A ``void_container``."""
    return {"key_ids": list(key_ids), **_names(names), **_callback(callback), **more}


def _names(names: Names) -> dict[str, Any]:
    return {"initiator_sae_id": names.initiator, "target_sae_ids": sorted(names.targets)}


def _callback(callback: str | None) -> dict[str, str]:
    return {} if callback is None else {"ack_callback_url": callback}


# what is heard


def parse(body: bytes) -> Any:
    """JSON in UTF-8."""
    try:
        return json.loads(body.decode("utf-8"))
    except ValueError as error:
        raise Fault(400, "invalid-parameter", malformed_property="the body") from error


def read_keys(document: Any) -> Keys:
    """A POST of ext_keys."""
    _need(document, "missing-parameters", "keys", "initiator_sae_id", "target_sae_ids")
    keys = document["keys"]
    _mind(isinstance(keys, list) and keys, "keys")
    values: dict[str, bytes] = {}
    for one in keys:
        _need(one, "missing-parameters", "key_id", "value")
        _mind(one["key_id"] not in values, "key_id")
        values[_uuid(one["key_id"])] = _base64(one["value"])
        if "extension" in one:
            _mind(isinstance(one["extension"], dict), "extension")
    for name in ("extension_mandatory", "extension_optional"):
        if name in document:
            extension = document[name]
            _mind(isinstance(extension, dict) and 1 <= len(extension) <= 1024, name)
            _mind(all(_EXTENSION.fullmatch(key) for key in extension), name)
    if "extension_mandatory" in document:
        raise Fault(503, "unsupported-mandatory-extension", unsupported_mandatory_extension="all")
    return Keys(_read_names(document), values, _read_callback(document), document)


def read_acks(document: Any) -> list[Ack]:
    """A POST of acks."""
    if not isinstance(document, list) or not 1 <= len(document) <= 1024:
        raise Fault(400, "ack-not-understood", ack_not_understood="not an array of 1 to 1024")
    acks = []
    for one in document:
        _need(one, "missing-parameters", "key_id_container", "ack_status", "initiator_sae_id")
        _need(one, "missing-parameters", "target_sae_ids")
        listed = one["key_id_container"]
        _mind(isinstance(listed, list) and 1 <= len(listed) <= 1024, "key_id_container")
        for key in listed:
            _need(key, "missing-parameters", "key_id")
        _mind(one["ack_status"] in STATUSES, "ack_status")
        message = one.get("message", "")
        _mind(isinstance(message, str) and len(message) <= 4096, "message")
        ids = tuple(_uuid(key["key_id"]) for key in listed)
        acks.append(Ack(one["ack_status"], ids, _read_names(one)))
    return acks


def read_void(document: Any) -> Void:
    """A POST of a void."""
    if not isinstance(document, dict):
        raise Fault(400, "void-request-not-understood", key_voiding_error="not an object")
    _need(document, "missing-parameters", "key_ids", "initiator_sae_id", "target_sae_ids")
    _mind(isinstance(document["key_ids"], list), "key_ids")
    if not document["key_ids"] and document.get("all_confirmation") is not True:
        raise Fault(400, "no-key-ids-or-confirmation", no_key_ids_or_confirmation="not confirmed")
    ids = tuple(_uuid(one) for one in document["key_ids"])
    return Void(_read_names(document), ids, _read_callback(document))


def check_problem(status: int, document: Any) -> tuple[str, dict[str, str]]:
    """What ``problem_details`` must look like; the suffix of its type, and its details."""
    assert isinstance(document, dict), document
    assert isinstance(document["type"], str)
    assert document["type"].startswith(PROBLEMS), document
    assert len(document["type"]) <= 1024
    assert document.get("status", status) == status
    assert len(document.get("title", "")) <= 1024
    details = document.get("details", {})
    assert isinstance(details, dict), document
    assert all(isinstance(text, str) for text in details.values()), document
    return document["type"].removeprefix(PROBLEMS), details


def _need(document: Any, suffix: str, *names: str) -> None:
    _mind(isinstance(document, dict), "an element")
    absent = [name for name in names if name not in document]
    if absent:
        raise Fault(400, suffix, missing_parameters=", ".join(absent))


def _mind(is_right: object, what: str) -> None:
    if not is_right:
        raise Fault(400, "invalid-parameter", malformed_property=what)


def _read_names(document: Any) -> Names:
    initiator, targets = document["initiator_sae_id"], document["target_sae_ids"]
    _mind(isinstance(targets, list) and targets, "target_sae_ids")
    for one in (initiator, *targets):
        _mind(isinstance(one, str) and _SAE.fullmatch(one), "a SAE ID")
    return Names.of(initiator, *targets)


def _read_callback(document: Any) -> str | None:
    url = document.get("ack_callback_url")
    if url is None:
        _mind("ack_callback_url" not in document, "ack_callback_url")
        return None
    _mind(isinstance(url, str) and len(url) <= 1024 and urlsplit(url).scheme == "https", "ack_callback_url")
    return str(url)


def _uuid(text: Any) -> str:
    _mind(isinstance(text, str), "key_id")
    try:
        found = str(uuid.UUID(text))
    except ValueError as error:
        raise Fault(400, "invalid-parameter", malformed_property="key_id") from error
    _mind(found == text.lower(), "key_id")
    return found


def _base64(text: Any) -> bytes:
    _mind(isinstance(text, str) and text, "value")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Fault(400, "invalid-parameter", malformed_property="value") from error
