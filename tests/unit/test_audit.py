"""The audit log: one line per fact, owner only, bounded, and loud when it cannot write."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from mesh.errors import ConfigError, ErrorReason, UnavailableError
from mesh.ops.audit import AuditLog
from mesh.ops.logging import serving


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def test_line_carries_time_event_request_and_facts(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    with AuditLog(path, now_s=lambda: 1_700_000_000.25) as audit, serving("req-1"):
        audit.record("key delivered", master="sae-a", key_id="k1", size_bytes=32)
        audit.record("key delivered", request_id="other")
    assert lines(path) == [
        {
            "ts": "2023-11-14T22:13:20.250Z",
            "event": "key delivered",
            "request_id": "req-1",
            "master": "sae-a",
            "key_id": "k1",
            "size_bytes": 32,
        },
        {"ts": "2023-11-14T22:13:20.250Z", "event": "key delivered", "request_id": "other"},
    ]


def test_file_is_for_the_owner_and_appended(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    path.write_text('{"event":"old"}\n')
    path.chmod(0o644)
    with AuditLog(path) as audit:
        audit.record("new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [line["event"] for line in lines(path)] == ["old", "new"]


@pytest.mark.parametrize(
    "value", [b"key", bytearray(b"key"), memoryview(b"key"), [b"key"], {"k": 1}, object()]
)
def test_bytes_are_refused(tmp_path: Path, value: object) -> None:
    with AuditLog(tmp_path / "audit.log") as audit, pytest.raises(TypeError, match="value"):
        audit.record("event", value=value)  # type: ignore[arg-type]
    assert (tmp_path / "audit.log").read_bytes() == b""


def test_a_file_that_was_moved_away_is_begun_anew_and_no_line_is_lost(tmp_path: Path) -> None:
    path, second = tmp_path / "audit.log", [1_700_000_000.0]
    with AuditLog(path, now_s=lambda: second[0]) as audit:
        audit.record("before")
        path.rename(tmp_path / "moved.log")
        audit.record("in the same second")
        second[0] += 1
        audit.record("after")
        path.unlink()
        second[0] += 1
        audit.record("last")
    assert [line["event"] for line in lines(tmp_path / "moved.log")] == ["before", "in the same second"]
    assert [line["event"] for line in lines(path)] == ["last"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_rotation_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    with AuditLog(path, max_bytes=200, keep=2) as audit:
        for number in range(20):
            audit.record("event", number=number)
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["audit.log", "audit.log.1", "audit.log.2"]
    kept = [line["number"] for name in reversed(names) for line in lines(tmp_path / name)]
    assert kept == list(range(20))[-len(kept) :]
    assert all(stat.S_IMODE(entry.stat().st_mode) == 0o600 for entry in tmp_path.iterdir())


def test_a_list_that_no_line_holds_is_cut_and_the_line_says_by_how_many(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    ids, targets = [f"{n:036}" for n in range(1024)], [f"{n:064}" for n in range(2048)]
    with AuditLog(path) as audit:
        audit.record("whole", key_ids=ids, targets=targets[:256])
        audit.record("cut", key_ids=ids, targets=targets)
        audit.record("both", key_ids=tuple(ids * 3), targets=targets)
        with pytest.raises(TypeError, match="64 KiB"):
            audit.record("text", text="x" * 70_000)
    whole, cut, both = lines(path)
    assert (whole["key_ids"], whole["targets"]) == (ids, targets[:256])
    assert "targets_cut" not in whole
    kept = cut["targets"]
    assert isinstance(kept, list)
    assert cut["key_ids"] == ids
    assert kept == targets[: len(kept)]
    assert cut["targets_cut"] == 2048 - len(kept)
    assert {"key_ids_cut", "targets_cut"} <= both.keys()
    assert all(32_768 < len(line) <= 65_536 for line in path.read_bytes().splitlines())


def test_many_lines_are_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = []
    real = os.write

    def counting(descriptor: int, data: bytes) -> int:
        writes.append(len(data))
        return real(descriptor, data)

    with AuditLog(tmp_path / "audit.log") as audit:
        monkeypatch.setattr(os, "write", counting)
        audit.record_all("event", [{"number": number} for number in range(5)])
        audit.record_all("event", [])
    assert len(writes) == 1
    assert len(lines(tmp_path / "audit.log")) == 5


def test_full_disk_fails_the_call_and_the_log_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.log"
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def torn(descriptor: int, data: bytes) -> int:
        return real(descriptor, bytes(data)[:10])

    with AuditLog(path) as audit:
        for failure in (full, torn):
            monkeypatch.setattr(os, "write", failure)
            with pytest.raises(UnavailableError) as caught:
                audit.record("lost")
            assert caught.value.reason is ErrorReason.DISK_FULL
        monkeypatch.setattr(os, "write", real)
        audit.record("after")
    assert json.loads(path.read_text().splitlines()[-1])["event"] == "after"


def test_a_disk_without_room_is_seen_before_a_line_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    room = [0]
    real = os.fstatvfs

    def fstatvfs(descriptor: int) -> SimpleNamespace:
        looks.append(descriptor)
        found = real(descriptor)
        return SimpleNamespace(f_bavail=room[0], f_bfree=room[0], f_blocks=1 << 20, f_frsize=found.f_frsize)

    monkeypatch.setattr(os, "fstatvfs", fstatvfs)
    with AuditLog(tmp_path / "audit.log") as audit:
        for _ in range(2):
            with pytest.raises(UnavailableError) as caught:
                audit.check()
            assert caught.value.reason is ErrorReason.DISK_FULL
        room[0] = 1 << 20
        looks.clear()
        for _ in range(1000):
            audit.check()
        assert len(looks) == 1
    assert not lines(tmp_path / "audit.log")


def test_after_a_lost_line_the_log_proves_itself_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.log"

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with AuditLog(path) as audit:
        audit.check()
        with monkeypatch.context() as disk:
            disk.setattr(os, "write", full)
            with pytest.raises(UnavailableError):
                audit.record("lost")
            for _ in range(2):
                with pytest.raises(UnavailableError):
                    audit.check()
        audit.check()
        audit.check()
    assert [line["event"] for line in lines(path)] == ["audit_resumed"]


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "audit.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="audit_log"):
        AuditLog(tmp_path / "audit.log")


def test_closed_means_closed(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.log")
    audit.close()
    audit.close()
    with pytest.raises(UnavailableError) as caught:
        audit.record("event")
    assert caught.value.reason is ErrorReason.SHUTTING_DOWN
