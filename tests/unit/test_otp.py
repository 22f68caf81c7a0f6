"""XOR is exact on both sides of every size threshold, for every buffer type."""

from __future__ import annotations

import random

import pytest

from mesh.core.otp import xor, xor_into

SIZES = [0, 1, 15, 32, 511, 512, 513, 4096, 65535, 65536, 65537, 200_001]


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_bytewise_definition(size: int) -> None:
    rng = random.Random(size)
    a, b = rng.randbytes(size), rng.randbytes(size)
    expected = bytes(x ^ y for x, y in zip(a, b, strict=True))
    assert xor(a, b) == expected
    assert xor(memoryview(a), bytearray(b)) == expected
    target = bytearray(a)
    xor_into(target, memoryview(b))
    assert target == expected


def test_result_is_bytes_of_its_own() -> None:
    for size in (32, 4096, 200_000):
        assert type(xor(bytearray(size), bytearray(size))) is bytes


@pytest.mark.parametrize("other", [31, 33, 0])
def test_lengths_must_agree(other: int) -> None:
    with pytest.raises(ValueError, match="length"):
        xor(bytes(32), bytes(other))
    target = bytearray(b"x" * 32)
    with pytest.raises(ValueError, match="length"):
        xor_into(target, bytes(other))
    assert target == b"x" * 32
