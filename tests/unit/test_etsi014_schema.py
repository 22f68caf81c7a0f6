"""The strict decoder and the compact encoder of ETSI 014, without sockets."""

from __future__ import annotations

import base64
import json
from http import HTTPStatus
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.etsi014 import schema
from gateway.etsi014.errors import (
    KEY_ACCESS_ERROR,
    KEY_NOT_FOUND,
    SIZE_NOT_BYTES,
    answer_error,
    answer_refusal,
)
from gateway.etsi014.routes import decode_sae_segment, split_target
from gateway.exchange import HttpRefusal
from mesh.client import (
    CallerError,
    DeliveredKey,
    ErrorReason,
    IntegrityError,
    KeyStatus,
    MeshError,
    NotAuthorizedError,
    PeerError,
    ShortageError,
    UnavailableError,
)
from mesh.errors import NOTHING_HAPPENED

FACTS = {"master": "sae-a", "slave": "sae-b"}


def decode(body: bytes, **switches: bool) -> schema.KeyRequest:
    return schema.decode_key_request(body, master="sae-a", slave="sae-b", **switches)


def test_absent_members_take_the_standards_defaults() -> None:
    for body in (b"", b"{}", b" { } "):
        assert decode(body) == schema.KeyRequest(1, None, (), (), ())


def test_all_members_are_decoded_and_bits_become_bytes() -> None:
    body = {
        "number": 3,
        "size": 1024,
        "additional_slave_SAE_IDs": ["sae-c", "urn:x"],
        "extension_mandatory": [{"a_x": 1, "a_y": [2]}, {"a_z": None}],
        "extension_optional": [{"b_x": "t"}],
    }
    assert decode(json.dumps(body).encode()) == schema.KeyRequest(
        3,
        128,
        ("sae-c", "urn:x"),
        (("a_x", 1), ("a_y", [2]), ("a_z", None)),
        (("b_x", "t"),),
    )


def test_switches_refuse_what_real_clients_send() -> None:
    with pytest.raises(CallerError, match="body is empty"):
        decode(b"", refuse_empty_body=True)
    with pytest.raises(CallerError, match="must not be empty"):
        decode(b'{"additional_slave_SAE_IDs":[]}', refuse_empty_list=True)
    assert decode(b'{"additional_slave_SAE_IDs":[]}').additional_slaves == ()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "must be a JSON object"),
        (b"{", "not valid JSON"),
        (b'{"x":"\xff"}', "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"number":NaN}', "not valid JSON"),
        (b'{"x":Infinity}', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"number":' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"number":true}', "number must be an integer"),
        (b'{"number":1.0}', "number must be an integer"),
        (b'{"number":"1"}', "number must be an integer"),
        (b'{"number":null}', "number must be an integer"),
        (b'{"size":1e2}', "size must be an integer"),
        (b'{"size":12}', SIZE_NOT_BYTES),
        (b'{"number":1,"number":1}', "number is given more than once"),
        (b'{"size":8,"si\\u007ae":16}', "size is given more than once"),
        (b'{"extension_mandatory":[{"a":1,"a":2}]}', "a is given more than once"),
        (b'{"additional_slave_SAE_IDs":["sae-a"]}', "repeats an SAE"),
    ],
)
def test_refusals_name_the_member_and_the_problem(body: bytes, message: str) -> None:
    with pytest.raises(CallerError, match=message) as caught:
        decode(body)
    assert caught.value.reason is ErrorReason.INVALID_ARGUMENT


def test_repeated_unknown_members_are_ignored_like_single_ones() -> None:
    assert decode(b'{"x":1,"x":2,"number":2}').number == 2


def test_values_of_clients_are_never_repeated_in_messages() -> None:
    secret = base64.b64encode(b"0123456789abcdef").decode()
    for body in (
        {"key_IDs": [{"key_ID": secret}]},
        {"key_IDs": [{"key_ID": 1, "key": secret}]},
        {"key_IDs": secret},
    ):
        with pytest.raises(CallerError) as caught:
            schema.decode_key_ids(json.dumps(body).encode())
        assert secret not in str(caught.value)


