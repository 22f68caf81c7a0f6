"""Assembles the image's root file system: the interpreter, keymesh, and the libraries both load.

Runs inside the build stage, with the base image's own Python and nothing else. What the result
holds is found, not listed: shared libraries are asked of the dynamic linker, and every file that
came from a distribution's package names that package in the bill of materials. No shell, no
package manager and no tool of the base image goes along.

Every time stamp is SOURCE_DATE_EPOCH, so that the same base image and wheels give the same layer.

    python3 rootfs.py VENV WHEELS TARGET
"""

from __future__ import annotations

import compileall
import hashlib
import importlib.metadata
import json
import os
import platform
import py_compile
import shutil
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

USER_ID = 10001
EPOCH = int(os.environ["SOURCE_DATE_EPOCH"])
# For developing and for other programs' scripts; a server never imports them.
STDLIB_LEFT_OUT = {
    "__pycache__", "dist-packages", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tkinter", "turtledemo", "turtle.py",
}  # fmt: skip
# Interfaces to terminals, naming services and databases, with the libraries they would bring.
EXTENSIONS_LEFT_OUT = ("_crypt", "_curses", "_dbm", "_gdbm", "_sqlite3", "_tkinter", "nis", "readline")
SITE_LEFT_OUT = {"__pycache__", "tests", "f2py", "include", "sqlite_extra_binaries"}
SUFFIXES_LEFT_OUT = {".a", ".c", ".h", ".pxd", ".pyi", ".pyx"}
# Opened by name while running, so no program's list of libraries shows them: thread exit, host names.
OPENED_LATER = ("libgcc_s.so.1", "libnss_dns.so.2", "libnss_files.so.2", "libresolv.so.2")
KEPT_FILES = ("/etc/ld.so.cache", "/etc/os-release", "/etc/ssl/openssl.cnf")
OWN_FOLDERS = ("var/lib/keymesh", "var/log/keymesh", "run/keymesh")


class RootFs:
    """The tree under construction.

    Args:
        target: where it grows.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.sources: set[Path] = set()

    def add(self, source: Path) -> None:
        """Copy a file to where it lies in the base image; symbolic links become what they lead to."""
        place = source.parent.resolve() / source.name
        self.sources.add(source)
        at = self.target / place.relative_to("/")
        if not at.exists():
            at.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, at)

    def add_tree(self, folder: Path, left_out: set[str]) -> None:
        """Copy a folder but for some names and for what only compilers read."""
        for path in sorted(folder.rglob("*")):
            parts = path.relative_to(folder).parts
            is_left_out = (
                left_out & set(parts)
                or path.suffix in SUFFIXES_LEFT_OUT
                or parts[0].startswith("config-")
                or (parts[0] == "lib-dynload" and path.name.startswith(EXTENSIONS_LEFT_OUT))
            )
            if path.is_file() and not is_left_out:
                self.add(path)

    def link(self, path: Path, to: str) -> None:
        """A symbolic link."""
        at = self.target / path.relative_to("/")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.symlink_to(to)

    def write(self, path: str, text: str) -> None:
        """A file of our own."""
        at = self.target / path.lstrip("/")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(text, encoding="utf-8")


def main(venv: Path, wheels: Path, target: Path) -> None:
    """Build everything."""
    root = RootFs(target)
    for name in ("lib", "lib32", "lib64"):
        if (link := Path("/", name)).is_symlink():
            root.link(link, str(link.readlink()))
    site = next((venv / "lib").glob("python3*/site-packages"))
    interpreter = Path(sys.executable).resolve()
    root.add(interpreter)
    root.add_tree(Path(sysconfig.get_path("stdlib")), STDLIB_LEFT_OUT)
    root.add_tree(site, SITE_LEFT_OUT)
    root.add(venv / "pyvenv.cfg")
    root.add(venv / "bin" / "keymesh")
    root.link(venv / "bin" / "python3", str(interpreter))
    root.link(venv / "bin" / "python", "python3")
    for library in sorted(shared_libraries(root.target, interpreter)):
        root.add(library)
    for name in KEPT_FILES:
        if Path(name).exists():
            root.add(Path(name))
    root.write("/etc/passwd", f"keymesh:x:{USER_ID}:{USER_ID}:keymesh:/var/lib/keymesh:/nonexistent\n")
    root.write("/etc/group", f"keymesh:x:{USER_ID}:\n")
    root.write("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
    packages = owners(root.sources)
    for name, fields in packages.items():
        root.write(f"/var/lib/dpkg/status.d/{name}", fields["status"])
        if (copyright_file := Path("/usr/share/doc", name, "copyright")).exists():
            root.write(str(copyright_file), copyright_file.read_text(encoding="utf-8"))
    bill = bill_of_materials(site, wheels, packages)
    root.write("/usr/share/keymesh/sbom.cdx.json", json.dumps(bill, indent=1, sort_keys=True) + "\n")
    compile_all(target)
    finish(target)


def shared_libraries(target: Path, interpreter: Path) -> set[Path]:
    """What the dynamic linker loads for the interpreter and for every extension module."""
    found: set[Path] = set()
    for path in [interpreter, *target.rglob("*.so"), *target.rglob("*.so.*")]:
        done = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            words = line.split()
            place = words[2] if len(words) > 2 and words[1] == "=>" else words[0]
            if place.startswith("/") and not place.startswith(str(target)):
                found.add(Path(place))
            elif "not found" in line:
                sys.exit(f"{path} needs {words[0]}, which the base image lacks")
    later = {library.parent / name for library in found for name in OPENED_LATER}
    return found | {library for library in later if library.exists()}


def owners(sources: Iterable[Path]) -> dict[str, dict[str, str]]:
    """The distribution's packages that own some of the files, by name; none where dpkg is absent."""
    if shutil.which("dpkg-query") is None:
        return {}
    asked = sorted({name for path in sources for name in _spellings(path)})
    done = subprocess.run(["dpkg-query", "--search", *asked], capture_output=True, text=True, check=False)
    names = {line.split(": ")[0].split(",")[0].split(":")[0] for line in done.stdout.splitlines()}
    found = {}
    for name in sorted(names):
        status = subprocess.run(["dpkg-query", "--status", name], capture_output=True, text=True, check=True)
        fields = dict(line.split(": ", 1) for line in status.stdout.splitlines() if ": " in line)
        found[name] = {"status": status.stdout, "version": fields["Version"], "arch": fields["Architecture"]}
    return found


