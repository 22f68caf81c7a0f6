"""One-time pad: XOR of equally long byte strings, at memory speed.

Owns nothing but the operation. It never chooses, remembers or wipes pad: that a
byte is used once is the lane's rule (protocol 1.1-1.2), not this module's.
"""

from __future__ import annotations

import numpy as np

from mesh.core.secret import Buffer

#: Up to here two int conversions beat NumPy's fixed cost of about 1.5 µs.
_SMALL_BYTES = 512
#: Larger operands go piece by piece: temporaries stay in the cache and below the size from
#: which the allocator maps, and the kernel clears, fresh pages for each (ten times slower).
_PIECE_BYTES = 1 << 16


def xor(a: Buffer, b: Buffer) -> bytes:
    """XOR of ``a`` and ``b``, both of n bytes; returns n bytes.

    Raises:
        ValueError: the lengths differ.
    """
    size = len(a)
    if size != len(b):
        raise ValueError("operands of xor differ in length")
    if size <= _SMALL_BYTES:
        return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).to_bytes(size, "little")
    left, right = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    if size <= _PIECE_BYTES:
        return (left ^ right).tobytes()
    ends = range(_PIECE_BYTES, size + _PIECE_BYTES, _PIECE_BYTES)
    pieces = (left[end - _PIECE_BYTES : end] ^ right[end - _PIECE_BYTES : end] for end in ends)
    return b"".join([piece.data for piece in pieces])


def xor_into(target: bytearray, pad: Buffer) -> None:
    """XOR ``pad`` onto ``target`` in place, without a copy; both of n bytes.

    Raises:
        ValueError: the lengths differ; ``target`` is then unchanged.
    """
    if len(target) != len(pad):
        raise ValueError("operands of xor differ in length")
    whole = np.frombuffer(target, np.uint8)
    np.bitwise_xor(whole, np.frombuffer(pad, np.uint8), out=whole)
