"""Who wants to hear of changes: plain callbacks in the event loop."""

from __future__ import annotations

import logging
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Listeners:
    """A list of callbacks; one that fails is logged and does not keep the others from hearing."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []

    def add(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Adds a callback; returns a function that removes it (once)."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def tell(self) -> None:
        """Calls them all."""
        for callback in tuple(self._callbacks):
            try:
                callback()
            except Exception:  # noqa: BLE001 - a listener's fault must not stop the teller
                _log.exception("directory listener failed")
