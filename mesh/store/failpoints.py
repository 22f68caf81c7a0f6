"""Places to die: before and after every durable step (house style 34).

A failpoint does nothing until the environment names it,
``KEYMESH_FAILPOINT=name[:count]``: the process then kills itself with SIGKILL at
the count-th passage (1 by default), as a crash would. Tests of the same process
arm a callback instead. The name must be in ``ALL`` or ``COURIER``, so a typo cannot pass as a
test that survived.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from mesh.errors import ConfigError

VARIABLE = "KEYMESH_FAILPOINT"

ALL: frozenset[str] = frozenset(
    {
        "commit.before",
        "commit.after",
        "proof.before",
        "proof.after",
        "pads.create.before_write",
        "pads.create.before_sync",
        "pads.create.before_dir_sync",
        "pads.create.after",
        "pads.wipe.before",
        "pads.wipe.after",
        "pads.remove.before_wipe",
        "pads.remove.before_unlink",
        "pads.remove.after",
    }
)
#: Of courier files, which only issuing and importing pass.
COURIER: frozenset[str] = frozenset(
    {
        "courier.before_sync",
        "courier.before_name",
        "courier.after_name",
        "courier.before_wipe",
        "courier.before_unlink",
        "courier.after_unlink",
    }
)


def _parse(text: str) -> tuple[str, int]:
    name, _, count = text.partition(":")
    if name not in ALL | COURIER or not (count or "1").isdecimal() or int(count or "1") < 1:
        raise ConfigError(f"{VARIABLE} must be a known failpoint name[:count]", facts={"value": text})
    return name, int(count or "1")


class _Failpoints:
    """The armed failpoint of this process and the passages left until it fires."""

    def __init__(self, text: str) -> None:
        self.kill_name, self.kill_in = _parse(text) if text else ("", 0)
        self.armed: dict[str, Callable[[], None]] = {}
        self.is_quiet = not text


_state = _Failpoints(os.environ.get(VARIABLE, ""))


def fail_at(name: str) -> None:
    """Pass the failpoint ``name``: a no-op unless it is armed."""
    if _state.is_quiet:
        return
    if name == _state.kill_name:
        _state.kill_in -= 1
        if _state.kill_in == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    callback = _state.armed.get(name)
    if callback is not None:
        callback()


def kill_at(text: str) -> None:
    """Kill this process at ``name[:count]`` from now on, as the environment variable does; "" disarms."""
    _state.kill_name, _state.kill_in = _parse(text) if text else ("", 0)
    _state.is_quiet = not text and not _state.armed


def arm(name: str, callback: Callable[[], None]) -> None:
    """Run ``callback`` at every passage of ``name`` (tests); it may raise."""
    if name not in ALL | COURIER:
        raise ConfigError("unknown failpoint", facts={"name": name})
    _state.armed[name] = callback
    _state.is_quiet = False


def disarm_all() -> None:
    """Forget every callback armed in this process."""
    _state.armed.clear()
    _state.is_quiet = not _state.kill_name
