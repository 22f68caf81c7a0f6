"""The border's tables: nothing that happens per key walks through them, and what is forgotten when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh.core.border import Inbound, Outbound
from mesh.store.store import Store
from mesh.store.tables import BorderKeyRow, CarryRow, ExchangeRow, PostRow, ReportRow, Tables
from tests.power_cut_files import PowerCutFiles


@pytest.fixture
def store() -> Iterator[Store]:
    opened = Store.open(Path("/data"), kme_id="kme-a", files=PowerCutFiles(), proof_dir=Path("/none"))
    yield opened
    opened.close()


def named(number: int) -> bytes:
    return number.to_bytes(16, "big")


def crossing(
    number: int,
    peer: str,
    state: Inbound | Outbound,
    *,
    settled_s: int,
    came_from: int | None = None,
    keys: int = 1,
) -> Callable[[Tables], None]:
    """An exchange and its keys, whose ids are its number and those after it."""
    is_outbound = isinstance(state, Outbound)

    def put(tables: Tables) -> None:
        owner = ("transit" if came_from is not None else "deposit") if is_outbound else ""
        job = named(number if came_from is None else came_from) if is_outbound else b""
        row = ExchangeRow(
            named(number), is_outbound, peer, "a", ("b",), "", owner, "kme-a", job, b"{}", 5, 1, settled_s
        )
        tables.border.put_exchange(row)
        for key in range(number, number + keys):
            tables.border.put_key(
                BorderKeyRow(is_outbound, peer, named(key), named(number), state, b"", b"{}")
            )
        tables.border.put_carry(CarryRow(named(number), "kme-b", ("b",), "open"))

    return put


def post(number: int) -> PostRow:
    return PostRow(named(9), "ack", named(number), "uk", "https://x", "relayed", "a", ("b",), (named(1),), 7)


HOT: dict[str, Callable[[Tables], object]] = {
    "put": crossing(1, "uk", Outbound.QUEUED, settled_s=0),
    "settle": lambda t: t.border.set_settled(named(1), 4),
    "wipe extensions": lambda t: t.border.wipe_extensions(named(1)),
    "callback": lambda t: t.border.set_callback(named(1), "x"),
    "exchange": lambda t: t.border.exchange(named(1)),
    "exchanges of a job": lambda t: t.border.exchanges_for("kme-a", named(1)),
    "exchanges at the start": lambda t: t.border.unsettled("local"),
    "overdue": lambda t: t.border.overdue(9, is_outbound=True, states=("queued", "posted")),
    "forget": lambda t: t.border.forget_settled("uk", 9, 4),
    "put again": crossing(1, "uk", Outbound.QUEUED, settled_s=0),
    "key": lambda t: t.border.key(named(1), "uk", is_outbound=True),
    "save": lambda t: t.border.save_key(t.border.everywhere(named(1))[0]),
    "keys": lambda t: t.border.keys(named(1)),
    "keys of an association": lambda t: t.border.keys_of("uk", "a", ("b",)),
    "counts": lambda t: t.border.count_of("uk"),
    "put post": lambda t: t.border.put_post(post(1)),
    "post": lambda t: t.border.post(named(9)),
    "posts": lambda t: t.border.posts_of(named(1)),
    "overdue posts": lambda t: t.border.overdue_posts(9),
    "narrow": lambda t: t.border.narrow_post(named(9), [named(1), named(2)]),
    "end": lambda t: t.border.delete_post(named(9)),
    "carries": lambda t: t.border.carries(named(1)),
    "put call": lambda t: t.border.put_call("void", named(1), "kme-b", [named(1)]),
    "submit call": lambda t: t.border.submit_call(1, named(8)),
    "call": lambda t: t.border.call(1),
    "call of a job": lambda t: t.border.call_of(named(8)),
    "calls": lambda t: t.border.calls_of(named(1)),
    "end call": lambda t: t.border.delete_call(1),
    "put report": lambda t: t.border.put_report(ReportRow("kme-b", named(7), (named(1),), ())),
    "reports": lambda t: t.border.reports("kme-b"),
    "end report": lambda t: t.border.put_report(ReportRow("kme-b", named(7), (), ())),
}


def test_no_statement_of_a_key_on_its_way_walks_through_a_table(store: Store) -> None:
    """Two million rows of the past must not be read for every answer."""
    said: list[tuple[str, object]] = []

    def note(_cursor: object, sql: str, values: object) -> bool:
        said.append((sql, values))
        return True

    def change(tables: Tables) -> None:
        database = tables.border._database
        database.exec_trace = note
        try:
            for step in HOT.values():
                step(tables)
        finally:
            database.exec_trace = None
        plans = {
            sql: [row[3] for row in database.execute("EXPLAIN QUERY PLAN " + sql, values)]  # type: ignore[arg-type]  # as it was bound
            for sql, values in said
        }
        walking = {sql: plan for sql, plan in plans.items() if any(line.startswith("SCAN") for line in plan)}
        assert walking == {}
        assert sum(any("SEARCH" in line for line in plan) for plan in plans.values()) > 20

    store.commit_now(change)


def test_the_numbers_by_state_follow_every_move(store: Store) -> None:
    def count() -> dict[tuple[bool, str, str], int]:
        return store.read(lambda tables: tables.border.count_states())

    store.commit_now(crossing(1, "uk", Outbound.QUEUED, settled_s=0, keys=3))
    assert count() == {(True, "uk", "queued"): 3}

    def move(tables: Tables) -> None:
        (row, *_) = tables.border.keys(named(1))
        tables.border.save_key(BorderKeyRow(True, "uk", row.key_id, named(1), Outbound.POSTED, b""))

    store.commit_now(move)
    store.commit_now(move)
    assert count() == {(True, "uk", "queued"): 2, (True, "uk", "posted"): 1}
    store.commit_now(lambda tables: tables.border.set_settled(named(1), 5))
    store.commit_now(lambda tables: tables.border.forget_settled("uk", 6, 1))
    assert count() == {}


def test_the_oldest_settled_go_first_and_no_more_than_are_to_go(store: Store) -> None:
    for number, settled_s in ((10, 30), (20, 10), (30, 20), (40, 0)):
        store.commit_now(crossing(number, "uk", Inbound.RELAYED, settled_s=settled_s, keys=2))
    store.commit_now(crossing(50, "third", Inbound.RELAYED, settled_s=1))
    # What is still to be said about an exchange must be said first.
    store.commit_now(lambda tables: tables.border.put_post(post(20)))
    assert store.commit_now(lambda tables: tables.border.forget_settled("uk", 100, 3)) == 4

    def left(tables: Tables) -> list[int]:
        return [n for n in range(10, 60, 10) if tables.border.key(named(n), "uk", is_outbound=False)]

    assert store.read(left) == [20, 40]
    assert store.commit_now(lambda tables: tables.border.forget_settled("uk", 100, 3)) == 0
    store.commit_now(lambda tables: tables.border.delete_post(named(9)))
    assert store.commit_now(lambda tables: tables.border.forget_settled("uk", 10, 3)) == 0  # too young
    assert store.commit_now(lambda tables: tables.border.forget_settled("uk", 11, 3)) == 2
    assert store.read(lambda tables: tables.border.carries(named(20))) == []


def test_both_halves_of_a_key_in_transit_are_forgotten_together(store: Store) -> None:
    store.commit_now(crossing(1, "can", Inbound.RELAYED, settled_s=10))
    store.commit_now(crossing(2, "uk", Outbound.VOIDING, settled_s=0, came_from=1))
    for peer in ("can", "uk"):
        assert store.commit_now(lambda tables, p=peer: tables.border.forget_settled(p, 99, 9)) == 0  # type: ignore[misc]  # bound now
    store.commit_now(lambda tables: tables.border.set_settled(named(2), 20))
    assert store.commit_now(lambda tables: tables.border.forget_settled("can", 20, 9)) == 0
    assert store.commit_now(lambda tables: tables.border.forget_settled("uk", 21, 9)) == 1
    assert store.read(lambda tables: tables.border.count_states()) == {}
