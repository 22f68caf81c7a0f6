"""The torture run's own promises: it ends in time although the network under test does not heal."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.torture import traffic
from tests.torture.history import History


class SlowCaller:
    """Each request takes a while and fails."""

    asked = 0

    def __init__(self, *_: object) -> None:
        SlowCaller.asked = 0

    def get(self, *_: object, **__: object) -> bool:
        time.sleep(0.05)
        SlowCaller.asked += 1
        return False

    def close(self) -> None:
        return


def test_no_pair_is_asked_after_the_time_for_healing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "Caller", SlowCaller)
    lab: dict[str, Any] = {"saes": [{"id": f"sae-{number}"} for number in range(20)]}
    with pytest.raises(TimeoutError, match="sae-18"):
        traffic.wait_until_healed(lab, History({}), timeout_s=0.12)
    assert SlowCaller.asked <= 3
