"""YAML from a file to plain values, whatever the file holds.

Owns one thing: PyYAML ends in a dozen kinds of exception besides its own (a month 13, a number of
5 000 digits, ``!!int ''``), and an operator gets the same words for all of them. Must not know
what the values mean. Objects are never built: loaders are safe ones.
"""

from __future__ import annotations

from typing import Any

import yaml

from mesh.errors import ConfigError

#: Deeper than anything that is read here. libyaml's composer recurses, and far deeper it overruns the stack.
MAX_DEPTH = 100
#: What PyYAML's scanner, parser and constructors were seen to raise on hostile input.
_FAULTS = (
    yaml.YAMLError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    TypeError,
    RecursionError,
)


def decode_yaml(data: bytes | str, *, loader: type[Any] = yaml.CSafeLoader) -> Any:
    """The value that a YAML text stands for.

    Args:
        data: the text.
        loader: a subclass of one of PyYAML's safe loaders.

    Raises:
        ConfigError: it is not valid YAML, or nested too deeply; says where as far as PyYAML does.
    """
    try:
        _check_depth(data)
        return yaml.load(data, Loader=loader)  # noqa: S506 - safe loaders only
    except _FAULTS as error:
        mark = getattr(error, "problem_mark", None)
        facts = {} if mark is None else {"line": mark.line + 1}
        problem = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
        raise ConfigError(f"not valid YAML: {problem or type(error).__name__}", facts=facts) from error


def _check_depth(data: bytes | str) -> None:
    depth = 0
    for event in yaml.parse(data, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise yaml.YAMLError(f"values nested deeper than {MAX_DEPTH}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
