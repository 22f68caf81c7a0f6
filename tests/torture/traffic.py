"""Checked traffic: several SAEs asking at once, every answer judged by the history.

Each worker has a connection per SAE and a random generator of its own, so that a seed decides
what is asked (not when it is answered). What is asked includes what must be refused: a second
fetch, a stranger's fetch, a forged key_ID.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from tests.torture.client import Answer, CutError, NotSentError, Sae
from tests.torture.history import Fate, Fetchable, History

SIZES_BITS = (None, None, None, 128, 192, 512, 1024, 4096)
NUMBERS = (1, 1, 1, 2, 4, 16)
MAX_OPEN = 400
"""So many keys wait to be fetched at most; beyond that, workers fetch."""
DEADLINE_S = 10.0
"""What cannot be met answers within this (docs: defaults of the 014 API)."""
_GRACE_S = 5.0
_AT_ONCE = 0.6
_MAX_FORGED = 400
"""A node refuses a pair after 1 000 wrong tags a day, so a long run forges no more than this."""


class Caller:
    """All SAEs of a lab, as one thread uses them.

    Args:
        lab: the content of ``lab.json``.
        history: judges what comes back.
        rng: decides what is asked.
    """

    def __init__(self, lab: Mapping[str, Any], history: History, rng: random.Random) -> None:
        self._history = history
        self._rng = rng
        self._saes = {entry["id"]: Sae(lab, entry["id"]) for entry in lab["saes"]}
        self._pairs = list(itertools.permutations(self._saes, 2))

    def close(self) -> None:
        """Close all connections."""
        for sae in self._saes.values():
            sae.close()

    def step(self) -> bool:
        """Ask for one thing; whether it was answered with 200."""
        dice = self._rng.random()
        if dice < 0.5 and self._history.open_count < MAX_OPEN:
            return self.get(*self._rng.choice(self._pairs))
        if dice < 0.9:
            return self.fetch_some()
        if dice < 0.95:
            self._fetch_again()
        elif self._history.counts["forged"] < _MAX_FORGED:
            self._fetch_as_stranger()
        return True

    # -- what must work ---------------------------------------------------------------------

    def get(self, master: str, slave: str, *, fetches: bool | None = None) -> bool:
        """``enc_keys``, and often ``dec_keys`` at once."""
        number = self._rng.choice(NUMBERS)
        size_bits = self._rng.choice(SIZES_BITS)
        others = [sae for sae in self._saes if sae not in (master, slave)]
        more = self._rng.sample(others, self._rng.choice((1, 2))) if self._rng.random() < 0.1 else []
        answer = self._ask(
            "enc_keys",
            lambda: self._saes[master].enc_keys(slave, number=number, size_bits=size_bits, more=more),
        )
        if answer is None or answer.status != 200:
            if answer is not None and answer.status != 503:
                self._history.wrong(f"enc_keys {master} to {slave} answered {answer.status} {answer.reason}")
            return False
        keys = answer.keys
        if len(keys) != number or any(8 * len(key.value) != (size_bits or 256) for key in keys):
            self._history.wrong(f"enc_keys {master} to {slave} gave other keys than asked for")
        self._history.acknowledged(master, [slave, *more], keys)
        if self._rng.random() < _AT_ONCE if fetches is None else fetches:
            return self._fetch(self._history.take_just(master, slave, keys))
        return True

    def fetch_some(self) -> bool:
        """``dec_keys`` for keys that wait."""
        batch = self._history.take_open(self._rng, self._rng.choice((1, 2, 8)))
        return batch is None or self._fetch(batch)

    def fetch_all(self, deadline_s: float) -> bool:
        """``dec_keys`` until nothing waits; whether that was reached in time."""
        while (batch := self._history.take_open(None, 32)) is not None:
            self._fetch(batch)
            if time.monotonic() > deadline_s:
                return False
        return True

    def _fetch(self, batch: Fetchable) -> bool:
        if not batch.keys:
            return True
        try:
            answer = self._dec(batch)
            if answer is not None and answer.status in (400, 401) and len(batch.keys) > 1:
                # Nothing was redeemed; one by one shows which key it is.
                singles = [Fetchable(batch.master, batch.slave, (key,)) for key in batch.keys]
                return sum(self._fetch(single) for single in singles) == len(singles)
        finally:
            self._history.put_back(batch)
        if answer is None or answer.status == 503:
            return False
        if answer.status == 200:
            self._history.fetched(batch, answer.keys)
            return True
        self._history.refused(batch, answer.status)
        if answer.status not in (400, 401):
            self._history.wrong(f"dec_keys at {batch.slave} answered {answer.status}")
        return False

    def _dec(self, batch: Fetchable) -> Answer | None:
        sae = self._saes[batch.slave]
        ids = [key.key_id for key in batch.keys]
        answer = self._ask(
            "dec_keys", lambda: sae.dec_keys(batch.master, ids), cut=lambda: self._history.cut(batch)
        )
        if answer is not None and answer.status == 503 and answer.outcome != "none":
            # The node may have been killed between its redeem and its answer to the gateway.
            self._history.cut(batch)
        return answer

    def _ask(
        self, what: str, call: Callable[[], Answer], *, cut: Callable[[], None] | None = None
    ) -> Answer | None:
        """One request; None if no answer came."""
        try:
            answer = call()
        except NotSentError:
            self._history.asked(f"{what} not sent")
            return None
        except CutError:
            self._history.asked(f"{what} cut")
            if cut is not None:
                cut()
            return None
        except ValueError as error:
            self._history.wrong(f"{what} answered with no JSON: {error}")
            return None
        self._history.asked(
            f"{what} {answer.status}{f' {answer.reason}' if answer.reason else ''}", answer.took_s
        )
        if answer.status == 503 and not (answer.reason and "retry-after" in answer.headers):
            self._history.wrong(f"{what} answered 503 without a reason or Retry-After")
        if answer.status == 503 and answer.outcome not in ("none", "unknown"):
            self._history.wrong(f"{what} answered 503 without an outcome")
        if answer.took_s > DEADLINE_S + _GRACE_S:
            self._history.asked("late", answer.took_s)
        return answer

    # -- what must be refused ----------------------------------------------------------------

    def _fetch_again(self) -> None:
        chosen = self._history.some(self._rng, Fate.FETCHED)
        if chosen is None:
            return
        key, slave = chosen
        answer = self._ask("second fetch", lambda: self._saes[slave].dec_keys(key.master, [key.key_id]))
        if answer is not None and answer.status == 200:
            self._history.fetched(Fetchable(key.master, slave, (key,)), answer.keys)
        elif answer is not None and answer.status not in (400, 401, 503):
            self._history.wrong(f"a second fetch answered {answer.status}")

    def _fetch_as_stranger(self) -> None:
        chosen = self._history.some(self._rng, Fate.HELD)
        if chosen is None:
            return
        key, slave = chosen
        self._history.counts["forged"] += 1
        if self._rng.random() < 0.5:
            number = uuid.UUID(key.key_id).int ^ (1 << self._rng.randrange(60))
            who, wanted = slave, str(uuid.UUID(int=number))
        else:
            strangers = [sae for sae in self._saes if sae != key.master and sae not in key.fates]
            if not strangers:
                return
            who, wanted = self._rng.choice(strangers), key.key_id
        answer = self._ask("forged fetch", lambda: self._saes[who].dec_keys(key.master, [wanted]))
        if answer is not None and answer.status not in (400, 401, 503):
            self._history.wrong(f"a fetch by a stranger or with a forged key_ID answered {answer.status}")


class Traffic:
    """Workers that ask until the block is left.

    Args:
        lab: the content of ``lab.json``.
        history: judges.
        seed: of the workers' generators.
        workers: how many ask at once.
        pause_s: of a worker after each request, at random up to twice that.
    """

    def __init__(
        self, lab: Mapping[str, Any], history: History, *, seed: int, workers: int = 4, pause_s: float = 0.05
    ) -> None:
        self._history = history
        self._stop = threading.Event()
        self._pause_s = pause_s
        self.errors: list[BaseException] = []
        rngs = [random.Random(f"{seed}/{index}") for index in range(workers)]
        self._threads = [
            threading.Thread(target=self._work, args=(Caller(lab, history, rng), rng), daemon=True)
            for rng in rngs
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60.0)
        if self.errors and error is None:
            raise self.errors[0]

    def _work(self, caller: Caller, rng: random.Random) -> None:
        try:
            while not self._stop.wait(2 * self._pause_s * rng.random()):
                caller.step()
        except BaseException as error:  # noqa: BLE001 - told to whoever runs the traffic
            self.errors.append(error)
        finally:
            caller.close()


def wait_until_healed(lab: Mapping[str, Any], history: History, *, timeout_s: float, seed: int = 0) -> float:
    """Ask for a key over every pair of SAEs, in both directions, until each pair has worked.

    Returns:
        Seconds that took.

    Raises:
        TimeoutError: names the pairs that do not work. Nobody is asked after ``timeout_s``.
    """
    began_s = time.monotonic()
    caller = Caller(lab, history, random.Random(seed))
    waiting = list(itertools.permutations((sae["id"] for sae in lab["saes"]), 2))
    try:
        while waiting:
            failed = []
            for index, pair in enumerate(waiting, 1):
                if not caller.get(*pair, fetches=True):
                    failed.append(pair)
                left = failed + waiting[index:]
                if left and time.monotonic() - began_s > timeout_s:
                    raise TimeoutError(f"after {timeout_s:.0f} s no keys for {left}")
            if failed:
                time.sleep(0.3)
            waiting = failed
        return time.monotonic() - began_s
    finally:
        caller.close()
