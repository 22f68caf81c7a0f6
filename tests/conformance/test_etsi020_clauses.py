"""ETSI GS QKD 020 V1.1.1, row by row, from outside: a node and its gateway as processes, real mutual TLS.

The standard is an OpenAPI description whose prose has headings and tables without numbers; a test's name says
which it plays: ``table_1`` and ``operation`` (clauses "Connection specification and security scheme" and
"Operation of the API"), ``path_…``, ``response_…`` and ``schema_…`` (components of the description),
``extensions`` and ``sae_ids``. What misbehaving peers do is in ``tests/independent020``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import uuid
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.wire import Received, Wire
from tests.fakes.border_site import UNREACHABLE
from tests.independent020 import messages as m
from tests.independent020.messages import Names
from tests.independent020.peer import FAILED, RELAYED, VOIDED, Answer, Plan, Reply, fresh, until
from tests.independent020.troubles import silent
from tests.independent020.world import World

pytestmark = pytest.mark.slow

NAMES = Names.of("near-initiator", "own-b")
ID = "550e8400-e29b-41d4-a716-446655440000"
KEY = {"key_id": ID, "value": base64.b64encode(bytes(32)).decode()}
MANY = {f"E32473_{index}": index for index in range(1025)}
REMOVED = object()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, private_proofs: Path) -> Iterator[World]:
    found = World(tmp_path_factory.mktemp("clauses020"), private_proofs)
    try:
        yield found
        for kms in found.kms.values():
            assert kms.complaints == []
    finally:
        found.stop()


def connect(world: World, *, papers: Any = "near", maximum: ssl.TLSVersion | None = None) -> Wire:
    """A connection of near's to the site's listener for key managers."""
    context = world.context(world.papers[papers] if papers else None)
    if maximum is not None:
        context.minimum_version = maximum
        context.maximum_version = maximum
    return Wire(world.site.url020, context)


def keys_body(world: World, **members: Any) -> dict[str, Any]:
    """A good request for one fresh key; members replaced, or left out if ``REMOVED``."""
    document = m.keys_document(NAMES, fresh(1), world.near.callback)
    return _changed(document, members)


def void_body(world: World, **members: Any) -> dict[str, Any]:
    """A good request to void one key that was never here."""
    return _changed(m.void_document(NAMES, [str(uuid.uuid4())], world.near.callback), members)


def ack_body(**members: Any) -> list[dict[str, Any]]:
    """A container about a key that was never here."""
    return [_changed(m.ack_document(m.RELAYED, [str(uuid.uuid4())], Names.of("own-a", "near-b")), members)]


def _changed(document: dict[str, Any], members: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**document, **members}.items() if value is not REMOVED}


def post(world: World, path: str, document: Any) -> Answer:
    """One POST of near's."""
    return world.run(world.near.post(path, document))


def each(name: str, *values: object) -> list[dict[str, Any]]:
    """One member with each of these values."""
    return [{name: value} for value in values]


def assert_problem(answer: Answer, status: int, suffix: str, *details: str) -> str:
    """The problem that the standard lists; returns its text."""
    assert answer.status == status, answer
    assert answer.document["status"] == status
    assert answer.document["title"]
    found, texts = answer.problem()
    assert found == suffix, answer
    assert texts
    assert set(details) <= texts.keys(), answer
    return " ".join(texts.values())


# --- table 1 and "Connection specification and security scheme" ----------------------------------------


def test_table_1_http_1_1_over_tls_1_3(world: World) -> None:
    with connect(world) as wire:
        assert wire.socket.version() == "TLSv1.3"
        for _ in range(3):
            assert wire.request("GET", m.VERSIONS).status == 200


def test_table_1_tls_1_2_is_refused(world: World) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        connect(world, maximum=ssl.TLSVersion.TLSv1_2)


def test_table_1_our_own_requests_are_tls_1_3_too(world: World) -> None:
    """The peers' listeners take nothing less, and keys arrive there."""
    status, _ = world.run(world.enc("own-a", "near-tls"))
    assert status == 200


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=UTF-8"])
def test_table_1_content_type_of_requests(world: World, content_type: str) -> None:
    body = json.dumps(keys_body(world)).encode()
    with connect(world) as wire:
        received = wire.request("POST", m.KEYS, body, headers={"Content-Type": content_type})
    assert received.status == 202


def test_table_1_content_type_of_answers(world: World) -> None:
    with connect(world) as wire:
        versions = wire.request("GET", m.VERSIONS)
        problem = wire.request("POST", m.KEYS, b"{}")
        taken = wire.request("POST", m.KEYS, json.dumps(keys_body(world)).encode())
    assert [_media(one) for one in (versions, problem)] == ["application/json"] * 2
    assert (taken.status, taken.body) == (202, b"")


