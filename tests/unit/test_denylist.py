"""Deny lists: both spellings, re-read on change, and never forgotten by accident."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.errors import ConfigError
from mesh.ops.certificates import fingerprint_of, serial_of
from mesh.ops.denylist import DenyList
from mesh.ops.watch import FileWatch
from mesh.pki.authority import Authority

FINGERPRINT = "0a" * 32
SERIAL = "1f"


def test_spellings(tmp_path: Path) -> None:
    path = tmp_path / "deny"
    colons = ":".join("0A" for _ in range(32))
    path.write_text(f"# refused since May\n{colons}  # laptop\n\n0x001F\n")
    deny = DenyList(path)
    assert len(deny) == 2
    assert deny.denies(fingerprint=FINGERPRINT, serial="2")
    assert deny.denies(fingerprint="b" * 64, serial=SERIAL)
    assert not deny.denies(fingerprint="b" * 64, serial="2")


def test_real_certificates_match_as_openssl_prints_them(tmp_path: Path) -> None:
    certificate = (
        Authority.create("r").issue("x", kind="x", hosts=["x"], is_server=True, is_client=True).certificate
    )
    path = tmp_path / "deny"
    path.write_text(f"{certificate.serial_number:040X}\n")
    deny = DenyList(path)
    assert deny.denies(fingerprint=fingerprint_of(certificate), serial=serial_of(certificate))


def test_followed_and_kept_when_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "deny"
    path.write_text("")
    deny = DenyList(path, interval_s=0)
    assert not deny.denies(fingerprint=FINGERPRINT, serial=SERIAL)
    path.write_text(f"{SERIAL}\n")
    assert deny.denies(fingerprint=FINGERPRINT, serial=SERIAL)
    path.write_text("not hexadecimal\n")
    assert deny.denies(fingerprint=FINGERPRINT, serial=SERIAL)
    path.unlink()
    assert deny.denies(fingerprint=FINGERPRINT, serial=SERIAL)
    path.write_text("2\n")
    assert not deny.denies(fingerprint=FINGERPRINT, serial=SERIAL)


def test_none_refuses_nobody() -> None:
    assert not DenyList(None).denies(fingerprint=FINGERPRINT, serial=SERIAL)


@pytest.mark.parametrize("content", [b"xyz\n", b"\xff\xfe\n", b"a b\n", b"1" * 65])
def test_unreadable_at_the_start(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "deny"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="deny_list"):
        DenyList(path)
    with pytest.raises(ConfigError, match="deny_list"):
        DenyList(tmp_path / "missing")


def test_watch_asks_the_disk_at_most_once_per_interval(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("1")
    now = [0.0]
    watch = FileWatch([path], interval_s=1.0, now_s=lambda: now[0])
    path.write_text("22")
    assert not watch.changed()
    now[0] = 1.0
    assert watch.changed()
    assert not watch.changed()
    now[0] = 2.5
    assert not watch.changed()
    path.replace(tmp_path / "y")
    now[0] = 4.0
    assert watch.changed()
