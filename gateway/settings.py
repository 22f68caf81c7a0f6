"""Reading the operator's YAML files into typed settings.

Every refusal names the file, the member and the problem. Unknown members are refused: a
misspelt limit must not silently fall back to its default.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from mesh.client import ConfigError
from mesh.ops.yamltext import decode_yaml

MAX_FILE_BYTES = 16 * 1024 * 1024

T = TypeVar("T", bound=msgspec.Struct)


def read_settings(path: Path, kind: type[T]) -> T:
    """Read one YAML file as ``kind``.

    Raises:
        ConfigError: unreadable, too large, no YAML, or not of this shape; names file and member.
    """
    facts: dict[str, object] = {"file": str(path)}
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the file: {error.strerror}", facts=facts) from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"the file is larger than {MAX_FILE_BYTES} bytes", facts=facts)
    try:
        return msgspec.convert(decode_yaml(data), kind)
    except ConfigError as error:
        raise ConfigError(f"the file is {error.message}", facts={**facts, **error.facts}) from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"the file does not fit: {_lower_first(str(error))}", facts=facts) from error


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