def _media(received: Received) -> str:
    return received.headers["content-type"].partition(";")[0]


def test_table_1_another_content_type_is_refused_and_leaves_nothing(world: World) -> None:
    document = keys_body(world)
    with connect(world) as wire:
        received = wire.request(
            "POST", m.KEYS, json.dumps(document).encode(), headers={"Content-Type": "text/plain"}
        )
    assert received.status == 415
    assert post(world, m.KEYS, document | m._names(Names.of("near-other-type", "own-a"))).status == 202


def test_security_mutual_tls_no_certificate_no_connection(world: World) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)), connect(world, papers=None) as wire:
        wire.request("GET", m.VERSIONS)


def test_security_mutual_tls_the_identity_is_the_certificates(world: World) -> None:
    """Third's certificate may not name near's applications, whatever a header says."""
    document = keys_body(world, ack_callback_url=world.third.callback)
    with connect(world, papers="third") as wire:
        received = wire.request(
            "POST", m.KEYS, json.dumps(document).encode(), headers={"X-Forwarded-Client-Cert": "near-kme"}
        )
    assert received.status == 401
    assert m.check_problem(401, received.json())[0] == "unauthorized"


def test_security_mutual_tls_our_certificate_verifies_strictly(world: World) -> None:
    context = world.context(world.papers["near"])
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with Wire(world.site.url020, context) as wire:
        assert wire.request("GET", m.VERSIONS).status == 200


# --- paths ---------------------------------------------------------------------------------------------


def test_path_versions_and_schema_version_container(world: World) -> None:
    answer = world.run(world.near.get(m.VERSIONS))
    assert answer.status == 200
    assert answer.document["versions"] == ["v1"]
    assert answer.document["capabilities"] == ["synchronous_mode"]
    assert all(len(one) <= 128 for one in answer.document["capabilities"])
    assert answer.document.keys() <= {"versions", "capabilities", "extension"}


