"""No input from outside ends in anything but an error of ours (or what a parser documents).

The same targets as ``make fuzz``, with Hypothesis: random bytes, and seeds that were cut, spliced
and changed. For formats whose values nest (JSON, YAML), also values of the wrong shape.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.core.network_parse import parse_document
from mesh.core.policy import AccessTable
from mesh.errors import MeshError
from tests.fuzz.targets import Target, targets

ONE_BY_ONE = {target.name: target for target in targets()}
EACH = pytest.mark.parametrize("target", targets(), ids=list(ONE_BY_ONE))
QUICK = settings(max_examples=40, suppress_health_check=list(HealthCheck))
ODD = st.sampled_from(
    [
        *(b"", b"\x00", b"\xff", b"\xff" * 8, b"\x80" * 5, b"\n\n", b"\xed\xa0\x80", b'"'),
        *(b"{}", b"[]", b"[" * 2000, b"null", b"NaN", b"1e999", b"-1", b"9" * 5000),
        *(b"&a *a", b"!!python/object:os.system", b"2024-13-45", b"0001-01-01 00:00:00 +23:59"),
        *(b"!!int ''", b"!!bool x", b"!!timestamp x", b"!!binary x", b"{? [a] : b}"),
    ]
)


@st.composite
def mutated(draw: st.DrawFn, seed: bytes) -> bytes:
    """The seed after a few cuts, insertions, overwrites and repetitions."""
    data = seed
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        stop = min(len(data), at + draw(st.integers(0, 16)))
        piece = draw(st.one_of(st.binary(max_size=8), ODD, st.just(data[at:stop] * 3)))
        data = data[:at] + piece + data[stop:]
    return data


@EACH
def test_seeds_reach_beyond_the_first_check(target: Target) -> None:
    """A seed that is refused would leave the parser's inside untried."""
    target.run(target.seeds[0])


@EACH
@QUICK
@given(data=st.one_of(ODD, st.binary(max_size=600)))
def test_random_bytes(target: Target, data: bytes) -> None:
    target.try_one(data)


@EACH
@QUICK
@given(data=st.data())
def test_changed_seeds(target: Target, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(target.seeds))
    target.try_one(data.draw(mutated(seed)))


@EACH
def test_every_cut_and_every_byte_of_the_first_seed(target: Target) -> None:
    """Deterministic: cut there, and changed there, in up to 1 000 places."""
    seed = target.seeds[0]
    for at in range(0, len(seed), -(-len(seed) // 1000)):
        target.try_one(seed[:at])
        target.try_one(seed[:at] + bytes([seed[at] ^ 0xFF]) + seed[at + 1 :])


@EACH
def test_values_nested_beyond_every_parsers_depth(target: Target) -> None:
    for seed in target.seeds:
        for at in [0, *(at + 1 for at, byte in enumerate(seed) if byte in b"\x00:,[{")][:20]:
            for deep in (b"[" * 100_000, b'{"a":' * 20_000):
                target.try_one(seed[:at] + deep + seed[at:])


SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.dates()),
    *(st.text(max_size=8), st.binary(max_size=4)),
)
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(SCALARS, inner, max_size=3)),
    max_leaves=8,
)


@QUICK
@given(data=st.data())
def test_documents_and_tables_of_any_shape(data: st.DataObject) -> None:
    """Any value in the place of any member, two levels deep."""
    document = json.loads(ONE_BY_ONE["network-document"].seeds[0])
    member = data.draw(st.sampled_from(sorted(document)))
    value = data.draw(NESTED)
    if isinstance(document[member], dict) and data.draw(st.booleans()):
        inner = data.draw(st.sampled_from(sorted(document[member])))
        document[member] = {**document[member], inner: value}
    elif isinstance(document[member], list) and data.draw(st.booleans()):
        document[member] = [*document[member], value]
    else:
        document[member] = value
    for parse in (parse_document, AccessTable.parse):
        for given_value in (document, value, {"rules": value}, {"rules": [value]}):
            try:
                parse(given_value)
            except MeshError as error:
                assert str(error)
