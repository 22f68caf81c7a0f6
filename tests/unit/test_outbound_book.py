"""The source's end of a reserve: its durable marks when several establishes move them at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.core.transfer import SlotKind
from mesh.node.outbound import ASSIGN_STRIDE_SLOTS, DRAW_STRIDE_SLOTS, OutboundBook
from mesh.node.tasks import Background
from mesh.store.store import Store


@pytest.fixture
async def book(tmp_path: Path) -> AsyncIterator[OutboundBook]:
    store = Store.open(tmp_path / "data", kme_id="kme-a")
    tasks = Background()
    row = store.commit_now(
        lambda tables: tables.reserves.open("kme-a", "kme-b", 0, "trusted-relay", is_outbound=True)
    )
    yield OutboundBook(store, row, lifetime_s=60.0, spawn=tasks.spawn)
    await tasks.close()
    store.close()


async def test_establishes_that_move_the_assign_mark_at_once_do_not_fail_each_other(
    book: OutboundBook,
) -> None:
    """The second move asks for less than the first made durable: nothing falls, nothing is burnt twice."""
    first = await asyncio.gather(
        book.assign(9000, SlotKind.KEYS, draws=False), book.assign(100, SlotKind.KEYS, draws=False)
    )
    assert list(first) == [0, 9000]
    assert book.slots.assign_mark >= 9100
    stored = book._store.read(lambda tables: tables.reserves.get(book.reserve_id))
    assert stored.assign_mark == book.slots.assign_mark == 9000 + ASSIGN_STRIDE_SLOTS


async def test_the_draw_mark_is_moved_with_the_assign_mark_and_neither_falls(book: OutboundBook) -> None:
    await asyncio.gather(
        book.assign(3000, SlotKind.KEYS, draws=True), book.assign(10, SlotKind.KEYS, draws=True)
    )
    stored = book._store.read(lambda tables: tables.reserves.get(book.reserve_id))
    assert stored.draw_mark == book.slots.draw_mark == 3000 + DRAW_STRIDE_SLOTS
    assert stored.draw_mark <= stored.assign_mark == book.slots.assign_mark


async def test_a_retire_during_the_commit_of_a_sealed_message_leaves_later_slots_alone(
    book: OutboundBook,
) -> None:
    """The append of the message's slots is gone when its commit ends: nothing of another may be wiped."""
    later = bytes(range(1, 49)) * 4
    for payload in (bytes(48 * 4), later):
        first = await book.assign(4, SlotKind.SEALED, draws=False)
        book.hold(first, 4, SlotKind.SEALED, payload, persists=False)
        assert book.confirm(first, 0)
    span = book.slots.take_sealed(2)
    assert span is not None
    assert span.start == 0
    book.using_sealed(span)
    book.forget_sealed_below(4)
    book.wipe_sealed(span)
    kept = book.slots.take_sealed(4)
    assert kept is not None
    assert b"".join(book.sealed_parts(kept)) == later
    book.forget_sealed_below(8)
    book.wipe_sealed(span)
