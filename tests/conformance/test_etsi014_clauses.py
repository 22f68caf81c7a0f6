"""ETSI GS QKD 014 V1.1.1, clause by clause, from outside: real sockets, real mutual TLS."""

from __future__ import annotations

import base64
import json
import re
import ssl
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.conftest import Stack
from tests.conformance.wire import Received, Wire, client_context

UUID_TEXT = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
SIZE_NOT_BYTES = "size shall be a multiple of 8"
MANDATORY_UNSUPPORTED = "not all extension_mandatory parameters are supported"
MANDATORY_NOT_MET = "not all extension_mandatory request options could be met"
KEY_NOT_FOUND = "one or more keys specified are not found on KME"


def assert_error(received: Received, status: int, message: str | None = None) -> list[dict[str, Any]]:
    """An Error object of clause 6.5; returns its details."""
    assert received.status == status, received
    assert received.headers["content-type"] == "application/json"
    error = received.json()
    assert isinstance(error["message"], str)
    assert error["message"]
    if message is not None:
        assert error["message"] == message
    details = error.get("details", [])
    assert isinstance(details, list)
    assert all(isinstance(detail, dict) for detail in details)
    return details


def assert_unauthorized(received: Received) -> None:
    """A 401 carries no body at all."""
    assert received.status == 401, received
    assert received.headers["content-length"] == "0"
    assert "content-type" not in received.headers
    assert received.body == b""


def path_of(sae_id: str, method: str) -> str:
    return f"/api/v1/keys/{sae_id}/{method}"


# --- 5.1 general: transport, identity, content -------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_cl_5_1_tls_1_2_and_later_are_served_with_aead(stack: Stack, version: ssl.TLSVersion) -> None:
    sae = stack.master
    context = client_context(sae.gateway_ca, sae.cert, sae.key, maximum=version)
    with Wire(sae.url, context) as wire:
        suite = wire.socket.cipher()
        assert suite
        assert "GCM" in suite[0] or "CHACHA20" in suite[0]
        assert wire.request("GET", path_of(stack.slave.sae_id, "status")).status == 200


def test_cl_5_1_tls_1_1_is_refused(stack: Stack) -> None:
    sae = stack.master
    context = client_context(sae.gateway_ca, sae.cert, sae.key)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Wire(sae.url, context)


def test_cl_5_1_cbc_suites_of_tls_1_2_are_refused(stack: Stack) -> None:
    sae = stack.master
    context = client_context(sae.gateway_ca, sae.cert, sae.key, maximum=ssl.TLSVersion.TLSv1_2)
    context.set_ciphers("ECDHE-ECDSA-AES256-SHA384:ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES256-SHA")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Wire(sae.url, context)


def test_cl_5_1_connection_without_client_certificate_is_refused(stack: Stack) -> None:
    sae = stack.master
    with (
        pytest.raises((ssl.SSLError, ConnectionError)),
        Wire(sae.url, client_context(sae.gateway_ca, None, None)) as wire,
    ):
        wire.request("GET", path_of(stack.slave.sae_id, "status"))


def test_cl_5_1_certificate_of_an_unknown_root_is_refused_in_the_handshake(
    stack: Stack, tmp_path: Path
) -> None:
    from mesh.pki.authority import Pki

    rogue = Pki.create("rogue").sae(stack.master.sae_id).save(tmp_path, "rogue")
    context = client_context(stack.master.gateway_ca, rogue.cert, rogue.key)
    with pytest.raises((ssl.SSLError, ConnectionError)), Wire(stack.master.url, context) as wire:
        wire.request("GET", path_of(stack.slave.sae_id, "enc_keys"))


def test_cl_5_1_certificate_of_the_node_plane_is_no_sae(stack: Stack) -> None:
    cert, key = stack.other_roots["node"]
    context = client_context(stack.master.gateway_ca, cert, key)
    with pytest.raises((ssl.SSLError, ConnectionError)), Wire(stack.master.url, context) as wire:
        wire.request("GET", path_of(stack.slave.sae_id, "enc_keys"))


def test_cl_5_1_kme_certificate_verifies_strictly(stack: Stack) -> None:
    sae = stack.master
    context = client_context(sae.gateway_ca, sae.cert, sae.key)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with Wire(sae.url, context) as wire:
        assert wire.request("GET", path_of(stack.slave.sae_id, "status")).status == 200


def test_cl_5_1_identity_comes_from_the_certificate_only(stack: Stack) -> None:
    forged = {
        "X-Forwarded-Client-Cert": f"Subject=CN={stack.slave.sae_id}",
        "X-SSL-Client-CN": stack.slave.sae_id,
        "X-SAE-ID": stack.slave.sae_id,
        "X-Forwarded-User": stack.slave.sae_id,
        "Forwarded": f"for={stack.slave.sae_id}",
    }
    received = stack.master.ask("GET", path_of(stack.third.sae_id, "status"), headers=forged)
    assert received.json()["master_SAE_ID"] == stack.master.sae_id


