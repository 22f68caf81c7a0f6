"""Checked traffic through a running lab: every key is fetched at both ends and compared."""

from __future__ import annotations

import http.client
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mesh.errors import ConfigError
from mesh.lab.encryptor import Encryptor, FetchedKey, RefusedError
from mesh.lab.ready import encryptor

_PAUSE_S = 0.2


@dataclass(slots=True)
class TrafficResult:
    """What happened.

    Attributes:
        keys_checked: keys that both ends hold.
        mismatches: of those, how many differ.
        lost: acknowledged keys whose first fetch was refused.
        failures: calls that failed, by what they said.
    """

    keys_checked: int = 0
    mismatches: int = 0
    lost: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def is_clean(self) -> bool:
        """No key differed and none was lost."""
        return self.mismatches == 0 and self.lost == 0

    def __str__(self) -> str:
        failures = ", ".join(f"{count} x {what}" for what, count in self.failures.most_common(5))
        return (
            f"{self.keys_checked} keys checked, {self.mismatches} differ, {self.lost} lost"
            f"{f'; calls that failed: {failures}' if failures else ''}"
        )


def run_traffic(
    lab: dict[str, Any],
    duration_s: float,
    *,
    number: int = 4,
    now_s: Callable[[], float] = time.monotonic,
) -> TrafficResult:
    """Ask for keys between the SAEs of all pairs of nodes in turn, for ``duration_s``.

    A call that fails (a process was killed, a reserve is empty) is counted and the next
    pair is tried; only a key that differs or is lost is wrong.

    Raises:
        ConfigError: the lab has no two SAEs at different nodes.
    """
    pairs = [(a["id"], b["id"]) for a, b in itertools.permutations(lab["saes"], 2) if a["node"] != b["node"]]
    if not pairs:
        raise ConfigError("the lab has no two SAEs at different nodes")
    saes = {sae["id"]: encryptor(lab, sae["id"]) for sae in lab["saes"]}
    result = TrafficResult()
    end_s = now_s() + duration_s
    try:
        for master, slave in itertools.cycle(pairs):
            if now_s() >= end_s:
                return result
            keys = _get(saes[master], slave, number, result)
            if keys:
                _fetch(saes[slave], master, keys, result)
    finally:
        for sae in saes.values():
            sae.close()
    return result


def _get(sae: Encryptor, slave: str, number: int, result: TrafficResult) -> list[FetchedKey]:
    try:
        return sae.enc_keys(slave, number=number)
    except (RefusedError, OSError, http.client.HTTPException) as error:
        result.failures[f"enc_keys: {_words(error)}"] += 1
        time.sleep(_PAUSE_S)
        return []


def _fetch(sae: Encryptor, master: str, keys: list[FetchedKey], result: TrafficResult) -> None:
    try:
        fetched = {key.key_id: key.value for key in sae.dec_keys(master, [key.key_id for key in keys])}
    except RefusedError as error:
        result.failures[f"dec_keys: {_words(error)}"] += 1
        if error.status in (400, 401):
            result.lost += len(keys)
        return
    except (OSError, http.client.HTTPException) as error:
        # The answer was cut: the keys may have been handed out, so they count as spent.
        result.failures[f"dec_keys: {_words(error)}"] += 1
        time.sleep(_PAUSE_S)
        return
    result.keys_checked += len(keys)
    result.mismatches += sum(fetched.get(key.key_id) != key.value for key in keys)


def _words(error: Exception) -> str:
    return f"HTTP {error.status}" if isinstance(error, RefusedError) else type(error).__name__
