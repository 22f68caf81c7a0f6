"""The relay queue of a real link: shares on demand overtake bulk, and always find room."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.errors import ErrorReason, ShortageError
from mesh.node.link import MAX_RELAY_BYTES
from mesh.v1.link_pb2 import ShareItem
from tests.fakes.link_sites import Pair


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """Two sites with an open link."""
    both = Pair(tmp_path)
    await both.start()
    await both.a.until(lambda: both.a.link.claimable() > 2000)
    yield both
    await both.stop()


def item(name: bytes, size: int, priority: int) -> ShareItem:
    """A share to relay."""
    return ShareItem(header=name, tag=bytes(16), length_bytes=size, priority=priority)


async def test_shares_on_demand_overtake_bulk(pair: Pair) -> None:
    values = {name: os.urandom(500) for name in (b"bulk-1", b"bulk-2", b"key-1", b"key-2")}
    for name, value in values.items():
        pair.a.link.enqueue(item(name, 500, int(name.startswith(b"key"))), value)
    await pair.b.until(lambda: len(pair.b.shares.got) == 4)
    got = {share.header: value for _, share, value in pair.b.shares.got}
    assert list(got) == [b"key-1", b"key-2", b"bulk-1", b"bulk-2"]
    assert got == values


async def test_bulk_leaves_room_in_the_queue(pair: Pair) -> None:
    size = pair.a.link.max_frame_bytes - 32
    value = bytes(size)
    with pytest.raises(ShortageError) as caught:
        for _ in range(MAX_RELAY_BYTES // size + 1):
            pair.a.link.enqueue(item(b"bulk", size, 0), value)
    assert caught.value.reason == ErrorReason.BUSY
    pair.a.link.enqueue(item(b"key", 48, 1), bytes(48))
    await pair.b.until(lambda: bool(pair.b.shares.got))
    assert pair.b.shares.got[0][1].header == b"key"
