"""GF(2^8) modulo x^8 + x^4 + x^3 + x + 1 (0x11B): the field of the shares.

Owns the arithmetic only; who multiplies what is ``mesh.core.sharing``. Vectors
are byte strings, one field element per byte, and are multiplied by a constant
through a 256-byte translation table (over 1 GB/s in plain Python).
"""

from __future__ import annotations

from functools import cache

from mesh.core.secret import Buffer

MODULUS = 0x11B
#: 3 generates the multiplicative group under 0x11B (FIPS 197; 2 does not).
GENERATOR = 3


def _powers() -> bytes:
    element, powers = 1, bytearray()
    for _ in range(255):
        powers.append(element)
        element ^= element << 1
        if element > 0xFF:
            element ^= MODULUS
    return bytes(powers) * 2


EXP = _powers()
LOG = bytes(EXP.index(element) if element else 0 for element in range(256))


def mul(a: int, b: int) -> int:
    """Product of two elements, each 0..255."""
    return EXP[LOG[a] + LOG[b]] if a and b else 0


def inv(a: int) -> int:
    """Multiplicative inverse of ``a``, 1..255.

    Raises:
        ZeroDivisionError: ``a`` is 0.
    """
    if not a:
        raise ZeroDivisionError("0 has no inverse in GF(2^8)")
    return EXP[255 - LOG[a]]


@cache
def _table(c: int) -> bytes:
    return bytes(mul(c, element) for element in range(256))


def scale(data: Buffer, c: int) -> bytes:
    """Each byte of ``data`` times the constant ``c`` (0..255); as long as ``data``.

    Raises:
        IndexError: ``c`` is not an element of the field.
    """
    if c == 1:
        return bytes(data)
    return (data if isinstance(data, bytes) else bytes(data)).translate(_table(c))
