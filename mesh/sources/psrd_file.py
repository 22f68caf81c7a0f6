"""The courier file: one PSRD table on its way from a hub to its client.

Owns the byte layout and the checks. Memory stays bounded: the table is written and read in
pieces, and what a reader handed out before :meth:`CourierReader.finish` returned must not
be used. The integrity tag is a one-time Poly1305 under 32 bytes of the table itself that
get no lane offset (as block tag keys in protocol 2.2), over header and table: whoever has
not read the file cannot alter it unnoticed, with any computing power. Whoever has read it
knows the table; against him only the courier helps.

Version 1 (big-endian); with sealing 1 all from offset 8 on stands inside chunks
(``mesh.sources.psrd_seal``):

====== ===== ========================================================
offset bytes
====== ===== ========================================================
0      6     "KMPSRD"
6      1     version, 1
7      1     sealing: 0 none, 1 passphrase
8      2     bytes of the header
10     H     header (``mesh.core.psrd``)
10+H   32    the tag's one-time key, its r clamped (RFC 8439 2.5)
42+H   ..    table bytes, hub to client
..     ..    table bytes, client to hub
..     16    tag over bytes 0..10+H and the table
====== ===== ========================================================
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.poly1305 import Poly1305

from mesh.core.mac import KEY_BYTES, TAG_BYTES
from mesh.core.psrd import MAX_HEADER_BYTES, PsrdHeader, header_error
from mesh.core.secret import Buffer
from mesh.errors import CallerError, ErrorReason, IntegrityError
from mesh.sources import psrd_seal
from mesh.sources.psrd_seal import Seal

MAGIC = b"KMPSRD"
VERSION = 1
FRONT_BYTES = 8
_LENGTH = struct.Struct(">H")
#: Bits of r that Poly1305 ignores must be zero, else a flipped one would pass.
_CLAMP = bytes.fromhex("ffffff0ffcffff0ffcffff0ffcffff0f")
_WIPE_BYTES = 1 << 20

#: Told (bytes done, bytes in all) as a file is written or read.
Progress: TypeAlias = Callable[[int, int], None]


class ByteFile(Protocol):
    """An open file; ``mesh.store.files.File`` is one."""

    def pread(self, length: int, offset: int) -> bytes:
        """Read up to ``length`` bytes at ``offset``; shorter only at the end of the file."""
        ...

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        ...

    def sync(self) -> None:
        """Return once the data and the size are durable."""
        ...

    def size(self) -> int:
        """The size in bytes."""
        ...


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


class _Plain:
    """Bytes as they are."""

    def __init__(self, file: ByteFile) -> None:
        self._file = file
        self._at = FRONT_BYTES

    @property
    def body_bytes(self) -> int:
        return self._file.size() - FRONT_BYTES

    def write(self, data: Buffer) -> None:
        self._file.pwrite(data, self._at)
        self._at += len(data)

    def flush(self) -> None:
        return

    def read(self, count: int) -> bytes:
        data = self._file.pread(count, self._at)
        if len(data) != count:
            raise _truncated(count - len(data))
        self._at += count
        return data


class _Sealed:
    """Bytes in chunks under a passphrase; holds one chunk."""

    def __init__(self, file: ByteFile, seal: Seal) -> None:
        self._file = file
        self._seal = seal
        self._number = 1
        self._at = psrd_seal.CHUNKS_AT
        self._held = bytearray()

    @property
    def body_bytes(self) -> int:
        whole = self._seal.chunk_bytes + psrd_seal.TAG_BYTES
        full, rest = divmod(self._file.size() - psrd_seal.CHUNKS_AT, whole)
        if 0 < rest <= psrd_seal.TAG_BYTES:
            raise _truncated(whole - rest)
        return full * self._seal.chunk_bytes + max(0, rest - psrd_seal.TAG_BYTES)

    def write(self, data: Buffer) -> None:
        self._held += data
        while len(self._held) > self._seal.chunk_bytes:
            self._put(self._seal.chunk_bytes, is_last=False)

    def flush(self) -> None:
        self._put(len(self._held), is_last=True)

    def _put(self, count: int, *, is_last: bool) -> None:
        chunk = self._seal.lock_chunk(self._number, memoryview(self._held)[:count], is_last=is_last)
        self._file.pwrite(chunk, self._at)
        self._number += 1
        self._at += len(chunk)
        self._held[:count] = bytes(count)
        del self._held[:count]

    def read(self, count: int) -> bytes:
        while len(self._held) < count:
            size = min(self._seal.chunk_bytes + psrd_seal.TAG_BYTES, self._file.size() - self._at)
            if size <= 0:
                raise _truncated(count - len(self._held))
            chunk = self._file.pread(size, self._at)
            is_last = self._at + size >= self._file.size()
            self._held += self._seal.open_chunk(self._number, chunk, is_last=is_last)
            self._number += 1
            self._at += size
        data = bytes(memoryview(self._held)[:count])
        del self._held[:count]
        return data


class CourierWriter:
    """Writes a courier file, front to back.

    Args:
        file: empty, just created for its owner alone.
        header: of the table.
        tag_key: 32 random bytes that are used for nothing else.
        passphrase: None leaves the table in clear.
        salt: 16 random bytes, with a passphrase.
        progress: told of table bytes.
        cost_log2: scrypt's cost, see :class:`Seal`.
    """

    def __init__(
        self,
        file: ByteFile,
        header: PsrdHeader,
        tag_key: bytes,
        *,
        passphrase: bytes | None = None,
        salt: bytes = b"",
        progress: Progress = no_progress,
        cost_log2: int = psrd_seal.COST_LOG2,
        chunk_log2: int = psrd_seal.CHUNK_LOG2,
    ) -> None:
        self._file = file
        self._total = header.total_bytes
        self._left = self._total
        self._progress = progress
        front = MAGIC + bytes([VERSION, passphrase is not None])
        self._body: _Plain | _Sealed = _Plain(file)
        file.pwrite(front, 0)
        if passphrase is not None:
            seal = Seal(passphrase, front, salt, cost_log2=cost_log2, chunk_log2=chunk_log2)
            file.pwrite(seal.head, 0)
            self._body = _Sealed(file, seal)
        key = _clamped(tag_key)
        encoded = header.encode()
        head = _LENGTH.pack(len(encoded)) + encoded
        self._tag = Poly1305(key)
        self._tag.update(front + head)
        self._body.write(head + key)

    def write(self, data: Buffer) -> None:
        """Append table bytes: all of hub-to-client, then all of client-to-hub.

        Raises:
            ValueError: more than the header says.
        """
        if len(data) > self._left:
            raise ValueError("more table bytes than the header says")
        self._tag.update(data)
        self._body.write(data)
        self._left -= len(data)
        self._progress(self._total - self._left, self._total)

    def finish(self) -> None:
        """Write the tag and return once the file's bytes are durable."""
        if self._left:
            raise ValueError("fewer table bytes than the header says")
        self._body.write(self._tag.finalize())
        self._body.flush()
        self._file.sync()


