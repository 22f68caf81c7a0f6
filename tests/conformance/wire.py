"""A raw HTTP/1.1 client over mutual TLS: sends exactly what a test says, reads exactly what came."""

from __future__ import annotations

import json
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Received:
    """One HTTP response as read from the socket; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def client_context(
    ca: Path, cert: Path | None, key: Path | None, *, maximum: ssl.TLSVersion | None = None
) -> ssl.SSLContext:
    """A context that verifies the gateway, with or without a client certificate."""
    context = ssl.create_default_context(cafile=str(ca))
    if cert is not None:
        context.load_cert_chain(str(cert), str(key))
    if maximum is not None:
        context.maximum_version = maximum
    return context


class Wire:
    """One connection, kept alive over requests."""

    def __init__(self, url: str, context: ssl.SSLContext, *, timeout_s: float = 20.0) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        plain = socket.create_connection((parts.hostname, parts.port), timeout=timeout_s)
        self.socket = context.wrap_socket(plain, server_hostname=parts.hostname)
        self.host = f"{parts.hostname}:{parts.port}"
        self._buffer = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send raw bytes."""
        self.socket.sendall(data)

    def request(
        self,
        verb: str,
        target: str,
        body: bytes | None = None,
        *,
        headers: dict[str, str] | None = None,
        version: str = "1.1",
    ) -> Received:
        """Send one request and read its response."""
        lines = [f"{verb} {target} HTTP/{version}", f"Host: {self.host}"]
        fields = dict(headers or {})
        if body is not None:
            fields.setdefault("Content-Type", "application/json")
            fields.setdefault("Content-Length", str(len(body)))
        lines += [f"{name}: {value}" for name, value in fields.items()]
        self.send("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        return self.receive(has_body=verb != "HEAD")

    def receive(self, *, has_body: bool = True) -> Received:
        """Read one response."""
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0")) if has_body else 0
        while len(self._buffer) < length:
            self._fill()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return Received(int(status_line.split()[1]), headers, body)

    def is_closed_by_peer(self) -> bool:
        """True if the other end closes without sending more."""
        try:
            return self.socket.recv(1) == b""
        except (ConnectionError, ssl.SSLError):
            return True

    def _fill(self) -> None:
        chunk = self.socket.recv(65536)
        if not chunk:
            raise ConnectionResetError("closed by the gateway")
        self._buffer += chunk
