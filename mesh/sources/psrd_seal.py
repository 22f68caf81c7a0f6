"""The passphrase layer of a courier file: scrypt and AES-256-GCM in chunks. Computational.

A thief of the file who can guess the passphrase, or break AES, has the table: this layer
buys time against loss and curiosity, nothing more, and no claim of information-theoretic
security rests on it. Chunks are bound to their file, number and to which is the last
(the STREAM construction), so none can be dropped, moved or cut off.

After the eight bytes of magic, version and sealing:

====== ===== ========================================================
offset bytes
====== ===== ========================================================
8      1     log2 of scrypt's cost N (r = 8, p = 1)
9      1     log2 of the chunk size
10     16    salt, random
26     16    lock: the tag of an empty message under nonce 0 and the 26
             bytes before, tells a wrong passphrase from damage
42     ..    chunks: ciphertext and 16 bytes of tag; all but the last
             full; nonce = number from 1 (11 bytes), 1 if last (1 byte);
             associated data = lock
====== ===== ========================================================
"""

from __future__ import annotations

import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from mesh.core.secret import Buffer
from mesh.errors import CallerError, ErrorReason, IntegrityError

SALT_BYTES = 16
TAG_BYTES = 16
CHUNKS_AT = 42
COST_LOG2 = 17
CHUNK_LOG2 = 20
#: scrypt at 2^18 takes 256 MiB; a damaged byte must not ask for more.
_COSTS = range(10, 19)
_CHUNKS = range(6, 23)
_FIELDS = struct.Struct(">BB16s")


class Seal:
    """The key of one sealed file.

    Args:
        passphrase: at least one byte.
        front: magic, version and sealing, 8 bytes.
        salt: 16 random bytes, fresh for each file.
        cost_log2: work and memory (2^(cost + 10) bytes) of one guess.
        chunk_log2: plaintext bytes of a chunk.
    """

    def __init__(
        self,
        passphrase: bytes,
        front: bytes,
        salt: bytes,
        *,
        cost_log2: int = COST_LOG2,
        chunk_log2: int = CHUNK_LOG2,
    ) -> None:
        if not passphrase:
            raise CallerError("passphrase: is empty; give one, or none at all")
        head = front + _FIELDS.pack(cost_log2, chunk_log2, salt)
        key = Scrypt(salt=salt, length=32, n=1 << cost_log2, r=8, p=1).derive(passphrase)
        self._cipher = AESGCM(key)
        self.chunk_bytes = 1 << chunk_log2
        self._lock = self._cipher.encrypt(bytes(12), b"", head)
        self.head = head + self._lock

    @classmethod
    def opened(cls, passphrase: bytes, head: bytes) -> Seal:
        """The seal of an existing file, from its first 42 bytes.

        Raises:
            CallerError: another passphrase, or a head that no hub writes.
        """
        cost_log2, chunk_log2, salt = _FIELDS.unpack_from(head, 8)
        if cost_log2 not in _COSTS or chunk_log2 not in _CHUNKS:
            raise CallerError("courier file: sealing is out of bounds; the file is damaged: fetch it again")
        seal = cls(passphrase, head[:8], salt, cost_log2=cost_log2, chunk_log2=chunk_log2)
        if seal.head != head:
            raise CallerError(
                "passphrase: does not open the courier file; give the one used at issue (or the file's first "
                "bytes are damaged: fetch it again)",
                reason=ErrorReason.NOT_AUTHORIZED,
            )
        return seal

    def lock_chunk(self, number: int, data: Buffer, *, is_last: bool) -> bytes:
        """Encrypt chunk ``number``, from 1."""
        return self._cipher.encrypt(_nonce(number, is_last), data, self._lock)

    def open_chunk(self, number: int, data: Buffer, *, is_last: bool) -> bytes:
        """Decrypt chunk ``number``, from 1.

        Raises:
            IntegrityError: it was altered, moved or cut.
        """
        try:
            return self._cipher.decrypt(_nonce(number, is_last), data, self._lock)
        except InvalidTag as error:
            raise IntegrityError(
                "courier file: was altered or damaged on the way; nothing of it is used: fetch it again",
                reason=ErrorReason.TAG_MISMATCH,
            ) from error


def _nonce(number: int, is_last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([is_last])
