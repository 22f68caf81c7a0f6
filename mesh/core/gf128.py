"""The secret-authenticating tag: a polynomial over GF(2^128) under a shared key.

Owns form B of the design ("Secret-authenticating tag"), the only form that holds
when the attacker knows the secret and shifts it and the tag key by linear offsets:

    u = (c, d, e)        t = d + c*e + sum over j = 1..b of c^(j+1) * y_j

    y_1 ..     header, zero-padded to 16 bytes
    .. y_(b-1) secret, zero-padded to 16 bytes
    y_b        length of header, length of secret, 8 bytes each, little-endian

A change of header or secret and any shift of u passes with probability at most
(b+1)/2^128, as long as the attacker holds fewer than k shares.

Field and bit order: GF(2)[x] modulo x^128 + x^7 + x^2 + x + 1. A 16-byte block is
read as a little-endian integer whose bit i is the coefficient of x^i: byte 0 bit 0
(value 1) is x^0. This is the field of GCM with the bits of every byte reversed.

Must not be used with one u for two messages.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mesh.core.secret import Buffer

KEY_BYTES = 48
TAG_BYTES = 16
_BLOCK = 16
_MASK = (1 << 128) - 1
#: Up to this many blocks one byte-wise table and Python integers are fastest.
_SMALL_BLOCKS = 48


def secret_tag(u: Buffer, header: Buffer, secret: Buffer) -> bytes:
    """The 16-byte tag t of ``header`` and ``secret`` under the 48-byte key ``u``.

    Raises:
        ValueError: ``u`` is not 48 bytes.
    """
    if len(u) != KEY_BYTES:
        raise ValueError("the tag key has 48 bytes")
    c = int.from_bytes(u[:16], "little")
    d = int.from_bytes(u[16:32], "little")
    message = b"".join(
        (
            u[32:],
            header,
            bytes(-len(header) % _BLOCK),
            secret,
            bytes(-len(secret) % _BLOCK),
            len(header).to_bytes(8, "little"),
            len(secret).to_bytes(8, "little"),
        )
    )
    table = _byte_table(c)
    value = _evaluate(message, c, table)
    return (d ^ _times(table, value)).to_bytes(TAG_BYTES, "little")


def _times(table: list[int], value: int) -> int:
    """``value`` times the constant of ``table``, byte by byte, then reduced."""
    product = 0
    for byte in value.to_bytes(_BLOCK, "big"):
        product = product << 8 ^ table[byte]
    return _reduce(product)


def _reduce(product: int) -> int:
    """A product of up to 256 bits modulo the field polynomial."""
    high = product >> 128
    product = product & _MASK ^ high ^ high << 1 ^ high << 2 ^ high << 7
    high = product >> 128
    return product & _MASK ^ high ^ high << 1 ^ high << 2 ^ high << 7


def _byte_table(c: int) -> list[int]:
    """The 256 products of ``c`` and a polynomial of degree < 8, not reduced."""
    table = [0]
    for bit in range(8):
        shifted = c << bit
        table += [entry ^ shifted for entry in table]
    return table


def _evaluate(message: bytes, c: int, table: list[int]) -> int:
    """Sum of c^j times the j-th 16-byte block of ``message``, j from 0."""
    count = len(message) // _BLOCK
    if count > _SMALL_BLOCKS:
        return _evaluate_lanes(np.frombuffer(message, np.uint64).reshape(count, 2), c, table)
    value = 0
    for at in reversed(range(0, len(message), _BLOCK)):
        value = _times(table, value) ^ int.from_bytes(message[at : at + _BLOCK], "little")
    return value


def _evaluate_lanes(blocks: NDArray[np.uint64], c: int, table: list[int]) -> int:
    """The same for many blocks: L interleaved lanes advance by c^L, then are themselves evaluated.

    Row r of L blocks counts c^(r*L) times its own value, so one multiplication by c^L serves
    a whole row: sixteen table look-ups, one per byte, each fetching a 16-byte product.
    """
    count = len(blocks)
    doublings = max(4, min(12, (count.bit_length() - 1) - 4))
    lanes = 1 << doublings
    power = c
    for _ in range(doublings):
        power = _square(power)
    tables = _position_tables(power)
    state = np.zeros((lanes, 2), np.uint64)
    top = (count - 1) // lanes * lanes
    state[: count - top] = blocks[top:]
    indices = np.empty((_BLOCK, lanes), np.intp)
    products = np.empty(lanes, np.complex128)
    words = products.view(np.uint64).reshape(lanes, 2)
    for row in range(top - lanes, -1, -lanes):
        indices[:] = state.view(np.uint8).reshape(lanes, _BLOCK).T
        state = blocks[row : row + lanes].copy()
        for position in range(_BLOCK):
            tables[position].take(indices[position], None, products, "wrap")
            state ^= words
    return _evaluate(state.tobytes(), c, table)


def _square(value: int) -> int:
    """The square: in characteristic 2 the bits move apart, then the result is reduced."""
    return _reduce(int(f"{value:b}", 4))


def _position_tables(c: int) -> NDArray[np.complex128]:
    """Shape (16, 256): entry (i, v) is v * x^(8*i) * c; a complex128 is a 16-byte cell, never a number."""
    basis = bytearray()
    for _ in range(128):
        basis += c.to_bytes(_BLOCK, "little")
        c = (c << 1) ^ (0x87 | 1 << 128 if c >> 127 else 0)
    steps = np.frombuffer(basis, np.uint64).reshape(_BLOCK, 8, 1, 2)
    table = np.zeros((_BLOCK, 256, 2), np.uint64)
    for bit in range(8):
        done = 1 << bit
        np.bitwise_xor(table[:, :done], steps[:, bit], out=table[:, done : 2 * done])
    return table.view(np.complex128).reshape(_BLOCK, 256)
