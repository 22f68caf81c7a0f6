"""What the image is made of, and that nothing else is in it."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import docker
import pytest

from mesh import __version__
from tests.containers.mesh import LABEL, USER

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BILL = "usr/share/keymesh/sbom.cdx.json"


@pytest.fixture(scope="module")
def members(engine: docker.DockerClient, image: str) -> Iterator[dict[str, tarfile.TarInfo]]:
    """Every file of the image by path."""
    container = engine.containers.create(image, labels={LABEL: ""})
    with TemporaryFile() as content:
        for chunk in container.export():
            content.write(chunk)
        content.seek(0)
        with tarfile.open(fileobj=content) as archive:
            yield {member.name.rstrip("/"): member for member in archive}


def run(engine: docker.DockerClient, image: str, *words: str, **options: Any) -> str:
    output = engine.containers.run(
        image, list(words), remove=True, read_only=True, cap_drop=["ALL"], network_mode="none",
        security_opt=["no-new-privileges"], labels={LABEL: ""}, **options,
    )  # fmt: skip
    return bytes(output).decode()


def test_it_runs_without_rights_and_without_a_writable_disk(engine: docker.DockerClient, image: str) -> None:
    assert run(engine, image, "--version") == f"keymesh {__version__}\n"
    # Every command's modules are there, and a foreign user id does, too.
    everything = (
        "import gateway.main, mesh.devices.main, mesh.directory.tool, mesh.hub.hub, mesh.node.node, os"
    )
    program = f"{everything}; print(os.getuid())"
    for user, seen in ((None, USER), ("12345:12345", 12345)):
        words = ["-c", program]
        assert run(engine, image, *words, entrypoint="/opt/keymesh/bin/python", user=user) == f"{seen}\n"


def test_its_labels_say_what_it_is(engine: docker.DockerClient, image: str) -> None:
    facts = engine.images.get(image).attrs["Config"]
    assert facts["User"] == f"{USER}:{USER}"
    assert facts["Entrypoint"] == ["/opt/keymesh/bin/keymesh"]
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in facts["Labels"].items()}
    assert labels["title"] == "keymesh"
    assert labels["version"] == __version__
    assert labels["licenses"] == "Apache-2.0"
    assert len(labels["revision"]) in (7, 40)
    assert labels["created"].endswith("Z")


def test_nothing_to_work_with_is_in_it(members: dict[str, tarfile.TarInfo]) -> None:
    programs = {
        name
        for name, member in members.items()
        if member.isfile() and member.mode & 0o111 and Path(name).parent.name in ("bin", "sbin", "libexec")
    }
    interpreter = {name for name in programs if name.split("/")[-1].startswith("python3")}
    assert programs - interpreter == {"opt/keymesh/bin/keymesh"}
    assert len(interpreter) == 1
    assert not [name for name in members if name.split("/")[-1] in ("pip", "sh", "bash", "busybox", "perl")]
    assert not [name for name, member in members.items() if member.isfile() and member.mode & 0o6000]


def test_only_its_own_folders_are_the_users(members: dict[str, tarfile.TarInfo]) -> None:
    own = {name: member for name, member in members.items() if member.uid == USER}
    assert set(own) == {"var/lib/keymesh", "var/log/keymesh", "run/keymesh"}
    assert {member.mode & 0o7777 for member in own.values()} == {0o700}
    writable = {name for name, member in members.items() if not member.issym() and member.mode & 0o022}
    # What the engine itself puts into containers is not the image's.
    assert {name for name in writable if not name.startswith(("dev", "proc", "sys"))} == {"tmp"}


def test_every_time_stamp_is_one(members: dict[str, tarfile.TarInfo]) -> None:
    times = {member.mtime for name, member in members.items() if name.startswith(("opt", "usr", "var"))}
    assert len(times) == 1


def test_its_bill_of_materials_is_true(engine: docker.DockerClient, image: str) -> None:
    reader = f"print(open('/{BILL}').read())"
    text = run(engine, image, "-c", reader, entrypoint="/opt/keymesh/bin/python")
    validator = pytest.importorskip("cyclonedx.validation.json", reason="make test-containers installs it")
    version = pytest.importorskip("cyclonedx.schema").SchemaVersion.V1_6
    assert validator.JsonStrictValidator(version).validate_str(text) is None
    bill = json.loads(text)
    assert bill["metadata"]["component"]["name"] == "keymesh"
    listed = {entry["purl"]: entry for entry in bill["components"]}
    # Byte for byte what the lock allows.
    lock = (ROOT / "requirements" / "otel.txt").read_text()
    wheels = {purl: entry for purl, entry in listed.items() if purl.startswith("pkg:pypi/")}
    assert len(wheels) == sum(1 for line in lock.splitlines() if line[:1].isalnum())
    for purl, entry in wheels.items():
        assert f"{purl.removeprefix('pkg:pypi/').replace('@', '==')} " in lock
        assert f"sha256:{entry['hashes'][0]['content']}" in lock
    assert any("/libc6@" in purl or "/python@" in purl for purl in listed)
    assert json.loads((ROOT / "build" / "image" / "sbom.cdx.json").read_text()) == bill


def test_traces_need_nothing_that_the_image_lacks(engine: docker.DockerClient, image: str) -> None:
    run(engine, image, "-c", "import mesh.ops.otel", entrypoint="/opt/keymesh/bin/python")
