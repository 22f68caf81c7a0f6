"""Blocks: bounds, the canonical core, and the two one-time tags (protocol 2.2)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.poly1305 import Poly1305

from mesh.core import blocks
from mesh.core.blocks import Block
from mesh.core.budget import FailureBudget, RateCap
from mesh.errors import PeerError, TagMismatchError

DATA = bytes(range(256)) * 2
BLOCK = Block(b"i" * 16, True, 3, 4096, len(DATA) - 64, ("key-1", "key-22"))


def test_core_as_documented() -> None:
    head = b"KMB\x01" + b"i" * 16 + b"\x01" + (3).to_bytes(4, "big") + (4096).to_bytes(8, "big")
    head += (448).to_bytes(4, "big") + (2).to_bytes(2, "big")
    assert BLOCK.core() == head + b"\x05key-1\x06key-22"
    assert (BLOCK.span.start, BLOCK.span.stop) == (4096, 4096 + 448)


def test_tags_use_one_key_each_and_cover_the_rest() -> None:
    offer = Poly1305.generate_tag(DATA[:32], BLOCK.core() + DATA[64:])
    accept = Poly1305.generate_tag(DATA[32:64], b"KMA\x01" + BLOCK.core() + DATA[64:])
    assert blocks.offer_tag(BLOCK, DATA) == offer
    assert blocks.accept_tag(BLOCK, DATA) == accept
    assert bytes(blocks.lane_bytes(DATA)) == DATA[64:]
    blocks.verify_offer(BLOCK, DATA, offer)


@pytest.mark.parametrize(
    "changed",
    [
        {"block_id": b"j" * 16},
        {"leader_writes": False},
        {"epoch": 4},
        {"offset": 4097},
        {"device_key_ids": ("key-1", "key-23")},
        {"device_key_ids": ("key-22", "key-1")},
    ],
)
def test_offer_tag_covers_every_field(changed: dict[str, object]) -> None:
    tag = blocks.offer_tag(BLOCK, DATA)
    with pytest.raises(TagMismatchError):
        blocks.verify_offer(replace(BLOCK, **changed), DATA, tag)  # type: ignore[arg-type]


def test_offer_tag_covers_the_lane_bytes() -> None:
    tag = blocks.offer_tag(BLOCK, DATA)
    with pytest.raises(TagMismatchError):
        blocks.verify_offer(BLOCK, DATA[:-1] + b"\x00", tag)
    with pytest.raises(PeerError):
        blocks.verify_offer(BLOCK, DATA + b"\x00", tag)


@pytest.mark.parametrize(
    "changed",
    [
        {"block_id": b"short"},
        {"epoch": 1 << 32},
        {"offset": -1},
        {"length_bytes": 63},
        {"length_bytes": (256 << 10) - 63},
        {"device_key_ids": ()},
        {"device_key_ids": ("same", "same")},
        {"device_key_ids": ("x" * 65,)},
        {"device_key_ids": ("new\nline",)},
        {"device_key_ids": ("ümlaut",)},
        {"device_key_ids": tuple(map(str, range(1025)))},
    ],
)
def test_bounds(changed: dict[str, object]) -> None:
    with pytest.raises(PeerError):
        replace(BLOCK, **changed)  # type: ignore[arg-type]


def test_failure_budget_is_per_hour() -> None:
    budget = FailureBudget(limit=3, span_s=3600)
    assert [budget.failed(at) for at in (0.0, 1.0, 2.0)] == [False, False, True]
    assert budget.failed(4000.0) is False
    assert budget.total == 4


def test_rate_cap() -> None:
    cap = RateCap(per_s=2.0, burst=3)
    assert [cap.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert cap.take(10.5)
    assert not cap.take(10.5)
    assert not cap.take(5.0)  # a clock that jumps back gives nothing
