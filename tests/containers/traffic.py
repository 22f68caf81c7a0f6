"""Traffic that insists: every acknowledged key is fetched at the other end until an answer comes."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mesh.lab.encryptor import Encryptor, FetchedKey, RefusedError
from mesh.lab.ready import encryptor

_GIVE_UP_S = 60.0
_PAUSE_S = 0.1


@dataclass(slots=True)
class Tally:
    """What became of the keys that were acknowledged, and why others were refused."""

    acknowledged: int = 0
    delivered: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)


class Traffic:
    """Threads that draw and fetch keys, one for each ordered pair of SAEs, until left.

    Args:
        lab: the content of ``lab.json``.
        pairs: master and slave.
    """

    def __init__(self, lab: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
        self._lab = lab
        self._stop = threading.Event()
        self.tallies = {pair: Tally() for pair in pairs}
        self._threads = [
            threading.Thread(target=self._run, args=(*pair, tally)) for pair, tally in self.tallies.items()
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, master: str, slave: str, tally: Tally) -> None:
        with encryptor(self._lab, master) as source, encryptor(self._lab, slave) as target:
            while not self._stop.is_set():
                try:
                    keys = source.enc_keys(slave, number=2)
                except (RefusedError, OSError, http.client.HTTPException) as error:
                    # Nothing was acknowledged, so nothing is owed.
                    tally.refusals[_reason(error)] += 1
                    self._stop.wait(_PAUSE_S)
                    continue
                tally.acknowledged += len(keys)
                for key in keys:
                    if problem := _fetch(target, master, key):
                        tally.failed.append(problem)
                    else:
                        tally.delivered += 1
                self._stop.wait(0.02)


def _reason(error: Exception) -> str:
    """The reason that an answer names, or its status; of what was no answer, its kind."""
    if not isinstance(error, RefusedError):
        return type(error).__name__
    found = re.search(rb'"reason":\s*"([^"]+)"', error.body)
    return found[1].decode() if found else str(error.status)


def _fetch(target: Encryptor, master: str, key: FetchedKey) -> str:
    """Fetch until it is answered; what went wrong, or ""."""
    before: list[str] = []
    give_up_s = time.monotonic() + _GIVE_UP_S
    while time.monotonic() < give_up_s:
        try:
            (fetched,) = target.dec_keys(master, [key.key_id])
        except RefusedError as error:
            if error.status != 503:
                return f"{error} after {before}"
            before.append(str(error))
        except (OSError, http.client.HTTPException) as error:
            before.append(repr(error))
        else:
            return "" if fetched.value == key.value else "the two ends differ"
        time.sleep(_PAUSE_S)
    return f"no answer: {before[-3:]}"
