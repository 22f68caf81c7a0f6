"""Looks for key bytes where none may be: logs, audits, metrics, etcd, what operators see.

A key is looked for by its first 8 bytes, which finds whole keys too: raw, hexadecimal in both
cases, base64 in both alphabets. All keys of a run are looked for at once.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

PREFIX_BYTES = 8
_WORD = 8
_BASE64_CHARS = 10
"""Characters of base64 that 8 bytes decide: 60 of their 64 bits."""


def forms(value: bytes) -> list[bytes]:
    """What the first 8 bytes of a key look like in files."""
    prefix = value[:PREFIX_BYTES]
    return [
        prefix,
        prefix.hex().encode(),
        prefix.hex().upper().encode(),
        base64.b64encode(prefix)[:_BASE64_CHARS],
        base64.urlsafe_b64encode(prefix)[:_BASE64_CHARS],
    ]


class KeySearch:
    """Finds any of many keys in data, in one pass per byte alignment.

    Args:
        values: key bytes; those shorter than 16 bytes are too likely by chance and left out.
    """

    def __init__(self, values: Iterable[bytes]) -> None:
        self._forms: dict[int, set[bytes]] = defaultdict(set)
        for value in values:
            if len(value) >= 2 * PREFIX_BYTES:
                for form in forms(value):
                    self._forms[int.from_bytes(form[:_WORD], "little")].add(form)
        self._heads = np.array(sorted(self._forms), dtype=np.uint64)

    def count(self, data: bytes) -> int:
        """How many places of ``data`` show a key."""
        if not len(self._heads):
            return 0
        return sum(self._count_at(data, shift) for shift in range(min(_WORD, max(0, len(data) - _WORD + 1))))

    def _count_at(self, data: bytes, shift: int) -> int:
        words = np.frombuffer(data, dtype="<u8", offset=shift, count=(len(data) - shift) // _WORD)
        at = np.searchsorted(self._heads, words)
        at[at == len(self._heads)] = 0
        places = np.flatnonzero(self._heads[at] == words)
        return sum(
            any(data.startswith(form, shift + _WORD * int(place)) for form in self._forms[int(words[place])])
            for place in places
        )


def search_files(search: KeySearch, roots: Iterable[Path]) -> dict[str, int]:
    """Places that show a key, by file; folders are walked."""
    found: dict[str, int] = {}
    for root in roots:
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            if path.is_file() and (count := search.count(path.read_bytes())):
                found[str(path)] = count
    return found
