"""Sizes as people write them: a number and a unit, in bytes.

Owns the spelling of sizes on command lines ("64MiB"); wire and configuration use plain
bytes.
"""

from __future__ import annotations

import re

from mesh.errors import CallerError

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,6}))?\s*([A-Za-z]{0,3})", re.ASCII)


def parse_size(text: str, *, field: str = "size") -> int:
    """Read ``64MiB``, ``1.5 GB`` or ``4096`` as bytes; fractions of a byte are cut.

    Args:
        text: decimal number and unit (B, KiB, MiB, GiB, TiB, kB, MB, GB, TB; none is bytes).
        field: named in the error.

    Raises:
        CallerError: not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = None if match is None else _UNITS.get(match[3].lower())
    if match is None or unit is None:
        raise CallerError(
            f"{field}: not a size; give a number and a unit, for example 64MiB", facts={field: text[:40]}
        )
    fraction = match[2] or ""
    scale = int("1" + "0" * len(fraction))
    return int(match[1] + fraction) * unit // scale


def format_size(count: float) -> str:
    """A size in bytes with a binary unit and at most one decimal."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
