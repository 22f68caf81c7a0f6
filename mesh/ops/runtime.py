"""Running a process: event loop, signals, and what must not leak from memory.

Owns start and end of every long-running command: uvloop, SIGTERM and SIGINT as a
wish to stop, no core dumps, no tracing by the same user, files for the owner only.
Locking memory is best effort and its outcome is stated: Python may have copied
secrets before, and swap is the operator's to encrypt.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import uvloop

from mesh.errors import ConfigError, MeshError

_LOG = logging.getLogger("keymesh.runtime")
_PR_SET_DUMPABLE = 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
EXIT_OK, EXIT_FAILED, EXIT_CONFIG, EXIT_BUG = 0, 1, 2, 70


@dataclass(frozen=True, slots=True)
class Hardening:
    """What could be achieved: no core dumps and tracing, and memory kept out of swap."""

    is_undumpable: bool
    is_locked: bool


def harden_process(*, lock_memory: bool = True) -> Hardening:
    """Keeps memory out of core dumps and, when permitted, out of swap; sets umask 077.

    Memory is locked only when there is no limit on it: with a limit, later allocations
    would fail instead of being swapped.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is None:
        return Hardening(is_undumpable=False, is_locked=False)
    is_undumpable = libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0
    is_locked = False
    if lock_memory and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        is_locked = libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0
    return Hardening(is_undumpable=is_undumpable, is_locked=is_locked)


def tune_process() -> None:
    """Settings that cost nothing and are felt on every buffer and every thread switch.

    Frames and tags work on buffers of up to a mebibyte; glibc's defaults map and unmap each of
    them anew, which costs more than the arithmetic. The store's committing thread must not wait
    five milliseconds for a busy event loop to let go of the interpreter.
    """
    sys.setswitchinterval(0.0005)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 64 << 20)
            libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def run(
    main: Callable[[asyncio.Event], Coroutine[Any, Any, None]],
    *,
    name: str,
    lock_memory: bool = True,
) -> int:
    """Runs a process until ``main`` returns; ``main`` should return soon after its event is set.

    Args:
        main: gets the event that SIGTERM or SIGINT sets; a second signal cancels it.
        name: for messages, for example ``node kme-a``.
        lock_memory: try to keep memory out of swap.

    Returns:
        The exit status: 0, 1 (a MeshError), 2 (a ConfigError), 70 (a bug). What went
        wrong stands on standard error in one line, and in the log.
    """
    hardening = harden_process(lock_memory=lock_memory)
    tune_process()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_supervise(main, name, hardening))
        except ConfigError as exc:
            return _fail(name, str(exc), exc, EXIT_CONFIG)
        except MeshError as exc:
            return _fail(name, str(exc), exc, EXIT_FAILED)
        except BaseExceptionGroup as group:
            return _fail_group(name, group)
        except (asyncio.CancelledError, KeyboardInterrupt):
            return _fail(name, "stopped at once on a second signal", None, EXIT_FAILED)
        except Exception as exc:  # noqa: BLE001 - the last line of defence turns it into an exit status
            return _fail(name, "internal error, see the log", exc, EXIT_BUG)
    return EXIT_OK


async def _supervise(
    main: Callable[[asyncio.Event], Coroutine[Any, Any, None]], name: str, hardening: Hardening
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    task = loop.create_task(main(stop), name=name)

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            task.cancel()
            return
        _LOG.info("stopping", extra={"signal": number.name})
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    _LOG.info(
        "starting",
        extra={
            "command": name,
            "pid": os.getpid(),
            "is_undumpable": hardening.is_undumpable,
            "is_memory_locked": hardening.is_locked,
        },
    )
    await task
    _LOG.info("stopped", extra={"command": name})


def _fail_group(name: str, group: BaseExceptionGroup[BaseException]) -> int:
    """A TaskGroup wraps what failed in it; say what a person can act on."""
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, ConfigError):
        return _fail(name, str(first), first, EXIT_CONFIG)
    if isinstance(first, MeshError):
        return _fail(name, str(first), first, EXIT_FAILED)
    return _fail(name, "internal error, see the log", first, EXIT_BUG)


def _fail(name: str, text: str, exc: BaseException | None, status: int) -> int:
    _LOG.critical("process failed", extra={"command": name, "exit_status": status}, exc_info=exc)
    sys.stderr.write(f"keymesh: {name}: {text}\n")
    return status
