"""key_IDs: the layout, a fixed vector, and every way not to match.

Provenance of ``VECTOR``: computed by ``reference_tag`` below, a term-by-term
evaluation of the formula in the module's docstring that shares no code with it.
"""

from __future__ import annotations

import struct
import uuid
from fractions import Fraction
from itertools import product

import pytest

from mesh.core.keyid import KeyAddress, PairTagger, issue, matches, parse, text_of

P = 2**61 - 1
ADDRESS = KeyAddress(epoch=5, slot=0x123456789, size_bytes=32)
TAG_PART = bytes(range(100, 116))
VECTOR = "00512345-6789-800f-aa67-05bddc65be45"


def coefficients(address: KeyAddress, master: str, slave: str) -> list[int]:
    """What is multiplied by c, c^2, c^3, ...: the message as field elements."""
    names = b"".join(struct.pack("B", len(name)) + name for name in (master.encode(), slave.encode()))
    blocks = [int.from_bytes(names[at : at + 7], "little") for at in range(0, len(names), 7)]
    return [address.epoch * 2**36 + address.slot, address.size_bytes - 1, *blocks]


def reference_tag(address: KeyAddress, master: str, slave: str, tag_part: bytes) -> int:
    c = int.from_bytes(tag_part[:8], "little") % 2**61
    d = int.from_bytes(tag_part[8:], "little") % 2**61
    terms = coefficients(address, master, slave)
    return (d + sum(pow(c, power, P) * term for power, term in enumerate(terms, 1))) % P


def test_fixed_vector() -> None:
    key_id = issue(ADDRESS, "sae-alice", "sae-bob", TAG_PART)
    assert str(uuid.UUID(bytes=key_id)) == VECTOR
    assert int.from_bytes(key_id, "big") % 2**61 == reference_tag(ADDRESS, "sae-alice", "sae-bob", TAG_PART)


@pytest.mark.parametrize(
    "address", [KeyAddress(0, 0, 1), KeyAddress(4095, 2**36 - 1, 8192), KeyAddress(1, 2, 33), ADDRESS]
)
def test_layout(address: KeyAddress) -> None:
    key_id = issue(address, "m" * 64, "s", TAG_PART)
    shown = uuid.UUID(bytes=key_id)
    assert (shown.version, shown.variant) == (8, uuid.RFC_4122)
    number = shown.int
    assert number >> 116 == address.epoch
    assert number >> 80 & (2**36 - 1) == address.slot
    assert (number >> 64 & 0xFFF) << 1 | number >> 61 & 1 == address.size_bytes - 1
    assert number & (2**61 - 1) == reference_tag(address, "m" * 64, "s", TAG_PART)
    assert parse(key_id) == parse(memoryview(key_id)) == address


@pytest.mark.parametrize(("size", "slots"), [(1, 1), (32, 1), (33, 2), (64, 2), (65, 3), (8192, 256)])
def test_slot_count(size: int, slots: int) -> None:
    assert KeyAddress(0, 0, size).slot_count == slots


@pytest.mark.parametrize(
    "address",
    [
        KeyAddress(-1, 0, 32),
        KeyAddress(4096, 0, 32),
        KeyAddress(0, -1, 32),
        KeyAddress(0, 2**36, 32),
        KeyAddress(0, 0, 0),
        KeyAddress(0, 0, 8193),
    ],
)
def test_addresses_outside_the_layout_are_refused(address: KeyAddress) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        issue(address, "m", "s", TAG_PART)


@pytest.mark.parametrize(("master", "slave"), [("", "s"), ("m", ""), ("m" * 65, "s"), ("m", "é" * 33)])
def test_names_that_cannot_be_encoded_are_refused(master: str, slave: str) -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        PairTagger(master, slave)


@pytest.mark.parametrize("size", [0, 15, 17, 32])
def test_tag_parts_have_16_bytes(size: int) -> None:
    key_id = issue(ADDRESS, "m", "s", TAG_PART)
    with pytest.raises(struct.error):
        issue(ADDRESS, "m", "s", bytes(size))
    with pytest.raises(struct.error):
        matches(key_id, "m", "s", bytes(size))


