"""key_IDs: a UUID version 8 that addresses slots of a reserve and proves it.

Owns protocol 4.1-4.2: the layout, the 61-bit one-time tag over the prime field
2^61 - 1, and their comparison. Whether a slot is held or redeemed is decided by
``mesh.core.reserve``. No uuid.UUID here: this is the hot path.

Layout, version 1, big-endian, bit 0 is the first bit of byte 0::

    bits    0 -  11   epoch of the reserve
    bits   12 -  47   first slot
    bits   48 -  51   UUID version, 8 (RFC 9562 section 5.8)
    bits   52 -  63   size in bytes minus one, upper 12 of 13 bits
    bits   64 -  65   UUID variant, 0b10
    bit    66         size in bytes minus one, lowest bit
    bits   67 - 127   tag

Tag, with (c, d) the two little-endian 64-bit words of the first slot's tag part,
each cut to 61 bits, and p = 2^61 - 1::

    tag = d + c*(epoch*2^36 + slot) + c^2*(size - 1) + sum c^(2+j) * n_j   mod p

where n_1.. are the 7-byte little-endian blocks of: length of master (1 byte),
master, length of slave (1 byte), slave, zeros. The encoding is injective (epoch,
slot and size have fixed widths, the names carry their lengths), a block is below
p, and there are at most 21 of them, so for an attacker who sees one tag under
(c, d) any other message passes with probability at most 21/2^61 plus the 2^-60 by
which cut words differ from uniform: below 2^-56 per guess.
"""

from __future__ import annotations

import hmac
import struct
from functools import lru_cache
from typing import NamedTuple

from mesh.core.secret import Buffer

KEY_ID_BYTES = 16
TAG_PART_BYTES = 16
KEY_PART_BYTES = 32
MAX_EPOCH = (1 << 12) - 1
MAX_SLOT = (1 << 36) - 1
MAX_SIZE_BYTES = 1 << 13
NAME_MAX_BYTES = 64

_P = (1 << 61) - 1
_BLOCK_BYTES = 7
_WORDS = struct.Struct("<QQ")
_HALVES = struct.Struct(">QQ")
_VARIANT = 0b10 << 62
_VERSION = 8 << 12


