"""The secret-authenticating tag: published products, fixed vectors, every code path.

Provenance: ``GCM_PRODUCT`` is GHASH step X_1 of test case 2 in McGrew and Viega, The
Galois/Counter Mode of Operation (appendix B), with the bits of each byte reversed, as
our bit order wants. ``TAG_VECTORS`` were computed with the ``galois`` package 0.4.11
by the formula of form B; ``tests/property/test_gf128_properties.py`` recomputes them.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from mesh.core.gf128 import secret_tag

GCM_PRODUCT = (
    "66e94bd4ef8a2c3b884cfa59ca342b2e",
    "0388dace60b6a392f328c2b971b2fe78",
    "5e2ec746917062882c85b0685353deb7",
)


def vector_message(size: int) -> bytes:
    """Deterministic bytes for vectors: i * i + size mod 251."""
    return bytes((i * i + size) % 251 for i in range(size))


#: (size of header, size of secret, tag), under the key vector_message(48).
TAG_VECTORS = [
    (0, 0, "8770f9fbf7f0452d7bb27cf7c184adfe"),
    (5, 0, "a5e29bc1510e4837f1961e42f080db17"),
    (0, 32, "88243663f67dbe6778ad7a19b18f6d35"),
    (117, 80, "44c24f28da3075265d2f2ec74f8eee4f"),
    (64, 16_400, "aa0ea1f0bfc77d8fd781191564d18ddc"),
]


def product(a: int, b: int) -> int:
    """Shift and add modulo x^128 + x^7 + x^2 + x + 1; bit i is x^i."""
    total = 0
    for bit in reversed(range(128)):
        total <<= 1
        if total >> 128:
            total ^= 1 << 128 | 0x87
        if b >> bit & 1:
            total ^= a
    return total


def form_b(multiply: Callable[[int, int], int], u: bytes, header: bytes, secret: bytes) -> bytes:
    """t = d + c*e + sum of c^(j+1) * y_j, term by term."""
    c, d, e = (int.from_bytes(u[at : at + 16], "little") for at in (0, 16, 32))
    padded = b"".join(part + bytes(-len(part) % 16) for part in (header, secret))
    padded += len(header).to_bytes(8, "little") + len(secret).to_bytes(8, "little")
    total, power = d ^ multiply(c, e), c
    for at in range(0, len(padded), 16):
        power = multiply(power, c)
        total ^= multiply(power, int.from_bytes(padded[at : at + 16], "little"))
    return total.to_bytes(16, "little")


def test_published_product() -> None:
    reflect = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
    c, e, expected = (bytes.fromhex(one).translate(reflect) for one in GCM_PRODUCT)
    # With no header and no secret the length block is zero too: t = d + c*e.
    assert secret_tag(c + bytes(16) + e, b"", b"") == expected
    assert secret_tag(e + bytes(16) + c, b"", b"") == expected


@pytest.mark.parametrize(("header_bytes", "secret_bytes", "tag"), TAG_VECTORS)
def test_fixed_vectors(header_bytes: int, secret_bytes: int, tag: str) -> None:
    header, secret = vector_message(header_bytes), vector_message(secret_bytes)
    assert secret_tag(vector_message(48), header, secret).hex() == tag


@pytest.mark.parametrize(
    "blocks", [0, 1, 2, 60, 61, 62, 63, 64, 65, 79, 80, 127, 128, 1021, 1024, 2100, 8200]
)
def test_table_lane_and_bitwise_ways_agree(blocks: int) -> None:
    rng = random.Random(blocks)
    u, header, secret = rng.randbytes(48), rng.randbytes(19), rng.randbytes(blocks * 16 - (blocks > 7))
    assert secret_tag(u, header, secret) == form_b(product, u, header, secret)


@pytest.mark.parametrize(
    "extreme", [bytes(48), b"\xff" * 48, b"\x01" + bytes(47), bytes(15) + b"\x80" + bytes(32)]
)
def test_extreme_keys(extreme: bytes) -> None:
    for size in (40, 4000):
        secret = b"\xff" * size
        assert secret_tag(extreme, b"\xff", secret) == form_b(product, extreme, b"\xff", secret)


def test_every_length_around_the_first_rows() -> None:
    """Whole rows, rows completed by the padding, by the lengths, and a lengths block in a row of its own."""
    u = vector_message(48)
    for size in (*range(1022, 1058), *range(1262, 1298)):
        secret = vector_message(size)
        assert secret_tag(u, b"head", secret) == form_b(product, u, b"head", secret), size


def test_a_long_header() -> None:
    u, header = vector_message(48), vector_message(5000)
    for secret in (b"", vector_message(33), vector_message(2000)):
        assert secret_tag(u, header, secret) == form_b(product, u, header, secret)


def test_every_buffer_is_accepted() -> None:
    u, header, secret = vector_message(48), vector_message(20), vector_message(3000)
    expected = secret_tag(u, header, secret)
    assert secret_tag(bytearray(u), memoryview(header), bytearray(secret)) == expected
    assert secret_tag(memoryview(u), bytearray(header), memoryview(secret)) == expected


def test_padding_and_boundary_are_covered() -> None:
    """Moving bytes between header and secret, or adding zeros, changes the tag."""
    u, message = vector_message(48), vector_message(64)
    tags = {secret_tag(u, message[:cut], message[cut:]) for cut in range(65)}
    assert len(tags) == 65
    zeros = {secret_tag(u, bytes(a), bytes(b)) for a in range(33) for b in range(33)}
    assert len(zeros) == 33 * 33


def test_every_bit_counts() -> None:
    u, header, secret = vector_message(48), vector_message(21), vector_message(37)
    tag = secret_tag(u, header, secret)
    for number, part in enumerate((u, header, secret)):
        for bit in range(len(part) * 8):
            parts = [u, header, secret]
            parts[number] = (int.from_bytes(part, "little") ^ 1 << bit).to_bytes(len(part), "little")
            assert secret_tag(*parts) != tag


@pytest.mark.parametrize("size", [0, 32, 47, 49])
def test_the_key_has_48_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="48 bytes"):
        secret_tag(bytes(size), b"", b"")
