"""The command line: its words, its exit statuses, and what it says about wrong files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mesh.cli import build_parser, main
from mesh.client.operator import as_plain, as_table
from mesh.v1 import admin_pb2

WORDS = [
    "node run --config f",
    "gateway run --config f",
    "qkd-device run --config f",
    "config check f g",
    "network keygen --key k --public p",
    "network sign s --key k --out o",
    "network show d --public p",
    "network publish d --endpoint h:1 --ca c",
    "sae list --document d",
    "sae list --lab d",
    "status --lab d",
    "links --lab d --node n --json",
    "links --lab d --node n reset p --confirm p",
    "links reset p --confirm p --address h:1 --node n --domain d --ca c --cert c --key k",
    "reserves --address h:1 --node n --domain d --ca c --cert c --key k",
    "alarms --lab d --acknowledge a",
    "lab up --network metro --dir d",
    "lab up --network metro --dir d --detach",
    "lab down --dir d",
    "lab restart --dir d ID1 ID2",
    "lab run --dir d --traffic 3",
    "lab demo",
]


@pytest.mark.parametrize("words", WORDS)
def test_every_command_parses(words: str) -> None:
    assert callable(build_parser(words.split(maxsplit=1)[0]).parse_args(words.split()).handler)


def test_a_link_is_reset_at_one_node_and_with_its_name_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["links", "--lab", str(tmp_path), "--node", "kme-a", "reset", "kme-b"]
    arguments = build_parser("links").parse_args([*words, "--confirm", "kme-b"])
    assert (arguments.lab, arguments.node, arguments.peer) == (tmp_path, "kme-a", "kme-b")
    assert main([*words, "--confirm", "kme-c"]) == 2
    assert "--confirm" in capsys.readouterr().err


def test_pki_is_there() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["pki", "--help"])
    assert caught.value.code == 0


def test_version_and_help_import_no_heavy_library() -> None:
    code = (
        "import sys, mesh.cli\n"
        "try: mesh.cli.main(['--version'])\n"
        "except SystemExit: pass\n"
        "heavy = {'grpc', 'aiohttp', 'cryptography', 'numpy', 'matplotlib', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("keymesh ")


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        ("lab up --network no-such --dir {dir}", 2, "no-such"),
        ("lab down --dir {dir}/none", 2, "none"),
        ("lab restart --dir {dir} x", 2, "no lab"),
        ("lab run --dir {dir}", 2, "no lab"),
        ("links --lab {dir}", 2, "no lab"),
        ("links --node a", 2, "--address"),
        ("network sign s --key {dir}/none --out o", 2, "none"),
        ("config check {dir}/none.yaml", 2, "none.yaml"),
        ("qkd-device run --config {dir}/none.yaml", 2, "none.yaml"),
        ("node run --config {dir}/none.yaml", 2, "none.yaml"),
        ("hub run --config {dir}/none.yaml", 2, "none.yaml"),
        ("gateway run --config {dir}/none.yaml", 2, "none.yaml"),
        ("lab up --network metro --dir {dir}/file --detach", 2, "--dir: {dir}/file: "),
        ("lab up --network metro --dir {dir}/file/lab --detach", 2, "--dir: {dir}/file/lab: "),
    ],
)
def test_mistakes_are_named_in_one_line(
    words: str, status: int, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(words.format(dir=tmp_path).split()) == status
    error = capsys.readouterr().err
    assert named.format(dir=tmp_path) in error
    assert "Traceback" not in error


def test_lab_up_refuses_a_directory_that_holds_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "thesis.txt"
    precious.write_text("mine")
    assert main(["lab", "up", "--network", "metro", "--dir", str(tmp_path)]) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert precious.read_text() == "mine"


def test_config_check_tells_kinds_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = Path(__file__).parents[2] / "mesh" / "lab" / "networks" / "metro.yaml"
    assert main(["config", "check", str(network)]) == 0
    assert "lab network" in capsys.readouterr().out
    node = tmp_path / "node.yaml"
    node.write_text("kme_id: kme-a\ndomain_id: lab\n")
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text("colour: blue\n")
    assert main(["config", "check", str(node), str(unknown)]) == 2
    error = capsys.readouterr().err
    assert "data_dir" in error
    assert "no kind of file" in error


def test_answers_become_tables_and_plain_values() -> None:
    links = admin_pb2.ListLinksResponse(
        links=[
            admin_pb2.LinkStatus(
                peer_kme_id="kme-b", state="open", transmit=admin_pb2.LaneStatus(usable=3 << 20)
            )
        ]
    )
    header, row = as_table([("kme-a", links)]).splitlines()
    assert header.split()[:3] == ["NODE", "PEER", "STATE"]
    assert row.split()[:5] == ["kme-a", "kme-b", "open", "3.0", "MiB"]
    assert header.index("STATE") == row.index("open")
    plain = as_plain(links)["links"][0]
    assert plain["transmit"]["usable"] == 3 << 20
    assert plain["state"] == "open"
    status = admin_pb2.NodeStatus(kme_id="kme-a", incarnation=b"\x01\xff")
    assert as_plain(status)["incarnation"] == "01ff"
    assert "kme-a" in as_table([("kme-a", status)])


@pytest.mark.parametrize("answer", [admin_pb2.ListReservesResponse(), admin_pb2.ListAlarmsResponse()])
def test_a_table_of_nothing_is_its_header(
    answer: admin_pb2.ListReservesResponse | admin_pb2.ListAlarmsResponse,
) -> None:
    assert as_table([("kme-a", answer)]).startswith("NODE")
