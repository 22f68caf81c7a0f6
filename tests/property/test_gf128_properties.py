"""The tag against an independent field (``galois``) and against its algebra."""

from __future__ import annotations

import random
from typing import Any

import galois
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.gf128 import secret_tag
from mesh.core.otp import xor
from tests.unit.test_gf128 import TAG_VECTORS, form_b, product, vector_message


@pytest.fixture(scope="module")
def field() -> Any:
    """GF(2^128) as galois computes it; that x generates the group is not used, so not verified."""
    modulus = galois.Poly.Degrees([128, 7, 2, 1, 0])
    return galois.GF(
        2**128, irreducible_poly=modulus, primitive_element=galois.Poly.Degrees([1]), verify=False
    )


def galois_product(field: Any, a: int, b: int) -> int:
    return int(field(a) * field(b))


def test_the_modulus_is_irreducible() -> None:
    assert galois.Poly.Degrees([128, 7, 2, 1, 0]).is_irreducible()


@pytest.mark.parametrize(("header_bytes", "secret_bytes", "tag"), TAG_VECTORS)
def test_vectors_recomputed(field: Any, header_bytes: int, secret_bytes: int, tag: str) -> None:
    header, secret = vector_message(header_bytes), vector_message(secret_bytes)
    expected = form_b(lambda a, b: galois_product(field, a, b), vector_message(48), header, secret)
    assert expected.hex() == tag


@given(a=st.integers(0, 2**128 - 1), b=st.integers(0, 2**128 - 1))
def test_products_agree_with_galois(field: Any, a: int, b: int) -> None:
    u = a.to_bytes(16, "little") + bytes(16) + b.to_bytes(16, "little")
    expected = galois_product(field, a, b)
    assert product(a, b) == expected
    assert int.from_bytes(secret_tag(u, b"", b""), "little") == expected


@given(u=st.binary(min_size=48, max_size=48), header=st.binary(max_size=200), secret=st.binary(max_size=1500))
def test_tag_is_form_b(u: bytes, header: bytes, secret: bytes) -> None:
    assert secret_tag(u, header, secret) == form_b(product, u, header, secret)


@given(
    u=st.binary(min_size=48, max_size=48),
    shift=st.binary(min_size=16, max_size=16),
    secret=st.binary(max_size=2000),
)
def test_d_masks_the_tag(u: bytes, shift: bytes, secret: bytes) -> None:
    """A uniform d makes t uniform whatever the secret is: t says nothing about it."""
    moved = u[:16] + xor(u[16:32], shift) + u[32:]
    assert xor(secret_tag(u, b"", secret), secret_tag(moved, b"", secret)) == shift


@given(
    seed=st.integers(0, 2**64),
    key_shift=st.binary(min_size=48, max_size=48),
    shift=st.binary(min_size=1, max_size=90).filter(any),
)
def test_a_linear_shift_is_caught(seed: int, key_shift: bytes, shift: bytes) -> None:
    """What a lying hub can do to a shared (u, S): add what it knows; it passes below 2^-124."""
    rng = random.Random(seed)  # the tag key is uniform to the liar, which Hypothesis' bytes are not
    u, secret = rng.randbytes(48), rng.randbytes(len(shift))
    shifted = secret_tag(xor(u, key_shift), b"header", xor(secret, shift))
    assert shifted != secret_tag(u, b"header", secret)
