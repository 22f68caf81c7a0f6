"""``keymesh psrd …``: issue, import, status, discard, wipe.

Parses, calls one function, prints. Orders go to a running node (``--lab``, or ``--address``
and a tool certificate) or, with ``--config``, to the data directory of one that does not run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mesh.client import psrd
from mesh.client.operator import OperatorTarget, align, as_plain
from mesh.core.psrd import TABLE_ID_BYTES
from mesh.core.sizes import format_size, parse_size
from mesh.errors import CallerError, ConfigError
from mesh.hub.config import load_hub_config
from mesh.node.config import NodeConfig, load_node_config
from mesh.node.psrd_courier import ImportOrder, IssueOrder, check_courier, read_passphrase, wipe_courier
from mesh.node.psrd_offline import import_offline, issue_offline
from mesh.ops.yamltext import decode_yaml
from mesh.v1.admin_pb2 import ImportPsrdRequest, IssuePsrdRequest, PsrdLevel, PsrdStatusResponse

_BAR = 30
_SEALING = (
    "file whose first line is a passphrase (scrypt and AES-256-GCM: computational, keeps finders out, "
    "not the information-theoretic part)"
)

Targets = Callable[[argparse.Namespace], "list[OperatorTarget]"]


class Bar:
    """A progress bar on a terminal; silent elsewhere.

    Args:
        what: the word before it.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._drawn = ""
        self._is_shown = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        """Draw ``done`` of ``total`` bytes."""
        if not self._is_shown or not total:
            return
        full = _BAR * done // total
        bar = "#" * full + "." * (_BAR - full)
        text = f"{self._what} [{bar}] {100 * done // total:3d} % of {format_size(total)}"
        if text != self._drawn:
            sys.stderr.write(f"\r{text}")
            sys.stderr.flush()
            self._drawn = text

    def end(self) -> None:
        """Leave the line."""
        if self._drawn:
            sys.stderr.write("\n")


def add_parser(
    subparsers: Any, add_target: Callable[[argparse.ArgumentParser], None], targets: Targets
) -> argparse.ArgumentParser:
    """Adds ``psrd`` and its commands to ``keymesh``.

    Args:
        subparsers: what ``ArgumentParser.add_subparsers`` returned.
        add_target: adds the options that name a running node.
        targets: reads them.
    """
    text = "pre-shared random data: courier files between hubs and their clients"
    parser: argparse.ArgumentParser = subparsers.add_parser("psrd", help=text, description=text)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    issue = _command(commands, "issue", "make a table and its courier file (at the hub)", _issue)
    issue.add_argument("--peer", required=True, metavar="ID", help="the client's KME id")
    issue.add_argument("--size", metavar="SIZE", help="of the table, for example 64MiB, half per direction")
    issue.add_argument("--to-client", metavar="SIZE", help="bytes of the lane that the hub writes")
    issue.add_argument("--from-client", metavar="SIZE", help="bytes of the lane that the client writes")
    issue.add_argument("--out", type=Path, required=True, metavar="FILE", help="courier file to write")
    issue.add_argument(
        "--random-source", default="os", metavar="os|DEVICE", help="a device is xored with the system's bytes"
    )

    take = _command(commands, "import", "append a courier file's table to the lanes (at the client)", _import)
    take.add_argument("file", type=Path, metavar="FILE", help="courier file")
    take.add_argument("--peer", required=True, metavar="ID", help="the hub that issued it")
    take.add_argument("--wipe", action="store_true", help="overwrite and remove the file afterwards")
    take.add_argument(
        "--once",
        action="store_true",
        help="no failure when a file of this name was imported before: for jobs that run again",
    )

    status = _command(commands, "status", "levels, time to empty, tables", _status)
    status.add_argument("--json", action="store_true", help="JSON instead of a table")

    discard = _command(commands, "discard", "give up the last table, whose courier was lost (hub)", _discard)
    discard.add_argument("table", metavar="TABLE", help="table id, 32 hexadecimal digits")
    discard.add_argument("--peer", required=True, metavar="ID", help="the client's KME id")

    for command in (issue, take, status, discard):
        add_target(command)
        command.set_defaults(targets=targets)
    for command in (issue, take):
        command.add_argument("--passphrase-file", default="", metavar="FILE", help=_SEALING)
        command.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="of a node that does not run: work on its data directory",
        )
    wipe = _command(commands, "wipe", "overwrite and remove a courier file", _wipe)
    wipe.add_argument("file", type=Path, metavar="FILE")
    return parser