def test_matches_what_was_issued_and_nothing_else() -> None:
    key_id = issue(ADDRESS, "sae-a", "sae-b", TAG_PART)
    assert matches(key_id, "sae-a", "sae-b", TAG_PART)
    assert matches(memoryview(key_id), "sae-a", "sae-b", bytearray(TAG_PART))
    for master, slave in [
        ("sae-b", "sae-a"),
        ("sae-a", "sae-c"),
        ("sae-c", "sae-b"),
        ("sae-a", "sae-"),
        ("sae-as", "ae-b"),
        ("sae-", "asae-b"),
        ("sae-a", "sae-b\0"),
    ]:
        assert not matches(key_id, master, slave, TAG_PART)
    assert not matches(key_id, "sae-a", "sae-b", TAG_PART[1:] + TAG_PART[:1])


def test_a_tag_is_bound_to_epoch_slot_and_size() -> None:
    """Moving the tag onto another address does not match under the same tag part."""
    tag_of = 2**61 - 1
    number = int.from_bytes(issue(ADDRESS, "m", "s", TAG_PART), "big")
    for other in (
        ADDRESS._replace(epoch=6),
        ADDRESS._replace(slot=ADDRESS.slot + 1),
        ADDRESS._replace(size_bytes=31),
        ADDRESS._replace(size_bytes=33),
    ):
        moved = int.from_bytes(issue(other, "m", "s", TAG_PART), "big") & ~tag_of | number & tag_of
        forged = moved.to_bytes(16, "big")
        assert parse(forged) == other
        assert not matches(forged, "m", "s", TAG_PART)


def test_every_bit_of_a_key_id_counts() -> None:
    key_id = int.from_bytes(issue(ADDRESS, "m", "s", TAG_PART), "big")
    for bit in range(128):
        changed = (key_id ^ 1 << bit).to_bytes(16, "big")
        assert not matches(changed, "m", "s", TAG_PART)
        # Only version and variant make it something else than one of our key_IDs.
        assert (parse(changed) is None) == (bit in {76, 77, 78, 79, 62, 63})


def test_tags_have_one_form() -> None:
    """A tag of 0 is not also accepted as p."""
    address = KeyAddress(0, 0, 1)
    zero = next(
        part
        for part in (bytes(8) + d.to_bytes(8, "little") for d in (0, P))
        if int.from_bytes(issue(address, "m", "s", part), "big") % 2**61 == 0
    )
    key_id = int.from_bytes(issue(address, "m", "s", zero), "big")
    assert not matches((key_id | P).to_bytes(16, "big"), "m", "s", zero)


@pytest.mark.parametrize(
    "key_id",
    [b"", bytes(15), bytes(17), bytes(16), b"\xff" * 16, uuid.UUID(int=2**127 - 1, version=4).bytes],
)
def test_what_is_no_key_id_of_ours_parses_to_none(key_id: bytes) -> None:
    assert parse(key_id) is None
    assert not matches(key_id, "m", "s", TAG_PART)


def test_the_longest_message_has_21_terms() -> None:
    """So a guess after one seen tag passes with at most 21/2^61, plus the cut words' 2^-60: < 2^-56."""
    assert len(coefficients(ADDRESS, "m" * 64, "s" * 64)) == 21
    assert Fraction(21, 2**61) + Fraction(1, 2**60) < Fraction(1, 2**56)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("p", "terms"), [(5, 2), (7, 3), (11, 2)])
def test_forgery_bound_over_small_primes(p: int, terms: int) -> None:
    """Every change of the terms and of the tag, over every c: at most, and somewhere exactly, terms/p.

    d cancels, so after one seen tag another message passes where a polynomial in c of degree
    <= terms without constant term equals the change of the tag that was bet on.
    """
    worst = 0
    for change in product(range(p), repeat=terms):
        if any(change):
            sums = [sum(pow(c, j, p) * x for j, x in enumerate(change, 1)) % p for c in range(p)]
            worst = max(worst, *(sums.count(bet) for bet in range(p)))
    assert worst == terms


def test_text_is_as_rfc_9562_writes_it() -> None:
    key_id = bytes(range(16))
    assert text_of(key_id) == str(uuid.UUID(bytes=key_id)) == "00010203-0405-0607-0809-0a0b0c0d0e0f"
