"""One-time Poly1305: published vectors, and verification that raises and says nothing."""

from __future__ import annotations

import pytest
from cryptography.exceptions import UnsupportedAlgorithm, _Reasons

from mesh.core import mac
from mesh.core.mac import one_time_tag, require_poly1305, verify_one_time_tag
from mesh.errors import ErrorReason, IntegrityError, TagMismatchError

# RFC 8439 section 2.5.2, and test vectors 1, 7, 8, 9 and 11 of appendix A.3.
VECTORS = [
    (
        "85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b",
        b"Cryptographic Forum Research Group".hex(),
        "a8061dc1305136c6c22b8baf0c0127a9",
    ),
    ("00" * 32, "00" * 64, "00" * 16),
    ("02" + "00" * 31, "ff" * 16, "03" + "00" * 15),
    ("02" + "00" * 15 + "ff" * 16, "02" + "00" * 15, "03" + "00" * 15),
    ("01" + "00" * 31, "ff" * 16 + "f0" + "ff" * 15 + "11" + "00" * 15, "05" + "00" * 15),
    ("02" + "00" * 31, "fd" + "ff" * 15, "fa" + "ff" * 15),
]


@pytest.mark.parametrize(("key", "message", "tag"), VECTORS)
def test_published_vectors(key: str, message: str, tag: str) -> None:
    raw = bytes.fromhex(message)
    assert one_time_tag(bytes.fromhex(key), raw) == bytes.fromhex(tag)
    assert one_time_tag(bytes.fromhex(key), raw[:7], b"", memoryview(raw)[7:]) == bytes.fromhex(tag)
    verify_one_time_tag(bytearray.fromhex(key), bytes.fromhex(tag), raw[:3], raw[3:])


def test_no_parts_is_the_empty_message() -> None:
    key = bytes(range(32))
    assert one_time_tag(key) == one_time_tag(key, b"") == key[16:]


@pytest.mark.parametrize("tag_change", [b"\x01" + bytes(15), bytes(15) + b"\x80"])
def test_wrong_tags_raise_and_say_nothing(tag_change: bytes) -> None:
    key, message = bytes(range(32)), b"message"
    tag = one_time_tag(key, message)
    wrong = bytes(a ^ b for a, b in zip(tag, tag_change, strict=True))
    with pytest.raises(TagMismatchError) as caught:
        verify_one_time_tag(key, wrong, message)
    assert str(caught.value) == "authentication failed"
    assert caught.value.reason is ErrorReason.TAG_MISMATCH


@pytest.mark.parametrize("size", [0, 15, 17, 32])
def test_tags_of_another_length_look_the_same(size: int) -> None:
    key = bytes(range(32))
    with pytest.raises(TagMismatchError, match=r"^authentication failed$"):
        verify_one_time_tag(key, one_time_tag(key, b"m").ljust(size, b"\0")[:size], b"m")


@pytest.mark.parametrize("size", [0, 31, 33])
def test_keys_have_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        one_time_tag(bytes(size), b"m")
    with pytest.raises(ValueError, match="32 bytes"):
        verify_one_time_tag(bytes(size), bytes(16), b"m")


def test_a_provider_without_poly1305_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class FipsPoly1305:
        @staticmethod
        def generate_tag(key: bytes, data: bytes) -> bytes:
            raise UnsupportedAlgorithm("no poly1305", _Reasons.UNSUPPORTED_MAC)

    require_poly1305()
    monkeypatch.setattr(mac, "Poly1305", FipsPoly1305)
    with pytest.raises(IntegrityError, match="fips") as caught:
        require_poly1305()
    assert caught.value.reason is ErrorReason.CRYPTO_UNAVAILABLE
