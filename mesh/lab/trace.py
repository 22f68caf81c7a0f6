"""``keymesh lab trace``: where each millisecond of one request goes, hop by hop.

Nodes, hubs and gateways run with their spans in their logs for a moment; of some requests the one of
median length is taken, and every instant of it is given to the span that began last and is still under
way. All processes of a lab share one clock. Must find a quiet lab: what others ask for meanwhile would
stand between the lines.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from mesh.errors import CallerError, ConfigError, ErrorReason
from mesh.lab.control import Progress, restart_processes, rewrite_config
from mesh.lab.ready import DeliveryCheck, encryptor, wait_until
from mesh.lab.state import LabDirectory
from mesh.ops.spanlog import LOGGER

_READY_S = 60.0
_WARM_UP = 10
_REQUESTS = 15
# Background work that a request set off is over before the next one.
_PAUSE_S = 0.4
_TRACED = ("node", "hub", "gateway")


@dataclass(frozen=True, slots=True)
class Span:
    """Something that a process did; microseconds since 1970."""

    process: str
    what: str
    began_us: int
    took_us: int

    @property
    def end_us(self) -> int:
        """When it was over."""
        return self.began_us + self.took_us


@dataclass(slots=True)
class Traced:
    """One request, and what happened meanwhile.

    Attributes:
        spans: in the order of their beginnings, the request itself first.
        own_us: how much of the request is each span's own, in the same order.
    """

    spans: list[Span]
    own_us: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.own_us = shares(self.spans)

    def table(self) -> str:
        """For people; milliseconds."""
        request = self.spans[0]
        lines = [f"{'at':>8}{'took':>9}{'own':>9}  {'process':20}what"]
        for span, own_us in zip(self.spans, self.own_us, strict=True):
            at_ms = (span.began_us - request.began_us) / 1000
            lines.append(
                f"{at_ms:8.2f}{span.took_us / 1000:9.2f}{own_us / 1000:9.2f}  {span.process:20}{span.what}"
            )
        by_process: dict[str, int] = {}
        for span, own_us in zip(self.spans, self.own_us, strict=True):
            by_process[span.process] = by_process.get(span.process, 0) + own_us
        parts = sorted(by_process.items(), key=lambda item: -item[1])
        lines.append("")
        lines.append("own milliseconds by process, waiting for the network and for the disk included:")
        lines += [f"{own_us / 1000:8.2f}  {process}" for process, own_us in parts if own_us]
        return "\n".join(lines)


def shares(spans: Sequence[Span]) -> list[int]:
    """How much of the first span's time is each one's own: every instant is the latest-begun one's.

    Args:
        spans: in the order of their beginnings.
    """
    first = spans[0]
    bounds = sorted({min(max(edge, first.began_us), first.end_us) for one in spans for edge in _edges(one)})
    own = [0] * len(spans)
    for start, stop in pairwise(bounds):
        latest = max(index for index, one in enumerate(spans) if one.began_us <= start and stop <= one.end_us)
        own[latest] += stop - start
    return own


def _edges(span: Span) -> tuple[int, int]:
    return span.began_us, span.end_us


def trace_request(
    root: Path, progress: Progress, *, master: str | None = None, slave: str | None = None
) -> Traced:
    """Trace a request for one key in the running lab of ``root``; it runs as before afterwards.

    Args:
        master: the SAE that asks, by default the first.
        slave: for whom, by default the last at another node.

    Raises:
        ConfigError: no such lab or SAE.
        MeshError: a process does not come back.
        RefusedError: a request was refused.
    """
    directory = LabDirectory(root)
    a, b = _pair(directory.read_lab(), master, slave)
    with _spans_in_logs(directory, progress):
        logs = {one.id: Path(one.log) for one in directory.read_processes() if one.kind in _TRACED}
        requests = _ask(directory, a, b, logs)
        progress.done(f"{_REQUESTS} keys for {b} asked for by {a}; the one of median length follows")
        offsets, request = sorted(requests, key=lambda one: one[1].took_us)[len(requests) // 2]
        spans = [one for process, log in logs.items() for one in read_spans(process, log, offsets[process])]
    during = [one for one in spans if request.began_us <= one.began_us <= request.end_us]
    return Traced([request, *sorted(during, key=lambda one: one.began_us)])


def _pair(lab: dict[str, Any], master: str | None, slave: str | None) -> tuple[str, str]:
    saes = {sae["id"]: sae["node"] for sae in lab["saes"]}
    for given in (master, slave):
        if given is not None and given not in saes:
            raise ConfigError(f"no SAE {given!r} in this lab; there are {', '.join(saes)}")
    a = master or next(iter(saes))
    b = slave or next(sae for sae, node in reversed(saes.items()) if node != saes[a])
    return a, b


@contextmanager
def _spans_in_logs(directory: LabDirectory, progress: Progress) -> Iterator[None]:
    running = [one.id for one in directory.read_processes() if one.kind in _TRACED and one.is_running()]
    before = {process_id: directory.config_of(process_id).read_bytes() for process_id in running}
    for process_id in running:
        rewrite_config(directory, process_id, lambda config: config.update(tracing={"log": True}))
    try:
        restart_processes(directory, running, progress)
        wait_until(
            DeliveryCheck(directory.read_lab(), wanted_keys=0).missing,
            deadline_s=time.monotonic() + _READY_S,
            processes=directory.read_processes(),
            progress=progress.waiting,
        )
        yield
    finally:
        for process_id in running:
            directory.config_of(process_id).write_bytes(before[process_id])
        restart_processes(directory, running, progress)


def _ask(
    directory: LabDirectory, master: str, slave: str, logs: dict[str, Path]
) -> list[tuple[dict[str, int], Span]]:
    """The sizes of all logs before each request, and the request."""
    requests = []
    with encryptor(directory.read_lab(), master) as sae:
        for _ in range(_WARM_UP):
            sae.enc_keys(slave)
        for _ in range(_REQUESTS):
            time.sleep(_PAUSE_S)
            offsets = {process: log.stat().st_size for process, log in logs.items()}
            began_us = time.time_ns() // 1000
            if not sae.enc_keys(slave):
                raise CallerError("no key came", reason=ErrorReason.UNKNOWN_KEY)
            took_us = time.time_ns() // 1000 - began_us
            requests.append((offsets, Span(master, f"asks for a key for {slave}", began_us, took_us)))
    time.sleep(_PAUSE_S)
    return requests


def read_spans(process: str, log: Path, offset: int = 0) -> Iterator[Span]:
    """The spans in a process's log, from a byte offset on."""
    with log.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            try:
                entry = msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError:
                continue
            if entry.get("logger") == LOGGER:
                facts = " ".join(
                    f"{name.rpartition('.')[2]}={fact}" for name, fact in entry["attributes"].items()
                )
                yield Span(process, f"{entry['event']} {facts}".strip(), entry["began_us"], entry["took_us"])