def _command(
    commands: Any, name: str, text: str, handler: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(handler=handler)
    return parser


def _issue(arguments: argparse.Namespace) -> int:
    to_client, from_client = _sizes(arguments)
    out = arguments.out if arguments.config is None and not arguments.lab else arguments.out.resolve()
    bar = Bar("issuing")
    try:
        if arguments.config is not None:
            order = IssueOrder(to_client, from_client, out, read_passphrase(arguments.passphrase_file))
            record = asyncio.run(
                issue_offline(
                    load_any_config(arguments.config),
                    arguments.peer,
                    order,
                    random_source=arguments.random_source,
                    progress=bar,
                )
            )
            table_id = record.table_id
        else:
            request = IssuePsrdRequest(
                peer_kme_id=arguments.peer,
                to_client_bytes=to_client,
                from_client_bytes=from_client,
                path=str(out),
                passphrase_file=arguments.passphrase_file,
                random_source=arguments.random_source,
            )
            table_id = psrd.issue(_one(arguments), request, bar).table_id
    finally:
        bar.end()
    sys.stdout.write(
        f"table {table_id.hex()}: {format_size(to_client)} to {arguments.peer}, "
        f"{format_size(from_client)} back\n"
        f"courier file {out}: whoever reads it reads what this table protects; guard it, import it at "
        f"{arguments.peer}, and wipe it\n"
    )
    return 0


def _import(arguments: argparse.Namespace) -> int:
    file = arguments.file if arguments.config is None and not arguments.lab else arguments.file.resolve()
    bar = Bar("importing")
    try:
        if arguments.config is not None:
            order = ImportOrder(file, read_passphrase(arguments.passphrase_file), arguments.wipe)
            config = load_any_config(arguments.config)
            table_id = asyncio.run(import_offline(config, arguments.peer, order, progress=bar)).table_id
        else:
            request = ImportPsrdRequest(
                peer_kme_id=arguments.peer,
                path=str(file),
                passphrase_file=arguments.passphrase_file,
                wipe_courier_file=arguments.wipe,
            )
            try:
                table_id = psrd.take(_one(arguments), request, bar).table_id
            except CallerError:
                if not (arguments.once and _was_imported(arguments, str(file))):
                    raise
                sys.stdout.write(f"{file} of {arguments.peer} was imported before\n")
                return 0
    finally:
        bar.end()
    after = "the courier file is wiped" if arguments.wipe else f"wipe the file: keymesh psrd wipe {file}"
    sys.stdout.write(f"table {table_id.hex()} of {arguments.peer} is imported; {after}\n")
    return 0


def _was_imported(arguments: argparse.Namespace, path: str) -> bool:
    links = psrd.status(_one(arguments)).links
    tables = [table for link in links if link.peer_kme_id == arguments.peer for table in link.tables]
    return any(table.path == path and not table.is_issued for table in tables)


def _status(arguments: argparse.Namespace) -> int:

    answers = [(target.kme_id, psrd.status(target)) for target in arguments.targets(arguments)]
    if arguments.json:
        plain = {kme_id: as_plain(answer) for kme_id, answer in answers}
        sys.stdout.write(json.dumps(plain, indent=2) + "\n")
        return 0
    header = ("NODE", "PEER", "LANE", "LEFT", "COMING", "USE", "EMPTY IN", "LOW BELOW", "TABLES")
    sys.stdout.write(
        align([header, *(row for kme_id, answer in answers for row in _rows(kme_id, answer))]) + "\n"
    )
    return 0


def _rows(kme_id: str, answer: PsrdStatusResponse) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for link in answer.links:
        latest = link.tables[-1] if link.tables else None
        tables = "none"
        if latest is not None:
            day = datetime.fromtimestamp(latest.made_at_s, UTC).strftime("%Y-%m-%d")
            tables = f"{len(link.tables)}, last {latest.state} {day} {latest.table_id.hex()}"
        rows.append((kme_id, link.peer_kme_id, "out", *_cells(link.transmit), tables))
        rows.append((kme_id, link.peer_kme_id, "in", *_cells(link.receive), ""))
    return rows


def _cells(level: PsrdLevel) -> tuple[str, ...]:
    hours = level.seconds_to_empty / 3600
    empty = (
        "-" if level.seconds_to_empty < 0 else f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.0f} days"
    )
    return (
        format_size(level.usable_bytes) + (" (low)" if level.is_low else ""),
        format_size(level.waiting_bytes) if level.waiting_bytes else "-",
        f"{format_size(level.bytes_per_s)}/s",
        empty if level.seconds_to_empty >= 0 else "-",
        format_size(level.low_water_bytes),
    )


def _discard(arguments: argparse.Namespace) -> int:

    try:
        table_id = bytes.fromhex(arguments.table)
    except ValueError:
        table_id = b""
    if len(table_id) != TABLE_ID_BYTES:
        raise ConfigError("TABLE: must be 32 hexadecimal digits, as keymesh psrd status shows them")
    psrd.discard(_one(arguments), arguments.peer, table_id)
    sys.stdout.write(
        f"table {arguments.table} is discarded; its courier file is worthless: wipe it if found\n"
    )
    return 0


def _wipe(arguments: argparse.Namespace) -> int:

    check_courier(arguments.file)
    wipe_courier(arguments.file)
    sys.stdout.write(f"{arguments.file} is overwritten and removed (flash may keep old blocks)\n")
    return 0


def _one(arguments: argparse.Namespace) -> OperatorTarget:
    targets: list[OperatorTarget] = arguments.targets(arguments)
    if len(targets) != 1:
        raise ConfigError("--node: name the node that should do it")
    return targets[0]


def _sizes(arguments: argparse.Namespace) -> tuple[int, int]:
    """Bytes to the client and back."""
    if arguments.size is not None:
        if arguments.to_client or arguments.from_client:
            raise ConfigError("--size: give it alone, or --to-client and --from-client")
        size = parse_size(arguments.size, field="--size")
        return (size + 1) // 2, size // 2
    if not (arguments.to_client and arguments.from_client):
        raise ConfigError("--size: give it, or --to-client and --from-client")
    return (
        parse_size(arguments.to_client, field="--to-client"),
        parse_size(arguments.from_client, field="--from-client"),
    )


def load_any_config(path: Path) -> NodeConfig:
    """A hub's or a node's configuration, as a node's.

    Raises:
        ConfigError: neither, or not valid.
    """

    try:
        top = decode_yaml(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--config: cannot be read: {error.strerror}", facts={"file": path}) from error
    if isinstance(top, dict) and "hub_id" in top:
        return load_hub_config(path)[1]
    return load_node_config(path)
