"""Courier files for tests: tables, headers, and a file in memory."""

from __future__ import annotations

import random

from mesh.core.psrd import LaneSpan, PsrdHeader
from mesh.core.secret import Buffer
from mesh.sources.psrd_file import CourierReader, CourierWriter

PASSPHRASE = b"correct horse battery staple"


class MemoryFile:
    """A ``ByteFile`` in memory; ``budget`` bytes until the disk is full."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.is_synced = False

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def pwrite(self, data: Buffer, offset: int) -> None:
        self.data.extend(bytes(max(0, offset - len(self.data))))
        self.data[offset : offset + len(data)] = data
        self.is_synced = False

    def sync(self) -> None:
        self.is_synced = True

    def size(self) -> int:
        return len(self.data)


def header_of(
    *, from_hub: int = 4096, to_hub: int = 5000, epoch: int = 1, start: int = 0, seed: int = 1
) -> PsrdHeader:
    """A header of hub-1 for kme-a."""
    return PsrdHeader(
        random.Random(seed).randbytes(16),
        "lab",
        "hub-1",
        "kme-a",
        LaneSpan(epoch, start, start, from_hub),
        LaneSpan(epoch, start, start, to_hub),
        1_700_000_000,
    )


def courier_of(
    header: PsrdHeader, *, seed: int = 1, passphrase: bytes | None = None, chunk_log2: int = 12
) -> tuple[bytes, bytes]:
    """A courier file with random table bytes: (file, table)."""
    rng = random.Random(seed)
    file = MemoryFile()
    table = rng.randbytes(header.total_bytes)
    writer = CourierWriter(
        file,
        header,
        rng.randbytes(32),
        passphrase=passphrase,
        salt=rng.randbytes(16),
        cost_log2=10,
        chunk_log2=chunk_log2,
    )
    writer.write(table[:1000])
    writer.write(table[1000:])
    writer.finish()
    assert file.is_synced
    return bytes(file.data), table


def read_all(data: bytes, *, passphrase: bytes | None = None, piece: int = 777) -> tuple[PsrdHeader, bytes]:
    """Read a whole courier file as an importer would."""
    reader = CourierReader(MemoryFile(data), passphrase=passphrase)
    left = reader.header.total_bytes
    table = bytearray()
    while left:
        table += reader.read(min(piece, left))
        left = reader.header.total_bytes - len(table)
    reader.finish()
    return reader.header, bytes(table)