def test_cl_5_1_answers_are_json_in_one_segment_and_never_cached(stack: Stack) -> None:
    with stack.master.connect() as wire:
        wire.send(f"GET {path_of(stack.slave.sae_id, 'enc_keys')} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        first = wire.socket.recv(65536)  # one TLS record: header and body together
    head, _, body = first.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    assert b"cache-control: no-store" in head.lower()
    assert json.loads(body)["keys"]


def test_cl_5_1_connections_are_kept_alive(stack: Stack) -> None:
    with stack.master.connect() as wire:
        ids = set()
        for _ in range(5):
            received = wire.request("GET", path_of(stack.slave.sae_id, "enc_keys"))
            assert received.status == 200
            ids.add(received.json()["keys"][0]["key_ID"])
            assert wire.request("GET", "/nowhere").status == 404
        assert len(ids) == 5


def test_cl_5_1_http_1_0_keep_alive_is_confirmed(stack: Stack) -> None:
    with stack.master.connect() as wire:
        for _ in range(2):
            received = wire.request(
                "GET",
                path_of(stack.slave.sae_id, "status"),
                headers={"Connection": "keep-alive"},
                version="1.0",
            )
            assert received.headers["connection"] == "keep-alive"
        assert wire.request("GET", path_of(stack.slave.sae_id, "status"), version="1.0").status == 200
        assert wire.is_closed_by_peer()


def test_cl_5_1_pipelined_requests_are_answered_in_order(stack: Stack) -> None:
    with stack.master.connect() as wire:
        status = f"GET {path_of(stack.slave.sae_id, 'status')} HTTP/1.1\r\nHost: x\r\n\r\n"
        wire.send((status + "GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n" + status).encode())
        assert [wire.receive().status for _ in range(3)] == [200, 404, 200]


def test_cl_5_1_upgrade_offers_are_ignored(stack: Stack) -> None:
    offers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABk"}
    with stack.master.connect() as wire:
        for headers in (offers, {"Connection": "Upgrade", "Upgrade": "websocket"}, {}):
            assert wire.request("GET", path_of(stack.slave.sae_id, "status"), headers=headers).status == 200


def test_cl_5_1_the_body_of_a_get_is_ignored_and_the_connection_goes_on(stack: Stack) -> None:
    with stack.master.connect() as wire:
        received = wire.request("GET", path_of(stack.slave.sae_id, "enc_keys"), b'{"number":5}')
        assert len(received.json()["keys"]) == 1
        assert wire.request("GET", path_of(stack.slave.sae_id, "status")).status == 200


# --- 5.2 get status, 6.1 status ------------------------------------------------------------------------


def test_cl_5_2_get_status_names_both_kmes_and_both_saes(stack: Stack) -> None:
    received = stack.master.ask("GET", path_of(stack.slave.sae_id, "status"))
    assert received.status == 200
    status = received.json()
    assert (status["source_KME_ID"], status["target_KME_ID"]) == stack.kme_ids
    assert status["master_SAE_ID"] == stack.master.sae_id
    assert status["slave_SAE_ID"] == stack.slave.sae_id


def test_cl_6_1_status_has_every_mandatory_member_with_its_type(stack: Stack) -> None:
    status = stack.master.ask("GET", path_of(stack.slave.sae_id, "status")).json()
    for name in ("source_KME_ID", "target_KME_ID", "master_SAE_ID", "slave_SAE_ID"):
        assert type(status[name]) is str
    for name in (
        "key_size",
        "stored_key_count",
        "max_key_count",
        "max_key_per_request",
        "max_key_size",
        "min_key_size",
        "max_SAE_ID_count",
    ):
        assert type(status[name]) is int
    assert status["key_size"] == 256
    assert status["min_key_size"] == 8
    assert status["max_key_size"] == 65536
    assert status["max_key_per_request"] == 128
    assert status["max_SAE_ID_count"] == 8
    assert status["stored_key_count"] <= status["max_key_count"]
    assert isinstance(status.get("status_extension", {}), dict)


def test_cl_5_2_get_status_draws_nothing(stack: Stack) -> None:
    counts = [
        stack.master.ask("GET", path_of(stack.slave.sae_id, "status")).json()["max_key_count"]
        for _ in range(3)
    ]
    assert len(set(counts)) == 1


def test_cl_5_2_status_of_an_unknown_slave_is_400(stack: Stack) -> None:
    assert_error(stack.master.ask("GET", path_of("no-such-sae", "status")), 400)


@pytest.mark.parametrize("verb", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_cl_5_2_status_is_get_only(stack: Stack, verb: str) -> None:
    received = stack.master.ask(verb, path_of(stack.slave.sae_id, "status"))
    assert received.status == 405
    assert received.headers["allow"] == "GET"


# --- 5.3 get key, 6.2 key request, 6.3 key container ---------------------------------------------------


def assert_one_default_key(received: Received) -> None:
    assert received.status == 200, received
    (key,) = received.json()["keys"]
    assert UUID_TEXT.fullmatch(key["key_ID"])
    assert len(base64.b64decode(key["key"], validate=True)) == 32


def test_cl_5_3_get_key_get_without_query(stack: Stack) -> None:
    assert_one_default_key(stack.master.ask("GET", path_of(stack.slave.sae_id, "enc_keys")))


def test_cl_5_3_get_key_post_empty_object(stack: Stack) -> None:
    assert_one_default_key(stack.master.enc(stack.slave))


def test_cl_5_3_get_key_post_without_a_body(stack: Stack) -> None:
    path = path_of(stack.slave.sae_id, "enc_keys")
    assert_one_default_key(stack.master.ask("POST", path))
    assert_one_default_key(stack.master.ask("POST", path, b""))
    assert_one_default_key(stack.master.ask("POST", path, headers={"Content-Length": "0"}))


def test_cl_5_3_get_key_get_with_number_and_size(stack: Stack) -> None:
    received = stack.master.ask("GET", path_of(stack.slave.sae_id, "enc_keys?number=3&size=1024"))
    keys = received.json()["keys"]
    assert [len(base64.b64decode(key["key"])) for key in keys] == [128, 128, 128]
    assert len({key["key_ID"] for key in keys}) == 3
    assert len({key["key"] for key in keys}) == 3


def test_cl_6_2_number_and_size_in_a_post(stack: Stack) -> None:
    keys = stack.draw(number=2, size=64)
    assert [len(base64.b64decode(key["key"])) for key in keys] == [8, 8]


@pytest.mark.parametrize("bits", [8, 24, 256, 512, 65536])
def test_cl_6_2_any_multiple_of_8_within_the_limits_is_a_size(stack: Stack, bits: int) -> None:
    (key,) = stack.draw(size=bits)
    assert len(base64.b64decode(key["key"])) * 8 == bits
    assert stack.slave.dec(stack.master, key["key_ID"]).json()["keys"] == [key]


def test_cl_6_2_max_key_per_request_is_really_served(stack: Stack) -> None:
    keys = stack.draw(number=128)
    assert len({key["key_ID"] for key in keys}) == 128
    received = stack.slave.dec(stack.master, *(key["key_ID"] for key in keys))
    assert received.json()["keys"] == keys


@pytest.mark.parametrize("size", [1, 7, 9, 255, 257])
def test_cl_6_2_size_not_a_multiple_of_8_has_the_standard_message(stack: Stack, size: int) -> None:
    assert_error(stack.master.enc(stack.slave, size=size), 400, SIZE_NOT_BYTES)
    path = path_of(stack.slave.sae_id, f"enc_keys?size={size}")
    assert_error(stack.master.ask("GET", path), 400, SIZE_NOT_BYTES)


@pytest.mark.parametrize("size", [0, -8, 65544, 2**31, 2**64, 10**30])
def test_cl_6_2_size_outside_the_limits_is_400(stack: Stack, size: int) -> None:
    assert_error(stack.master.enc(stack.slave, size=size), 400)
    assert_error(stack.master.ask("GET", path_of(stack.slave.sae_id, f"enc_keys?size={size}")), 400)


@pytest.mark.parametrize("number", [0, -1, 129, 2**31, 2**64, 10**30])
def test_cl_6_2_number_outside_the_limits_is_400(stack: Stack, number: int) -> None:
    assert_error(stack.master.enc(stack.slave, number=number), 400)
    assert_error(stack.master.ask("GET", path_of(stack.slave.sae_id, f"enc_keys?number={number}")), 400)


@pytest.mark.parametrize("member", ["number", "size"])
@pytest.mark.parametrize("value", ["8", 8.0, 8.5, True, False, None, [8], {"n": 8}])
def test_cl_6_2_wrong_types_are_400(stack: Stack, member: str, value: object) -> None:
    details = assert_error(stack.master.enc(stack.slave, **{member: value}), 400)
    assert {"parameter": member} in details


@pytest.mark.parametrize("text", ["", "three", "1.0", "0x8", "+8", " 8", "8%20", "%388", "1e2", "-8", "٣"])
@pytest.mark.parametrize("name", ["number", "size"])
def test_cl_5_3_text_in_query_numbers_is_400(stack: Stack, name: str, text: str) -> None:
    if text == "%388":  # is "88" once decoded: legal
        received = stack.master.ask("GET", path_of(stack.slave.sae_id, f"enc_keys?{name}={text}"))
        assert received.status == 200
        return
    from urllib.parse import quote

    raw = f"enc_keys?{name}={quote(text, safe='%+')}"
    assert_error(stack.master.ask("GET", path_of(stack.slave.sae_id, raw)), 400)


def test_cl_5_3_repeated_query_parameter_is_400(stack: Stack) -> None:
    assert_error(stack.master.ask("GET", path_of(stack.slave.sae_id, "enc_keys?number=1&number=2")), 400)


@pytest.mark.parametrize("name", ["additional_slave_SAE_IDs", "extension_mandatory", "extension_optional"])
def test_cl_5_3_what_needs_post_is_refused_in_a_get(stack: Stack, name: str) -> None:
    assert_error(stack.master.ask("GET", path_of(stack.slave.sae_id, f"enc_keys?{name}=x")), 400)


def test_cl_5_3_parameters_in_the_query_of_a_post_are_refused(stack: Stack) -> None:
    assert_error(stack.master.ask("POST", path_of(stack.slave.sae_id, "enc_keys?number=3"), {}), 400)


def test_cl_5_3_unknown_slave_is_400(stack: Stack) -> None:
    assert_error(stack.master.ask("GET", path_of("no-such-sae", "enc_keys")), 400)


def test_cl_5_3_self_pair_is_400(stack: Stack) -> None:
    assert_error(stack.master.enc(stack.master), 400)
    assert_error(stack.master.ask("GET", path_of(stack.master.sae_id, "status")), 400)


def test_cl_5_3_head_draws_nothing(stack: Stack) -> None:
    received = stack.master.ask("HEAD", path_of(stack.slave.sae_id, "enc_keys"))
    assert received.status == 405
    assert received.body == b""


def test_cl_6_2_unknown_members_are_ignored(stack: Stack) -> None:
    assert_one_default_key(stack.master.enc(stack.slave, comment="x", Number=7, nested={"number": 9}))


def test_cl_6_3_container_is_compact_lower_case_and_base64(stack: Stack) -> None:
    received = stack.master.ask("GET", path_of(stack.slave.sae_id, "enc_keys"))
    text = received.body.decode("ascii")
    found = re.search(r'"key_ID":"([0-9a-f-]{36})","key":"([A-Za-z0-9+/]+=*)"', text)
    assert found
    assert text.startswith('{"keys":[{')
    assert received.json().keys() == {"keys"}
    uuid.UUID(found[1])


def test_cl_6_2_same_site_pair_gets_keys_too(stack: Stack) -> None:
    received = stack.master.enc(stack.neighbour)
    assert_one_default_key(received)
    key = received.json()["keys"][0]
    assert stack.neighbour.dec(stack.master, key["key_ID"]).json()["keys"] == [key]


# --- 6.2 extensions ----------------------------------------------------------------------------------


def test_cl_6_2_unsupported_mandatory_extension_is_400_with_its_name(stack: Stack) -> None:
    received = stack.master.enc(
        stack.slave, extension_mandatory=[{"abc_route_type": "direct"}, {"keymesh_grade": "x"}]
    )
    details = assert_error(received, 400, MANDATORY_UNSUPPORTED)
    assert {"extension_mandatory_unsupported": ["abc_route_type"]} in details


def test_cl_6_2_optional_extensions_are_ignored(stack: Stack) -> None:
    received = stack.master.enc(
        stack.slave, extension_optional=[{"abc_max_age": 30000}, {"abc_route_type": {"deep": [None, 1.5]}}]
    )
    assert_one_default_key(received)


def test_cl_6_2_grade_is_reported_when_asked_for(stack: Stack) -> None:
    received = stack.master.enc(stack.slave, extension_optional=[{"keymesh_grade": "anything"}])
    grade = received.json()["key_container_extension"]["keymesh_grade"]
    assert isinstance(grade, str)
    assert grade
    met = stack.master.enc(stack.slave, extension_mandatory=[{"keymesh_grade": grade}])
    assert met.json()["key_container_extension"] == {"keymesh_grade": grade}
    one_of = stack.master.enc(stack.slave, extension_mandatory=[{"keymesh_grade": ["dske(9,9)", grade]}])
    assert one_of.status == 200


def test_cl_6_2_mandatory_grade_that_cannot_be_met_is_400(stack: Stack) -> None:
    received = stack.master.enc(stack.slave, extension_mandatory=[{"keymesh_grade": "dske(9,9)"}])
    assert_error(received, 400, MANDATORY_NOT_MET)


@pytest.mark.parametrize("value", ["x", {}, [1], [["a"]], None, [None], 3])
@pytest.mark.parametrize("name", ["extension_mandatory", "extension_optional"])
def test_cl_6_2_extensions_of_a_wrong_type_are_400(stack: Stack, name: str, value: object) -> None:
    assert_error(stack.master.enc(stack.slave, **{name: value}), 400)


@pytest.mark.parametrize("value", [1, None, [], [1], {"a": 1}])
def test_cl_6_2_grade_of_a_wrong_type_is_400(stack: Stack, value: object) -> None:
    assert_error(stack.master.enc(stack.slave, extension_mandatory=[{"keymesh_grade": value}]), 400)


# --- 6.2 additional slaves, annex B --------------------------------------------------------------------


def test_annex_b_every_named_slave_gets_the_same_key_once(stack: Stack) -> None:
    others = [stack.third, stack.neighbour]
    received = stack.master.enc(
        stack.slave, number=2, additional_slave_SAE_IDs=[sae.sae_id for sae in others]
    )
    keys = received.json()["keys"]
    ids = [key["key_ID"] for key in keys]
    for sae in (stack.slave, *others):
        assert sae.dec(stack.master, *ids).json()["keys"] == keys
        assert sae.dec(stack.master, *ids).status == 400


def test_annex_b_a_slave_that_was_not_named_is_401(stack: Stack) -> None:
    received = stack.master.enc(stack.slave, additional_slave_SAE_IDs=[stack.neighbour.sae_id])
    key_id = received.json()["keys"][0]["key_ID"]
    assert_unauthorized(stack.third.dec(stack.master, key_id))
    assert stack.slave.dec(stack.master, key_id).status == 200
    assert stack.neighbour.dec(stack.master, key_id).status == 200


def test_annex_b_a_kme_that_no_slave_calls_does_not_know_the_key(stack: Stack) -> None:
    received = stack.master.enc(stack.slave, additional_slave_SAE_IDs=[stack.third.sae_id])
    (key,) = received.json()["keys"]
    stranger = stack.neighbour.dec(stack.master, key["key_ID"])
    assert stranger.status in (400, 401)  # 401 where the key is known, which is not everywhere
    assert key["key"].encode() not in stranger.body
    assert stack.third.dec(stack.master, key["key_ID"]).json()["keys"] == [key]


def test_cl_6_2_empty_additional_slaves_are_tolerated_by_default(stack: Stack) -> None:
    assert_one_default_key(stack.master.enc(stack.slave, additional_slave_SAE_IDs=[]))


def test_cl_6_2_bad_additional_slaves_are_400(stack: Stack) -> None:
    third, slave, master = stack.third.sae_id, stack.slave.sae_id, stack.master.sae_id
    for value in (
        [""],
        [" "],
        ["a b"],
        [third, third],
        [slave],
        [master],
        [third, ""],
        [1],
        [None],
        [[third]],
        third,
        {"id": third},
        None,
        ["x" * 65],
        ["é"],
        ["no-such-sae"],
        [f"sae-{number}" for number in range(9)],
        [f"sae-{number}" for number in range(300)],
    ):
        assert_error(stack.master.enc(stack.slave, additional_slave_SAE_IDs=value), 400)


# --- 5.4 get key with key IDs, 6.4 key IDs ---------------------------------------------------------------


def test_cl_5_4_slave_gets_the_same_bytes_by_post(stack: Stack) -> None:
    keys = stack.draw(number=3)
    received = stack.slave.dec(stack.master, *(key["key_ID"] for key in keys))
    assert received.status == 200
    assert received.json()["keys"] == keys


def test_cl_5_4_slave_gets_the_same_bytes_by_get(stack: Stack) -> None:
    (key,) = stack.draw()
    target = path_of(stack.master.sae_id, f"dec_keys?key_ID={key['key_ID']}")
    assert stack.slave.ask("GET", target).json()["keys"] == [key]


def test_cl_5_4_several_key_ids_in_one_get(stack: Stack) -> None:
    keys = stack.draw(number=3)
    query = "&".join(f"key_ID={key['key_ID']}" for key in keys)
    target = path_of(stack.master.sae_id, f"dec_keys?{query}")
    assert stack.slave.ask("GET", target).json()["keys"] == keys


def test_cl_6_4_keys_come_in_request_order(stack: Stack) -> None:
    keys = stack.draw(number=4)[::-1]
    assert stack.slave.dec(stack.master, *(key["key_ID"] for key in keys)).json()["keys"] == keys


def test_cl_6_4_upper_case_ids_are_the_same_ids(stack: Stack) -> None:
    (key,) = stack.draw()
    assert stack.slave.dec(stack.master, key["key_ID"].upper()).json()["keys"] == [key]


def test_cl_5_4_a_second_fetch_is_400_with_the_standard_message(stack: Stack) -> None:
    (key,) = stack.draw()
    assert stack.slave.dec(stack.master, key["key_ID"]).status == 200
    assert_error(stack.slave.dec(stack.master, key["key_ID"]), 400, KEY_NOT_FOUND)


def test_cl_5_4_all_or_nothing_and_no_word_which(stack: Stack) -> None:
    first, second = stack.draw(number=2)
    assert stack.slave.dec(stack.master, first["key_ID"]).status == 200
    both = stack.slave.dec(stack.master, second["key_ID"], first["key_ID"])
    assert_error(both, 400, KEY_NOT_FOUND)
    assert first["key_ID"].encode() not in both.body
    assert stack.slave.dec(stack.master, second["key_ID"]).json()["keys"] == [second]


def test_cl_5_4_an_id_that_no_key_can_have_is_400(stack: Stack) -> None:
    assert_error(stack.slave.dec(stack.master, str(uuid.uuid4())), 400, KEY_NOT_FOUND)


def test_cl_5_4_wrong_slave_is_401_and_burns_nothing(stack: Stack) -> None:
    (key,) = stack.draw()
    assert_unauthorized(stack.third.dec(stack.master, key["key_ID"]))
    target = path_of(stack.master.sae_id, f"dec_keys?key_ID={key['key_ID']}")
    assert_unauthorized(stack.third.ask("GET", target))
    assert stack.slave.dec(stack.master, key["key_ID"]).json()["keys"] == [key]


def test_cl_5_4_wrong_slave_is_401_also_after_delivery(stack: Stack) -> None:
    (key,) = stack.draw()
    assert stack.slave.dec(stack.master, key["key_ID"]).status == 200
    assert_unauthorized(stack.third.dec(stack.master, key["key_ID"]))


def test_cl_5_4_master_may_not_fetch_its_own_key(stack: Stack) -> None:
    (key,) = stack.draw()
    assert_unauthorized(stack.master.dec(stack.slave, key["key_ID"]))
    assert_unauthorized(stack.master.dec(stack.master, key["key_ID"]))
    assert stack.slave.dec(stack.master, key["key_ID"]).json()["keys"] == [key]


def test_cl_5_4_wrong_master_in_the_path_gives_no_key(stack: Stack) -> None:
    (key,) = stack.draw()
    assert stack.slave.dec(stack.neighbour, key["key_ID"]).status in (400, 401)
    assert stack.slave.dec(stack.master, key["key_ID"]).json()["keys"] == [key]


def test_cl_5_4_one_forbidden_id_makes_the_call_401(stack: Stack) -> None:
    (mine,) = stack.draw()
    (other,) = stack.master.enc(stack.third).json()["keys"]
    assert_unauthorized(stack.slave.dec(stack.master, mine["key_ID"], other["key_ID"]))
    assert stack.slave.dec(stack.master, mine["key_ID"]).status == 200
    assert stack.third.dec(stack.master, other["key_ID"]).status == 200


def test_cl_5_4_forged_id_gives_no_key_and_burns_nothing(stack: Stack) -> None:
    (key,) = stack.draw()
    forged = key["key_ID"][:-1] + ("0" if key["key_ID"][-1] != "0" else "1")
    assert stack.slave.dec(stack.master, forged).status in (400, 401)
    assert stack.slave.dec(stack.master, key["key_ID"]).json()["keys"] == [key]


@pytest.mark.parametrize(
    "body",
    [
        None,
        b"",
        {},
        {"key_IDs": []},
        {"key_IDs": None},
        {"key_IDs": {}},
        {"key_IDs": "x"},
        {"key_IDs": [None]},
        {"key_IDs": ["550e8400-e29b-41d4-a716-446655440000"]},
        {"key_IDs": [{}]},
        {"key_IDs": [{"key_ID": None}]},
        {"key_IDs": [{"key_ID": 1}]},
        {"key_IDs": [{"key_ID": ""}]},
        {"key_IDs": [{"key_ID": "not a uuid"}]},
        {"key_IDs": [{"key_ID": "550e8400e29b41d4a716446655440000"}]},
        {"key_IDs": [{"key_ID": "{550e8400-e29b-41d4-a716-446655440000}"}]},
        {"key_IDs": [{"key_ID": "550e8400-e29b-41d4-a716-446655440000\n"}]},
        {"key_IDs": [{"key_ID": "550e8400-e29b-41d4-a716-446655440000", "key_ID_extension": 1}]},
        {"key_IDs": [{"key_ID": "550e8400-e29b-41d4-a716-446655440000"}], "key_IDs_extension": []},
        {"keys": [{"key_ID": "550e8400-e29b-41d4-a716-446655440000"}]},
        {"key_IDs": [{"key_ID": "550e8400-e29b-41d4-a716-446655440000"}] * 2},
        {
            "key_IDs": [
                {"key_ID": "550e8400-e29b-41d4-a716-44665544000a"},
                {"key_ID": "550E8400-E29B-41D4-A716-44665544000A"},
            ]
        },
        {"key_IDs": [{"key_ID": str(uuid.UUID(int=number))} for number in range(129)]},
    ],
)
def test_cl_6_4_malformed_key_ids_are_400(stack: Stack, body: object) -> None:
    assert_error(stack.slave.ask("POST", path_of(stack.master.sae_id, "dec_keys"), body), 400)


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?",
        "?key_ID=",
        "?key_ID=x",
        "?key_id=550e8400-e29b-41d4-a716-446655440000",
        "?key_ID=550e8400-e29b-41d4-a716-446655440000&key_ID=550E8400-E29B-41D4-A716-446655440000",
        "?key_ID=550e8400-e29b-41d4-a716-446655440000&key_IDs_extension=1",
        "?key_ID=%",
        "?key_ID=%ff",
    ],
)
def test_cl_5_4_malformed_queries_are_400(stack: Stack, query: str) -> None:
    assert_error(stack.slave.ask("GET", path_of(stack.master.sae_id, "dec_keys") + query), 400)


