"""The torture's own judges: each finds what it is there to find, and nothing where there is nothing."""

from __future__ import annotations

import base64
import itertools
import json
import random
import uuid
from collections import Counter
from pathlib import Path

import pytest

from mesh.core.keyid import KeyAddress, issue
from mesh.core.ranges import Range
from mesh.store.failpoints import ALL
from tests.torture.__main__ import total
from tests.torture.client import Key
from tests.torture.history import Fate, Fetchable, History
from tests.torture.kills import plan_rounds
from tests.torture.leaks import KeySearch, forms, search_files
from tests.torture.pads import Overlaps, audit_pads

LAB = {
    "nodes": [{"id": "kme-a"}, {"id": "kme-b"}],
    "gateways": [{"id": "gw-a"}],
    "devices": [{"id": "qkd-a"}],
    "etcd": {"members": ["etcd-1"]},
}
HOMES = {"sae-a": "kme-a", "sae-b": "kme-b", "sae-c": "kme-b"}


def line(kme: str, start: int, stop: int, *, outbound: bool = True, epoch: int = 0) -> str:
    entry = {
        "kme": kme,
        "link": "kme-a--kme-b",
        "outbound": outbound,
        "epoch": epoch,
        "start": start,
        "stop": stop,
        "purpose": "data",
    }
    return json.dumps(entry) + "\n"


def audited(tmp_path: Path, *lines: str) -> tuple[int, int]:
    file = tmp_path / "all.pads.jsonl"
    file.write_text("".join(lines))
    audit = audit_pads([file])
    return audit.reused_bytes, audit.invented_bytes


def test_a_byte_that_a_writer_uses_twice_is_found(tmp_path: Path) -> None:
    assert audited(tmp_path, line("kme-a", 32, 100), line("kme-a", 200, 300), line("kme-a", 99, 150)) == (
        1,
        0,
    )


def test_the_same_offsets_of_other_lanes_and_epochs_are_no_reuse(tmp_path: Path) -> None:
    lines = (
        line("kme-a", 32, 100),
        line("kme-b", 32, 100),
        line("kme-a", 32, 100, epoch=1),
        line("kme-b", 32, 100, outbound=False),
    )
    assert audited(tmp_path, *lines) == (0, 0)


def test_frames_accepted_twice_or_never_written_are_found(tmp_path: Path) -> None:
    written = line("kme-a", 32, 100)
    taken = line("kme-b", 32, 100, outbound=False)
    assert audited(tmp_path, written, taken, taken) == (68, 0)
    assert audited(tmp_path, written, line("kme-b", 64, 101, outbound=False)) == (0, 37)


def test_half_a_line_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all\.pads\.jsonl:2"):
        audited(tmp_path, line("kme-a", 32, 100), line("kme-a", 100, 200)[:20])


def test_overlaps_agree_with_counting_bytes() -> None:
    rng = random.Random(1)
    for _ in range(50):
        merged, seen = Overlaps(), set[int]()
        for _ in range(40):
            start = rng.randrange(200)
            new = Range(start, start + rng.randrange(1, 20))
            assert merged.add(new) == sum(one in seen for one in range(new.start, new.stop))
            seen |= set(range(new.start, new.stop))
            assert merged.total == len(seen)
            assert merged.covers(new)


def history_with(*values: bytes, slaves: tuple[str, ...] = ("sae-b",)) -> tuple[History, list[Key]]:
    history = History(HOMES)
    keys = [Key(str(uuid.UUID(int=at, version=4)), value) for at, value in enumerate(values)]
    history.acknowledged("sae-a", slaves, keys)
    return history, keys


def taken(history: History) -> Fetchable:
    batch = history.take_open(None, 8)
    assert batch is not None
    return batch


def test_a_key_fetched_once_by_each_slave_is_clean() -> None:
    history, keys = history_with(bytes(32), slaves=("sae-b", "sae-c"))
    for _ in range(2):
        history.fetched(taken(history), keys)
    assert history.take_open(None, 8) is None
    assert not history.notes
    assert history.counts["fetched"] == 2


def test_a_first_fetch_refused_is_a_lost_key() -> None:
    history, _ = history_with(bytes(32))
    history.refused(taken(history), 400)
    assert history.counts["lost"] == 1


def test_a_fetch_that_was_cut_is_tried_again_and_then_indeterminate() -> None:
    history, keys = history_with(bytes(32), b"\1" * 32)
    batch = taken(history)
    history.cut(batch)
    history.put_back(batch)
    first = taken(history)
    assert first.keys[0].fates["sae-b"] is Fate.UNSURE
    assert len(first.keys) == 1
    history.refused(first, 400)
    history.fetched(taken(history), keys[1:])
    assert (history.counts["indeterminate"], history.counts["lost"]) == (1, 0)
    assert not history.notes


