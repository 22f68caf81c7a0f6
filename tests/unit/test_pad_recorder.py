"""The audit record of pads: whole lines, whatever kill ended the process that wrote the last one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.node.pad_recorder import JsonlPadRecorder
from tests.torture.pads import audit_pads, read_lines


def record(path: Path, start: int) -> None:
    """A process that uses one range."""
    recorder = JsonlPadRecorder(path, "kme-a")
    recorder.record("kme-a--kme-b", is_outbound=True, epoch=1, start=start, stop=start + 32, purpose="hello")
    recorder.close()


@pytest.mark.parametrize("left", [0, 1, 12, 100])
def test_a_line_that_a_kill_tore_is_dropped_at_the_next_start(tmp_path: Path, left: int) -> None:
    path = tmp_path / "kme-a.pads.jsonl"
    record(path, 32)
    whole = path.read_bytes()
    record(path, 64)
    path.write_bytes(path.read_bytes()[: len(whole) + left])
    record(path, 96)
    assert [line["start"] for line in read_lines(path)] == [32, 96]
    assert audit_pads([path]).lines == 2


def test_whole_lines_stay(tmp_path: Path) -> None:
    path = tmp_path / "kme-a.pads.jsonl"
    for at in range(100):
        record(path, 32 + 32 * at)
    assert [line["start"] for line in read_lines(path)] == [32 + 32 * at for at in range(100)]