@pytest.mark.parametrize(
    ("verb", "path", "allowed"),
    [
        *(("POST", m.VERSIONS, "GET"), ("DELETE", m.VERSIONS, "GET")),
        *((verb, path, "POST") for verb in ("GET", "PUT", "HEAD") for path in (m.KEYS, m.ACK, m.VOID)),
    ],
)
def test_paths_have_one_verb_each(world: World, verb: str, path: str, allowed: str) -> None:
    with connect(world) as wire:
        received = wire.request(verb, path)
    assert (received.status, received.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize("path", ["/", "/kmapi", "/kmapi/v2/ext_keys", "/api/v1/keys/own-a/status"])
def test_paths_nothing_else_is_served_there(world: World, path: str) -> None:
    with connect(world) as wire:
        received = wire.request("GET", path)
    assert received.status == 404
    assert m.check_problem(404, received.json())


def test_path_ext_keys_asynchronous_202_without_waiting_for_anything_remote(world: World) -> None:
    names = Names.of("near-quick", "third-quick")
    world.third.plans["third-quick"] = Plan(keys=repeat(Reply(wait_s=3.0)))
    values = fresh(1)
    world.near.lend(names, values)
    assert post(world, m.KEYS, m.keys_document(names, values, world.near.callback)).status == 202
    assert world.near.lent_as(names, "posted") == list(values)
    world.run(world.lent(world.near, values, RELAYED))


def test_path_ext_keys_the_ack_follows_at_the_callback_url(world: World) -> None:
    names, values = Names.of("near-callback", "own-b"), fresh(3)
    assert world.run(world.near.hand_over(names, values)).status == 202
    world.run(world.lent(world.near, values, RELAYED))
    said = [m.read_acks(document) for document in world.near.heard(m.ACK, names.initiator)]
    assert {one for acks in said for ack in acks for one in ack.key_ids} == values.keys()
    assert {(ack.status, ack.names) for acks in said for ack in acks} == {(m.RELAYED, names)}


def test_path_ext_keys_synchronous_200_with_ack_containers_and_no_ack_request(world: World) -> None:
    names, values = Names.of("near-synchronous", "own-b"), fresh(2)
    answer = post(world, m.KEYS, m.keys_document(names, values, None))
    assert answer.status == 200
    acks = m.read_acks(answer.document)
    assert {one for ack in acks for one in ack.key_ids} == values.keys()
    assert {(ack.status, ack.names) for ack in acks} == {(m.RELAYED, names)}
    world.run(asyncio.sleep(0.3))
    assert world.near.heard(m.ACK, names.initiator) == []


def test_path_ext_keys_synchronous_may_resolve_as_failed(world: World) -> None:
    names, values = Names.of("near-synchronous-f", "third-synchronous-f"), fresh(1)
    world.third.plans["third-synchronous-f"] = Plan(keys=repeat(Reply(400, is_heeded=False)))
    answer = post(world, m.KEYS, m.keys_document(names, values, None))
    assert [one.status for one in m.read_acks(answer.document)] == [m.FAILED]


def test_path_void_202_and_the_result_at_the_callback_url(world: World) -> None:
    names, values = Names.of("near-voiding", "own-b"), fresh(2)
    world.run(world.near.hand_over(names, values))
    world.run(world.lent(world.near, values, RELAYED))
    assert world.run(world.near.void(names, values)).status == 202
    world.run(world.lent(world.near, values, VOIDED))
    assert all(world.run(world.dec("own-b", names.initiator, one))[1] == {} for one in values)


def test_path_void_synchronous_200_with_ack_containers(world: World) -> None:
    names, values = Names.of("near-voiding-s", "own-b"), fresh(1)
    world.run(world.near.hand_over(names, values))
    world.run(world.lent(world.near, values, RELAYED))
    unknown = str(uuid.uuid4())
    answer = post(world, m.VOID, m.void_document(names, [*values, unknown], None))
    assert answer.status == 200
    said = {one: ack.status for ack in m.read_acks(answer.document) for one in ack.key_ids}
    assert said == {**dict.fromkeys(values, m.VOIDED), unknown: m.NOT_PRESENT}


def test_path_void_all_keys_of_these_saes_and_of_no_others(world: World) -> None:
    names, others = Names.of("near-void-all", "own-b"), Names.of("near-void-all", "own-a")
    values, spared = fresh(2), fresh(1)
    world.run(world.near.hand_over(names, values))
    world.run(world.near.hand_over(others, spared))
    world.run(world.lent(world.near, [*values, *spared], RELAYED))
    answer = post(world, m.VOID, m.void_document(names, [], None, all_confirmation=True))
    assert {one for ack in m.read_acks(answer.document) for one in ack.key_ids} == values.keys()
    assert world.run(world.dec("own-a", others.initiator, *spared)) == (200, spared)


def test_path_ack_200_for_a_valid_one(world: World) -> None:
    """What our application waits for; several containers, keys of several requests."""

    async def play() -> None:
        world.near.plans["near-acked"] = Plan(say=silent)
        asked = [asyncio.ensure_future(world.enc("own-a", "near-acked")) for _ in range(2)]
        await until(lambda: len(world.near.of("near-acked")) == 2)
        names = Names.of("own-a", "near-acked")
        acks = [m.ack_document(m.RELAYED, [one], names) for one in world.near.of("near-acked")]
        answer = await world.near.post(m.ACK, acks)
        assert (answer.status, answer.document) == (200, None)
        assert [(await one)[0] for one in asked] == [200, 200]

    world.run(play())


# --- responses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["keys", "initiator_sae_id", "target_sae_ids"])
def test_response_400_extkey_missing_parameters(world: World, name: str) -> None:
    answer = post(world, m.KEYS, keys_body(world, **{name: REMOVED}))
    assert name in assert_problem(answer, 400, "missing-parameters", "missing_parameters")


@pytest.mark.parametrize("name", ["key_ids", "initiator_sae_id", "target_sae_ids"])
def test_response_400_void_missing_parameters(world: World, name: str) -> None:
    answer = post(world, m.VOID, void_body(world, **{name: REMOVED}))
    assert name in assert_problem(answer, 400, "missing-parameters", "missing_parameters")


@pytest.mark.parametrize("name", ["key_id_container", "ack_status", "initiator_sae_id", "target_sae_ids"])
def test_response_400_ack_missing_parameters(world: World, name: str) -> None:
    answer = post(world, m.ACK, ack_body(**{name: REMOVED}))
    assert name in assert_problem(answer, 400, "missing-parameters", "missing_parameters")


def test_response_400_extkey_target_not_recognized(world: World) -> None:
    answer = post(world, m.KEYS, keys_body(world, target_sae_ids=["nobody"]))
    assert_problem(answer, 400, "key-routing-error", "target_sae_id_not_recognized")


def test_response_400_extkey_no_passback(world: World) -> None:
    answer = post(world, m.KEYS, keys_body(world, target_sae_ids=["near-b"]))
    assert_problem(answer, 400, "key-routing-error", "invalid_routing")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"void"', b"\xff", b"{}{}"])
def test_response_400_void_not_understood(world: World, body: bytes) -> None:
    assert_problem(post(world, m.VOID, body), 400, "void-request-not-understood", "key_voiding_error")


@pytest.mark.parametrize("more", [{}, {"all_confirmation": False}])
def test_response_400_void_no_key_ids_or_confirmation(world: World, more: dict[str, Any]) -> None:
    """The schema's text and its example disagree about the name: both are there."""
    answer = post(world, m.VOID, void_body(world, key_ids=[], **more))
    names = ("no_key_ids_or_confirmation", "no_all_confirmation")
    assert_problem(answer, 400, "no-key-ids-or-confirmation", *names)


@pytest.mark.parametrize("body", [b"", b"[", b"{}", b"null", b"\xff"])
def test_response_400_ack_not_understood(world: World, body: bytes) -> None:
    assert_problem(post(world, m.ACK, body), 400, "ack-not-understood", "ack_not_understood")


def test_response_400_ack_key_not_present(world: World) -> None:
    assert_problem(post(world, m.ACK, ack_body()), 400, "key-not-present", "key_not_present")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'{"keys":[],"keys":[]}', b'{"a":NaN}'])
