"""``keymesh psrd`` on data directories of nodes that do not run, and what it says when it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.cli import main
from mesh.client import psrd
from mesh.errors import CallerError
from mesh.hub import psrd_cli
from mesh.v1.admin_pb2 import PsrdLink, PsrdStatusResponse, PsrdTable
from tests.fakes.hub_network import HubNetwork


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of one hub and two nodes."""
    root = tmp_path_factory.mktemp("psrd")
    HubNetwork(root, hubs=("hub-1",), grade="dske(1,1)")
    return root


def keymesh(*words: object) -> int:
    """One command."""
    return main(["psrd", *(str(word) for word in words)])


def test_issue_carry_import_wipe(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    courier, phrase = files / "one.psrd", files / "phrase"
    phrase.write_text("a long phrase\n")
    hub, client = files / "hub-1.yaml", files / "kme-a.yaml"
    sealed = ("--passphrase-file", phrase)
    assert (
        keymesh("issue", "--config", hub, "--peer", "kme-a", "--size", "64KiB", "--out", courier, *sealed)
        == 0
    )
    said = capsys.readouterr().out
    assert "32.0 KiB to kme-a, 32.0 KiB back" in said
    assert "guard it" in said
    assert courier.stat().st_mode & 0o777 == 0o600

    assert keymesh("import", courier, "--config", client, "--peer", "hub-1") == 1
    assert "passphrase: the courier file is sealed with one; give it" in capsys.readouterr().err
    assert keymesh("import", courier, "--config", client, "--peer", "hub-1", *sealed) == 0
    assert "wipe the file: keymesh psrd wipe" in capsys.readouterr().out
    assert keymesh("import", courier, "--config", client, "--peer", "hub-1", *sealed) == 1
    assert "imported already" in capsys.readouterr().err

    assert keymesh("wipe", courier) == 0
    assert not courier.exists()
    assert keymesh("wipe", phrase) == 1
    assert "not a courier file" in capsys.readouterr().err
    assert phrase.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "64 parsecs"], "--size: not a size; give a number and a unit"),
        (["--size", "1KiB"], "a direction takes at least 4.0 KiB"),
        (["--size", "1GiB"], "raise links[].pool_max_bytes at both ends"),
        (["--to-client", "1MiB"], "--size: give it, or --to-client and --from-client"),
        (["--size", "1MiB", "--to-client", "1MiB"], "--size: give it alone"),
        (["--size", "1MiB", "--peer", "kme-z"], "links: none to this peer"),
        (["--size", "1MiB", "--random-source", "/etc/hostname"], "random source: not a device file"),
        (["--size", "1MiB", "--passphrase-file", "/nowhere"], "passphrase_file: cannot be read"),
        (["--size", "1MiB", "--out", "/nowhere/one.psrd"], "in a folder that exists"),
    ],
)
def test_issue_says_what_is_wrong(
    files: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = keymesh(
        "issue", "--config", files / "hub-1.yaml", "--peer", "kme-b", "--out", files / "never.psrd", *words
    )
    assert status in (1, 2)
    assert message in capsys.readouterr().err
    assert not list(files.glob("never*"))


def test_sizes_per_direction(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--to-client", "8KiB", "--from-client", "16KiB", "--out", files / "two.psrd")
    assert keymesh("issue", "--config", files / "hub-1.yaml", "--peer", "kme-b", *words) == 0
    assert "8.0 KiB to kme-b, 16.0 KiB back" in capsys.readouterr().out


def test_without_a_node_or_a_configuration_nothing_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert keymesh("import", "one.psrd", "--peer", "hub-1") == 2
    assert "give --lab DIR, or --address" in capsys.readouterr().err
    assert keymesh("discard", "xyz", "--peer", "hub-1") == 2
    assert "32 hexadecimal digits" in capsys.readouterr().err


def test_a_job_that_runs_again_succeeds_once_the_file_was_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--once forgives a refusal only where a table came from that very file of that very hub."""

    def refuse(*_: object) -> None:
        raise CallerError("path: cannot be opened: No such file or directory")

    table = PsrdTable(state="imported", path="/courier/one.psrd")
    links = [PsrdLink(peer_kme_id="hub-1", tables=[table])]
    monkeypatch.setattr(psrd, "take", refuse)
    monkeypatch.setattr(psrd, "status", lambda _: PsrdStatusResponse(links=links))
    tool = (
        "--node",
        "kme-b",
        "--address",
        "localhost:1",
        "--domain",
        "d",
        "--ca",
        "a",
        "--cert",
        "b",
        "--key",
        "c",
    )
    words = ("import", "/courier/one.psrd", "--peer", "hub-1", *tool)
    assert keymesh(*words, "--once") == 0
    assert "was imported before" in capsys.readouterr().out
    assert keymesh(*words) == 1
    assert keymesh("import", "/courier/two.psrd", "--peer", "hub-1", *tool, "--once") == 1
    assert keymesh("import", "/courier/one.psrd", "--peer", "hub-2", *tool, "--once") == 1


def test_the_bar_is_for_terminals_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = psrd_cli.Bar("issuing")
    bar(1, 2)
    bar.end()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = psrd_cli.Bar("issuing")
    bar(1 << 20, 4 << 20)
    bar(1 << 20, 4 << 20)
    bar.end()
    assert capsys.readouterr().err == "\rissuing [#######.......................]  25 % of 4.0 MiB\n"
