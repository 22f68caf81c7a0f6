"""A client that nobody here wrote, unmodified: ``etsi-qkd-014-client`` from PyPI."""

from __future__ import annotations

import base64
from urllib.parse import urlsplit

import pytest
import requests
from etsi_qkd_014_client import QKD014Client

from tests.conformance.conftest import Sae, Stack


def client_of(sae: Sae) -> QKD014Client:
    return QKD014Client(urlsplit(sae.url).netloc, str(sae.cert), str(sae.key), str(sae.gateway_ca))


def test_status_is_understood(stack: Stack) -> None:
    code, status = client_of(stack.master).get_status(stack.slave.sae_id)
    assert code == 200
    assert (status.source_kme_id, status.target_kme_id) == stack.kme_ids
    assert (status.key_size, status.min_key_size, status.max_key_size) == (256, 8, 65536)
    assert status.max_sae_id_count == 8


def test_keys_travel_from_master_to_slave(stack: Stack) -> None:
    code, drawn = client_of(stack.master).get_key(stack.slave.sae_id)
    assert code == 200
    ids = [key.key_id for key in drawn.keys]
    code, fetched = client_of(stack.slave).get_key_with_key_IDs(stack.master.sae_id, ids)
    assert code == 200
    assert [(key.key_id, key.key) for key in fetched.keys] == [(key.key_id, key.key) for key in drawn.keys]


def test_all_parameters_are_understood(stack: Stack) -> None:
    code, drawn = client_of(stack.master).get_key(
        stack.slave.sae_id,
        number=3,
        size=128,
        additional_slave_sae_ids=[stack.third.sae_id],
        extension_optional=[{"keymesh_grade": "report"}],
    )
    assert code == 200
    assert [len(base64.b64decode(key.key)) for key in drawn.keys] == [16, 16, 16]
    assert drawn.key_container_extension["keymesh_grade"]
    ids = [key.key_id for key in drawn.keys]
    for sae in (stack.slave, stack.third):
        code, fetched = client_of(sae).get_key_with_key_IDs(
            stack.master.sae_id, ids, key_ids_extensions=[{}, {}, {}], key_ids_extension={"x": 1}
        )
        assert code == 200
        assert [key.key for key in fetched.keys] == [key.key for key in drawn.keys]


def test_errors_are_understood(stack: Stack) -> None:
    code, error = client_of(stack.master).get_key(stack.slave.sae_id, size=7)
    assert (code, error.message) == (400, "size shall be a multiple of 8")
    assert all(isinstance(detail, dict) for detail in error.details)
    code, error = client_of(stack.master).get_key(
        stack.slave.sae_id, extension_mandatory=[{"abc_route_type": "direct"}]
    )
    assert (code, error.message) == (400, "not all extension_mandatory parameters are supported")


def test_a_401_makes_this_client_raise_because_it_has_no_body(stack: Stack) -> None:
    _, drawn = client_of(stack.master).get_key(stack.slave.sae_id)
    with pytest.raises(requests.exceptions.JSONDecodeError):
        client_of(stack.third).get_key_with_key_IDs(stack.master.sae_id, [drawn.keys[0].key_id])