class CourierReader:
    """Reads a courier file, front to back. Nothing is to be used before :meth:`finish`.

    Args:
        file: the courier file.
        passphrase: what it was sealed with, None for none.
        progress: told of table bytes.

    Raises:
        CallerError: no courier file, another version, too short or long, wrong passphrase;
            names the field, the problem and the remedy.
        IntegrityError: altered.
    """

    def __init__(
        self, file: ByteFile, *, passphrase: bytes | None = None, progress: Progress = no_progress
    ) -> None:
        self._progress = progress
        self._body = _opened(file, passphrase)
        self.is_sealed = isinstance(self._body, _Sealed)
        body_bytes = self._body.body_bytes
        head = self._body.read(_LENGTH.size)
        (length,) = _LENGTH.unpack(head)
        if length > MAX_HEADER_BYTES:
            raise header_error("header", "is too long")
        encoded = self._body.read(length)
        self.header = PsrdHeader.decode(encoded)
        expected = _LENGTH.size + length + KEY_BYTES + self.header.total_bytes + TAG_BYTES
        if body_bytes < expected:
            raise _truncated(expected - body_bytes)
        if body_bytes > expected:
            raise CallerError(
                "courier file: has bytes after its end; the file is damaged: fetch it again",
                facts={"bytes": body_bytes - expected},
            )
        key = self._body.read(KEY_BYTES)
        if key != _clamped(key):
            raise _altered()
        self._tag = Poly1305(key)
        self._tag.update(file.pread(FRONT_BYTES, 0) + head + encoded)
        self._left = self.header.total_bytes

    def read(self, count: int) -> bytes:
        """The next table bytes: hub-to-client first, then client-to-hub.

        Args:
            count: at most what is left.

        Raises:
            IntegrityError: altered.
        """
        if not 0 < count <= self._left:
            raise ValueError("not so many table bytes left")
        data = self._body.read(count)
        self._tag.update(data)
        self._left -= count
        self._progress(self.header.total_bytes - self._left, self.header.total_bytes)
        return data

    def finish(self) -> None:
        """Check the tag after all table bytes; only now may they be used.

        Raises:
            IntegrityError: header or table were altered.
        """
        if self._left:
            raise ValueError("table bytes left")
        try:
            self._tag.verify(self._body.read(TAG_BYTES))
        except InvalidSignature as error:
            raise _altered() from error


def wipe_bytes(file: ByteFile) -> None:
    """Overwrite a courier file with zeros, durably; flash may keep old blocks all the same.

    The magic stays, so that a file whose removal a crash cut short is still known for what it was.
    """
    size = file.size()
    for at in range(len(MAGIC), size, _WIPE_BYTES):
        file.pwrite(bytes(min(_WIPE_BYTES, size - at)), at)
    file.sync()


def _opened(file: ByteFile, passphrase: bytes | None) -> _Plain | _Sealed:
    front = file.pread(psrd_seal.CHUNKS_AT, 0)
    if front[:6] != MAGIC[: len(front)] or not front:
        raise CallerError("courier file: is not one; name the file that 'keymesh psrd issue' wrote")
    if len(front) < FRONT_BYTES:
        raise _truncated(FRONT_BYTES - len(front))
    if front[6] != VERSION:
        raise CallerError(
            "courier file: version is not one that this release reads; use the release that issued it, or a "
            "later one",
            facts={"version": front[6], "known": VERSION},
        )
    if front[7] == 0:
        if passphrase is not None:
            raise CallerError("passphrase: the courier file has none; import it without")
        return _Plain(file)
    if front[7] != 1:
        raise header_error("sealing", "is unknown")
    if passphrase is None:
        raise CallerError("passphrase: the courier file is sealed with one; give it")
    if len(front) < psrd_seal.CHUNKS_AT:
        raise _truncated(psrd_seal.CHUNKS_AT - len(front))
    return _Sealed(file, Seal.opened(passphrase, front))


def _clamped(key: bytes) -> bytes:
    return bytes(one & mask for one, mask in zip(key[:16], _CLAMP, strict=True)) + key[16:]


def _truncated(missing: int) -> CallerError:
    return CallerError(
        "courier file: is truncated; copy it again in full", facts={"missing_bytes_at_least": missing}
    )


def _altered() -> IntegrityError:
    return IntegrityError(
        "courier file: was altered or damaged on the way; nothing of it is used: fetch it again",
        reason=ErrorReason.TAG_MISMATCH,
    )
