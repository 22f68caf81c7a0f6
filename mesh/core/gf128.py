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
#: Up to here one table of 256 products and Python integers win: about 1.8 µs a block, against
#: a fixed 50 µs for the tables of the lanes.
_SMALL_BLOCKS = 64
#: 2^10 lanes: a row's 256 KiB of products stay in the second-level cache.
_MAX_DOUBLINGS = 10
#: What shifting a polynomial of degree 127 up by one adds: nothing, or the modulus.
_OVERFLOW = (0, 1 << 128 | 0x87)


def secret_tag(u: Buffer, header: Buffer, secret: Buffer) -> bytes:
    """The 16-byte tag t of ``header`` and ``secret`` under the 48-byte key ``u``.

    Table look-ups depend on the key: do not run this beside untrusted tenants of one core.

    Raises:
        ValueError: ``u`` is not 48 bytes.
    """
    if len(u) != KEY_BYTES:
        raise ValueError("the tag key has 48 bytes")
    c = int.from_bytes(u[:16], "little")
    # d and e are the blocks before y_1: t = d + c * (e + c * (y_1 + c * (..)))
    lead = b"".join((u[16:], header, bytes(-len(header) % _BLOCK)))
    tail = (
        bytes(-len(secret) % _BLOCK) + len(header).to_bytes(8, "little") + len(secret).to_bytes(8, "little")
    )
    if len(secret) > _SMALL_BLOCKS * _BLOCK:
        message = lead + _fold(secret, tail, c)
    else:
        message = b"".join((lead, secret, tail))
    while len(message) > _SMALL_BLOCKS * _BLOCK:
        message = _fold(message, b"", c)
    return _horner(message, c).to_bytes(TAG_BYTES, "little")


def _horner(message: bytes, c: int) -> int:
    """Sum of c^j times the j-th 16-byte block of ``message``, j from 0."""
    table = _byte_table(c)
    value = 0
    for at in reversed(range(0, len(message), _BLOCK)):
        value = _times(table, value) ^ int.from_bytes(message[at : at + _BLOCK], "little")
    return value


def _byte_table(c: int) -> list[int]:
    """The 256 products of ``c`` and a polynomial of degree < 8, not reduced."""
    table = [0]
    for bit in range(8):
        shifted = c << bit
        table += [entry ^ shifted for entry in table]
    return table


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


def _square(value: int) -> int:
    """The square: in characteristic 2 the bits just move apart; then reduced."""
    return _reduce(int(f"{value:b}", 4))


def _fold(message: Buffer, tail: bytes, c: int) -> bytes:
    """L blocks, L a power of two, with the same value at ``c`` as ``message`` and ``tail`` together.

    The blocks are dealt to L interleaved lanes. A row of L blocks is worth c^L times the row
    before it, so Horner's rule advances all lanes by one multiplication with the constant
    c^L: sixteen look-ups per block, one per byte, each of a 16-byte product.

    Args:
        message: more than 64 blocks, the last of which ``tail`` may complete.
        tail: what follows it, so that both together are whole blocks; at most two of them.
        c: the point.
    """
    doublings = min(_MAX_DOUBLINGS, max(4, (len(message) // _BLOCK).bit_length() - 6))
    lanes = 1 << doublings
    for _ in range(doublings):
        c = _square(c)
    products = _position_tables(c)
    whole = len(message) // (lanes * _BLOCK) * (lanes * _BLOCK)
    rest = bytes(memoryview(message)[whole:]) + tail
    rest += bytes(-len(rest) % (lanes * _BLOCK))
    rows: list[NDArray[np.uint64]] = [
        *np.frombuffer(message, "<u8", count=whole // 8).reshape(-1, 2 * lanes),
        *np.frombuffer(rest, "<u8").reshape(-1, 2 * lanes),
    ]
    state = rows.pop().copy()
    state_bytes = state.view(np.uint8).reshape(lanes, _BLOCK).T
    # Cell 256 * position + byte: byte 1 of every index stays the position, byte 0 is the lane's.
    cells = np.zeros((_BLOCK, lanes, 8), np.uint8)
    cells[:, :, 1] = np.arange(_BLOCK, dtype=np.uint8)[:, None]
    low_bytes = cells[:, :, 0]
    indices = cells.view("<i8").reshape(_BLOCK, lanes)
    found = np.empty((_BLOCK, lanes), np.complex128)
    found_words = found.view(np.uint64)
    for row in reversed(rows):
        low_bytes[:] = state_bytes
        products.take(indices, None, found, "wrap")
        np.bitwise_xor.reduce(found_words, axis=0, out=state)
        state ^= row
    return bytes(state)


def _position_tables(c: int) -> NDArray[np.complex128]:
    """4096 cells: number 256 * i + v is v * x^(8*i) * c. A complex128 is a 16-byte cell, never a number."""
    shifted = []
    for _ in range(128):
        shifted.append(c)
        c = c << 1 ^ _OVERFLOW[c >> 127]
    basis = np.frombuffer(b"".join([one.to_bytes(_BLOCK, "little") for one in shifted]), "<u8")
    steps = basis.reshape(32, 4, 2)
    # Word, nibble position, nibble value: products of four bits, then of two such halves of a byte.
    nibbles = np.zeros((2, 32, 16), np.uint64)
    for bit in range(4):
        done = 1 << bit
        np.bitwise_xor(nibbles[:, :, :done], steps[:, bit].T[:, :, None], out=nibbles[:, :, done : 2 * done])
    table = np.empty((16, 16, 16, 2), np.uint64)
    np.bitwise_xor(nibbles[:, 1::2, :, None], nibbles[:, ::2, None, :], out=table.transpose(3, 0, 1, 2))
    return table.view(np.complex128).reshape(4096)
