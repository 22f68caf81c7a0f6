"""Alarms: conditions that an operator must know of, by a stable id.

Owns the list of open alarms, its bound, and the three ways they show: the log, a
metric and the admin service. Must not decide anything; whoever raises an alarm
also stops what must stop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from mesh.errors import CallerError

_LOG = logging.getLogger("keymesh.alarms")


class Severity(StrEnum):
    """How much an alarm matters."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


_LEVEL = {Severity.INFO: logging.INFO, Severity.WARNING: logging.WARNING, Severity.CRITICAL: logging.ERROR}
_RANK = {Severity.INFO: 0, Severity.WARNING: 1, Severity.CRITICAL: 2}


@dataclass(frozen=True, slots=True)
class Alarm:
    """One open alarm.

    Attributes:
        alarm_id: stable id of the condition, for example ``link/kme-b/mismatch``.
        severity: how much it matters.
        message: what is so, for a person; never a secret.
        next_step: what the operator should do.
        needs_operator: stays until acknowledged, even when the condition is over.
        raised_at_s: seconds since the epoch of the first time.
        count: how often it was raised since.
    """

    alarm_id: str
    severity: Severity
    message: str
    next_step: str
    needs_operator: bool
    raised_at_s: float
    count: int


class AlarmGauge(Protocol):
    """Where the count of open alarms per severity shows, see ``mesh.ops.metrics``."""

    def __call__(self, severity: str, count: int) -> None:
        """Publishes how many alarms of a severity are open."""
        ...


class Alarms:
    """The open alarms of a process; may be used from any thread.

    Args:
        now_s: seconds since the epoch.
        limit: most alarms kept; beyond it the oldest of the least severe gives way.
        gauge: told about counts per severity whenever they change.
    """

    def __init__(
        self,
        *,
        now_s: Callable[[], float] = time.time,
        limit: int = 1000,
        gauge: AlarmGauge | None = None,
    ) -> None:
        self._now_s = now_s
        self._limit = limit
        self._gauge = gauge
        self._open: dict[str, Alarm] = {}
        self._lock = threading.Lock()

    def raise_alarm(
        self,
        alarm_id: str,
        severity: Severity | str,
        message: str,
        next_step: str,
        needs_operator: bool = False,
    ) -> Alarm:
        """Opens an alarm, or counts it again; logs the first time and when it gets worse.

        Args:
            alarm_id: stable id of the condition, 1 to 200 characters.
            severity: a Severity or its value.
            message: what is so; lower case, facts only, never a secret.
            next_step: what the operator should do.
            needs_operator: only ``acknowledge`` closes it, not ``clear``.
        """
        if not 1 <= len(alarm_id) <= 200:
            raise CallerError("alarm_id must have 1 to 200 characters", facts={"length": len(alarm_id)})
        severity = Severity(severity)
        with self._lock:
            before = self._open.get(alarm_id)
            alarm = Alarm(
                alarm_id=alarm_id,
                severity=severity,
                message=message,
                next_step=next_step,
                needs_operator=needs_operator or (before is not None and before.needs_operator),
                raised_at_s=before.raised_at_s if before else self._now_s(),
                count=before.count + 1 if before else 1,
            )
            if before is None and len(self._open) >= self._limit:
                self._make_room()
            self._open[alarm_id] = alarm
            self._publish()
        is_news = before is None or _RANK[severity] > _RANK[before.severity] or message != before.message
        _LOG.log(
            _LEVEL[severity] if is_news else logging.DEBUG,
            "alarm raised",
            extra={
                "alarm_id": alarm_id,
                "severity": severity.value,
                "alarm_message": message,
                "next_step": next_step,
                "count": alarm.count,
            },
        )
        return alarm

    def clear(self, alarm_id: str) -> bool:
        """Closes an alarm whose condition is over; one that needs the operator stays.

        Returns:
            Whether an alarm was closed.
        """
        with self._lock:
            alarm = self._open.get(alarm_id)
            if alarm is None or alarm.needs_operator:
                return False
            del self._open[alarm_id]
            self._publish()
        _LOG.info("alarm cleared", extra={"alarm_id": alarm_id})
        return True

    def acknowledge(self, alarm_id: str) -> Alarm:
        """Closes an alarm at the operator's word.

        Raises:
            CallerError: no such alarm is open.
        """
        with self._lock:
            alarm = self._open.pop(alarm_id, None)
            if alarm is None:
                raise CallerError("alarm_id names no open alarm", facts={"alarm_id": alarm_id[:200]})
            self._publish()
        _LOG.warning("alarm acknowledged", extra={"alarm_id": alarm_id, "count": alarm.count})
        return alarm

    def open_alarms(self) -> list[Alarm]:
        """All open alarms, the most severe first, then the oldest."""
        with self._lock:
            alarms = list(self._open.values())
        return sorted(alarms, key=lambda alarm: (-_RANK[alarm.severity], alarm.raised_at_s, alarm.alarm_id))

    def is_open(self, alarm_id: str) -> bool:
        """Whether this alarm is open."""
        return alarm_id in self._open

    def __len__(self) -> int:
        return len(self._open)

    def _make_room(self) -> None:
        victim = min(
            self._open.values(),
            key=lambda alarm: (alarm.needs_operator, _RANK[alarm.severity], alarm.raised_at_s),
        )
        del self._open[victim.alarm_id]

    def _publish(self) -> None:
        if self._gauge is None:
            return
        for severity in Severity:
            self._gauge(severity.value, sum(alarm.severity is severity for alarm in self._open.values()))
