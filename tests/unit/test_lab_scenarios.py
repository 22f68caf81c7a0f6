"""What counts as naming a member: the fields of the event or the alarm, not words in a line."""

from __future__ import annotations

import json
import logging
from io import StringIO
from typing import Any

import pytest

from mesh.core.collector import Verdict
from mesh.lab.scenarios import names
from mesh.node.keymetrics import KeyMetrics
from mesh.node.routewatch import RouteWatch
from mesh.ops.alarms import Alarms
from mesh.ops.logging import JsonFormatter
from mesh.ops.metrics import Metrics

ROUTE = ("kme-a", "hub-1", "relay-2", "kme-z")


@pytest.fixture
def told() -> list[str]:
    """What a node logs and raises of a liar, as the scenarios read it."""
    alarms, text = Alarms(), StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("keymesh.routes")
    logger.addHandler(handler)
    watch = RouteWatch(alarms, KeyMetrics(Metrics(with_process=False)), lambda: 100.0)
    watch.name([ROUTE], Verdict.LIED, source="kme-a", target="kme-z", seen_by="kme-z")
    logger.removeHandler(handler)
    (alarm,) = alarms.open_alarms()
    return [text.getvalue(), json.dumps({"alarm_id": alarm.alarm_id, "message": alarm.message})]


def test_the_event_and_the_alarm_name_each_node_between_the_ends(told: list[str]) -> None:
    for text in told:
        for member in ("hub-1", "relay-2"):
            assert names(text, member, Verdict.LIED)
            assert not names(text, member, Verdict.SUSPECTED)
            assert not names(text, member, Verdict.SILENT)
        for other in ("kme-a", "kme-z", "hub", "hub-2", "1-relay"):
            assert not names(text, other, Verdict.LIED)


@pytest.mark.parametrize(
    "facts",
    [
        {"logger": "keymesh.appends", "event": "hub-1 is missing and silent", "source": "hub-1"},
        {"logger": "keymesh.relay", "via": "hub-1", "verdict": "silent"},
        {"alarm_id": "link/hub-1/silent", "message": "silent: hub-1"},
        {},
    ],
)
def test_other_lines_name_nobody(facts: dict[str, Any]) -> None:
    text = json.dumps(facts)
    assert not names(text, "hub-1", Verdict.SILENT)
    assert not names(text[:-1], "hub-1", Verdict.SILENT)