def _spellings(path: Path) -> Iterator[str]:
    """A path with and without /usr in front: packages know their files under the older name."""
    for spelt in (path, path.parent.resolve() / path.name):
        yield str(spelt)
        yield str(spelt).removeprefix("/usr") if spelt.parts[1] == "usr" else f"/usr{spelt}"


def bill_of_materials(site: Path, wheels: Path, packages: dict[str, dict[str, str]]) -> dict[str, Any]:
    """CycloneDX 1.6: Python distributions with their wheels' digests, and distribution packages."""
    digests = {
        _plain(path.name.split("-")[0]): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in wheels.glob("*.whl")
    }
    release = platform.freedesktop_os_release()
    distro = f"{release.get('ID', 'linux')}-{release.get('VERSION_ID', '0')}"
    main_component: dict[str, Any] = {}
    components = []
    for entry in sorted(importlib.metadata.distributions(path=[str(site)]), key=lambda d: _plain(d.name)):
        reference = f"pkg:pypi/{_plain(entry.name)}@{entry.version}"
        component: dict[str, Any] = {
            "type": "library", "bom-ref": reference, "name": entry.name, "version": entry.version,
            "purl": reference,
        }  # fmt: skip
        if digest := digests.get(_plain(entry.name)):
            component["hashes"] = [{"alg": "SHA-256", "content": digest}]
        if "License-Expression" in entry.metadata:
            component["licenses"] = [{"expression": entry.metadata["License-Expression"]}]
        if entry.name == "keymesh":
            main_component = component | {"type": "application"}
        else:
            components.append(component)
    for name, fields in packages.items():
        version = fields["version"].replace("+", "%2B").replace(":", "%3A")
        vendor = release.get("ID", "debian")
        reference = f"pkg:deb/{vendor}/{name}@{version}?arch={fields['arch']}&distro={distro}"
        components.append(
            {"type": "library", "bom-ref": reference, "name": name, "version": fields["version"],
             "purl": reference}
        )  # fmt: skip
    if not any(name.startswith("python3") for name in packages):
        reference = f"pkg:generic/python@{platform.python_version()}"
        components.append(
            {"type": "library", "bom-ref": reference, "name": "python",
             "version": platform.python_version(), "purl": reference}
        )  # fmt: skip
    references = [component["bom-ref"] for component in components]
    content = json.dumps([main_component, components], sort_keys=True)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, content)}",
        "metadata": {
            "timestamp": datetime.fromtimestamp(EPOCH, UTC).isoformat(),
            "component": main_component,
        },
        "components": components,
        "dependencies": [{"ref": main_component["bom-ref"], "dependsOn": references}],
    }


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def compile_all(target: Path) -> None:
    """Byte code by content, not by time: nothing is written while running, and builds repeat."""
    is_done = compileall.compile_dir(
        target,
        maxlevels=64,
        quiet=1,
        stripdir=str(target),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    if not is_done:
        sys.exit("some module does not compile")


def finish(target: Path) -> None:
    """Folders of the user's own, plain modes, one time stamp for all."""
    (target / "etc" / "keymesh").mkdir()
    (target / "tmp").mkdir()
    for name in OWN_FOLDERS:
        (target / name).mkdir(parents=True)
    for path in [target, *target.rglob("*")]:
        if not path.is_symlink():
            is_program = path.is_dir() or os.access(path, os.X_OK)
            path.chmod(0o755 if is_program else 0o644)
    (target / "tmp").chmod(0o1777)
    for name in OWN_FOLDERS:
        (target / name).chmod(0o700)
        os.chown(target / name, USER_ID, USER_ID)
    for path in sorted([target, *target.rglob("*")], reverse=True):
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:]))
