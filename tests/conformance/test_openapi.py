"""``openapi.yaml`` tells the truth: real requests and answers are held against it."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml
from openapi_core import OpenAPI
from openapi_core.exceptions import OpenAPIError
from openapi_core.testing import MockRequest, MockResponse
from werkzeug.datastructures import ImmutableMultiDict

from gateway.etsi014 import schema
from gateway.etsi014.routes import METHODS, PREFIX, split_target
from gateway.identity import is_sae_id
from mesh.client import CallerError
from tests.conformance.conftest import Sae, Stack
from tests.conformance.wire import Received

TEXT = files("gateway.etsi014").joinpath("openapi.yaml").read_text()
DOCUMENT = yaml.safe_load(TEXT)
API = OpenAPI.from_dict(DOCUMENT)


def described_request(verb: str, target: str, body: bytes | None) -> MockRequest:
    parts = urlsplit(target)
    request = MockRequest(
        "https://localhost",
        verb.lower(),
        parts.path,
        data=body,
        headers={"Content-Type": "application/json"} if body is not None else {},
    )
    request.parameters.query = ImmutableMultiDict(parse_qsl(parts.query, keep_blank_values=True))
    return request


def hold_against(verb: str, target: str, body: bytes | None, received: Received) -> None:
    """Raise unless the answer is one that the description allows for this request."""
    response = MockResponse(
        received.body,
        status_code=received.status,
        headers=dict(received.headers),
        content_type=received.headers.get("content-type", ""),
    )
    API.validate_response(described_request(verb, target, body), response)
    if received.status == 401:
        assert received.body == b""


def accepts(verb: str, target: str, body: bytes | None) -> bool:
    """Whether the description allows this request."""
    try:
        API.validate_request(described_request(verb, target, body))
    except OpenAPIError:
        return False
    return True


def exchange(sae: Sae, verb: str, target: str, body: Any = None) -> Received:
    data = None if body is None else json.dumps(body).encode()
    received = sae.ask(verb, target, data)
    hold_against(verb, target, data, received)
    return received


def test_the_description_is_valid_and_describes_exactly_the_routes() -> None:
    API.check_spec()
    described = {
        (path, verb) for path, item in DOCUMENT["paths"].items() for verb in item if verb != "parameters"
    }
    expected = {(f"{PREFIX}{{slave_SAE_ID}}/status", "get")}
    expected |= {(f"{PREFIX}{{slave_SAE_ID}}/enc_keys", verb) for verb in ("get", "post")}
    expected |= {(f"{PREFIX}{{master_SAE_ID}}/dec_keys", verb) for verb in ("get", "post")}
    assert described == expected
    assert {split_target(path.replace("{", "").replace("}", ""))[0] for path, _ in described} == set(METHODS)


def test_good_and_bad_exchanges_fit_the_description(stack: Stack) -> None:
    slave, master = stack.slave.sae_id, stack.master.sae_id
    enc, dec = f"/api/v1/keys/{slave}/enc_keys", f"/api/v1/keys/{master}/dec_keys"
    assert exchange(stack.master, "GET", f"/api/v1/keys/{slave}/status").status == 200
    assert exchange(stack.master, "GET", "/api/v1/keys/no-such-sae/status").status == 400
    assert exchange(stack.master, "GET", enc).status == 200
    assert exchange(stack.master, "GET", f"{enc}?number=2&size=64").status == 200
    assert exchange(stack.master, "GET", f"{enc}?size=7").status == 400
    assert exchange(stack.master, "POST", enc).status == 200
    members: dict[str, Any] = {
        "number": 2,
        "size": 128,
        "additional_slave_SAE_IDs": [stack.third.sae_id],
        "extension_optional": [{"keymesh_grade": "report"}, {"abc_x": 1}],
    }
    keys = exchange(stack.master, "POST", enc, members).json()["keys"]
    assert exchange(stack.master, "POST", enc, {"extension_mandatory": [{"abc_x": 1}]}).status == 400
    assert exchange(stack.slave, "GET", f"{dec}?key_ID={keys[0]['key_ID']}").status == 200
    assert exchange(stack.slave, "GET", f"{dec}?key_ID={keys[0]['key_ID']}").status == 400
    (unicast,) = stack.draw()
    assert exchange(stack.third, "GET", f"{dec}?key_ID={unicast['key_ID']}").status == 401
    assert exchange(stack.slave, "POST", dec, {"key_IDs": [{"key_ID": keys[1]["key_ID"]}]}).status == 200
    assert exchange(stack.slave, "POST", dec, {"key_IDs": []}).status == 400
    assert exchange(stack.slave, "POST", dec, {"key_IDs": [{"x": "y" * 300_000}]}).status == 413


@pytest.mark.parametrize(
    ("body", "is_good"),
    [
        ({}, True),
        ({"number": 1, "size": 8, "x": 1}, True),
        ({"additional_slave_SAE_IDs": ["a", "b%20c"]}, True),
        ({"additional_slave_SAE_IDs": []}, True),
        ({"extension_mandatory": [{"keymesh_grade": "x"}], "extension_optional": []}, True),
        ({"number": 0}, False),
        ({"number": "1"}, False),
        ({"number": True}, False),
        ({"number": None}, False),
        ({"size": 12}, False),
        ({"size": 0}, False),
        ({"additional_slave_SAE_IDs": ["a", "a"]}, False),
        ({"additional_slave_SAE_IDs": [""]}, False),
        ({"additional_slave_SAE_IDs": ["a b"]}, False),
        ({"additional_slave_SAE_IDs": ["x" * 65]}, False),
        ({"extension_optional": ["x"]}, False),
        ({"extension_mandatory": {}}, False),
        ([], False),
    ],
)
def test_decoder_and_description_agree_on_key_requests(body: object, is_good: bool) -> None:
    data = json.dumps(body).encode()
    try:
        schema.decode_key_request(data, master="master", slave="slave")
        is_decoded = True
    except CallerError:
        is_decoded = False
    assert is_decoded is is_good
    assert accepts("POST", "/api/v1/keys/slave/enc_keys", data) is is_good


KEY_ID = "550E8400-e29b-41d4-a716-446655440000"


@pytest.mark.parametrize(
    ("body", "is_good"),
    [
        ({"key_IDs": [{"key_ID": KEY_ID}]}, True),
        ({"key_IDs": [{"key_ID": KEY_ID, "key": "x", "key_ID_extension": None}], "y": 1}, True),
        ({"key_IDs": [{"key_ID": KEY_ID, "key_ID_extension": {}}], "key_IDs_extension": {}}, True),
        ({}, False),
        ({"key_IDs": []}, False),
        ({"key_IDs": {}}, False),
        ({"key_IDs": [{}]}, False),
        ({"key_IDs": [KEY_ID]}, False),
        ({"key_IDs": [{"key_ID": KEY_ID[:-1]}]}, False),
        ({"key_IDs": [{"key_ID": KEY_ID, "key_ID_extension": []}]}, False),
        ({"key_IDs": [{"key_ID": KEY_ID}], "key_IDs_extension": 1}, False),
    ],
)
def test_decoder_and_description_agree_on_key_ids(body: object, is_good: bool) -> None:
    data = json.dumps(body).encode()
    try:
        schema.decode_key_ids(data)
        is_decoded = True
    except CallerError:
        is_decoded = False
    assert is_decoded is is_good
    assert accepts("POST", "/api/v1/keys/master/dec_keys", data) is is_good


@pytest.mark.parametrize("sae_id", ["a", "a/b:c", "100%25", "x" * 64, "", "x" * 65, "a b", "%", "é"])
def test_mapping_and_description_agree_on_sae_ids(sae_id: str) -> None:
    import re

    pattern = DOCUMENT["components"]["schemas"]["SaeId"]["pattern"]
    assert (re.search(pattern, sae_id) is not None and len(sae_id) <= 64) is is_sae_id(sae_id)


def test_an_answer_that_is_not_described_would_be_noticed(stack: Stack) -> None:
    target = f"/api/v1/keys/{stack.slave.sae_id}/status"
    received = stack.master.ask("GET", target)
    wrong = {**received.json(), "key_size": "256"}
    with pytest.raises(OpenAPIError):
        hold_against("GET", target, None, Received(200, received.headers, json.dumps(wrong).encode()))
