"""Logging as JSON lines, with the request id of whoever is being served.

Owns the line format. Messages carry facts only: no caller may pass key, pad or share
bytes. The formatter is the second fence, not the first: it writes the length of
anything that holds bytes, and of foreign exceptions the type and the place, never
the text (a parser's complaint may quote its input).
"""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import re
import secrets
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO

import msgspec

from mesh.errors import ConfigError, MeshError

request_id: ContextVar[str] = ContextVar("keymesh_request_id", default="")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}", re.ASCII)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_STACK_LIMIT = 30
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def new_request_id() -> str:
    """A fresh request id, 16 hexadecimal digits; not a secret."""
    return secrets.token_hex(8)


def clean_request_id(text: object) -> str:
    """The request id that somebody sent, if it is fit for logs and metadata; else a fresh one.

    Fit means 1 to 64 of letters, digits, ``.``, ``_``, ``:``, ``-``.
    """
    if isinstance(text, str) and _REQUEST_ID.fullmatch(text):
        return text
    return new_request_id()


def adopted_request_id(sender: str, text: str, otherwise: str) -> str:
    """The id of a request that came from another operator's ``sender`` under the id ``text``.

    Who sent it stands in front, so that nobody's word passes for ours; ``otherwise`` if that is not fit.
    """
    adopted = f"{sender}:{text}"
    return adopted if text and _REQUEST_ID.fullmatch(adopted) else otherwise


def origin(identifier: str) -> str:
    """The id of a request where it began, without who passed it on."""
    return identifier.rpartition(":")[2]


@contextmanager
def serving(identifier: str) -> Iterator[str]:
    """Sets the request id for everything logged inside, in this task and its children."""
    token = request_id.set(identifier)
    try:
        yield identifier
    finally:
        request_id.reset(token)


def log_soon(logger: logging.Logger, event: str, **facts: object) -> None:
    """Writes an info line once what is ready to run has run: a line must not delay what it tells of."""
    if logger.isEnabledFor(logging.INFO):
        asyncio.get_running_loop().call_soon(partial(logger.info, event, extra=facts))


class JsonFormatter(logging.Formatter):
    """One JSON object per record: ``ts``, ``level``, ``logger``, ``event``, ``request_id``, facts.

    Args:
        facts: written on every line, for example ``{"kme": "kme-a"}``.
    """

    def __init__(self, facts: dict[str, str] | None = None) -> None:
        super().__init__()
        self._facts = facts or {}

    def format(self, record: logging.LogRecord) -> str:
        """Formats one record; never raises on what callers pass as facts."""
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **self._facts,
        }
        identifier = request_id.get()
        if identifier:
            line["request_id"] = identifier
        for name, value in vars(record).items():
            if name not in _STANDARD and not name.startswith("_"):
                line[name] = fact(value)
        if record.exc_info and record.exc_info[1] is not None:
            line.update(_describe(record.exc_info[1]))
        return msgspec.json.encode(line).decode()


def fact(value: object) -> object:
    """A value as it may stand in a log line: bytes become their length."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, BaseException):
        return _describe(value)
    if isinstance(value, dict):
        return {str(name): fact(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [fact(inner) for inner in value]
    return str(value)


def setup_logging(
    *,
    level: str = "info",
    file: Path | None = None,
    facts: dict[str, str] | None = None,
    stream: IO[str] | None = None,
) -> None:
    """Sends all logging of the process to one place as JSON lines.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        file: appended to, and opened anew when moved away; None for standard error.
        facts: written on every line.
        stream: instead of standard error.

    Raises:
        ConfigError: unknown level, or the file cannot be opened.
    """
    if level not in LEVELS:
        raise ConfigError(f"log.level must be one of {', '.join(LEVELS)}", facts={"level": level})
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler(stream or sys.stderr)
    else:
        try:
            handler = logging.handlers.WatchedFileHandler(file, encoding="utf-8")
        except OSError as exc:
            raise ConfigError("log.file cannot be opened", facts={"file": file, "cause": exc}) from exc
    handler.setFormatter(JsonFormatter(facts))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(LEVELS[level])
    # grpc logs every failed handler with its traceback; mesh.rpc.server says it once, in our words.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def _describe(exc: BaseException) -> dict[str, object]:
    chain: list[str] = []
    current: BaseException | None = exc
    while current is not None and len(chain) < 5:
        chain.append(_name(current))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    frames = traceback.extract_tb(exc.__traceback__, limit=-_STACK_LIMIT)
    described: dict[str, object] = {
        "error": chain[0],
        "stack": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
    if chain[1:]:
        described["caused_by"] = chain[1:]
    if isinstance(exc, MeshError):
        described["reason"] = exc.reason.value
    return described


def _name(exc: BaseException) -> str:
    kind = type(exc).__qualname__
    if isinstance(exc, MeshError):
        return f"{kind}: {exc}"
    if isinstance(exc, OSError) and exc.errno is not None:
        return f"{kind}: {exc.strerror}"
    return kind
