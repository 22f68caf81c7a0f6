"""ETSI GS QKD 020 V1.1.1 data formats: limits, strictness, the problem body."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID, uuid4

import pytest

from gateway.etsi020.errors import TYPE_BASE, Refusal, encode_problem, from_http, refusal_of
from gateway.etsi020.schema import (
    Versions,
    decode_acks,
    decode_ext_keys,
    decode_versions,
    decode_void,
    encode_ack_containers,
    encode_ext_keys,
    encode_versions,
    encode_void,
    key_ids_of,
    problem_type,
)
from gateway.exchange import HttpRefusal
from mesh.client import CallerError, ErrorReason, ShortageError, UnavailableError
from mesh.client.border import Ack, AckStatus, Association, ForeignKey, PostKeys, PostVoid, Problem

ID = UUID("0193f7e2-0000-4000-8000-000000000001")
PAIR = Association("uk-a", ("can-b", "can-c"))
URL = "https://kme:8443/kmapi/v1/ext_keys/ack"


def ext_keys(**changes: Any) -> bytes:
    """A valid ``ext_key_container`` with changes; None leaves a member out."""
    document = {
        "keys": [{"key_id": str(ID), "value": "AAECAw=="}],
        "initiator_sae_id": "uk-a",
        "target_sae_ids": ["can-c", "can-b"],
        "ack_callback_url": URL,
        **changes,
    }
    return json.dumps({name: value for name, value in document.items() if value is not None}).encode()


def void(**changes: Any) -> bytes:
    """A valid ``void_container`` with changes."""
    return ext_keys(**{"key_ids": [str(ID)], "keys": None, **changes})


def ack(**changes: Any) -> bytes:
    """An array of one ``ack_container`` with changes."""
    container = {
        "key_id_container": [{"key_id": str(ID)}],
        "ack_status": "relayed",
        "initiator_sae_id": "uk-a",
        "target_sae_ids": ["can-b", "can-c"],
        **changes,
    }
    return json.dumps([{name: value for name, value in container.items() if value is not None}]).encode()


def refusal(call: Any, body: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        call(body)
    return caught.value


def test_keys_travel_both_ways() -> None:
    asked = decode_ext_keys(ext_keys(extension_optional={"E32473_a": [1]}))
    assert (asked.association, asked.callback) == (PAIR, URL)
    assert [(key.key_id, key.value) for key in asked.keys] == [(ID, b"\0\1\2\3")]
    again = decode_ext_keys(encode_ext_keys(PostKeys(PAIR, asked.keys, URL, asked.extension)))
    assert again == asked
    assert json.loads(asked.extension) == {"E32473_a": [1]}
    assert str(b"\0\1\2\3") not in repr(asked)


def test_extensions_of_keys_pass_unchanged() -> None:
    extension = b'{"E32473_x":{"y":1}}'
    body = encode_ext_keys(PostKeys(PAIR, (ForeignKey(ID, b"1", extension),), URL))
    assert decode_ext_keys(body).keys[0].extension == extension


@pytest.mark.parametrize(
    ("changes", "suffix", "detail"),
    [
        ({"keys": None}, "missing-parameters", "missing_parameters"),
        ({"initiator_sae_id": None}, "missing-parameters", "missing_parameters"),
        ({"keys": [{"key_id": str(ID)}]}, "missing-parameters", "missing_parameters"),
        ({"keys": []}, "invalid-parameter", "malformed_property"),
        ({"keys": [{"key_id": "1", "value": "AA=="}]}, "invalid-parameter", "malformed_property"),
        ({"keys": [{"key_id": str(ID), "value": "AA"}]}, "invalid-parameter", "malformed_property"),
        ({"keys": [{"key_id": str(ID), "value": "AB=="}]}, "invalid-parameter", "malformed_property"),
        ({"keys": [{"key_id": str(ID), "value": "_-8="}]}, "invalid-parameter", "malformed_property"),
        ({"keys": [{"key_id": str(ID), "value": "AA=="}] * 2}, "invalid-parameter", "malformed_property"),
        ({"initiator_sae_id": "a" * 65}, "invalid-parameter", "malformed_property"),
        ({"initiator_sae_id": "a b"}, "invalid-parameter", "invalid_character"),
        ({"target_sae_ids": []}, "invalid-parameter", "malformed_property"),
        ({"target_sae_ids": "can-b"}, "invalid-parameter", "malformed_property"),
        ({"target_sae_ids": ["uk-a"]}, "invalid-parameter", "malformed_property"),
        ({"ack_callback_url": "http://kme/x"}, "invalid-parameter", "malformed_property"),
        ({"ack_callback_url": "https://kme/" + "x" * 1024}, "invalid-parameter", "malformed_property"),
        ({"extension_mandatory": []}, "invalid-parameter", "malformed_property"),
        ({"extension_optional": {}}, "invalid-parameter", "malformed_property"),
    ],
)
def test_what_is_malformed_is_named(changes: dict[str, Any], suffix: str, detail: str) -> None:
    found = refusal(decode_ext_keys, ext_keys(**changes))
    problem = json.loads(encode_problem(found))
    assert (problem["type"], problem["status"]) == (TYPE_BASE + suffix, 400)
    assert list(problem["details"]) == [detail]
    assert all(isinstance(text, str) for text in problem["details"].values())


def test_no_value_of_the_peer_is_repeated() -> None:
    secret = "c2VjcmV0"
    for changes in (
        {"keys": [{"key_id": secret, "value": "AA=="}]},
        {"initiator_sae_id": secret + " "},
        {"ack_callback_url": secret},
    ):
        assert secret.encode() not in encode_problem(refusal(decode_ext_keys, ext_keys(**changes)))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"keys":1,"keys":2}', b'{"keys":NaN}', b"\xff", b"[" * 9999]
)
def test_what_is_no_container_is_refused(body: bytes) -> None:
    assert refusal(decode_ext_keys, body).status == 400


def test_key_ids_of_a_refused_body_are_found_wherever_they_stand() -> None:
    other = uuid4()
    assert key_ids_of(
        b'{"keys":1,"keys":2,"x":"' + str(ID).upper().encode() + b'"' + str(other).encode()
    ) == [
        ID,
        other,
    ]


def test_acks_are_an_array_of_containers() -> None:
    (found,) = decode_acks(ack(message="why", key_id_container=[{"key_id": str(ID)}, {"key_id": str(ID)}]))
    assert found == Ack(AckStatus.RELAYED, (ID,), PAIR, "why")
    assert decode_acks(encode_ack_containers([found])) == (found,)
    for status in ("relayed", "failed", "voided", "failed to void", "key not present"):
        assert decode_acks(ack(ack_status=status))[0].status == status


@pytest.mark.parametrize(
    ("body", "suffix"),
    [
        (b"{}", "ack-not-understood"),
        (b"no", "ack-not-understood"),
        (b"[]", "invalid-parameter"),
        (ack(ack_status="done"), "invalid-parameter"),
        (ack(ack_status=None), "missing-parameters"),
        (ack(key_id_container={"key_id": str(ID)}), "invalid-parameter"),
        (ack(key_id_container=[{"key_id": str(ID)}] * 1025), "invalid-parameter"),
        (ack(message="x" * 4097), "invalid-parameter"),
    ],
)
def test_acks_that_are_none(body: bytes, suffix: str) -> None:
    assert refusal(decode_acks, body).kind == suffix


def test_void_of_all_needs_a_confirmation() -> None:
    assert decode_void(void()).key_ids == (ID,)
    assert decode_void(void(key_ids=[], all_confirmation=True)).is_all
    found = refusal(decode_void, void(key_ids=[]))
    assert found.kind == "no-key-ids-or-confirmation"
    assert set(found.details) == {"no_key_ids_or_confirmation", "no_all_confirmation"}
    assert refusal(decode_void, b"[]").kind == "void-request-not-understood"
    assert refusal(decode_void, ext_keys(keys=None)).kind == "missing-parameters"
    assert refusal(decode_void, void(all_confirmation="yes")).status == 400
    asked = decode_void(encode_void(PostVoid(PAIR, (ID,), URL)))
    assert (asked.association, asked.key_ids, asked.callback, asked.is_all) == (PAIR, (ID,), URL, False)


def test_versions() -> None:
    ours = Versions(("v1",), ("synchronous_mode",))
    assert decode_versions(encode_versions(ours)) == ours
    for document in ({}, {"versions": "v1"}, {"versions": ["v" * 17]}, {"versions": ["v1"] * 1001}):
        assert refusal(decode_versions, json.dumps(document).encode()).status == 400


def test_node_refusals_become_problems_and_never_lie() -> None:
    for problem, status in (
        (Problem.FOREIGN_INITIATOR, 401),
        (Problem.UNKNOWN_TARGET, 400),
        (Problem.BOUNCE, 400),
        (Problem.TOO_MANY_TARGETS, 503),
        (Problem.NO_ROUTE, 503),
        (Problem.LOOP, 503),
        (Problem.HELD, 503),
        (Problem.VOIDED, 400),
        (Problem.NOT_PRESENT, 400),
    ):
        clean = CallerError("no", facts={"problem": problem.value})
        held = CallerError("no", facts={"problem": problem.value, "is_held": "true"})
        assert refusal_of(clean).status == status
        assert refusal_of(held).status == 503


def test_shortage_and_faults_are_503() -> None:
    short = refusal_of(ShortageError("dry", reason=ErrorReason.OUT_OF_MATERIAL))
    gone = refusal_of(UnavailableError("gone"))
    assert (short.status, short.kind) == (503, "insufficient-key-material")
    assert (gone.status, gone.kind) == (503, "server-side-general-error")
    assert short.retry_after_s > 0


def test_a_body_that_never_came_promises_nothing() -> None:
    for reason in ("slow-body", "malformed-http"):
        found = from_http(HttpRefusal(400, "late", reason=reason))
        assert (found.status, found.kind) == (408, "timeout")


def test_problem_type_of_an_answer() -> None:
    assert problem_type(encode_problem(refusal(decode_acks, b"{}"))) == TYPE_BASE + "ack-not-understood"
    for body in (b"", b"<html>", b"[]", b'{"type":1}'):
        assert problem_type(body) == ""