def test_response_400_extkey_invalid_parameter(world: World, body: bytes) -> None:
    assert_problem(post(world, m.KEYS, body), 400, "invalid-parameter", "malformed_property")


def test_response_401_unauthorized(world: World) -> None:
    answer = post(world, m.KEYS, keys_body(world, initiator_sae_id="third-a"))
    assert_problem(answer, 401, "unauthorized", "unauthorized")


@pytest.mark.parametrize("path", [m.VERSIONS, m.KEYS, m.ACK, m.VOID])
def test_response_401_a_certificate_that_is_nobodys(world: World, path: str) -> None:
    with Wire(world.site.url020, world.context(world.wrong)) as wire:
        received = (
            wire.request("GET", path)
            if path == m.VERSIONS
            else wire.request("POST", path, b"[]" if path == m.ACK else b"{}")
        )
    assert received.status == 401
    assert m.check_problem(401, received.json())[0] == "unauthorized"


@pytest.mark.parametrize("path", [m.KEYS, m.VOID, m.ACK])
def test_response_408_timeout(world: World, path: str) -> None:
    body = json.dumps(keys_body(world)).encode()
    with connect(world) as wire:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        wire.send(f"{head}Content-Length: {len(body) + 1}\r\n\r\n".encode() + body)
        received = wire.receive()
    assert received.status == 408
    suffix, details = m.check_problem(408, received.json())
    assert (suffix, set(details)) == ("timeout", {"timeout"})


def test_response_503_too_many_targets(world: World) -> None:
    answer = post(world, m.KEYS, keys_body(world, target_sae_ids=["own-b", *(f"own-{n}" for n in range(9))]))
    assert_problem(answer, 503, "key-routing-error", "no_route_multiple_targets")


def test_response_503_no_known_route(world: World) -> None:
    """To an SAE that is somebody's, but lies behind no key manager that is met here."""
    answer = post(world, m.KEYS, keys_body(world, target_sae_ids=[UNREACHABLE + "b"]))
    assert_problem(answer, 503, "key-routing-error", "no_known_route")


def test_response_503_no_known_route_for_a_key_that_came_another_way_before(world: World) -> None:
    """A loop over several key managers: the standard forbids only the way straight back."""
    values = fresh(1)
    came = m.keys_document(Names.of("third-loop", "own-b"), values, world.third.callback)
    assert world.run(world.third.post(m.KEYS, came)).status == 202
    again = m.keys_document(Names.of("near-loop", "own-c"), values, world.near.callback)
    assert_problem(post(world, m.KEYS, again), 503, "key-routing-error", "no_known_route")
    assert world.run(world.dec("own-c", "near-loop", *values))[1] == {}


def test_response_503_unsupported_mandatory_extension_names_them(world: World) -> None:
    """503 here; ETSI GS QKD 014 says 400."""
    extension = {"E32473_ext1": 1, "E32473_ext2": {"a": []}}
    answer = post(world, m.KEYS, keys_body(world, extension_mandatory=extension))
    text = assert_problem(answer, 503, "unsupported-mandatory-extension", "unsupported_mandatory_extension")
    assert all(name in text for name in extension)


def test_response_503_while_the_node_is_away(world: World) -> None:
    world.site.kill("node")
    try:
        answer = post(world, m.KEYS, keys_body(world))
        assert_problem(answer, 503, "server-side-general-error", "server_side_general_error")
        # 400 would say that nothing is held, and nobody knows that now.
        assert post(world, m.KEYS, keys_body(world, target_sae_ids=[])).status == 503
    finally:
        world.site.launch("node")
        world.site.wait_ready("node")
        world.site.wait_ready("gateway")


