"""Secret: a byte string that does not show itself.

Owns house rule 21-23: no bytes in reprs, no pickling, constant-time comparison,
wiping where Python allows it. It must not derive anything from the bytes, not
even a hash or a prefix. Design: house style "Secrets".

Limits, said where they apply: ``reveal`` and ``take`` make immutable copies that
cannot be wiped, and the interpreter may copy while growing or collecting.
"""

from __future__ import annotations

import hmac
from typing import NoReturn, TypeAlias

#: What every function of the core accepts as bytes.
Buffer: TypeAlias = bytes | bytearray | memoryview


class Secret:
    """Key, pad or share bytes with a repr without bytes.

    Args:
        data: the bytes; copied, so the caller may wipe its own copy.
    """

    __slots__ = ("_data", "_wiped")
    __hash__ = None  # type: ignore[assignment]  # a hash is a fact about the bytes

    def __init__(self, data: Buffer) -> None:
        self._data = bytearray(data)
        self._wiped = False

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return f"Secret({len(self._data)} bytes)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        same = hmac.compare_digest(self._data, other._data)
        return same and not self._wiped and not other._wiped

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret is neither pickled nor copied")

    def view(self) -> memoryview:
        """A read-only window on the bytes; it shows zeros once the secret is wiped.

        Raises:
            ValueError: the secret is wiped.
        """
        self._check()
        return memoryview(self._data).toreadonly()

    def reveal(self) -> bytes:
        """A copy of all bytes, for the one place that needs them.

        Raises:
            ValueError: the secret is wiped.
        """
        self._check()
        return bytes(self._data)

    def take(self, start: int, stop: int) -> bytes:
        """A copy of the bytes from ``start`` up to but not including ``stop``.

        Raises:
            ValueError: the secret is wiped, or the range is not inside it.
        """
        self._check()
        if not 0 <= start <= stop <= len(self._data):
            raise ValueError("range outside the secret")
        return bytes(memoryview(self._data)[start:stop])

    def wipe(self) -> None:
        """Overwrite with zeros, in place; every later read raises. Idempotent."""
        self._data[:] = bytes(len(self._data))
        self._wiped = True

    def _check(self) -> None:
        if self._wiped:
            raise ValueError("the secret is wiped")
