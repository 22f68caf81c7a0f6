"""One-time pad: XOR of equally long byte strings, at memory speed.

Owns nothing but the operation. It never chooses, remembers or wipes pad: that a
byte is used once is the lane's rule (protocol 1.1-1.2), not this module's.
"""

from __future__ import annotations

import numpy as np

from mesh.core.secret import Buffer

#: Up to here two int conversions beat NumPy's fixed cost of about 2 µs.
_SMALL_BYTES = 1024


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
    return np.bitwise_xor(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)).tobytes()


def xor_into(target: bytearray, pad: Buffer) -> None:
    """XOR ``pad`` onto ``target`` in place, without a copy; both of n bytes.

    Raises:
        ValueError: the lengths differ; ``target`` is then unchanged.
    """
    if len(target) != len(pad):
        raise ValueError("operands of xor differ in length")
    whole = np.frombuffer(target, np.uint8)
    np.bitwise_xor(whole, np.frombuffer(pad, np.uint8), out=whole)