# --- schemas -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        *each("key_id", "", "x", ID[:-1], ID + "0", "{" + ID + "}", ID.replace("-", ""), 7, None),
        *each("value", "", "AA", "AAA", "AA==AA==", "-_8=", "AB==", " AAA=", "A A=", 7, None),
        *each("extension", [], "x", None, 7, MANY),
    ],
)
def test_schema_key(world: World, change: dict[str, Any]) -> None:
    answer = post(world, m.KEYS, keys_body(world, keys=[{**KEY, **change}]))
    assert_problem(answer, 400, "invalid-parameter", "malformed_property")


@pytest.mark.parametrize("missing", ["key_id", "value"])
def test_schema_key_required(world: World, missing: str) -> None:
    key = {name: value for name, value in KEY.items() if name != missing}
    assert_problem(post(world, m.KEYS, keys_body(world, keys=[key])), 400, "missing-parameters")


@pytest.mark.parametrize("keys", [None, {}, [], "x", [None], [[]], [KEY, KEY]])
def test_schema_keys(world: World, keys: object) -> None:
    answer = post(world, m.KEYS, keys_body(world, keys=keys))
    assert_problem(answer, 400, "invalid-parameter", "malformed_property")


def test_schema_key_id_is_a_uuid_of_any_version_and_case(world: World) -> None:
    names = Names.of("near-uuids", "own-b")
    ids = [
        str(uuid.uuid1()),
        str(uuid.uuid4()).upper(),
        str(uuid.uuid5(uuid.NAMESPACE_URL, "x")),
        str(uuid.UUID(int=7)),
    ]
    document = m.keys_document(names, {one: bytes(32) for one in ids}, None)
    answer = post(world, m.KEYS, document)
    assert answer.status == 200
    assert {one for ack in m.read_acks(answer.document) for one in ack.key_ids} == {
        one.lower() for one in ids
    }


@pytest.mark.parametrize("size", [1, 2, 3, 31, 32, 33, 8192])
def test_schema_value_padding_is_no_key_material(world: World, size: int) -> None:
    names, values = Names.of(f"near-size-{size}", "own-b"), fresh(1, size)
    assert post(world, m.KEYS, m.keys_document(names, values, None)).status == 200
    assert world.run(world.dec("own-b", names.initiator, *values)) == (200, values)


def test_schema_value_table_1_alphabet_and_padding_in_what_we_send(world: World) -> None:
    async def play() -> None:
        for size in (8, 16, 24, 256, 264):
            status, keys = await world.enc("own-a", f"near-value-{size}", size=size)
            assert status == 200
            (document,) = world.near.heard(m.KEYS, f"near-value-{size}")
            assert [one["value"] for one in document["keys"]] == [
                base64.b64encode(key).decode() for key in keys.values()
            ]

    world.run(play())


def test_schema_ext_key_container_of_ours_has_its_members_and_no_others(world: World) -> None:
    status, keys = world.run(world.enc("own-a", "near-members", "near-members-2", number=2))
    assert status == 200
    (document,) = world.near.heard(m.KEYS, "near-members-2")
    assert document.keys() == {"keys", "initiator_sae_id", "target_sae_ids", "ack_callback_url"}
    assert [one.keys() for one in document["keys"]] == [{"key_id", "value"}] * 2
    assert {one["key_id"] for one in document["keys"]} == keys.keys()
    assert document["initiator_sae_id"] == "own-a"
    assert sorted(document["target_sae_ids"]) == ["near-members", "near-members-2"]
    assert document["ack_callback_url"] == world.site.url020 + m.ACK


BAD_SAES = [
    "",
    "x" * 65,
    "a b",
    "a\x00",
    "ü",
    "a%",
    "a%zz",
    "a\\",
    "a\n",
    '"',
    "<",
    "^",
    "`",
    "{",
    "|",
    7,
    None,
    [],
]


@pytest.mark.parametrize("sae", BAD_SAES)
def test_sae_ids_and_schema_initiator_sae_id(world: World, sae: object) -> None:
    assert_problem(post(world, m.KEYS, keys_body(world, initiator_sae_id=sae)), 400, "invalid-parameter")
    assert_problem(post(world, m.VOID, void_body(world, initiator_sae_id=sae)), 400, "invalid-parameter")
    assert_problem(post(world, m.ACK, ack_body(initiator_sae_id=sae)), 400, "invalid-parameter")


@pytest.mark.parametrize("sae", BAD_SAES)
def test_sae_ids_and_schema_target_sae_id(world: World, sae: object) -> None:
    answer = post(world, m.KEYS, keys_body(world, target_sae_ids=["own-b", sae]))
    assert_problem(answer, 400, "invalid-parameter")