class KeyAddress(NamedTuple):
    """Where a key lies: ``size_bytes`` of the key parts from ``slot`` on, in ``epoch``."""

    epoch: int
    slot: int
    size_bytes: int

    @property
    def slot_count(self) -> int:
        """How many consecutive slots the key takes."""
        return -(-self.size_bytes // KEY_PART_BYTES)


class PairTagger:
    """Issues and checks key_IDs of one (master, slave) pair; the names are encoded once.

    Args:
        master: the master SAE id, already validated by ``mesh.core.names``.
        slave: the slave SAE id, likewise.

    Raises:
        ValueError: a name is empty or longer than 64 bytes.
    """

    __slots__ = ("_blocks",)

    def __init__(self, master: str, slave: str) -> None:
        encoded = bytearray()
        for name in (master.encode(), slave.encode()):
            if not 0 < len(name) <= NAME_MAX_BYTES:
                raise ValueError("an SAE id has 1 to 64 bytes")
            encoded += bytes((len(name),)) + name
        self._blocks = tuple(
            int.from_bytes(encoded[at : at + _BLOCK_BYTES], "little")
            for at in reversed(range(0, len(encoded), _BLOCK_BYTES))
        )

    def issue(self, address: KeyAddress, tag_part: Buffer) -> bytes:
        """The key_ID, 16 bytes as in ``uuid.UUID.bytes``, of a key at ``address``.

        Args:
            address: epoch 0..2^12-1, slot 0..2^36-1, size 1..8192 bytes.
            tag_part: the 16 bytes of the first slot, used for this key_ID only.

        Raises:
            ValueError: the address does not fit the layout.
            struct.error: the tag part is not 16 bytes.
        """
        epoch, slot, size_bytes = address
        if not (0 <= epoch <= MAX_EPOCH and 0 <= slot <= MAX_SLOT and 0 < size_bytes <= MAX_SIZE_BYTES):
            raise ValueError("the key address does not fit a key_id")
        size = size_bytes - 1
        high = epoch << 52 | slot << 16 | _VERSION | size >> 1
        return _HALVES.pack(high, self._low(epoch << 36 | slot, size, tag_part))

    def issue_run(self, first: KeyAddress, count: int, tag_parts: Buffer) -> list[bytes]:
        """``issue`` for ``count`` keys of one size that lie one after the other: the hot path of draws.

        Args:
            first: address of the first key.
            count: number of keys, each ``first.slot_count`` slots.
            tag_parts: 16 bytes for every slot of the run, in order.

        Raises:
            ValueError: the addresses do not fit the layout.
            struct.error: too few tag parts.
        """
        epoch, slot, size_bytes = first
        step = first.slot_count
        if not (0 <= epoch <= MAX_EPOCH and 0 < size_bytes <= MAX_SIZE_BYTES and slot >= 0) or (
            slot + count * step > MAX_SLOT + 1
        ):
            raise ValueError("the key addresses do not fit a key_id")
        words = struct.unpack_from(f"<{2 * step * count}Q", tag_parts)
        size = size_bytes - 1
        high = epoch << 52 | slot << 16 | _VERSION | size >> 1
        low = _VARIANT | (size & 1) << 61
        where = epoch << 36 | slot
        blocks, pack, p = self._blocks, _HALVES.pack, _P
        issued = []
        for at in range(0, 2 * step * count, 2 * step):
            c = words[at] & p
            total = 0
            for block in blocks:
                total = (total + block) * c % p
            total = (((total + size) * c + where) * c + (words[at + 1] & p)) % p
            issued.append(pack(high, low | total))
            high += step << 16
            where += step
        return issued

    def matches(self, key_id: Buffer, tag_part: Buffer) -> bool:
        """Whether ``issue`` gives this key_ID for the address it names; constant-time compare.

        Raises:
            struct.error: the tag part is not 16 bytes.
        """
        if parse(key_id) is None:
            return False
        high, low = _HALVES.unpack(key_id)
        expected = self._low(high >> 16, (high & 0xFFF) << 1 | low >> 61 & 1, tag_part)
        return hmac.compare_digest(_HALVES.pack(high, expected), key_id)

    def _low(self, where: int, size: int, tag_part: Buffer) -> int:
        """Bits 64-127: variant, lowest bit of the size field, tag."""
        c: int
        d: int
        c, d = _WORDS.unpack(tag_part)
        c &= _P
        total = 0
        for block in self._blocks:
            total = (total + block) * c % _P
        total = (((total + size) * c + where) * c + (d & _P)) % _P
        return _VARIANT | (size & 1) << 61 | total


def text_of(key_id: bytes) -> str:
    """A key_ID of 16 bytes as RFC 9562 writes it; like ``str(UUID(bytes=key_id))``, but quick."""
    digits = key_id.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def parse(key_id: Buffer) -> KeyAddress | None:
    """The address in a key_ID, or None if it is not 16 bytes of UUID version 8, RFC variant.

    Says nothing about whether the tag fits: see ``matches``.
    """
    if len(key_id) != KEY_ID_BYTES:
        return None
    high, low = _HALVES.unpack(key_id)
    if high & 0xF000 != _VERSION or low >> 62 != 0b10:
        return None
    return KeyAddress(high >> 52, high >> 16 & MAX_SLOT, ((high & 0xFFF) << 1 | low >> 61 & 1) + 1)


@lru_cache(maxsize=4096)
def tagger(master: str, slave: str) -> PairTagger:
    """The tagger of a pair, from a bounded cache of public facts."""
    return PairTagger(master, slave)


def issue(address: KeyAddress, master: str, slave: str, tag_part: Buffer) -> bytes:
    """``PairTagger.issue`` for a pair named in the call."""
    return tagger(master, slave).issue(address, tag_part)


def matches(key_id: Buffer, master: str, slave: str, tag_part: Buffer) -> bool:
    """``PairTagger.matches`` for a pair named in the call."""
    return tagger(master, slave).matches(key_id, tag_part)
