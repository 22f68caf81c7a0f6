"""Blocks: how keys of two devices become bytes of a lane, checked by both ends.

Owns protocol 2.2: the first 64 bytes of a block are the one-time keys of its offer and of
its acceptance, get no lane offset and are tagged by nothing. Must not fetch or store.

A block's canonical core, covered by both tags (big-endian):

====== ===== ====================================================
offset bytes version 1
====== ===== ====================================================
0      4     "KMB" and 1
4      16    block id
20     1     1: the leader writes the lane
21     4     lane epoch
25     8     lane offset of the block's first lane byte
33     4     lane bytes of the block
37     2     number of device key IDs
39     ..    each ID: 1 byte of length, ASCII
====== ===== ====================================================
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mesh.core.mac import one_time_tag, verify_one_time_tag
from mesh.core.ranges import Range
from mesh.core.secret import Buffer
from mesh.errors import PeerError

TAG_KEYS_BYTES = 64
BLOCK_ID_BYTES = 16
MAX_KEY_IDS = 1024
MAX_KEY_ID_CHARS = 64
MAX_BLOCK_BYTES = 256 << 10
#: A block holds at least the two tag keys and the root.
MIN_BLOCK_BYTES = TAG_KEYS_BYTES + 64
#: Offers that a leader may have open on one link.
MAX_OUTSTANDING = 8
_CORE = struct.Struct(">4s16sBIQIH")
_MAGIC = b"KMB\x01"
_ACCEPTED = b"KMA\x01"


@dataclass(frozen=True, slots=True)
class Block:
    """What an offer says of a block.

    Raises:
        PeerError: a field is out of bounds; names it.
    """

    block_id: bytes
    leader_writes: bool
    epoch: int
    offset: int
    length_bytes: int
    device_key_ids: tuple[str, ...]

    def __post_init__(self) -> None:
        checks = (
            ("block_id", len(self.block_id) == BLOCK_ID_BYTES),
            ("epoch", 0 <= self.epoch < 1 << 32),
            ("offset", 0 <= self.offset < 1 << 62),
            (
                "length_bytes",
                MIN_BLOCK_BYTES <= self.length_bytes + TAG_KEYS_BYTES <= MAX_BLOCK_BYTES,
            ),
            ("device_key_ids", 1 <= len(self.device_key_ids) <= MAX_KEY_IDS),
            ("device_key_ids", len(set(self.device_key_ids)) == len(self.device_key_ids)),
            (
                "device_key_ids",
                all(
                    one.isascii() and one.isprintable() and 1 <= len(one) <= MAX_KEY_ID_CHARS
                    for one in self.device_key_ids
                ),
            ),
        )
        for name, holds in checks:
            if not holds:
                raise PeerError(f"block offer with a bad {name}")

    @property
    def span(self) -> Range:
        """The lane offsets of the block."""
        return Range(self.offset, self.offset + self.length_bytes)

    def core(self) -> bytes:
        """The bytes that both tags cover besides the block's own."""
        head = _CORE.pack(
            _MAGIC,
            self.block_id,
            self.leader_writes,
            self.epoch,
            self.offset,
            self.length_bytes,
            len(self.device_key_ids),
        )
        return head + b"".join(bytes([len(one)]) + one.encode("ascii") for one in self.device_key_ids)


def offer_tag(block: Block, data: Buffer) -> bytes:
    """The offer's tag, under the block's first 32 bytes; ``data`` is the whole block."""
    key, _, lane = _split(block, data)
    return one_time_tag(key, block.core(), lane)


def verify_offer(block: Block, data: Buffer, tag: Buffer) -> None:
    """Check that the fetched keys are the ones offered.

    Raises:
        TagMismatchError: they are not, or something in the offer was changed.
        PeerError: the keys' bytes do not add up to the offer's length.
    """
    key, _, lane = _split(block, data)
    verify_one_time_tag(key, tag, block.core(), lane)


def accept_tag(block: Block, data: Buffer) -> bytes:
    """The acceptance's tag, under the block's second 32 bytes.

    Both ends can compute it: the leader keeps it beside the offer and compares.
    """
    _, key, lane = _split(block, data)
    return one_time_tag(key, _ACCEPTED, block.core(), lane)


def lane_bytes(data: Buffer) -> memoryview:
    """The part of a block that gets lane offsets."""
    return memoryview(data)[TAG_KEYS_BYTES:]


def _split(block: Block, data: Buffer) -> tuple[memoryview, memoryview, memoryview]:
    if len(data) != block.length_bytes + TAG_KEYS_BYTES:
        raise PeerError("the device's keys do not add up to the block's length")
    view = memoryview(data)
    return view[:32], view[32:TAG_KEYS_BYTES], view[TAG_KEYS_BYTES:]
