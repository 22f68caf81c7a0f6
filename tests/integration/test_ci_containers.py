"""`.ci/containers` with stand-ins for what it calls: which machines leave the tests out, and which fail."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helm.chart import ROOT

_TOOLS = ("bash", "dirname", "env", "mkdir", "seq", "sleep", "tail")
# A machine on which everything is there but an engine that answers; it starts one.
_MACHINE = {
    "id": "echo 0",
    "unshare": "exit 0",
    "iptables": "exit 0",
    "debootstrap": "exit 0",
    "dockerd": 'echo "$$" > running; exec sleep 30',
    "docker": "[ -e running ]",
    "make": 'echo "made $2"',
}
_DONE = "made image\nmade test-containers\n"
_LEFT_OUT = "CONTAINER TESTS LEFT OUT: "


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, 0, _DONE),
        ({"docker": "exit 0", "id": "echo 1000", "dockerd": None}, 0, _DONE),
        ({"id": "echo 1000"}, 0, _LEFT_OUT + "no engine answers, and starting one needs root"),
        ({"unshare": "exit 1"}, 0, _LEFT_OUT + "no engine answers, and there are no namespaces"),
        ({"dockerd": None}, 0, _LEFT_OUT + "there is no apt-get to install dockerd with"),
        ({"dockerd": None, "apt-get": "exit 100"}, 1, "apt-get did not install dockerd"),
        ({"dockerd": "echo no overlay; exit 1"}, 1, "the engine did not start: no overlay"),
        ({"docker": '[ -e running ] && [ "$1" != network ]'}, 1, "the engine makes no networks"),
        ({"make": "exit 2"}, 2, ""),
    ],
)
@pytest.mark.parametrize("is_required", [True, False])
def test_a_machine_without_an_engine_leaves_the_tests_out_unless_they_are_required(
    changes: dict[str, str | None], status: int, said: str, is_required: bool, tmp_path: Path
) -> None:
    if status == 1 and not is_required:
        status, said = 0, _LEFT_OUT + said
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "containers", tmp_path / ".ci")
    path = tmp_path / "bin"
    path.mkdir()
    for tool in _TOOLS:
        (path / tool).symlink_to(shutil.which(tool) or "")
    for name, text in {**_MACHINE, **changes}.items():
        if text is not None:
            (path / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
            (path / name).chmod(0o755)
    done = subprocess.run(
        [tmp_path / ".ci" / "containers", "python3"],
        env={"PATH": str(path)} | ({"CONTAINERS": "required"} if is_required else {}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
    assert ("made test-containers" in done.stdout) == (said == _DONE)
