"""The target's end of a reserve: what a retire forgets and what it leaves."""

from __future__ import annotations

from pathlib import Path

from mesh.core.ranges import Range
from mesh.core.transfer import KEY_PART_BYTES, TAG_PART_BYTES
from mesh.node.inbound import InboundBook
from mesh.node.tasks import Background
from mesh.store.store import Store
from mesh.store.tables import AppendKind, AppendRow, Tables

COUNT = 4


async def test_a_retire_forgets_appends_below_it_and_wipes_the_one_that_it_cuts(tmp_path: Path) -> None:
    store, tasks = Store.open(tmp_path / "data", kme_id="kme-b"), Background()
    row = store.commit_now(
        lambda tables: tables.reserves.open("kme-a", "kme-b", 0, "trusted-relay", is_outbound=False)
    )
    book = InboundBook(store, row, spawn=tasks.spawn)
    payload = bytes(range(1, COUNT + 1)) * (TAG_PART_BYTES + KEY_PART_BYTES)
    appends = [
        AppendRow(row.reserve_id, first, COUNT, AppendKind.KEYS, "", 0, payload, None, None, True, 0)
        for first in range(0, 5 * COUNT, COUNT)
    ]

    def put_all(tables: Tables) -> None:
        for append in appends:
            tables.appends.put(append)

    store.commit_now(put_all)
    book.restore(appends, [])
    below = 2 * COUNT + 1
    files = await store.commit(book.retiring(below))
    book.retired(below, files)
    assert [piece.first for piece in book._pieces] == [2 * COUNT, 3 * COUNT, 4 * COUNT]
    assert book.tag_part(2 * COUNT - 1) is None
    assert book.tag_part(2 * COUNT) == bytes(TAG_PART_BYTES)
    assert book.tag_part(2 * COUNT + 1) == payload[TAG_PART_BYTES : 2 * TAG_PART_BYTES]
    assert book.key_parts(Range(2 * COUNT, 2 * COUNT + 1)) == bytes(KEY_PART_BYTES)
    await tasks.close()
    store.close()
