"""Version 1 says what it said before: shape and bytes against the record."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from tests.contract.wire_v1 import RECORD, Shape, as_json, breaks, examples, messages, shape

RECORDED: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
EXAMPLES: dict[str, Any] = RECORDED.pop("examples")


def test_nothing_breaks_older_ends() -> None:
    assert breaks(RECORDED, shape()) == []


def test_everything_is_recorded() -> None:
    """What is not recorded could change unnoticed: ``make generate`` records it."""
    assert shape() == RECORDED
    names = {name for descriptor in messages().values() for name, _ in examples(descriptor)}
    assert names <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_recorded_messages_read_as_they_did_and_write_the_same_bytes(name: str) -> None:
    entry = EXAMPLES[name]
    wire = bytes.fromhex(entry["wire"])
    message = GetMessageClass(messages()[name.partition(" ")[0]]).FromString(wire)
    assert len(UnknownFieldSet(message)) == 0
    assert as_json(message) == entry["says"]
    assert message.SerializeToString(deterministic=True) == wire


def _remove_field(new: Shape) -> None:
    del new["fields"]["mesh.v1.Hello"]["1"]


def _change_type(new: Shape) -> None:
    new["fields"]["mesh.v1.Hello"]["1"][2] = "mesh.v1.Elsewhere"


def _rename_value(new: Shape) -> None:
    enum = next(iter(new["enums"].values()))
    enum["0"] = "OTHERWISE"


def _repeat(new: Shape) -> None:
    new["fields"]["mesh.v1.Hello"]["1"][1] = "repeated"


def _remove_message(new: Shape) -> None:
    del new["fields"]["mesh.v1.Hello"]


def _stream(new: Shape) -> None:
    name = next(name for name, ends in new["methods"].items() if not ends[1].startswith("stream "))
    new["methods"][name][1] = f"stream {new['methods'][name][1]}"


@pytest.mark.parametrize(
    "change", [_remove_field, _change_type, _rename_value, _repeat, _remove_message, _stream]
)
def test_breaking_changes_are_refused(change: Callable[[Shape], None]) -> None:
    new = copy.deepcopy(shape())
    change(new)
    assert len(breaks(shape(), new)) == 1


def test_additions_are_none() -> None:
    new = copy.deepcopy(shape())
    new["fields"]["mesh.v1.Later"] = {"1": ["name", "single", "9"]}
    new["fields"]["mesh.v1.Hello"]["1000"] = ["later", "single", "9"]
    new["methods"]["/mesh.v1.Later/Ask"] = ["mesh.v1.Later", "mesh.v1.Later"]
    assert breaks(shape(), new) == []