def test_cl_6_4_echoed_key_objects_are_accepted_and_their_keys_ignored(stack: Stack) -> None:
    keys = stack.draw(number=2)
    echoed = [{**key, "key_ID_extension": None, "key_extension": {"x": 1}} for key in keys]
    path = path_of(stack.master.sae_id, "dec_keys")
    assert stack.slave.ask("POST", path, {"key_IDs": echoed}).json()["keys"] == keys


# --- 6.5 error, and what HTTP itself refuses ---------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/api",
        "/api/v1/keys",
        "/api/v1/keys/",
        "/api/v1/keys/sae",
        "/api/v1/keys/sae/",
        "/api/v1/keys/sae/enc_keys/x",
        "/api/v1/keys/sae/enc_keys//",
        "/api/v1/keys/sae/ENC_KEYS",
        "/api/v1/keys/sae/%65nc_keys",
        "/api/v2/keys/sae/enc_keys",
        "//api/v1/keys/sae/enc_keys",
        "/api/v1/keys/a/b/enc_keys",
        "/metrics",
    ],
)
def test_cl_6_5_unknown_paths_are_404_with_an_error_body(stack: Stack, target: str) -> None:
    assert_error(stack.master.ask("GET", target), 404)


@pytest.mark.parametrize("method", ["enc_keys", "dec_keys"])
@pytest.mark.parametrize("verb", ["PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
def test_cl_6_5_other_verbs_are_405_with_an_error_body(stack: Stack, method: str, verb: str) -> None:
    received = stack.master.ask(verb, path_of(stack.slave.sae_id, method))
    assert_error(received, 405)
    assert received.headers["allow"] == "GET, POST"


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1", "json"],
)
def test_cl_6_5_other_content_types_are_415(stack: Stack, content_type: str) -> None:
    received = stack.master.ask(
        "POST", path_of(stack.slave.sae_id, "enc_keys"), {}, headers={"Content-Type": content_type}
    )
    assert_error(received, 415)


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'],
)
def test_cl_5_1_json_content_types_are_accepted(stack: Stack, content_type: str) -> None:
    received = stack.master.ask(
        "POST", path_of(stack.slave.sae_id, "enc_keys"), {}, headers={"Content-Type": content_type}
    )
    assert_one_default_key(received)


