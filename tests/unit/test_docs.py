"""Documentation that names code is checked against the code: names, paths, fields, metrics, alarms."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest

from gateway.config import GatewayConfig
from mesh.cli import build_parser
from mesh.node.config import NodeConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("**/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"])
SOURCES = sorted([*(ROOT / "mesh").rglob("*.py"), *(ROOT / "gateway").rglob("*.py")])
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
_DOTTED = re.compile(r"`((?:mesh|gateway)(?:\.[A-Za-z_][A-Za-z0-9_]*)+)`")
_PATH = re.compile(
    r"`((?:mesh|gateway|tests|docs|protos|benchmarks|examples|requirements)/[\w./-]*)(?:::(\w+))?`"
)
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
_ANCHOR = re.compile(r"\]\(([^)#:]*)#([^)]+)\)")
_PROTO_PACKAGES = ("mesh.v1",)


@EACH_PAGE
def test_dotted_names_can_be_imported(page: Path) -> None:
    for name in _DOTTED.findall(page.read_text(encoding="utf-8")):
        if not name.startswith(_PROTO_PACKAGES):
            assert _resolves(name), f"{page.name} names {name}"


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            if not hasattr(found, attribute) and attribute not in getattr(found, "__slots__", ()):
                return False
            found = getattr(found, attribute)
        return True
    return False


@EACH_PAGE
def test_paths_and_tests_exist(page: Path) -> None:
    for path, test in _PATH.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{page.name}: {path}::{test}"


@EACH_PAGE
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@EACH_PAGE
def test_anchors_exist(page: Path) -> None:
    for target, anchor in _ANCHOR.findall(page.read_text(encoding="utf-8")):
        other = page.parent / target if target else page
        assert anchor in _anchors(other), f"{page.name} links to {target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# -- commands --------------------------------------------------------------------------------------


@EACH_PAGE
def test_commands_and_their_options_exist(page: Path) -> None:
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    fenced = "\n".join(re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    code = fenced + "\n" + "\n".join(re.findall(r"^ {4}(.*)$", text, re.MULTILINE))
    for line in re.findall(r"^(?:\.venv/bin/)?keymesh (\w.*)$", code, re.MULTILINE):
        words = shlex.split(line, comments=True)
        parser = build_parser(words[0])
        for word in words:
            choices = _subcommands(parser)
            if word in choices:
                parser = choices[word]
            elif word.startswith("--"):
                assert word in parser._option_string_actions, f"{page.name}: keymesh {line}: {word}"
        assert parser.prog != "keymesh", f"{page.name}: keymesh {line}"


def test_the_readme_lists_every_command() -> None:
    rows = re.findall(r"^\| `keymesh (\S+)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == _subcommands(build_parser()).keys()
    for name, text in rows:
        inner = _subcommands(_subcommands(build_parser(name))[name])
        named = set(re.findall(r"`(\w+)`", text))
        assert named <= inner.keys(), f"{name}: {named - inner.keys()}"
        assert named in (inner.keys(), set()) or name in ("pki", "links"), f"{name}: {inner.keys() - named}"


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


# -- operations.md -----------------------------------------------------------------------------


def _section(title: str) -> str:
    """The text of one second-level section of operations.md."""
    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"operations.md has no section {title!r}"
    return found[1]


def _rows(section: str) -> dict[str, str]:
    """First cell (in backticks) to second cell of every table row."""
    return {
        cells[1].strip().strip("`"): cells[2].strip().strip("`")
        for line in section.splitlines()
        if line.startswith("| `") and len(cells := re.split(r"(?<!\\)\|", line)) > 3
    }


def _fields(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, str]]:
    hints = get_type_hints(kind, include_extras=False)
    for field in msgspec.structs.fields(kind):
        name = f"{prefix}{field.name}"
        inner, is_list = _struct(hints[field.name])
        default = _default(field)
        if inner is None:
            yield name, default
            continue
        if default == "required" or is_list:
            yield name, default
        yield from _fields(inner, f"{name}[]." if is_list else f"{name}.")


def _struct(hint: object) -> tuple[type[msgspec.Struct] | None, bool]:
    """The structure inside a type, and whether it is an element of a list."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint, False
    for argument in get_args(hint):
        inner, _ = _struct(argument)
        if inner is not None:
            return inner, getattr(hint, "__origin__", None) is list or _struct(argument)[1]
    return None, False


def _default(field: msgspec.structs.FieldInfo) -> str:
    value = field.default
    if value is msgspec.NODEFAULT and field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
    if value is msgspec.NODEFAULT:
        return "required"
    if isinstance(value, msgspec.Struct):
        return "section"
    return msgspec.json.encode(value).decode().strip('"')


@pytest.mark.parametrize(
    ("title", "kind"),
    [("The node's configuration", NodeConfig), ("The gateway's configuration", GatewayConfig)],
)
def test_every_field_and_its_default_is_documented(title: str, kind: type[msgspec.Struct]) -> None:
    assert _rows(_section(title)) == {
        name: default for name, default in _fields(kind) if default != "section"
    }


def test_every_metric_is_documented() -> None:
    kinds = {"counter": "keymesh_{}_total", "gauge": "keymesh_{}", "histogram": "keymesh_{}"}
    registered = set()
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr in kinds
                and call.args
                and isinstance(call.args[0], ast.Constant)
            ):
                registered.add(kinds[call.func.attr].format(call.args[0].value))
    assert set(_rows(_section("Metrics"))) == registered


def test_every_alarm_has_a_section() -> None:
    raised = {pattern for path in SOURCES for pattern in _alarm_ids(path)}
    documented = {
        re.sub(r"<[^>]+>", "*", heading)
        for heading in re.findall(r"^### `([^`]+)`$", _section("Alarms"), re.MULTILINE)
    }
    assert [one for one in raised if not any(fnmatchcase(heading, one) for heading in documented)] == []
    assert [one for one in documented if not any(fnmatchcase(one, pattern) for pattern in raised)] == []


def _alarm_ids(path: Path) -> Iterator[str]:
    """First arguments of ``raise_alarm`` in a file, what is filled in as ``*``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {
        target.id: statement.value
        for statement in ast.walk(tree)
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    # A function of the same file whose one return is the id.
    for function in ast.walk(tree):
        if (
            isinstance(function, ast.FunctionDef)
            and isinstance(last := function.body[-1], ast.Return)
            and last.value
        ):
            named[function.name] = last.value
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "raise_alarm" and call.args):
            continue
        given = call.args[0]
        if isinstance(given, ast.Subscript):
            given = given.value
        if isinstance(given, ast.Name):
            given = named[given.id]
        elif isinstance(given, ast.Call) and isinstance(given.func, ast.Name):
            given = named[given.func.id]
        if isinstance(given, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in given.values)
        elif isinstance(given, ast.Constant):
            yield str(given.value)
        else:
            pytest.fail(f"{path}:{call.lineno}: an alarm id that cannot be read from the source")