def test_sae_ids_an_invalid_character_is_called_so(world: World) -> None:
    answer = post(world, m.KEYS, keys_body(world, initiator_sae_id="near-ü"))
    assert_problem(answer, 400, "invalid-parameter", "invalid_character")


def test_sae_ids_every_character_of_a_uri_and_64_of_them(world: World) -> None:
    for initiator in ("near-" + ":/?#[]@!$&'()*+,;=-._~%2F", "near-" + "x" * 59):
        names, values = Names.of(initiator, "own-b"), fresh(1)
        assert post(world, m.KEYS, m.keys_document(names, values, None)).status == 200


@pytest.mark.parametrize("targets", [None, [], "own-b", {}, [["own-b"]], ["own-b", "near-initiator"]])
def test_schema_target_sae_ids(world: World, targets: object) -> None:
    answer = post(world, m.KEYS, keys_body(world, target_sae_ids=targets))
    assert_problem(answer, 400, "invalid-parameter", "malformed_property")


def test_schema_target_sae_ids_each_target_gets_the_identical_key(world: World) -> None:
    names, values = Names.of("near-identical", "own-a", "own-b", "own-c"), fresh(1)
    assert post(world, m.KEYS, m.keys_document(names, values, None)).status == 200
    for target in names.targets:
        assert world.run(world.dec(target, names.initiator, *values)) == (200, values)


@pytest.mark.parametrize(
    "url", ["", "http://localhost/ack", "localhost", "https://", 7, None, [], "https://x/" + "y" * 1024]
)
@pytest.mark.parametrize("path", [m.KEYS, m.VOID])
def test_schema_ack_callback_url(world: World, path: str, url: object) -> None:
    body = keys_body(world) if path == m.KEYS else void_body(world)
    assert_problem(post(world, path, body | {"ack_callback_url": url}), 400, "invalid-parameter")


def test_schema_ack_callback_url_may_have_1024_characters(world: World) -> None:
    names, values = Names.of("near-longest", "own-b"), fresh(1)
    longest = world.near.callback + "?" + "y" * (1024 - len(world.near.callback) - 1)
    world.near.lend(names, values)
    assert post(world, m.KEYS, m.keys_document(names, values, longest)).status == 202
    world.run(world.lent(world.near, values, RELAYED))


@pytest.mark.parametrize("name", ["extension_mandatory", "extension_optional"])
@pytest.mark.parametrize("value", [[], [{"a": 1}], "x", None, {}, MANY])
def test_schema_extension_mandatory_and_optional(world: World, name: str, value: object) -> None:
    answer = post(world, m.KEYS, keys_body(world, **{name: value}))
    assert_problem(answer, 400, "invalid-parameter", "malformed_property")


def test_extensions_optional_ones_pass_without_change(world: World) -> None:
    extension = {
        "E32473_" + "n" * 40: {"deep": [1, 2.5, -0.0, 1e300, None, "ü\u0000", True, {}]},
        "E32473_b": "",
    }
    names, values = Names.of("near-passing", "third-passing"), fresh(1)
    document = m.keys_document(names, values, None, extension_optional=extension)
    document["keys"][0]["extension"] = {"E32473_key": [1, "x"]}
    assert post(world, m.KEYS, document).status == 200
    (heard,) = world.third.heard(m.KEYS, names.initiator)
    assert json.dumps(heard["extension_optional"]) == json.dumps(extension)
    assert heard["keys"][0]["extension"] == document["keys"][0]["extension"]


def test_extensions_numbers_pass_digit_by_digit(world: World) -> None:
    names, values = Names.of("near-digits", "third-digits"), fresh(1)
    numbers = "[1.10,-0,1E5,1e400,12345678901234567890123,0.12345678901234567890]"
    document = m.keys_document(names, values, None, extension_optional={"E32473_n": "NUMBERS"})
    assert post(world, m.KEYS, json.dumps(document).replace('"NUMBERS"', numbers).encode()).status == 200
    (heard,) = [text for text in world.third.texts if names.initiator in text]
    assert f'"E32473_n":{numbers}' in heard.replace(" ", "")


@pytest.mark.parametrize("half", ["\\ud800", "\\uDFFF", "\\ud83dx"])
def test_schemas_half_a_character_is_none(world: World, half: str) -> None:
    text = f'"{half}"'
    for path, document in (
        (m.KEYS, keys_body(world, extension_optional={"E32473_x": "HALF"})),
        (m.KEYS, keys_body(world, extension_optional={"HALF": 1})),
        (m.ACK, ack_body(message="HALF")),
        (m.VOID, void_body(world, extension={"E32473_x": ["HALF"]})),
    ):
        answer = post(world, path, json.dumps(document).replace('"HALF"', text).encode())
        assert answer.status == 400, (path, answer)
        assert answer.problem()


