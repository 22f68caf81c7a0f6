"""A load generator for the ETSI GS QKD 014 interface: raw HTTP/1.1 on keep-alive mutual TLS.

Small on purpose: it shares two cores with what it measures. It reads whole
answers, checks their status, and counts only what was answered with 200.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Outcome:
    """What a run of requests gave: times in seconds, and answers that were not 200."""

    times_s: list[float] = field(default_factory=list)
    elapsed_s: float = 0.0
    failures: dict[int, int] = field(default_factory=dict)

    def failed(self, status: int) -> None:
        """Count an answer that is not 200."""
        self.failures[status] = self.failures.get(status, 0) + 1


class Connection:
    """One keep-alive connection of one SAE; requests go one after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self._reader = reader
        self._writer = writer
        self._host = host

    @classmethod
    async def open(cls, url: str, context: ssl.SSLContext) -> Connection:
        """Connect to the gateway at ``url`` (without ``/api/v1``)."""
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(
            parts.hostname, parts.port, ssl=context, server_hostname=parts.hostname
        )
        return cls(reader, writer, f"{parts.hostname}:{parts.port}")

    async def get(self, path: str) -> tuple[int, bytes]:
        """GET ``path``; returns the status code and the body."""
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        lower = head.lower()
        start = lower.find(b"content-length:")
        length = 0 if start < 0 else int(lower[start + 15 : lower.index(b"\r\n", start)])
        body = await self._reader.readexactly(length) if length else b""
        return int(head[9:12]), body

    async def close(self) -> None:
        """Close the connection."""
        self._writer.close()


def client_context(ca: str, cert: str, key: str) -> ssl.SSLContext:
    """Mutual TLS as an encryptor does it."""
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(cert, key)
    return context


async def fetch_repeatedly(
    connections: list[Connection], path: str, *, duration_s: float, most: int = 1 << 62
) -> Outcome:
    """GET one path on all connections at once until the time or the count is up."""
    outcome = Outcome()
    start = time.perf_counter()
    end = start + duration_s
    left = most

    async def worker(connection: Connection) -> None:
        nonlocal left
        while left > 0 and (begun := time.perf_counter()) < end:
            left -= 1
            status, _ = await connection.get(path)
            if status == 200:
                outcome.times_s.append(time.perf_counter() - begun)
            else:
                outcome.failed(status)

    await asyncio.gather(*map(worker, connections))
    outcome.elapsed_s = time.perf_counter() - start
    return outcome


async def fetch_pairs(
    masters: list[Connection],
    slaves: list[Connection],
    enc_path: str,
    dec_prefix: str,
    *,
    duration_s: float,
) -> tuple[Outcome, int]:
    """Draw at the master and redeem at the slave, one key a time on each pair of connections.

    Returns:
        The outcome (one time per pair) and how many pairs held different bytes.
    """
    outcome = Outcome()
    differing = 0
    start = time.perf_counter()
    end = start + duration_s

    async def worker(master: Connection, slave: Connection) -> None:
        nonlocal differing
        while (begun := time.perf_counter()) < end:
            status, body = await master.get(enc_path)
            if status != 200:
                outcome.failed(status)
                continue
            drawn = json.loads(body)["keys"][0]
            status, body = await slave.get(dec_prefix + drawn["key_ID"])
            if status != 200:
                outcome.failed(status)
                continue
            differing += json.loads(body)["keys"][0]["key"] != drawn["key"]
            outcome.times_s.append(time.perf_counter() - begun)

    await asyncio.gather(*(worker(m, s) for m, s in zip(masters, slaves, strict=True)))
    outcome.elapsed_s = time.perf_counter() - start
    return outcome, differing
