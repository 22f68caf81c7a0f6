"""Tracing one request of a lab: what is read from logs, and whose each instant is."""

from __future__ import annotations

import io
import logging
import time
from pathlib import Path

import msgspec
import pytest

from mesh.errors import ConfigError
from mesh.lab.trace import Span, read_spans, shares, summarise, table
from mesh.ops.logging import JsonFormatter, serving
from mesh.ops.spanlog import LOGGER
from mesh.ops.tracing import TracingSection, close_tracing, is_traced, setup_tracing, span


def lines_of(work: object) -> bytes:
    """What a process logs that traces to its log while ``work`` runs."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter({"kme": "kme-a"}))
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    setup_tracing(TracingSection(log=True), role="node", member="kme-a")
    try:
        assert callable(work)
        work()
    finally:
        close_tracing()
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return stream.getvalue().encode()


def test_spans_in_a_log_are_read_back_to_the_microsecond(tmp_path: Path) -> None:
    def work() -> None:
        with serving("request-1"), span("outer", target="kme-b") as own:
            own.name("renamed")
            own.note({"http.response.status_code": 200})
        with span("serves nobody"):
            pass

    before_us = time.time_ns() // 1000
    written = lines_of(work)
    assert not is_traced()
    assert msgspec.json.decode(written)["request_id"] == "request-1"
    log = tmp_path / "kme-a.log"
    log.write_bytes(b"not json\n" + b'{"logger": "keymesh.other", "event": "else"}\n' + written)
    (read,) = read_spans("kme-a", log)
    assert (read.process, read.what) == ("kme-a", "renamed target=kme-b status_code=200")
    assert before_us <= read.began_us <= read.end_us <= time.time_ns() // 1000
    assert list(read_spans("kme-a", log, offset=log.stat().st_size)) == []


def test_a_span_that_fails_is_written_too(tmp_path: Path) -> None:
    def work() -> None:
        with pytest.raises(ValueError, match="no"), serving("request-1"), span("fails"):
            raise ValueError("no")

    log = tmp_path / "log"
    log.write_bytes(lines_of(work))
    assert [one.what for one in read_spans("kme-a", log)] == ["fails"]


def test_a_section_names_a_collector_or_the_log() -> None:
    with pytest.raises(ConfigError, match=r"tracing\.endpoint"):
        setup_tracing(TracingSection(), role="node", member="kme-a")


def test_every_instant_is_the_latest_begun_spans() -> None:
    spans = [
        Span("app", "asks", 1000, 100),
        Span("gw", "GET", 1010, 80),
        Span("kme-a", "draw", 1020, 30),
        Span("kme-b", "append", 1045, 20),
        Span("kme-c", "goes on", 1095, 50),
    ]
    assert shares(spans) == [15, 35, 25, 20, 5]
    assert sum(shares(spans)) == spans[0].took_us


def request(began_us: int, *rest: Span) -> list[Span]:
    return [Span("app", "asks", began_us, 4000), *rest]


def test_the_table_says_what_usually_happens_and_how_much_of_it_was_its_own() -> None:
    rows = summarise(
        [
            request(5000, Span("kme-a", "draw", 6000, 1500)),
            request(15_000, Span("kme-a", "draw", 15_500, 1000), Span("kme-a", "establish", 16_500, 500)),
            request(25_000, Span("kme-a", "draw", 27_000, 2000)),
        ]
    )
    assert [(row.process, row.what) for row in rows] == [("app", "asks"), ("kme-a", "draw")]
    head, first, second, *rest = table(rows).splitlines()
    assert head.split() == ["at", "took", "own", "process", "what"]
    assert first.split() == ["0.00", "4.00", "2.50", "app", "asks"]
    assert second.split() == ["1.00", "1.50", "1.50", "kme-a", "draw"]
    assert [line.split() for line in rest[-2:]] == [["2.50", "app"], ["1.50", "kme-a"]]


def test_the_same_span_twice_in_a_request_is_two_rows() -> None:
    twice = [Span("kme-a", "post", 1000, 10), Span("kme-a", "post", 2000, 20)]
    rows = summarise([request(0, *twice), request(0, *twice)])
    assert [(row.at_ms, row.took_ms) for row in rows[1:]] == [(1.0, 0.01), (2.0, 0.02)]