@pytest.mark.parametrize(
    "change",
    [
        *each("ack_status", "", "RELAYED", "success", "failed_to_void", None, 7),
        *each("key_id_container", None, [], {}, ["x"], [ID], [{"key_id": "x"}], [{"key_id": ID}] * 1025),
        *each("message", None, 7, "x" * 4097),
        *each("extension", None, [], "x", MANY),
        *each("target_sae_ids", [], "near-b", None),
    ],
)
def test_schema_ack_container(world: World, change: dict[str, Any]) -> None:
    assert_problem(post(world, m.ACK, ack_body(**change)), 400, "invalid-parameter", "malformed_property")


@pytest.mark.parametrize("status", sorted(m.STATUSES))
def test_schema_ack_status_every_word_is_known(world: World, status: str) -> None:
    answer = post(world, m.ACK, ack_body(ack_status=status, message="x" * 4096, extension={"E32473_a": 1}))
    assert_problem(answer, 400, "key-not-present")


@pytest.mark.parametrize("count", [0, 1025])
def test_schema_ack_containers_1_to_1024(world: World, count: int) -> None:
    document = ack_body(key_id_container=[{"key_id": ID}]) * count
    assert post(world, m.ACK, document).status == 400


def test_schema_ack_containers_1024_of_them_are_read(world: World) -> None:
    assert_problem(post(world, m.ACK, ack_body() * 1024), 400, "key-not-present")


@pytest.mark.parametrize(
    "change",
    [
        *each("key_ids", None, {}, ID, [None], ["x"], [{"key_id": ID}], [ID, ID]),
        *each("all_confirmation", "true", 1, None),
        *each("extension", None, [], "x", MANY),
    ],
)
def test_schema_void_container(world: World, change: dict[str, Any]) -> None:
    answer = post(world, m.VOID, void_body(world, **change))
    assert_problem(answer, 400, "invalid-parameter", "malformed_property")


def test_schema_void_container_of_ours_has_its_members_and_no_others(world: World) -> None:
    async def play() -> None:
        world.near.plans["near-void-members"] = Plan(say=silent)
        assert (await world.enc("own-a", "near-void-members"))[0] == 503
        await until(lambda: world.near.heard(m.VOID, "near-void-members"))

    world.run(play())
    document = world.near.heard(m.VOID, "near-void-members")[0]
    assert document.keys() == {"key_ids", "initiator_sae_id", "target_sae_ids", "ack_callback_url"}
    assert document["key_ids"] == list(world.near.of("near-void-members"))


def test_schemas_members_that_they_do_not_name_are_ignored(world: World) -> None:
    names, values = Names.of("near-unknown", "own-b"), fresh(1)
    document = m.keys_document(names, values, None, comment="x", Keys=[])
    document["keys"][0]["size"] = 256
    assert post(world, m.KEYS, document).status == 200


def test_schema_problem_details_never_repeat_key_bytes(world: World) -> None:
    secret = base64.b64encode(b"\x5a" * 33).decode()
    for change in (
        {"keys": secret},
        {"keys": [{"key_id": secret, "value": secret}]},
        {"target_sae_ids": secret + "!"},
    ):
        answer = post(world, m.KEYS, keys_body(world, **change))
        assert answer.status == 400
        assert secret not in json.dumps(answer.document)


# --- operation of the API: key association -------------------------------------------------------------


def test_operation_rule_1_no_association_after_400_or_401(world: World) -> None:
    values = fresh(1)
    for names, status in ((Names.of("near-a", "nobody"), 400), (Names.of("third-a", "own-b"), 401)):
        assert post(world, m.KEYS, m.keys_document(names, values, world.near.callback)).status == status
    names = Names.of("near-fresh-again", "own-c")
    assert post(world, m.KEYS, m.keys_document(names, values, None)).status == 200
    assert world.run(world.dec("own-c", names.initiator, *values)) == (200, values)


@pytest.mark.parametrize(
    "change",
    [
        {"target_sae_ids": ["nobody"]},
        {"target_sae_ids": ["near-b"]},
        {"target_sae_ids": []},
        {"initiator_sae_id": "third-a"},
        {"initiator_sae_id": ""},
        {"ack_callback_url": "https://elsewhere.example/"},
        {"extension_optional": {}},
    ],
)
def test_operation_rule_1_never_400_or_401_while_an_association_is_held(
    world: World, change: dict[str, Any]
) -> None:
    names, values = Names.of(f"near-held-{uuid.uuid4().hex[:8]}", "own-b"), fresh(1)
    document = m.keys_document(names, values, None)
    assert post(world, m.KEYS, document).status == 200
    again = document | {"ack_callback_url": world.near.callback} | change
    assert_problem(post(world, m.KEYS, again), 503, "server-side-general-error")
    assert world.run(world.dec("own-b", names.initiator, *values)) == (200, values)