def test_key_ids_keep_their_order_and_any_case_and_version() -> None:
    ids = [UUID(int=5), uuid4(), UUID("550E8400-E29B-81D4-A716-44665544000A")]
    body = {"key_IDs": [{"key_ID": str(key_id).upper(), "key": "ignored"} for key_id in ids]}
    assert schema.decode_key_ids(json.dumps(body).encode()) == ids
    query = "&".join(f"key_ID={key_id}" for key_id in ids)
    assert schema.decode_key_ids_query(f"{query}&other=1") == ids


def test_none_or_too_many_key_ids_are_refused_before_the_node_sees_them() -> None:
    with pytest.raises(CallerError, match="more key_IDs"):
        body = {"key_IDs": [{"key_ID": str(UUID(int=n))} for n in range(schema.MAX_KEY_IDS + 1)]}
        schema.decode_key_ids(json.dumps(body).encode())
    for query in ("", "key_ID=", "other=1"):
        with pytest.raises(CallerError):
            schema.decode_key_ids_query(query)


def test_queries_are_decoded_strictly() -> None:
    assert schema.decode_key_request_query("number=2&size=64") == schema.KeyRequest(2, 8)
    assert schema.decode_key_request_query("n%75mber=2&x=y&&") == schema.KeyRequest(2)
    for query in (
        "number=",
        "number",
        "number=1&number=1",
        "size=+8",
        "size=%zz",
        "size=%ff",
        "number=٣",
        "extension_optional=1",
        "x=" + "y" * 9000,
    ):
        with pytest.raises(CallerError):
            schema.decode_key_request_query(query)


def test_container_is_compact_and_equal_to_generic_json() -> None:
    keys = [DeliveredKey(uuid4().bytes, bytes(range(n, n + 32))) for n in (0, 99, 200)]
    plain = schema.encode_key_container(keys)
    assert plain == json.dumps(json.loads(plain), separators=(",", ":")).encode()
    decoded = json.loads(schema.encode_key_container(keys, grade='dske(2,3)"'))
    assert decoded["key_container_extension"] == {"keymesh_grade": 'dske(2,3)"'}
    assert [base64.b64decode(key["key"], validate=True) for key in decoded["keys"]] == [k.value for k in keys]


def test_status_has_the_members_of_table_9() -> None:
    status = KeyStatus("a", "b", 256, 8, 65536, 5, 10, 128, 8, "local", 0.0)
    decoded = json.loads(schema.encode_status(status, master="m", slave="s"))
    assert decoded == {
        "source_KME_ID": "a",
        "target_KME_ID": "b",
        "master_SAE_ID": "m",
        "slave_SAE_ID": "s",
        "key_size": 256,
        "stored_key_count": 5,
        "max_key_count": 10,
        "max_key_per_request": 128,
        "max_key_size": 65536,
        "min_key_size": 8,
        "max_SAE_ID_count": 8,
        "status_extension": {"keymesh_grade": "local"},
    }


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(body: bytes) -> None:
    for decoder in (decode, schema.decode_key_ids):
        try:
            decoder(body)
        except CallerError as error:
            assert error.message


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(schema._KEY_REQUEST_MEMBERS)), _JSON, max_size=5))
def test_any_json_in_known_members_decodes_or_is_refused(document: dict[str, object]) -> None:
    try:
        request = decode(json.dumps(document).encode())
    except CallerError as error:
        assert answer_error(error).status == 400
        json.loads(answer_error(error).body)
    else:
        assert request.number >= 1
        assert request.size_bytes is None or request.size_bytes >= 1


@given(st.text(max_size=80))
def test_any_segment_is_an_sae_id_or_refused(text: str) -> None:
    try:
        sae_id = decode_sae_segment(text)
    except CallerError:
        return
    assert 1 <= len(sae_id) <= 64
    assert sae_id.isascii()
    assert sae_id.isprintable()
    assert " " not in sae_id


