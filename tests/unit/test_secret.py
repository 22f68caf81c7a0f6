"""A Secret shows no bytes: not in reprs, pickles, copies, hashes, and not after wiping."""

from __future__ import annotations

import copy
import pickle

import pytest

from mesh.core.secret import Secret

DATA = bytes(range(200, 232))


def test_reads_back_what_was_put_in() -> None:
    secret = Secret(DATA)
    assert len(secret) == 32
    assert secret.reveal() == DATA
    assert secret.take(4, 9) == DATA[4:9]
    assert bytes(secret.view()) == DATA


def test_keeps_its_own_copy() -> None:
    source = bytearray(DATA)
    secret = Secret(source)
    source[:] = bytes(32)
    assert secret.reveal() == DATA


@pytest.mark.parametrize("text", [repr, str, "{}".format, "%s".__mod__, ascii])
def test_texts_name_the_size_only(text: object) -> None:
    assert callable(text)
    assert text(Secret(DATA)) == "Secret(32 bytes)"


def test_view_cannot_change_the_secret() -> None:
    with pytest.raises(TypeError):
        Secret(DATA).view()[0] = 1


@pytest.mark.parametrize("leak", [pickle.dumps, copy.copy, copy.deepcopy, hash])
def test_is_not_pickled_copied_or_hashed(leak: object) -> None:
    assert callable(leak)
    with pytest.raises(TypeError):
        leak(Secret(DATA))


def test_has_no_attributes_to_add() -> None:
    with pytest.raises(AttributeError):
        Secret(DATA).label = "x"  # type: ignore[attr-defined]


def test_compares_with_secrets_only() -> None:
    assert Secret(DATA) == Secret(bytearray(DATA))
    assert Secret(DATA) != Secret(DATA[:-1] + b"\0")
    assert Secret(DATA) != Secret(DATA[:-1])
    assert Secret(DATA) != DATA


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (0, 33), (5, 4), (33, 33)])
def test_take_refuses_what_is_outside(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        Secret(DATA).take(start, stop)


def test_wipe_zeroes_in_place_and_ends_reading() -> None:
    secret = Secret(DATA)
    view = secret.view()
    secret.wipe()
    secret.wipe()
    assert bytes(view) == bytes(32)
    assert len(secret) == 32
    assert secret != Secret(bytes(32))
    assert secret != secret  # noqa: PLR0124  # a wiped secret equals nothing, itself included
    for read in (secret.view, secret.reveal, lambda: secret.take(0, 1)):
        with pytest.raises(ValueError, match="wiped"):
            read()
