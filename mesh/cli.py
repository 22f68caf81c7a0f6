"""The ``keymesh`` command: one word per process and per question.

Parses arguments, calls one function, turns errors into one line and an exit status.
Imports what a command needs only when that command runs, so that ``--help`` and small
questions answer at once. Must not hold rules of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh import __version__
from mesh.errors import ConfigError, MeshError, UnavailableError

if TYPE_CHECKING:
    from mesh.client.operator import OperatorTarget

Handler = Callable[[argparse.Namespace], int]
_SCENARIOS = ("hub-killed", "hub-liar", "cut-link", "two-of-three-hubs-dead")
_EXIT_FAILED = 1
_EXIT_CONFIG = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status (0 done, 1 failed, 2 wrong usage or file)."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser(words[0] if words else "").parse_args(words)
    handler: Handler = arguments.handler
    try:
        return handler(arguments)
    except ConfigError as error:
        sys.stderr.write(f"keymesh: {error}\n")
        return _EXIT_CONFIG
    except MeshError as error:
        sys.stderr.write(f"keymesh: {error}\n")
        return _EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        sys.stderr.close()
        return 0


def build_parser(first: str = "") -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``handler``.

    Args:
        first: the first word of the command line; what is slow to import is filled in
            only when asked for.
    """
    parser = argparse.ArgumentParser(
        prog="keymesh", description="Key management mesh: QKD relay behind ETSI GS QKD 014"
    )
    parser.add_argument("--version", action="version", version=f"keymesh {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_processes(commands)
    _add_config(commands)
    if first == "pki":
        from mesh.pki.cli import add_parser

        add_parser(commands)
    else:
        commands.add_parser("pki", help="certificates: lab authorities, and what is wrong with a file")
    _add_network(commands)
    _add_sae(commands)
    _add_operator(commands)
    if first == "psrd":
        from mesh.hub.psrd_cli import add_parser as add_psrd

        add_psrd(commands, _add_target, _targets)
    else:
        commands.add_parser("psrd", help="pre-shared random data: issue, import, status of courier files")
    _add_lab(commands)
    return parser


Commands = argparse._SubParsersAction


def _group(
    commands: Commands[argparse.ArgumentParser], name: str, text: str
) -> Commands[argparse.ArgumentParser]:
    group = commands.add_parser(name, help=text, description=text)
    return group.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _command(
    commands: Commands[argparse.ArgumentParser], name: str, text: str, handler: Handler
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(handler=handler)
    return parser


# --- processes --------------------------------------------------------------------------


def _add_processes(commands: Commands[argparse.ArgumentParser]) -> None:
    for name, text, handler in (
        ("node", "a KME: links, establishing, reserves, keys", _run_node),
        ("hub", "a hub: forwards shares, ends nothing", _run_hub),
        ("gateway", "the REST interfaces of a site (ETSI GS QKD 014)", _run_gateway),
        ("qkd-device", "a simulated QKD device pair", _run_device),
    ):
        group = _group(commands, name, text)
        run = _command(group, "run", f"run {text}, until SIGTERM", handler)
        run.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML configuration")


def _run_node(arguments: argparse.Namespace) -> int:
    from mesh.node.node import run

    return run(arguments.config)


def _run_hub(arguments: argparse.Namespace) -> int:
    from mesh.hub.hub import run

    return run(arguments.config)


def _run_gateway(arguments: argparse.Namespace) -> int:
    from gateway.main import main as run_gateway

    return run_gateway(arguments.config)


def _run_device(arguments: argparse.Namespace) -> int:
    from mesh.devices.main import run

    return run(arguments.config)


# --- files ------------------------------------------------------------------------------


def _add_config(commands: Commands[argparse.ArgumentParser]) -> None:
    group = _group(commands, "config", "configuration files")
    check = _command(
        group, "check", "check a configuration or network file and say what is wrong", _check_config
    )
    check.add_argument("files", type=Path, nargs="+", metavar="FILE")


def _check_config(arguments: argparse.Namespace) -> int:
    from mesh.lab.configcheck import check_file

    failures = 0
    for file in arguments.files:
        try:
            print(f"{file}: a valid {check_file(file)}")
        except MeshError as error:
            failures += 1
            sys.stderr.write(f"{file}: {error}\n")
    return _EXIT_CONFIG if failures else 0


def _add_network(commands: Commands[argparse.ArgumentParser]) -> None:
    group = _group(commands, "network", "the signed network document")
    keygen = _command(group, "keygen", "make the operator's signing key (keep it offline)", _network_keygen)
    keygen.add_argument("--key", type=Path, required=True, metavar="FILE", help="private key to write")
    keygen.add_argument("--public", type=Path, required=True, metavar="FILE", help="public key to write")
    sign = _command(group, "sign", "check a document (YAML or JSON) and sign it", _network_sign)
    sign.add_argument("source", type=Path, metavar="FILE")
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="operator's private key (PEM)")
    sign.add_argument("--out", type=Path, required=True, metavar="FILE", help="signed document to write")
    show = _command(group, "show", "show a document, and whether its signature holds", _network_show)
    show.add_argument("document", type=Path, metavar="FILE")
    show.add_argument("--public", type=Path, metavar="FILE", help="operator's public key (PEM)")
    publish = _command(group, "publish", "put a signed document into the domain's etcd", _network_publish)
    publish.add_argument("document", type=Path, metavar="FILE")
    _add_etcd(publish, needs_certificate=False)
    publish.add_argument("--username", help="etcd user that may write the document")
    publish.add_argument("--password-file", type=Path, metavar="FILE")
    text = "make etcd users that come with a client certificate (CN: KME id), and turn authentication on"
    users = _command(group, "users", text, _network_users)
    users.add_argument("--domain", required=True, metavar="ID")
    users.add_argument("--member", action="append", default=[], metavar="ID", help="KME id of a node or hub")
    _add_etcd(users, needs_certificate=True)


def _add_etcd(parser: argparse.ArgumentParser, *, needs_certificate: bool) -> None:
    parser.add_argument("--endpoint", action="append", required=True, metavar="HOST:PORT")
    parser.add_argument("--ca", type=Path, required=True, metavar="FILE", help="etcd root (PEM)")
    text = "client certificate (PEM), CN root" if needs_certificate else "client certificate (PEM)"
    parser.add_argument("--cert", type=Path, required=needs_certificate, metavar="FILE", help=text)
    parser.add_argument("--key", type=Path, required=needs_certificate, metavar="FILE", help="its key (PEM)")


def _network_keygen(arguments: argparse.Namespace) -> int:
    from mesh.directory.tool import generate_key

    generate_key(arguments.key, arguments.public)
    return 0


def _network_sign(arguments: argparse.Namespace) -> int:
    from mesh.directory.tool import sign_file

    print(sign_file(arguments.source, arguments.key, arguments.out))
    return 0


def _network_show(arguments: argparse.Namespace) -> int:
    from mesh.directory.tool import show_file

    print(show_file(arguments.document, arguments.public))
    return 0


def _network_publish(arguments: argparse.Namespace) -> int:
    from mesh.directory.tool import publish_file

    serial = publish_file(
        arguments.document,
        endpoints=arguments.endpoint,
        ca=arguments.ca,
        cert=arguments.cert,
        key=arguments.key,
        username=arguments.username,
        password_file=arguments.password_file,
    )
    print(f"serial {serial} is in the directory; nodes take it up by themselves")
    return 0


def _network_users(arguments: argparse.Namespace) -> int:
    from mesh.directory.tool import set_up_users

    set_up_users(
        arguments.domain,
        arguments.member,
        endpoints=arguments.endpoint,
        ca=arguments.ca,
        cert=arguments.cert,
        key=arguments.key,
    )
    print(f"{len(arguments.member)} users may write their own entries; authentication is on")
    return 0


def _add_sae(commands: Commands[argparse.ArgumentParser]) -> None:
    group = _group(commands, "sae", "applications and their homes")
    listing = _command(group, "list", "list SAEs and their homes by the network document", _sae_list)
    where = listing.add_mutually_exclusive_group(required=True)
    where.add_argument("--document", type=Path, metavar="FILE", help="network document, signed or not")
    where.add_argument("--lab", type=Path, metavar="DIR", help="a lab's directory")


def _sae_list(arguments: argparse.Namespace) -> int:
    from mesh.directory.tool import list_saes

    if arguments.document is not None:
        print(list_saes(arguments.document))
        return 0
    from mesh.lab.state import LabDirectory

    for domain in LabDirectory(arguments.lab).read_lab()["domains"]:
        print(list_saes(Path(domain["document"])))
    return 0


# --- questions to running nodes -----------------------------------------------------------


def _add_operator(commands: Commands[argparse.ArgumentParser]) -> None:
    for name, text in (
        ("status", "how nodes are: version, uptime, document, directory, certificate"),
        ("links", "links of nodes: state, material, device"),
        ("reserves", "reserves of nodes, in 48-byte slots"),
        ("alarms", "open alarms of nodes, with the operator's next step"),
    ):
        parser = _command(commands, name, text, _ask_nodes)
        parser.set_defaults(what=name)
        parser.add_argument("--json", action="store_true", help="JSON instead of a table")
        _add_target(parser)
        if name == "alarms":
            parser.add_argument("--acknowledge", metavar="ALARM", help="clear an alarm that waits for you")
        if name == "links":
            _add_reset(parser)


def _add_target(parser: argparse.ArgumentParser, **common: Any) -> None:
    """Which node to ask, and with which certificate; ``common`` goes to every option."""
    parser.add_argument("--lab", type=Path, metavar="DIR", help="ask the nodes of the lab in DIR", **common)
    parser.add_argument("--node", metavar="ID", help="KME id; with --lab only this node", **common)
    parser.add_argument("--role", choices=("node", "hub"), **{"default": "node", **common})
    parser.add_argument("--address", metavar="HOST:PORT", help="the node's gRPC listener", **common)
    parser.add_argument("--domain", metavar="ID", **common)
    for option, meaning in (("ca", "node root"), ("cert", "tool certificate"), ("key", "its key")):
        parser.add_argument(f"--{option}", type=Path, metavar="FILE", help=f"{meaning} (PEM)", **common)


def _add_reset(links: argparse.ArgumentParser) -> None:
    group = links.add_subparsers(title="commands", metavar="COMMAND")
    text = "throw away a link's material at one node; do it at both ends, unless one is new"
    reset = _command(group, "reset", text, _reset_link)
    reset.add_argument("peer", metavar="PEER", help="KME id of the link's other end")
    reset.add_argument("--confirm", required=True, metavar="PEER", help="the same id again")
    # Suppressed defaults leave alone what stood before the word reset.
    _add_target(reset, default=argparse.SUPPRESS)


def _reset_link(arguments: argparse.Namespace) -> int:
    from mesh.client import operator

    if arguments.confirm != arguments.peer:
        raise ConfigError("--confirm must repeat the id of the other end: the material is destroyed")
    targets = _targets(arguments)
    if len(targets) != 1:
        raise ConfigError("give --node: a reset is for one node at a time")
    transmit, receive = operator.reset_link(targets[0], arguments.peer)
    print(f"link to {arguments.peer} reset: epochs {transmit} out, {receive} in")
    print("do the same at the other end, unless it is new")
    return 0


def _ask_nodes(arguments: argparse.Namespace) -> int:
    import json

    from mesh.client import operator

    targets = _targets(arguments)
    if alarm := getattr(arguments, "acknowledge", None):
        for target in targets:
            operator.acknowledge(target, alarm)
        return 0
    answers, failures = [], 0
    for target in targets:
        try:
            answers.append((target.kme_id, operator.ask(target, arguments.what)))
        except MeshError as error:
            failures += 1
            sys.stderr.write(f"keymesh: {target.kme_id}: {error}\n")
    if arguments.json:
        print(json.dumps({kme_id: operator.as_plain(answer) for kme_id, answer in answers}, indent=2))
    elif answers:
        print(operator.as_table(answers))
    return _EXIT_FAILED if failures else 0


def _targets(arguments: argparse.Namespace) -> list[OperatorTarget]:
    from mesh.client.operator import OperatorTarget
    from mesh.core.identity import Role

    if arguments.lab is not None:
        from mesh.lab.state import operator_targets

        return operator_targets(arguments.lab, arguments.node)
    needed = ("address", "node", "domain", "ca", "cert", "key")
    if missing := [f"--{name}" for name in needed if getattr(arguments, name) is None]:
        raise ConfigError(f"give --lab DIR, or {', '.join(missing)}")
    return [
        OperatorTarget(
            arguments.address,
            arguments.node,
            arguments.domain,
            arguments.ca,
            arguments.cert,
            arguments.key,
            Role(arguments.role),
        )
    ]


# --- labs -------------------------------------------------------------------------------


def _add_lab(commands: Commands[argparse.ArgumentParser]) -> None:
    group = _group(commands, "lab", "whole networks on this machine")
    up = _command(group, "up", "start a network and wait until every gateway can deliver", _lab_up)
    up.add_argument("--network", required=True, metavar="NAME|FILE", help="shipped network or YAML file")
    up.add_argument("--detach", action="store_true", help="return once it delivers; it keeps running")
    down = _command(group, "down", "stop everything of a lab, also after crashes", _lab_down)
    restart = _command(group, "restart", "start processes of a lab again", _lab_restart)
    restart.add_argument("ids", nargs="+", metavar="ID", help="of nodes, gateways, devices, relays, etcd")
    run = _command(group, "run", "send checked traffic through a running lab, or play a scenario", _lab_run)
    run.add_argument("--traffic", type=float, default=10.0, metavar="SECONDS", help="how long (default 10)")
    run.add_argument("--number", type=int, default=4, metavar="N", help="keys per call (default 4)")
    run.add_argument(
        "--scenario", choices=_SCENARIOS, help="break something; see whether keys still come and it is named"
    )
    run.add_argument(
        "--stand-in", type=Path, metavar="FILE", help="Python file that runs in a hub's place (hub-liar)"
    )
    demo = _command(group, "demo", "bring metro up, measure it, draw the picture, stop it", _lab_demo)
    paper = _command(group, "paper", "repeat the paper's measurement on its network", _lab_paper)
    paper.add_argument(
        "--duration", type=float, default=60.0, metavar="SECONDS", help="of measuring (default 60)"
    )
    paper.add_argument(
        "--round-trip", type=float, default=85.0, metavar="MS", help="of the emulated ocean (default 85)"
    )
    paper.add_argument("--dir", type=Path, default=Path("build/paper"), metavar="DIR", help="for the results")
    text = "show where each millisecond of a request goes; restarts nodes, hubs and gateways for it"
    trace = _command(group, "trace", text, _lab_trace)
    trace.add_argument("--master", metavar="SAE", help="who asks (default: the first SAE)")
    trace.add_argument("--slave", metavar="SAE", help="for whom (default: the last SAE at another node)")
    for parser in (up, down, restart, run, trace):
        parser.add_argument("--dir", type=Path, required=True, metavar="DIR", help="the lab's directory")
    demo.add_argument("--dir", type=Path, default=Path("build/demo"), metavar="DIR", help="for the results")


def _lab_up(arguments: argparse.Namespace) -> int:
    import signal

    from mesh.lab.control import Progress, hold_lab, start_lab
    from mesh.lab.networks import load_lab

    progress = Progress()
    # Stop what was started also when told to stop half-way, and when a shell had SIGINT ignored.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    directory = start_lab(load_lab(arguments.network), arguments.dir, progress)
    if not arguments.detach:
        hold_lab(directory, progress)
    return 0


def _lab_down(arguments: argparse.Namespace) -> int:
    from mesh.lab.control import Progress, stop_lab
    from mesh.lab.state import LabDirectory

    stop_lab(LabDirectory(arguments.dir), Progress())
    return 0


def _lab_restart(arguments: argparse.Namespace) -> int:
    from mesh.lab.control import Progress, restart_processes
    from mesh.lab.state import LabDirectory

    restart_processes(LabDirectory(arguments.dir), arguments.ids, Progress())
    return 0


def _lab_run(arguments: argparse.Namespace) -> int:
    if arguments.scenario is not None:
        return _lab_scenario(arguments)
    from mesh.lab.state import LabDirectory
    from mesh.lab.traffic import run_traffic

    lab = LabDirectory(arguments.dir).read_lab()
    result = run_traffic(lab, arguments.traffic, number=arguments.number)
    print(result)
    return 0 if result.is_clean and result.keys_checked else _EXIT_FAILED


def _lab_scenario(arguments: argparse.Namespace) -> int:
    from mesh.lab.control import Progress
    from mesh.lab.scenarios import run_scenario

    run_scenario(arguments.scenario, arguments.dir, Progress(), stand_in=arguments.stand_in)
    return 0


def _lab_demo(arguments: argparse.Namespace) -> int:
    from mesh.lab.demo import run_demo

    return run_demo(arguments.dir)


def _lab_trace(arguments: argparse.Namespace) -> int:
    from mesh.lab.control import Progress
    from mesh.lab.encryptor import RefusedError
    from mesh.lab.trace import table, trace_request

    progress = Progress()
    try:
        rows = trace_request(arguments.dir, progress, master=arguments.master, slave=arguments.slave)
    except RefusedError as error:
        raise UnavailableError(f"a request was refused: {error}") from error
    print(table(rows))
    return 0


def _lab_paper(arguments: argparse.Namespace) -> int:
    from mesh.lab.paper import run_paper

    if arguments.duration <= 0 or arguments.round_trip <= 0:
        raise ConfigError("--duration and --round-trip must be more than 0")
    return run_paper(arguments.dir, duration_s=arguments.duration, round_trip_ms=arguments.round_trip)


if __name__ == "__main__":
    raise SystemExit(main())