def test_cl_6_5_compressed_bodies_are_415(stack: Stack) -> None:
    received = stack.master.ask(
        "POST", path_of(stack.slave.sae_id, "enc_keys"), b"{}", headers={"Content-Encoding": "gzip"}
    )
    assert_error(received, 415)


def test_cl_6_5_large_bodies_are_413(stack: Stack) -> None:
    body = b'{"x":"' + b"x" * 300_000 + b'"}'
    assert_error(stack.master.ask("POST", path_of(stack.slave.sae_id, "enc_keys"), body), 413)


def test_cl_6_5_announced_large_bodies_are_413_before_they_come(stack: Stack) -> None:
    received = stack.master.ask(
        "POST", path_of(stack.slave.sae_id, "enc_keys"), b"", headers={"Content-Length": "99999999999"}
    )
    assert_error(received, 413)


def test_cl_6_5_large_chunked_bodies_are_413(stack: Stack) -> None:
    with stack.master.connect() as wire:
        wire.send(
            f"POST {path_of(stack.slave.sae_id, 'enc_keys')} HTTP/1.1\r\nHost: x\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        for _ in range(5):
            wire.send(b"10000\r\n" + b" " * 65536 + b"\r\n")
        assert_error(wire.receive(), 413)


def test_cl_5_1_chunked_bodies_are_read(stack: Stack) -> None:
    with stack.master.connect() as wire:
        wire.send(
            f"POST {path_of(stack.slave.sae_id, 'enc_keys')} HTTP/1.1\r\nHost: x\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            '5\r\n{"num\r\n9\r\nber": 2 }\r\n0\r\n\r\n'.encode()
        )
        assert len(wire.receive().json()["keys"]) == 2
        assert wire.request("GET", path_of(stack.slave.sae_id, "status")).status == 200


def test_cl_5_1_expect_100_continue_is_answered(stack: Stack) -> None:
    with stack.master.connect() as wire:
        wire.send(
            f"POST {path_of(stack.slave.sae_id, 'enc_keys')} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
            "Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert wire.receive().status == 100
        wire.send(b"{}")
        assert_one_default_key(wire.receive())


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"1",
        b"{'number': 1}",
        b'{"number": 1,}',
        b'{"number": 1} x',
        b'{"number": NaN}',
        b'{"x": NaN}',
        b'{"x": -Infinity}',
        b'{"number": 1, "number": 1}',
        b'{"number": 1, "n\\u0075mber": 2}',
        b'{"size": 8, "number": 1, "size": 16}',
        b'{"extension_optional": [{"a": 1, "a": 2}]}',
        b'{"number": 01}',
        b'{"x": "\xff"}',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"x": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
        b'{"number": ' + b"9" * 5000 + b"}",
        b'{"x": "\n"}',
    ],
)
@pytest.mark.parametrize("method", ["enc_keys", "dec_keys"])
def test_cl_6_5_malformed_bodies_are_400(stack: Stack, method: str, body: bytes) -> None:
    received = stack.master.ask("POST", path_of(stack.slave.sae_id, method), body)
    assert_error(received, 400)
    assert b"Traceback" not in received.body


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /x HTTP/9.9\r\n\r\n",
        b"GET /x HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
)
def test_cl_6_5_what_is_no_http_is_400_and_the_end(stack: Stack, raw: bytes) -> None:
    with stack.master.connect() as wire:
        wire.send(raw)
        received = wire.receive()
        assert_error(received, 400)
        assert b"<html" not in received.body.lower()
        assert b"Traceback" not in received.body
        assert wire.is_closed_by_peer()