def test_operation_rule_3_errors_on_ext_keys_are_tried_again_or_voided(world: World) -> None:
    async def play() -> None:
        world.near.plans["near-rule-3"] = Plan(keys=iter([Reply(503, is_heeded=False)]))
        assert (await world.enc("own-a", "near-rule-3"))[0] == 200
        world.near.plans["near-rule-3-v"] = Plan(keys=repeat(Reply(503)), say=silent)
        assert (await world.enc("own-a", "near-rule-3-v"))[0] == 503
        await until(lambda: {key.state for key in world.near.of("near-rule-3-v").values()} == {VOIDED})

    world.run(play())


def test_operation_rule_4_missing_acks_end_in_a_void(world: World) -> None:
    async def play() -> None:
        world.near.plans["near-rule-4"] = Plan(say=silent)
        assert (await world.enc("own-a", "near-rule-4"))[0] == 503
        await until(lambda: {key.state for key in world.near.of("near-rule-4").values()} == {VOIDED})

    world.run(play())


def test_operation_rule_5_an_ack_is_tried_again_or_the_key_voided_the_other_way(world: World) -> None:
    names, values = Names.of("near-rule-5", "own-b"), fresh(1)
    world.near.plans["near-rule-5"] = Plan(acks=iter([Reply(503, is_heeded=False)] * 2))
    world.run(world.near.hand_over(names, values))
    world.run(world.lent(world.near, values, RELAYED))
    assert len(world.near.heard(m.ACK, "near-rule-5")) >= 3
    unknown = fresh(1)  # not noted here: our ack will be answered 400
    assert post(world, m.KEYS, m.keys_document(names, unknown, world.near.callback)).status == 202
    world.run(until(lambda: world.near.heard(m.VOID, next(iter(unknown)))))
    world.run(world.settled(world.near, next(iter(unknown))))
    assert world.run(world.dec("own-b", names.initiator, *unknown))[1] == {}


def test_operation_note_no_key_is_released_before_every_target_is_acked(world: World) -> None:
    async def play() -> None:
        world.near.plans["near-rule-6"] = Plan(say=silent)
        asked = asyncio.ensure_future(world.enc("own-a", "near-rule-6", "near-rule-6-b"))
        await until(lambda: world.near.of("near-rule-6"))
        ids = list(world.near.of("near-rule-6"))
        for target in ("near-rule-6", "near-rule-6-b"):
            await asyncio.sleep(0.2)
            assert not asked.done()
            await world.near.say(world.site.url020 + m.ACK, (m.RELAYED, ids, Names.of("own-a", target)))
        assert list((await asked)[1]) == ids

    world.run(play())


def test_operation_rule_7_after_a_void_the_key_is_refused_for_ever(world: World) -> None:
    names, values = Names.of("near-rule-7", "own-b"), fresh(1)
    world.run(world.near.hand_over(names, values))
    world.run(world.lent(world.near, values, RELAYED))
    world.run(world.near.void(names, values))
    world.run(world.lent(world.near, values, VOIDED))
    assert world.run(world.dec("own-b", names.initiator, *values))[0] == 400
    assert post(world, m.KEYS, m.keys_document(names, values, world.near.callback)).status == 400
    assert post(world, m.VOID, m.void_document(names, list(values), None)).status == 200


def test_operation_failed_is_said_of_what_cannot_be_relayed(world: World) -> None:
    names, values = Names.of("near-hopeless", "third-hopeless"), fresh(1)
    world.third.plans["third-hopeless"] = Plan(keys=repeat(Reply(401, is_heeded=False)))
    world.run(world.near.hand_over(names, values))
    world.run(world.lent(world.near, values, FAILED))


def test_operation_failed_to_void_is_said_of_what_an_application_has(world: World) -> None:
    names, values = Names.of("near-delivered", "own-b"), fresh(1)
    world.run(world.near.hand_over(names, values))
    world.run(world.lent(world.near, values, RELAYED))
    world.run(world.dec("own-b", names.initiator, *values))
    answer = post(world, m.VOID, m.void_document(names, list(values), None))
    assert [one.status for one in m.read_acks(answer.document)] == [m.FAILED_TO_VOID]
