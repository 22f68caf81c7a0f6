"""Identifiers: what is accepted, what is refused, and that refusals name the field."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mesh.core.names import check_domain_id, check_kme_id, check_sae_id, link_id, smaller
from mesh.errors import CallerError, ErrorReason

Check = Callable[[str, str], str]
LABELS: list[Check] = [check_kme_id, check_domain_id]


@pytest.mark.parametrize("check", LABELS)
@pytest.mark.parametrize("value", ["a", "0", "kme-a", "hub-1", "a" * 63, "a-"])
def test_labels(check: Check, value: str) -> None:
    assert check(value, "id") == value


@pytest.mark.parametrize("check", LABELS)
@pytest.mark.parametrize(
    "value", ["", "-a", "A", "kme_a", "kme.a", "a" * 64, "é", "a\n", "a b", "kme/a", "٣"]
)
def test_labels_refused(check: Check, value: str) -> None:
    with pytest.raises(CallerError) as caught:
        check(value, "peer")
    assert caught.value.message.startswith("peer must be 1 to 63 characters")
    assert caught.value.reason is ErrorReason.INVALID_ARGUMENT
    assert caught.value.facts["field"] == "peer"


@pytest.mark.parametrize(
    "value", ["a", "SAE_A", "sae-a.example~1", "urn:sae:1", "a/b?c#d", "[x]@!$&'()*+,;=", "%2F", "x" * 64]
)
def test_sae_ids(value: str) -> None:
    assert check_sae_id(value) == value


@pytest.mark.parametrize(
    "value",
    ["", "x" * 65, "a b", "a\n", "%", "%2", "%zz", "é", "a\0", '"', "<a>", "a\\b", "{a}", "a|b", "^", "`"],
)
def test_sae_ids_refused(value: str) -> None:
    with pytest.raises(CallerError, match=r"^slave must be 1 to 64 characters"):
        check_sae_id(value, "slave")


@pytest.mark.parametrize("value", [None, 7, b"sae-a", ["sae-a"]])
def test_what_is_no_text_is_refused(value: str) -> None:
    for check in (*LABELS, check_sae_id):
        with pytest.raises(CallerError):
            check(value, "id")


def test_refusals_do_not_repeat_long_input() -> None:
    with pytest.raises(CallerError) as caught:
        check_sae_id("x" * 100_000)
    assert len(str(caught.value)) < 300


def test_a_link_has_one_name_and_one_dialer() -> None:
    assert link_id("kme-b", "kme-a") == link_id("kme-a", "kme-b") == "kme-a--kme-b"
    assert smaller("kme-b", "kme-a") == "kme-a"
    for refused in (link_id, smaller):
        with pytest.raises(ValueError, match="different"):
            refused("kme-a", "kme-a")