# --- pitfalls and peers' faults that a client can see -------------------------------------------------------


@pytest.mark.parametrize("method", ["status", "enc_keys"])
def test_pitfall_23_a_trailing_slash_is_accepted_without_redirect(stack: Stack, method: str) -> None:
    received = stack.master.ask("GET", path_of(stack.slave.sae_id, method) + "/")
    assert received.status == 200
    assert "location" not in received.headers
    assert stack.master.ask("POST", path_of(stack.slave.sae_id, "enc_keys") + "/", {}).status == 200


def test_pitfall_24_percent_encoded_ids_are_decoded_once(stack: Stack) -> None:
    encoded = "".join(f"%{byte:02X}" for byte in stack.slave.sae_id.encode())
    received = stack.master.ask("GET", path_of(encoded, "status"))
    assert received.json()["slave_SAE_ID"] == stack.slave.sae_id


@pytest.mark.parametrize(
    "segment",
    ["", "%20", "a%20b", "%", "%zz", "%C3%A9", "%FF", "%00", "x" * 65, "a%0Ab", "%22", "a|b", "%3Cscript%3E"],
)
def test_pitfall_24_malformed_sae_ids_are_400(stack: Stack, segment: str) -> None:
    received = stack.master.ask("GET", path_of(segment, "enc_keys"))
    assert_error(received, 400)
    assert b"script" not in received.body


