"""The repository speaks of itself alone, its locks are locked, and what it ships is complete."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mesh.cli import build_parser
from mesh.lab.networks import shipped_networks

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


GENERATED = re.compile(r"(^|/)(\.(?!ci/|gitignore)[^/]*|__pycache__|build|dist|[^/]*\.egg-info)(/|$)")


def tracked() -> list[Path]:
    """Every file that git knows; in an unpacked archive, whatever no tool has made."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode == 0:
        names = [name for name in done.stdout.decode().split("\0") if name]
    else:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
        names = [name for name in names if not GENERATED.search(name)]
    found = [ROOT / name for name in names]
    return [path for path in found if path.is_file() and path != Path(__file__)]


def texts() -> dict[str, str]:
    """Contents of all tracked text files by path."""
    contents = {}
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data:
            contents[str(path.relative_to(ROOT))] = data.decode("utf-8")
    return contents


# Home folders and scratch places of whoever built it; hosts of package registries and mirrors.
FOREIGN = re.compile(
    r"(?<![\w.])/(?:root|home/\w+|Users/\w+|work|opt/wheels)/"
    r"|(?:pypi\.org|files\.pythonhosted\.org|test\.pypi\.org|registry\.npmjs\.org)"
    r"|--(?:extra-)?index-url|--find-links|--trusted-host"
)
LEFTOVER = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b|README_[A-Z]+|<<<<<<<|>>>>>>>")


def test_no_file_names_the_machine_it_was_written_on() -> None:
    found = {name: match[0] for name, text in texts().items() if (match := FOREIGN.search(text))}
    assert found == {}


def test_nothing_is_left_to_be_done_later() -> None:
    found = {name: match[0] for name, text in texts().items() if (match := LEFTOVER.search(text))}
    assert found == {}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_requirement_is_pinned_and_hashed(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split("#", 1)[0].strip() for line in text.splitlines()]
    wanted = [line for line in lines if line]
    assert wanted
    for line in wanted:
        assert re.match(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==\S+ ", line), line[:80]
        assert "--hash=sha256:" in line, line[:80]


def test_later_locks_pin_what_earlier_ones_pin() -> None:
    """``make test`` must not replace what ``make demo`` installed."""
    pins = {
        lock.stem: dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", lock.read_text("utf-8"), re.MULTILINE))
        for lock in LOCKS
    }
    for first, second in (("run", "lab"), ("lab", "dev"), ("dev", "fuzz")):
        assert pins[first].items() <= pins[second].items(), (first, second)


def test_the_readme_names_every_command() -> None:
    listed = re.search(r"^\| command \|.*?\n\n", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    assert listed, "the README has a table of commands"
    actions = build_parser("pki")._subparsers
    assert actions is not None
    choices = actions._group_actions[0].choices
    assert choices is not None
    assert set(re.findall(r"^\| `keymesh ([a-z-]+)", listed[0], re.M)) == {str(name) for name in choices}


def test_packages_are_marked_as_typed() -> None:
    assert (ROOT / "mesh/py.typed").exists()
    assert (ROOT / "gateway/py.typed").exists()


@pytest.mark.slow
def test_the_wheel_holds_networks_and_the_api_description(tmp_path: Path) -> None:
    # A build leaves files beside its sources: build a copy.
    source = tmp_path / "source"
    for path in (*tracked(), Path(__file__)):
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(source)], check=True, cwd=tmp_path, capture_output=True
    )
    (wheel,) = tmp_path.glob("keymesh-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for network in shipped_networks():
        assert f"mesh/lab/networks/{network}.yaml" in names
    for name in ("gateway/etsi014/openapi.yaml", "mesh/py.typed", "gateway/py.typed", "mesh/v1/keys_pb2.py"):
        assert name in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "examples/"))]
    assert [name for name in names if name.endswith("entry_points.txt")]
