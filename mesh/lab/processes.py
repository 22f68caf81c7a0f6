"""Starting, recognising and stopping the lab's processes.

Owns the rule that nothing is signalled unless it is ours: a process is known by pid
*and* start time, so that a pid that the system gave to somebody else is left alone.
Linux only (``/proc``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from mesh.errors import ErrorReason, UnavailableError

_POLL_S = 0.02


class Process(msgspec.Struct, forbid_unknown_fields=True):
    """One process of the lab, as written to ``processes.json``.

    Attributes:
        id: the id that ``lab.json`` and ``lab restart`` use.
        kind: etcd, device, relay, node or gateway.
        argv: how it is started.
        log: where its output goes.
        pid: of the running or last process, 0 before the first start.
        started: start time of that pid in clock ticks after boot (``/proc/PID/stat``).
        boot: the boot in which that was, as the kernel names it.
    """

    id: str
    kind: str
    argv: list[str]
    log: str
    pid: int = 0
    started: int = 0
    boot: str = ""

    def start(self) -> None:
        """Start in a session of its own, holding none of our descriptors."""
        log = Path(self.log)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output, Path(os.devnull).open("rb") as nothing:
            popen = subprocess.Popen(
                self.argv,
                stdin=nothing,
                stdout=output,
                stderr=output,
                close_fds=True,
                start_new_session=True,
                cwd=log.parent,
            )
        _children[popen.pid] = popen
        self.pid = popen.pid
        self.started = _start_ticks(popen.pid)
        self.boot = _boot_id()

    def is_running(self) -> bool:
        """Whether the process that we started still runs."""
        _reap(self.pid)
        return self.pid > 0 and self.boot == _boot_id() and 0 < _start_ticks(self.pid) == self.started

    @property
    def age_s(self) -> float:
        """Seconds since it was started."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.started / os.sysconf("SC_CLK_TCK")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it is still our process."""
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def log_tail(self, lines: int = 8) -> str:
        """The last lines of the log, for messages."""
        try:
            text = Path(self.log).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(line[:400] for line in text.splitlines()[-lines:])

    def check_running(self) -> None:
        """Raise if the process has ended, with what it last said."""
        if not self.is_running():
            raise UnavailableError(
                f"{self.kind} {self.id} stopped; its log {self.log} ends:\n{self.log_tail()}",
                reason=ErrorReason.INTERNAL,
            )


_children: dict[int, subprocess.Popen[bytes]] = {}


def _reap(pid: int) -> None:
    """Collect a child of ours that ended, so that it does not look alive as a zombie."""
    child = _children.get(pid)
    if child is not None and child.poll() is not None:
        del _children[pid]


def stop_all(processes: Iterable[Process], *, grace_s: float = 8.0) -> list[str]:
    """Stop processes: SIGTERM to all, SIGKILL to those that outlast ``grace_s``.

    Returns:
        The ids of those that had to be killed.
    """
    running = [process for process in processes if process.is_running()]
    for process in running:
        process.signal(signal.SIGTERM)
    deadline_s = time.monotonic() + grace_s
    while running and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        running = [process for process in running if process.is_running()]
    killed = [process.id for process in running]
    for process in running:
        process.signal(signal.SIGKILL)
    deadline_s = time.monotonic() + 5.0
    while any(process.is_running() for process in running) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    return killed


def _start_ticks(pid: int) -> int:
    """Start time in clock ticks since boot; 0 if there is no such process or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    # The command name may hold spaces and parentheses: fields are counted after the last ')'.
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] in {"Z", "X"} else int(fields[19])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
