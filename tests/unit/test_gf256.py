"""GF(2^8): the examples of FIPS 197 and the whole multiplication table."""

from __future__ import annotations

import pytest

from mesh.core.gf256 import GENERATOR, MODULUS, inv, mul, scale


def long_multiplication(a: int, b: int) -> int:
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= MODULUS << (bit - 8)
    return product


def test_published_products() -> None:
    # FIPS 197 sections 4.2 and 4.2.1; the inverse is that of the S-box example 53 -> ED.
    assert mul(0x57, 0x83) == 0xC1
    assert mul(0x57, 0x13) == 0xFE
    assert inv(0x53) == 0xCA


def test_the_whole_table() -> None:
    for a in range(256):
        row = bytes(long_multiplication(a, b) for b in range(256))
        assert bytes(mul(a, b) for b in range(256)) == row
        assert scale(bytes(range(256)), a) == row


def test_inverses() -> None:
    assert all(mul(a, inv(a)) == 1 for a in range(1, 256))
    with pytest.raises(ZeroDivisionError):
        inv(0)


def test_the_generator_generates() -> None:
    element, seen = 1, set()
    for _ in range(255):
        element = mul(element, GENERATOR)
        seen.add(element)
    assert seen == set(range(1, 256))


def test_scale_takes_every_buffer_and_returns_bytes() -> None:
    data = bytes(range(7))
    for buffer in (data, bytearray(data), memoryview(data)):
        for c in (0, 1, 2):
            assert type(scale(buffer, c)) is bytes
            assert scale(buffer, c) == bytes(mul(c, x) for x in data)
