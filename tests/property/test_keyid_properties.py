"""key_IDs over the whole range of addresses, names and tag parts."""

from __future__ import annotations

import uuid

from hypothesis import assume, given
from hypothesis import strategies as st

from mesh.core.keyid import KeyAddress, PairTagger, issue, matches, parse
from tests.unit.test_keyid import coefficients, reference_tag

ADDRESSES = st.builds(KeyAddress, st.integers(0, 2**12 - 1), st.integers(0, 2**36 - 1), st.integers(1, 2**13))
SAE_CHARS = "ABCxyz0189-._~:/?#[]@!$&'()*+,;=%"
NAMES = st.text(SAE_CHARS, min_size=1, max_size=64)
TAG_PARTS = st.binary(min_size=16, max_size=16)


@given(address=ADDRESSES, master=NAMES, slave=NAMES, tag_part=TAG_PARTS)
def test_issue_parse_and_match(address: KeyAddress, master: str, slave: str, tag_part: bytes) -> None:
    key_id = issue(address, master, slave, tag_part)
    assert uuid.UUID(bytes=key_id).version == 8
    assert uuid.UUID(bytes=key_id).variant == uuid.RFC_4122
    assert parse(key_id) == address
    assert matches(key_id, master, slave, tag_part)
    assert PairTagger(master, slave).issue(address, tag_part) == key_id
    assert int.from_bytes(key_id, "big") % 2**61 == reference_tag(address, master, slave, tag_part)


@given(
    one=st.tuples(ADDRESSES, NAMES, NAMES),
    other=st.tuples(ADDRESSES, NAMES, NAMES),
    same_names=st.booleans(),
)
def test_the_encoding_is_injective(
    one: tuple[KeyAddress, str, str], other: tuple[KeyAddress, str, str], same_names: bool
) -> None:
    """Different (epoch, slot, size, master, slave) are different polynomials: the bound rests on it."""
    if same_names:
        other = (other[0], *one[1:])
    assume(one != other)
    first, second = coefficients(*one), coefficients(*other)
    length = max(len(first), len(second))
    assert first + [0] * (length - len(first)) != second + [0] * (length - len(second))
    assert max(*first, *second) < 2**61 - 1


@given(names=st.text(SAE_CHARS, min_size=2, max_size=64), tag_part=TAG_PARTS, data=st.data())
def test_moving_the_boundary_between_names_does_not_match(
    names: str, tag_part: bytes, data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(1, len(names) - 1), min_size=2, max_size=2))
    assume(cuts[0] != cuts[1] and int.from_bytes(tag_part[:8], "little") % 2**61 % (2**61 - 1))
    (master, slave), (other_master, other_slave) = ((names[:cut], names[cut:]) for cut in cuts)
    key_id = issue(KeyAddress(1, 1, 32), master, slave, tag_part)
    assert coefficients(KeyAddress(1, 1, 32), master, slave) != coefficients(
        KeyAddress(1, 1, 32), other_master, other_slave
    )
    expected = reference_tag(KeyAddress(1, 1, 32), other_master, other_slave, tag_part)
    assert matches(key_id, other_master, other_slave, tag_part) == (
        int.from_bytes(key_id, "big") % 2**61 == expected
    )


@given(st.binary(max_size=20), NAMES, NAMES, TAG_PARTS)
def test_no_input_crashes(junk: bytes, master: str, slave: str, tag_part: bytes) -> None:
    assert (parse(junk) is None) or len(junk) == 16
    matches(junk, master, slave, tag_part)