@pytest.mark.parametrize(
    "segment", ["a%2Fb", "urn:sae:1", "a%3Ab", "x" * 64, "a%2525", "..", "a@b!$&'()*+,;="]
)
def test_pitfall_24_legal_ids_that_nobody_has_are_400_not_404(stack: Stack, segment: str) -> None:
    details = assert_error(stack.master.ask("GET", path_of(segment, "enc_keys")), 400)
    assert {"reason": "unknown-sae"} in details


def test_fault_no_certificate_reaches_another_pairs_key(stack: Stack) -> None:
    (key,) = stack.draw()
    for sae in (stack.third, stack.neighbour):
        for master in (stack.master, stack.slave):
            received = sae.dec(master, key["key_ID"])
            assert received.status in (400, 401)
            assert key["key"].encode() not in received.body
    assert stack.slave.dec(stack.master, key["key_ID"]).json()["keys"] == [key]


def test_fault_keys_are_never_handed_out_twice(stack: Stack) -> None:
    keys = [key for _ in range(4) for key in stack.draw(number=32)]
    assert len({key["key_ID"] for key in keys}) == len(keys)
    assert len({key["key"] for key in keys}) == len(keys)


def test_fault_keys_of_an_earlier_request_survive_later_ones(stack: Stack) -> None:
    (first,) = stack.draw()
    stack.draw(number=64)
    assert stack.slave.dec(stack.master, first["key_ID"]).json()["keys"] == [first]


def test_fault_both_directions_at_once_do_not_block_each_other(stack: Stack) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def both_ways(index: int) -> bool:
        master, slave = (stack.master, stack.slave) if index % 2 else (stack.slave, stack.master)
        key = master.enc(slave).json()["keys"][0]
        return bool(slave.dec(master, key["key_ID"]).json()["keys"] == [key])

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(both_ways, range(64)))


def test_fault_health_and_metrics_show_no_key_facts(stack: Stack) -> None:
    from urllib.request import urlopen

    (key,) = stack.draw()
    stack.slave.dec(stack.master, key["key_ID"])
    pages = b"".join(urlopen(stack.ops_url + page).read() for page in ("/healthz", "/readyz", "/metrics"))
    for secret in (key["key"], key["key_ID"], stack.slave.sae_id, base64.b64decode(key["key"]).hex()[:12]):
        assert secret.encode() not in pages
    for name in (
        b'keymesh_gateway_requests_total{code="200",method="enc_keys"}',
        b"keymesh_gateway_request_seconds_bucket",
        b"keymesh_certificate_expiry_timestamp_seconds",
    ):
        assert name in pages