def test_other_bytes_or_other_keys_differ() -> None:
    history, keys = history_with(bytes(32))
    history.fetched(taken(history), [Key(keys[0].key_id, b"\1" * 32)])
    assert history.counts["differing"] == 1
    history, _ = history_with(bytes(32))
    history.fetched(taken(history), [])
    assert history.counts["differing"] == 1


def test_a_second_delivery_is_doubled() -> None:
    history, keys = history_with(bytes(32))
    batch = taken(history)
    history.fetched(batch, keys)
    history.fetched(batch, keys)
    assert history.counts["doubled"] == 1


def test_a_key_handed_out_twice_is_reused() -> None:
    history, keys = history_with(bytes(32))
    history.acknowledged("sae-a", ["sae-b"], keys)
    assert history.counts["reused"] == 1
    other = [Key(str(uuid.uuid4()), bytes(32))]
    history.acknowledged("sae-a", ["sae-b"], other)
    assert history.counts["reused"] == 2


def test_two_keys_on_the_same_slots_are_reused() -> None:
    history = History(HOMES)
    for slot, size, value in ((4, 64, b"\1" * 64), (5, 32, b"\2" * 32)):
        key_id = issue(KeyAddress(0, slot, size), "sae-a", "sae-b", bytes(16))
        history.acknowledged("sae-a", ["sae-b"], [Key(str(uuid.UUID(bytes=key_id)), value)])
    assert history.counts["reused"] == 1


@pytest.mark.parametrize("shift", range(9))
@pytest.mark.parametrize("form", range(5))
def test_a_key_is_found_in_every_form_at_every_place(form: int, shift: int) -> None:
    value = bytes(range(0xB0, 0xD0))
    search = KeySearch([bytes(32), value, b"short"])
    assert search.count(b"x" * shift + forms(value)[form] + b" and more") == 1
    assert search.count(b"x" * shift + forms(value)[form][:7] + b" and more") == 0


def test_whole_keys_are_found_in_files_of_folders(tmp_path: Path) -> None:
    value = random.Random(2).randbytes(32)
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "a.log").write_bytes(b"key=" + base64.b64encode(value))
    (tmp_path / "log" / "b.log").write_bytes(b"nothing")
    assert search_files(KeySearch([value]), [tmp_path]) == {str(tmp_path / "log" / "a.log"): 1}
    assert search_files(KeySearch([]), [tmp_path]) == {}


def test_the_plan_of_kills_is_the_seeds() -> None:
    first, again, other = (list(itertools.islice(plan_rounds(LAB, seed), 50)) for seed in (7, 7, 8))
    assert first == again != other
    assert {victim for one in first for victim in one.victims} == {
        "kme-a",
        "kme-b",
        "gw-a",
        "qkd-a",
        "etcd-1",
    }
    assert all(one.victims[0].startswith("kme") for one in first if one.failpoint)
    assert any(one.failpoint for one in first)


def test_the_plan_comes_to_every_failpoint_equally_often() -> None:
    armed = [one.failpoint for one in itertools.islice(plan_rounds(LAB, 3), 400) if one.failpoint]
    counts = Counter(name for name, _, _ in (one.partition(":") for one in armed))
    assert set(counts) == ALL
    assert max(counts.values()) - min(counts.values()) <= 1


def test_several_runs_add_up_and_one_violation_shows() -> None:
    one = {"seed": 1, "kills": 30, "ok": True, "slowest_s": 2.0, "kills_by": {"kme-a": 30}, "notes": []}
    two = one | {"seed": 2, "ok": False, "slowest_s": 9.0, "kills_by": {"gw-a": 30}, "notes": ["lost: x"]}
    words = (
        "requests",
        "fetched",
        "reused",
        "lost",
        "differing",
        "doubled",
        "leaked",
        "wrong",
        "indeterminate",
    )
    summed = total([one | dict.fromkeys(words, 0), two | dict.fromkeys(words, 1)])
    assert (summed["kills"], summed["lost"], summed["ok"], summed["slowest_s"]) == (60, 1, False, 9.0)
    assert summed["kills_by"] == {"kme-a": 30, "gw-a": 30}
    assert summed["notes"] == ["seed 2: lost: x"]
    assert "VIOLATED: seed 2" in summed["runs"][1]
