"""One-time Poly1305: the authenticator of frames, blocks, confirms and deposits.

Both halves of the key, r and s, are fresh pad bytes, so the tag is information-
theoretically secure: a forgery over L bytes passes with probability at most
8*ceil(L/16)/2^106 per attempt (Bernstein, The Poly1305-AES message-authentication
code, theorem 3.3, with a fresh s in place of AES; RFC 8439 section 2.5 for the
function). Must not be used twice with one key: whoever passes the key has claimed
it (protocol 1.5).
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.poly1305 import Poly1305

from mesh.core.secret import Buffer
from mesh.errors import ErrorReason, IntegrityError, TagMismatchError

KEY_BYTES = 32
TAG_BYTES = 16


def one_time_tag(key: Buffer, *parts: Buffer) -> bytes:
    """The 16-byte tag of the concatenated ``parts`` under a 32-byte one-time key.

    Parts are joined without framing: a caller whose parts vary in length puts the
    lengths into a part of fixed size.

    Raises:
        ValueError: the key is not 32 bytes.
    """
    if len(parts) == 1:
        return Poly1305.generate_tag(key, parts[0])
    state = Poly1305(key)
    for part in parts:
        state.update(part)
    return state.finalize()


def verify_one_time_tag(key: Buffer, tag: Buffer, *parts: Buffer) -> None:
    """Compare ``tag`` with that of ``parts``, in constant time; returns nothing.

    Raises:
        TagMismatchError: the tag is another, or is not 16 bytes long.
        ValueError: the key is not 32 bytes.
    """
    state = Poly1305(key)
    for part in parts:
        state.update(part)
    try:
        state.verify(bytes(tag))
    except InvalidSignature as error:
        raise TagMismatchError from error


def require_poly1305() -> None:
    """Check at start-up that the provider has Poly1305; there is no weaker fallback.

    Raises:
        IntegrityError: it has not, as under a FIPS provider (``CRYPTO_UNAVAILABLE``).
    """
    try:
        Poly1305.generate_tag(bytes(KEY_BYTES), b"")
    except UnsupportedAlgorithm as error:
        raise IntegrityError(
            "the cryptographic provider offers no poly1305, use one that is not in fips mode",
            reason=ErrorReason.CRYPTO_UNAVAILABLE,
        ) from error
