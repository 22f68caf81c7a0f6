"""Alarms: once per condition, bounded, and closed only by whom they wait for."""

from __future__ import annotations

import logging

import pytest

from mesh.errors import CallerError
from mesh.ops.alarms import Alarms, Severity
from mesh.ops.metrics import Metrics


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_raise_counts_and_keeps_the_first_time() -> None:
    clock = Clock()
    alarms = Alarms(now_s=clock)
    alarms.raise_alarm("a", "warning", "it is so", "do this")
    clock.now_s = 200.0
    again = alarms.raise_alarm("a", Severity.WARNING, "it is so", "do this")
    assert (again.count, again.raised_at_s) == (2, 100.0)
    assert [alarm.alarm_id for alarm in alarms.open_alarms()] == ["a"]


def test_clear_closes_but_not_what_waits_for_the_operator() -> None:
    alarms = Alarms()
    alarms.raise_alarm("a", "info", "m", "n")
    alarms.raise_alarm("b", "critical", "m", "n", needs_operator=True)
    # Later news of the same condition does not take the operator's part away.
    alarms.raise_alarm("b", "critical", "m", "n")
    assert alarms.clear("a")
    assert not alarms.clear("b")
    assert not alarms.clear("never raised")
    assert alarms.is_open("b")
    assert alarms.acknowledge("b").alarm_id == "b"
    assert len(alarms) == 0
    with pytest.raises(CallerError, match="alarm_id"):
        alarms.acknowledge("b")


def test_bounded_the_least_severe_gives_way() -> None:
    clock = Clock()
    alarms = Alarms(now_s=clock, limit=3)
    alarms.raise_alarm("critical", "critical", "m", "n")
    alarms.raise_alarm("kept", "info", "m", "n", needs_operator=True)
    alarms.raise_alarm("info", "info", "m", "n")
    alarms.raise_alarm("new", "warning", "m", "n")
    assert {alarm.alarm_id for alarm in alarms.open_alarms()} == {"critical", "kept", "new"}


def test_order_and_gauge() -> None:
    metrics = Metrics(with_process=False)
    alarms = Alarms(gauge=metrics.alarm_gauge)
    alarms.raise_alarm("i", "info", "m", "n")
    alarms.raise_alarm("c", "critical", "m", "n")
    assert [alarm.alarm_id for alarm in alarms.open_alarms()] == ["c", "i"]
    assert b'keymesh_alarms_open{severity="critical"} 1.0' in metrics.render()
    alarms.clear("c")
    assert b'keymesh_alarms_open{severity="critical"} 0.0' in metrics.render()


def test_logged_once_and_again_when_worse(caplog: pytest.LogCaptureFixture) -> None:
    alarms = Alarms()
    with caplog.at_level(logging.INFO, logger="keymesh.alarms"):
        for severity in ("warning", "warning", "critical"):
            alarms.raise_alarm("a", severity, "m", "n")
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.ERROR]


@pytest.mark.parametrize("alarm_id", ["", "x" * 201])
def test_ids_are_bounded(alarm_id: str) -> None:
    with pytest.raises(CallerError, match="alarm_id"):
        Alarms().raise_alarm(alarm_id, "info", "m", "n")
