"""``keymesh lab trace``: where each millisecond of one request goes, hop by hop.

Nodes, hubs and gateways run with their spans in their logs for a moment. Every instant of a request is
given to the span that began last and is still under way; of several requests the medians are shown. All
processes of a lab share one clock. Must find a quiet lab: what others ask for meanwhile would stand
between the lines.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from mesh.errors import ConfigError
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


@dataclass(frozen=True, slots=True)
class Row:
    """A span as it usually is: medians over the requests that have it; milliseconds.

    Attributes:
        at_ms: after the request began.
        own_ms: the part of the request that is this span's own.
    """

    process: str
    what: str
    at_ms: float
    took_ms: float
    own_ms: float


def summarise(requests: Sequence[Sequence[Span]]) -> list[Row]:
    """What happens in most requests, in the order in which it begins.

    Args:
        requests: the spans of each, in the order of their beginnings, the request itself first.
    """
    seen: defaultdict[tuple[str, str, int], list[tuple[int, int, int]]] = defaultdict(list)
    for spans in requests:
        count: Counter[tuple[str, str]] = Counter()
        for span, own_us in zip(spans, shares(spans), strict=True):
            count[span.process, span.what] += 1
            key = span.process, span.what, count[span.process, span.what]
            seen[key].append((span.began_us - spans[0].began_us, span.took_us, own_us))
    rows = [
        Row(process, what, *(median(column) / 1000 for column in zip(*values, strict=True)))
        for (process, what, _), values in seen.items()
        if 2 * len(values) > len(requests)
    ]
    return sorted(rows, key=lambda row: row.at_ms)


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [f"{'at':>8}{'took':>9}{'own':>9}  {'process':20}what"]
    by_process: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        lines.append(f"{row.at_ms:8.2f}{row.took_ms:9.2f}{row.own_ms:9.2f}  {row.process:20}{row.what}")
        by_process[row.process] += row.own_ms
    lines += ["", "own milliseconds by process, waiting for the network and for the disk included:"]
    parts = sorted(by_process.items(), key=lambda part: -part[1])
    lines += [f"{own_ms:8.2f}  {process}" for process, own_ms in parts if own_ms]
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
) -> list[Row]:
    """Trace requests for one key in the running lab of ``root``; it runs as before afterwards.

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
        offsets, requests = _ask(directory, a, b, logs)
        spans = [one for process, log in logs.items() for one in read_spans(process, log, offsets[process])]
    spans.sort(key=lambda one: one.began_us)
    progress.done(f"{_REQUESTS} keys for {b} asked for by {a}, one after the other: medians follow")
    return summarise(
        [
            [request, *(one for one in spans if request.began_us <= one.began_us <= request.end_us)]
            for request in requests
        ]
    )


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
) -> tuple[dict[str, int], list[Span]]:
    """The sizes of all logs before the requests, and the requests."""
    requests = []
    with encryptor(directory.read_lab(), master) as sae:
        for _ in range(_WARM_UP):
            sae.enc_keys(slave)
        offsets = {process: log.stat().st_size for process, log in logs.items()}
        for _ in range(_REQUESTS):
            time.sleep(_PAUSE_S)
            began_us = time.time_ns() // 1000
            sae.enc_keys(slave)
            took_us = time.time_ns() // 1000 - began_us
            requests.append(Span(master, f"asks for a key for {slave}", began_us, took_us))
    time.sleep(_PAUSE_S)
    return offsets, requests


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