def test_targets_are_split_on_the_raw_path() -> None:
    assert split_target("/api/v1/keys/a%2Fb/status") == ("status", "a%2Fb", "")
    assert split_target("/api/v1/keys/a:b/enc_keys/?number=1?2") == ("enc_keys", "a:b", "number=1?2")
    assert split_target("https://h:1/api/v1/keys/x/dec_keys?key_ID=1") == ("dec_keys", "x", "key_ID=1")
    assert decode_sae_segment("a%2Fb") == "a/b"
    assert decode_sae_segment("%2541") == "%41"


def test_reasons_map_to_codes_by_table() -> None:
    codes = {reason: answer_error(MeshError("m", reason=reason)).status for reason in ErrorReason}
    assert {reason for reason, code in codes.items() if code == 400} == {
        ErrorReason.INVALID_ARGUMENT,
        ErrorReason.LIMIT_EXCEEDED,
        ErrorReason.UNKNOWN_SAE,
        ErrorReason.UNKNOWN_KEY,
    }
    assert {reason for reason, code in codes.items() if code == 401} == {ErrorReason.NOT_AUTHORIZED}
    assert set(codes.values()) == {400, 401, 503}


def test_unknown_key_has_the_standard_text_and_no_oracle() -> None:
    error = CallerError("key 5 was redeemed", reason=ErrorReason.UNKNOWN_KEY, facts={"key": 5})
    answer = answer_error(error)
    assert json.loads(answer.body) == {"message": KEY_NOT_FOUND, "details": [{"reason": "unknown-key"}]}
    assert answer_error(error, unknown_key_status=404).status == 404


def test_unauthorized_has_no_body() -> None:
    assert answer_error(NotAuthorizedError("the story")).body == b""


def test_shortage_says_when_to_come_back() -> None:
    answer = answer_error(ShortageError("not enough", retry_after_s=2.1, facts={"available_bytes": 7}))
    assert answer.status == 503
    assert answer.headers == {"Retry-After": "3"}
    assert json.loads(answer.body) == {
        "message": "not enough",
        "details": [
            {"reason": "out-of-material"},
            {"available_bytes": 7},
            {"retry_after_s": 3},
            {"outcome": "none"},
        ],
    }
    assert answer_error(UnavailableError("gone")).headers == {"Retry-After": "1"}
    assert answer_error(UnavailableError("gone", retry_after_s=1e9)).headers == {"Retry-After": "3600"}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ShortageError("", reason=ErrorReason.BUSY), "none"),
        (UnavailableError("", reason=ErrorReason.PEER_UNREACHABLE), "unknown"),
        (UnavailableError("", reason=ErrorReason.PEER_UNREACHABLE, facts=NOTHING_HAPPENED), "none"),
        (UnavailableError("", reason=ErrorReason.DEADLINE_EXCEEDED), "unknown"),
        (UnavailableError("", reason=ErrorReason.DISK_FULL), "unknown"),
        (PeerError("", facts=NOTHING_HAPPENED), "none"),
        (HttpRefusal(HTTPStatus.SERVICE_UNAVAILABLE, "", reason="busy"), "none"),
        (HttpRefusal(HTTPStatus.SERVICE_UNAVAILABLE, "", reason="internal"), "unknown"),
    ],
)
def test_a_503_says_once_whether_anything_happened(error: MeshError | HttpRefusal, outcome: str) -> None:
    answer = answer_refusal(error) if isinstance(error, HttpRefusal) else answer_error(error)
    details = json.loads(answer.body)["details"]
    assert [detail for detail in details if "outcome" in detail] == [{"outcome": outcome}]


def test_integrity_errors_tell_the_caller_nothing() -> None:
    answer = answer_error(IntegrityError("lane kme-a--kme-b went back", facts={"lane": 4}))
    assert answer.status == 503
    assert json.loads(answer.body) == {
        "message": KEY_ACCESS_ERROR,
        "details": [{"reason": "state-corrupt"}, {"retry_after_s": 1}, {"outcome": "unknown"}],
    }
