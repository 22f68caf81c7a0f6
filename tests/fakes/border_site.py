"""One border site as processes: a node on its own and its gateway, which meet other key managers over TLS."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import yaml

from mesh.lab.ground import free_ports
from mesh.pki.authority import CredentialFiles, Pki

DOMAIN = "own"
_START_S = 60.0
#: SAEs behind the border, and behind no key manager that is configured there.
UNREACHABLE = "unreachable-"


@dataclass(frozen=True)
class Neighbour:
    """Another owner's key manager as the configuration names it."""

    kme_id: str
    url: str
    prefix: str
    root: Path
    name: str


class BorderSite:
    """The processes of one site.

    Args:
        directory: for everything it writes.
        proofs: a folder on tmpfs.
        neighbours: whom it meets.
        border: further settings of the node's border.
        etsi020: further settings of the gateway's.
        domain: SAEs are called after it, with ``-a``, ``-b`` and ``-c``, the KME with ``-kme``.
        port020: where key managers are listened for; 0 takes a free one.
        request_timeout_s: how long an application of the site waits for its keys.
    """

    def __init__(
        self,
        directory: Path,
        *,
        proofs: Path,
        neighbours: Sequence[Neighbour],
        border: dict[str, Any] | None = None,
        etsi020: dict[str, Any] | None = None,
        domain: str = DOMAIN,
        port020: int = 0,
        request_timeout_s: float = 4.0,
    ) -> None:
        self.directory = directory
        self.domain, self.kme, self._gateway = domain, f"{domain}-kme", f"{domain}-gw"
        self._pki = Pki.create(domain)
        self.roots = self._pki.save(directory)
        self.saes = {sae: self._pki.sae(sae).save(directory, sae) for sae in self._saes()}
        ports = list(free_ports(5))
        ports[4] = port020 or ports[4]
        self._grpc, self._node_http, https, self._gateway_http, listen = (f"127.0.0.1:{p}" for p in ports)
        self.url = f"https://localhost:{ports[2]}"
        self.url020 = f"https://localhost:{ports[4]}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._request_timeout_s = request_timeout_s
        self._write_node(neighbours, proofs, border or {})
        self._write_gateway(neighbours, https, listen, etsi020 or {})

    def _saes(self) -> list[str]:
        return [f"{self.domain}-{letter}" for letter in "abc"]

    def _write(self, name: str, document: dict[str, Any]) -> None:
        is_json = name.endswith(".json")
        (self.directory / name).write_text(json.dumps(document) if is_json else yaml.safe_dump(document))

    def _write_node(self, neighbours: Sequence[Neighbour], proofs: Path, border: dict[str, Any]) -> None:
        node = self._pki.node(self.kme, hosts=["127.0.0.1", "localhost"]).save(self.directory, self.kme)
        self._write(
            "document.json",
            {
                "format": "keymesh-network/1",
                "serial": 1,
                "domain": self.domain,
                "nodes": {self.kme: {}},
                "saes": {sae: {"home": self.kme} for sae in self._saes()},
                "foreign": [
                    {"prefix": prefix, "border": self.kme, "domain": domain}
                    for prefix, domain in (
                        *((one.prefix, one.kme_id) for one in neighbours),
                        (UNREACHABLE, "nowhere"),
                    )
                ],
            },
        )
        self._write(
            "directory.yaml",
            {"format": "keymesh-directory/1", "nodes": {self.kme: self._grpc}, "document": "document.json"},
        )
        self._write(
            "node.yaml",
            {
                "kme_id": self.kme,
                "domain_id": self.domain,
                "data_dir": "data",
                "listen": {"grpc": self._grpc, "http": self._node_http},
                "tls": self._tls("node", node),
                "directory": {"static": "directory.yaml"},
                "network": {"trust_directory": True},
                "access": "open",
                "proof_dir": str(proofs),
                # No link, no lane bytes: keys made here come from this device alone.
                "random_device": "/dev/urandom",
                "limits": {"request_timeout_s": self._request_timeout_s},
                "border": {
                    "gateways": [self._gateway],
                    "url": self.url020,
                    "peers": [
                        {"kme_id": one.kme_id, "url": one.url, "prefixes": [one.prefix]} for one in neighbours
                    ],
                    **border,
                },
                "log": {"file": "node.log"},
            },
        )

    def _write_gateway(
        self, neighbours: Sequence[Neighbour], https: str, listen: str, etsi020: dict[str, Any]
    ) -> None:
        server = self._pki.gateway_server(self._gateway).save(self.directory, "gateway-server")
        client = self._pki.gateway_client(self._gateway).save(self.directory, "gateway-client")
        border = self._pki.border(self.kme).save(self.directory, "border")
        self._write(
            "gateway.yaml",
            {
                "gateway_id": self._gateway,
                "domain_id": self.domain,
                "listen": {"https": https, "http": self._gateway_http},
                "node": {"address": self._grpc, "kme_id": self.kme},
                "node_tls": self._tls("node", client),
                "tls": self._tls("sae", server),
                "audit_log": "audit.log",
                "limits": {"body_timeout_s": 1.0, "drain_s": 0.2},
                "etsi020": {
                    "listen": listen,
                    "cert": str(border.cert),
                    "key": str(border.key),
                    "peers": [
                        {
                            "kme_id": one.kme_id,
                            "url": one.url,
                            "ca": str(one.root),
                            "names": [one.name],
                        }
                        for one in neighbours
                    ],
                    **etsi020,
                },
                "log": {"file": "gateway.log"},
            },
        )

    def _tls(self, root: str, files: CredentialFiles) -> dict[str, str]:
        return {"ca": str(self.roots[root]), "cert": str(files.cert), "key": str(files.key)}

    # processes

    def start(self) -> None:
        """Starts both and waits until keys can be delivered."""
        for kind in ("node", "gateway"):
            self.launch(kind)
        try:
            for kind in ("node", "gateway"):
                self.wait_ready(kind)
        except BaseException:
            self.stop()
            raise

    def launch(self, kind: str) -> None:
        """Starts ``node`` or ``gateway``."""
        with (self.directory / f"{kind}.err").open("ab") as errors:
            self._processes[kind] = subprocess.Popen(
                [sys.executable, "-m", "mesh.cli", kind, "run", "--config", self.directory / f"{kind}.yaml"],
                cwd=Path(__file__).parents[2],
                stdout=errors,
                stderr=errors,
            )

    def wait_ready(self, kind: str) -> None:
        """Until it says so."""
        address = self._node_http if kind == "node" else self._gateway_http
        deadline = time.monotonic() + _START_S
        while not _is_ready(address):
            assert time.monotonic() < deadline, self.log(kind)
            assert self._processes[kind].poll() is None, self.log(kind)
            time.sleep(0.05)

    def kill(self, kind: str) -> None:
        """``kill -9``."""
        process = self._processes.pop(kind)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """Ends both."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def log(self, kind: str) -> str:
        """What it wrote, for people."""
        files = [self.directory / f"{kind}.{end}" for end in ("err", "log")]
        return "".join(file.read_text() for file in files if file.exists())

    def metrics(self, kind: str) -> str:
        """Its metrics page."""
        address = self._node_http if kind == "node" else self._gateway_http
        return str(urlopen(f"http://{address}/metrics").read(), "utf-8")


def _is_ready(address: str) -> bool:
    try:
        return bool(urlopen(f"http://{address}/readyz").status == 200)
    except HTTPError:
        return False
    except OSError:
        return False
