"""``keymesh pki …``: lab authorities, certificates and their diagnosis from the command line.

Parses, calls one function, prints. ``add_parser`` is wired by ``mesh.cli``; each
command sets ``handler``, which takes the parsed arguments and returns an exit status.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError
from mesh.pki.authority import LOCAL_HOSTS, Credential, CredentialFiles, Pki
from mesh.pki.explain import PURPOSES, explain, report
from mesh.pki.secrets import read_text, write_secrets

_Issue = Callable[[Pki, argparse.Namespace], dict[str, Credential]]


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds ``pki`` and its commands to ``keymesh``.

    Args:
        subparsers: what ``ArgumentParser.add_subparsers`` returned.
    """
    text = "certificates: lab authorities, and what is wrong with a file"
    parser: argparse.ArgumentParser = subparsers.add_parser("pki", help=text, description=text)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    init = commands.add_parser("init", help="make the roots of a domain")
    init.add_argument("--domain", required=True, help="domain id")
    _add_directory(init)
    init.set_defaults(handler=_init)

    for name, help_text, issue in (
        ("issue-node", "a node's certificate", _node),
        ("issue-hub", "a hub's certificate", _hub),
        ("issue-gateway", "a gateway's two certificates: REST server, client of its node", _gateway),
        ("issue-tool", "a certificate for operators' tools", _tool),
        ("issue-sae", "an application's certificate", _sae),
        ("issue-border", "a KME's certificate towards other owners' key managers", _border),
        ("issue-device", "a QKD device's server certificate", _device),
        ("issue-device-client", "a node's certificate towards its QKD device", _device_client),
        ("issue-etcd", "an etcd member's certificate", _etcd),
        ("issue-etcd-client", "a certificate for reaching etcd", _etcd_client),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("id", help="the id of its holder")
        _add_directory(command)
        if issue in (_node, _hub, _gateway, _border, _device, _etcd):
            command.add_argument(
                "--host", action="append", help="DNS name or address to be valid for; may be repeated"
            )
        command.set_defaults(handler=_issue, issue=issue)

    text = (
        "Kubernetes Secrets for the Certificates of a rendered chart, where there is no cert-manager (labs)"
    )
    secrets = commands.add_parser("secrets", help=text, description=text)
    secrets.add_argument(
        "file", type=Path, metavar="FILE", help="what helm template wrote; - for standard input"
    )
    secrets.add_argument("--out", type=Path, required=True, metavar="FILE", help="YAML for kubectl apply")
    _add_directory(secrets)
    secrets.set_defaults(handler=_secrets)

    explained = commands.add_parser("explain", help="say in words what is wrong with a certificate")
    explained.add_argument("file", type=Path, metavar="FILE", help="certificate, PEM")
    explained.add_argument("--key", type=Path, metavar="FILE", help="its private key")
    explained.add_argument("--ca", type=Path, metavar="FILE", help="roots that its other ends trust")
    explained.add_argument("--as", dest="purpose", choices=[*PURPOSES], help="what it is meant for")
    explained.add_argument("--host", action="append", help="must be valid for this name or address")
    explained.set_defaults(handler=_explain)
    return parser


def _add_directory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dir", type=Path, default=Path("pki"), metavar="DIR", help="where the files are (default: pki)"
    )


def _init(arguments: argparse.Namespace) -> int:
    if any(arguments.dir.glob("*-ca.key")):
        raise ConfigError(
            "the directory holds roots already; every certificate they issued would become void, "
            "so choose another directory",
            facts={"dir": arguments.dir},
        )
    for name, path in Pki.create(arguments.domain).save(arguments.dir).items():
        _print(f"{name} root: {path}")
    return 0


def _issue(arguments: argparse.Namespace) -> int:
    issue: _Issue = arguments.issue
    pki = Pki.load(arguments.dir)
    for stem, credential in issue(pki, arguments).items():
        files: CredentialFiles = credential.save(arguments.dir, stem)
        _print(f"{files.cert} {files.key}")
    return 0


def _secrets(arguments: argparse.Namespace) -> int:
    manifests = sys.stdin.read() if str(arguments.file) == "-" else read_text(arguments.file)
    count = write_secrets(manifests, arguments.dir, arguments.out)
    _print(f"{count} Secrets: {arguments.out}; they hold private keys: apply them, then remove the file")
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    diagnosis = explain(
        arguments.file,
        key=arguments.key,
        ca=arguments.ca,
        purpose=arguments.purpose,
        hosts=arguments.host or (),
    )
    sys.stdout.write(report(arguments.file, diagnosis))
    return 1 if diagnosis.fatal else 0


def _node(pki: Pki, arguments: argparse.Namespace) -> dict[str, Credential]:
    return {f"node-{arguments.id}": pki.node(arguments.id, hosts=arguments.host or LOCAL_HOSTS)}


def _hub(pki: Pki, arguments: argparse.Namespace) -> dict[str, Credential]:
    return {f"hub-{arguments.id}": pki.hub(arguments.id, hosts=arguments.host or LOCAL_HOSTS)}


def _gateway(pki: Pki, arguments: argparse.Namespace) -> dict[str, Credential]:
    return {
        f"gateway-{arguments.id}-server": pki.gateway_server(
            arguments.id, hosts=arguments.host or LOCAL_HOSTS
        ),
        f"gateway-{arguments.id}-client": pki.gateway_client(arguments.id),
    }


def _tool(pki: Pki, arguments: argparse.Namespace) -> dict[str, Credential]:
    return {f"tool-{arguments.id}": pki.tool(arguments.id)}


def _sae(pki: Pki, arguments: argparse.Namespace) -> dict[str, Credential]:
    return {f"sae-{arguments.id}": pki.sae(arguments.id)}


def _border(pki: Pki, arguments: argparse.Namespace) -> dict[str, Credential]:
    return {f"border-{arguments.id}": pki.border(arguments.id, hosts=arguments.host or LOCAL_HOSTS)}


def _device(pki: Pki, arguments: argparse.Namespace) -> dict[str, Credential]:
    return {f"device-{arguments.id}": pki.device_server(arguments.id, hosts=arguments.host or LOCAL_HOSTS)}


def _device_client(pki: Pki, arguments: argparse.Namespace) -> dict[str, Credential]:
    return {f"device-client-{arguments.id}": pki.device_client(arguments.id)}


def _etcd(pki: Pki, arguments: argparse.Namespace) -> dict[str, Credential]:
    return {f"etcd-{arguments.id}": pki.etcd_server(arguments.id, hosts=arguments.host or LOCAL_HOSTS)}


def _etcd_client(pki: Pki, arguments: argparse.Namespace) -> dict[str, Credential]:
    return {f"etcd-client-{arguments.id}": pki.etcd_client(arguments.id)}


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
