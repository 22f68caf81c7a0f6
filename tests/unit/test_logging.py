"""Log lines: JSON, with the request id, and no bytes even when somebody passes some."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.errors import ConfigError, ShortageError
from mesh.ops import logging as ops_logging
from mesh.ops.logging import (
    JsonFormatter,
    adopted_request_id,
    clean_request_id,
    new_request_id,
    origin,
    serving,
    setup_logging,
)

SECRET = bytes.fromhex("00112233445566778899aabbccddeeff")


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter({"kme": "kme-a"}))
    logger = logging.getLogger("keymesh.test")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield logger, stream
    logger.removeHandler(handler)
    logger.propagate = True


def last(stream: io.StringIO) -> dict[str, object]:
    line: dict[str, object] = json.loads(stream.getvalue().splitlines()[-1])
    return line


def test_line_has_facts_and_the_request_id(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    with serving("req-1"):
        logger.info("key drawn", extra={"peer": "kme-b", "count": 3})
    line = last(stream)
    assert line.pop("ts")
    assert line == {
        "level": "info",
        "logger": "keymesh.test",
        "event": "key drawn",
        "kme": "kme-a",
        "request_id": "req-1",
        "peer": "kme-b",
        "count": 3,
    }
    logger.info("later")
    assert "request_id" not in last(stream)


def test_bytes_become_lengths(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    logger.info(
        "x", extra={"a": SECRET, "b": bytearray(SECRET), "c": memoryview(SECRET), "d": [{"e": SECRET}]}
    )
    line = last(stream)
    assert (line["a"], line["b"], line["c"]) == ("<16 bytes>",) * 3
    assert line["d"] == [{"e": "<16 bytes>"}]


def test_foreign_exceptions_lose_their_text(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    try:
        try:
            int(SECRET.hex() + "x", 16)
        except ValueError as exc:
            raise ShortageError("no material", facts={"peer": "kme-b"}) from exc
    except ShortageError:
        logger.exception("failed")
    text = stream.getvalue()
    assert SECRET.hex() not in text
    line = last(stream)
    assert line["error"] == "ShortageError: no material (peer=kme-b)"
    assert line["caused_by"] == ["ValueError"]
    assert line["reason"] == "out-of-material"
    assert "test_logging.py" in str(line["stack"])


def test_a_broken_line_cannot_be_forged(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    logger.info("x", extra={"sae": 'a"\n{"event":"forged"}'})
    assert len(stream.getvalue().splitlines()) == 1


@pytest.mark.parametrize("text", ["", "a" * 65, "a b", "a\n", "é", None, b"abc", 7])
def test_unfit_request_ids_are_replaced(text: object) -> None:
    assert clean_request_id(text) != text


def test_fit_request_ids_stay() -> None:
    assert clean_request_id("A-b.c_d:9") == "A-b.c_d:9"
    assert clean_request_id(new_request_id())
    assert new_request_id() != new_request_id()


@pytest.fixture
def root_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for handler in handlers:
        root.removeHandler(handler)
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


@pytest.mark.usefixtures("root_logging")
def test_setup_to_file_and_stream(tmp_path: Path) -> None:
    setup_logging(level="warning", file=tmp_path / "x.log", facts={"kme": "kme-a"})
    logging.getLogger("keymesh.x").info("hidden")
    logging.getLogger("keymesh.x").warning("shown")
    assert [json.loads(line)["event"] for line in (tmp_path / "x.log").read_text().splitlines()] == ["shown"]
    stream = io.StringIO()
    setup_logging(stream=stream)
    logging.getLogger("keymesh.x").info("there")
    assert json.loads(stream.getvalue())["event"] == "there"
    assert len(logging.getLogger().handlers) == 1


@pytest.mark.usefixtures("root_logging")
def test_setup_refuses_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log\.level"):
        setup_logging(level="loud")
    with pytest.raises(ConfigError, match=r"log\.file"):
        setup_logging(file=tmp_path / "missing" / "x.log")


def test_request_id_is_a_context_variable() -> None:
    with serving("outer"):
        with serving("inner"):
            assert ops_logging.request_id.get() == "inner"
        assert ops_logging.request_id.get() == "outer"
    assert ops_logging.request_id.get() == ""


def test_an_id_from_another_operator_names_its_sender() -> None:
    assert adopted_request_id("can-z", "4f1c-2a", "own-1") == "can-z:4f1c-2a"
    assert adopted_request_id("uk-x", "can-z:4f1c-2a", "own-1") == "uk-x:can-z:4f1c-2a"
    for text in ("", "a b", "x" * 64, "new\nline", "ü"):
        assert adopted_request_id("can-z", text, "own-1") == "own-1"
    assert origin("uk-x:can-z:4f1c-2a") == origin("4f1c-2a") == "4f1c-2a"
