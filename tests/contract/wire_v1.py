"""What version 1 of the protocol buffers has said once: its shape, and messages as bytes.

``wire_v1.json`` holds the record. It only grows: fields, values and methods may be added, nothing
may go, move or change its type, since nodes of different releases talk to each other during every
upgrade. ``make generate`` records what is new, and refuses when something breaks.

    python -m tests.contract.wire_v1
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

RECORD = Path(__file__).with_suffix(".json")
_MODULES = ("admin_pb2", "border_pb2", "keys_pb2", "link_pb2", "peer_pb2")
_DEPTH = 3
_WHOLE = {
    FieldDescriptor.TYPE_UINT32: 1 << 31,
    FieldDescriptor.TYPE_UINT64: 1 << 63,
    FieldDescriptor.TYPE_INT32: -(1 << 31),
    FieldDescriptor.TYPE_INT64: -(1 << 63),
    FieldDescriptor.TYPE_SINT32: -(1 << 31),
    FieldDescriptor.TYPE_SINT64: -(1 << 63),
    FieldDescriptor.TYPE_FIXED32: 1 << 31,
    FieldDescriptor.TYPE_FIXED64: 1 << 63,
}
"""The far end of each range; the field's number is added."""

Shape = dict[str, dict[str, Any]]


def files() -> list[FileDescriptor]:
    """The descriptors of all files of version 1."""
    return [import_module(f"mesh.v1.{name}").DESCRIPTOR for name in _MODULES]


def messages() -> dict[str, Descriptor]:
    """All messages by full name, nested ones included."""
    found: dict[str, Descriptor] = {}

    def walk(message: Descriptor) -> None:
        found[message.full_name] = message
        for nested in message.nested_types:
            walk(nested)

    for file in files():
        for message in file.message_types_by_name.values():
            walk(message)
    return found


def shape() -> Shape:
    """Every field, enum value and method, as far as it decides over the wire."""
    enums: dict[str, EnumDescriptor] = {}
    for file in files():
        enums |= {enum.full_name: enum for enum in file.enum_types_by_name.values()}
    for message in messages().values():
        enums |= {enum.full_name: enum for enum in message.enum_types}
    return {
        "fields": {
            name: {str(field.number): _field(field) for field in message.fields}
            for name, message in messages().items()
        },
        "enums": {
            name: {str(value.number): value.name for value in enum.values} for name, enum in enums.items()
        },
        "methods": {
            f"/{service.full_name}/{method.name}": [
                "stream " * method.client_streaming + method.input_type.full_name,
                "stream " * method.server_streaming + method.output_type.full_name,
            ]
            for file in files()
            for service in file.services_by_name.values()
            for method in service.methods
        },
    }


def _field(field: FieldDescriptor) -> list[str]:
    kind = field.message_type or field.enum_type
    oneof = field.containing_oneof
    words = [
        field.name,
        "repeated" if field.is_repeated else "single",
        kind.full_name if kind else str(field.type),
    ]
    return [*words, oneof.name] if oneof else words


def breaks(old: Shape, new: Shape) -> list[str]:
    """What ``new`` does to ends that speak ``old``; empty if it only adds."""
    problems = []
    for section, entries in old.items():
        for name, entry in entries.items():
            there = new[section].get(name)
            if there is None:
                problems.append(f"{name} is gone")
            elif isinstance(entry, dict):
                problems += [
                    f"{name}, number {number}: {said} became {there.get(number, 'nothing')}"
                    for number, said in entry.items()
                    if there.get(number) != said
                ]
            elif there != entry:
                problems.append(f"{name}: {entry} became {there}")
    return problems


def examples(descriptor: Descriptor) -> Iterator[tuple[str, Message]]:
    """A message with every field set; one more for each further member of a oneof."""
    members = [field for oneof in descriptor.oneofs for field in oneof.fields if len(oneof.fields) > 1]
    for name in [field.name for field in members] or [""]:
        message = GetMessageClass(descriptor)()
        _fill(message, _DEPTH)
        if name:
            _set(message, descriptor.fields_by_name[name], _DEPTH)
        yield f"{descriptor.full_name} {name}".rstrip(), message


def _fill(message: Message, depth: int) -> None:
    for name in message.DESCRIPTOR.fields_by_name:
        _set(message, cast("FieldDescriptor", message.DESCRIPTOR.fields_by_name[name]), depth)


def _set(message: Message, field: FieldDescriptor, depth: int) -> None:
    kind, there = field.message_type, getattr(message, field.name)
    if kind is None:
        value = _value(field)
        if field.is_repeated:
            there.extend([value, value])
        else:
            setattr(message, field.name, value)
    elif kind.GetOptions().map_entry:
        key, value = _value(kind.fields_by_name["key"]), kind.fields_by_name["value"]
        if value.message_type is None:
            there[key] = _value(value)
        else:
            _fill(there[key], depth)
    elif depth:
        if not field.is_repeated:
            there.SetInParent()
        for target in [there.add(), there.add()] if field.is_repeated else [there]:
            _fill(target, depth - 1)


def _value(field: FieldDescriptor) -> Any:
    if field.enum_type is not None:
        return max(value.number for value in field.enum_type.values)
    if field.type in _WHOLE:
        return _WHOLE[field.type] + field.number
    if field.type == FieldDescriptor.TYPE_BOOL:
        return True
    if field.type == FieldDescriptor.TYPE_STRING:
        return f"{field.name} ñ"
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes([0, field.number % 256, 255])
    return field.number + 0.5


def as_json(message: Message) -> dict[str, Any]:
    """All that a message says, by field name."""
    said: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return said


def main() -> int:
    """Record what is new; refuse what breaks."""
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    now = shape()
    if problems := breaks({section: record.get(section, {}) for section in now}, now):
        sys.stderr.write("version 1 would break:\n  " + "\n  ".join(problems) + "\n")
        return 1
    said = {
        name: {"wire": message.SerializeToString(deterministic=True).hex(), "says": as_json(message)}
        for descriptor in messages().values()
        for name, message in examples(descriptor)
    }
    # What was recorded stays as it is: older ends go on sending it.
    record = now | {"examples": said | record.get("examples", {})}
    sections = [f"{json.dumps(name)}: {{\n{_lines(entries)}\n}}" for name, entries in record.items()]
    RECORD.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")
    return 0


def _lines(entries: dict[str, Any]) -> str:
    return ",\n".join(
        f"{json.dumps(name)}: {json.dumps(entries[name], sort_keys=True, ensure_ascii=False)}"
        for name in sorted(entries)
    )


if __name__ == "__main__":
    sys.exit(main())
