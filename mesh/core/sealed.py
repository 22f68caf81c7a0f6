"""Sealed messages between two KMEs: one-time-pad encrypted and one-time authenticated from sealed slots.

Owns the layout of protocol 4.8. A sealed message uses consecutive *sealed* slots of the sender's
reserve: the tag parts of the first two are its one-time Poly1305 key, the key part of the first is
the key of its single answer (sent as nothing: raw pad, so no generator decides it), the key parts of
the rest are its pad. Bodies are opaque here; what they mean is decided in ``mesh.node.deposits``.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.core import mac, otp
from mesh.core.transfer import KEY_PART_BYTES, TAG_PART_BYTES
from mesh.errors import PeerError

JOB_ID_BYTES = 16
MAX_BODY_BYTES = 256 * 1024
MIN_SLOTS = 2
_ATTACHMENT_HEAD = JOB_ID_BYTES + 16
_MESSAGE_LABEL = b"KMS\x01"
_ANSWER_LABEL = b"KMA\x01"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a sealed message says in clear, all of it under its tag.

    ``lowest_open_job``: results of this source's jobs with lower numbers may be forgotten.
    """

    source: str
    target: str
    epoch: int
    first_slot: int
    slot_count: int
    job_id: bytes
    job_number: int
    lowest_open_job: int

    def encode(self) -> bytes:
        """Canonical bytes, fields fixed or length-prefixed."""
        ids = b"".join(
            len(value).to_bytes(1, "big") + value for value in (self.source.encode(), self.target.encode())
        )
        numbers = (
            self.epoch.to_bytes(2, "big")
            + self.first_slot.to_bytes(8, "big")
            + self.slot_count.to_bytes(4, "big")
            + self.job_number.to_bytes(8, "big")
            + self.lowest_open_job.to_bytes(8, "big")
        )
        return ids + numbers + len(self.job_id).to_bytes(1, "big") + self.job_id


def slots_needed(body_bytes: int) -> int:
    """Sealed slots that a body takes: one for the answer key, the rest as pad; two at least."""
    return max(MIN_SLOTS, 1 + -(-body_bytes // KEY_PART_BYTES))


def seal(envelope: Envelope, body: bytes, *, tag_parts: bytes, key_parts: bytes) -> tuple[bytes, bytes]:
    """Encrypts and tags ``body``.

    Args:
        tag_parts: tag parts of the message's slots, in order (the first 32 bytes are used).
        key_parts: key parts of the message's slots, in order, ``32 * slot_count`` bytes.

    Returns:
        (ciphertext as long as the body, 16-byte tag).
    """
    _check_pad(envelope, len(body), tag_parts, key_parts)
    ciphertext = otp.xor(body, memoryview(key_parts)[KEY_PART_BYTES : KEY_PART_BYTES + len(body)])
    tag = mac.one_time_tag(tag_parts[: 2 * TAG_PART_BYTES], _MESSAGE_LABEL, envelope.encode(), ciphertext)
    return ciphertext, tag


def unseal(envelope: Envelope, ciphertext: bytes, tag: bytes, *, tag_parts: bytes, key_parts: bytes) -> bytes:
    """Verifies, then decrypts; the inverse of ``seal``.

    Raises:
        TagMismatchError: nothing of the plaintext leaves this function.
        PeerError: the sizes do not fit.
    """
    if not 0 < len(ciphertext) <= MAX_BODY_BYTES or slots_needed(len(ciphertext)) != envelope.slot_count:
        raise PeerError(
            "sealed message refused", facts={"field": "slot_count", "problem": "does not fit the ciphertext"}
        )
    _check_pad(envelope, len(ciphertext), tag_parts, key_parts)
    mac.verify_one_time_tag(
        tag_parts[: 2 * TAG_PART_BYTES], tag, _MESSAGE_LABEL, envelope.encode(), ciphertext
    )
    return otp.xor(ciphertext, memoryview(key_parts)[KEY_PART_BYTES : KEY_PART_BYTES + len(ciphertext)])


def answer_tag(key_parts: bytes, job_id: bytes, answer: bytes) -> bytes:
    """The 16-byte tag of the single answer, under the key part of the message's first slot.

    The caller keeps the invariant: one answer per message, stored and resent byte for byte.
    """
    return mac.one_time_tag(key_parts[:KEY_PART_BYTES], _ANSWER_LABEL, job_id, answer)


def verify_answer(key_part: bytes, envelope: Envelope, answer: bytes, tag: bytes) -> None:
    """Raises TagMismatchError unless the answer is the target's."""
    mac.verify_one_time_tag(key_part[:KEY_PART_BYTES], tag, _ANSWER_LABEL, envelope.job_id, answer)


def encode_attachment(job_id: bytes, job_number: int, lowest_open_job: int, body: bytes) -> bytes:
    """The plaintext of an attachment: job id (16) ‖ number (8) ‖ lowest open job (8) ‖ body."""
    return job_id + job_number.to_bytes(8, "big") + lowest_open_job.to_bytes(8, "big") + body


def decode_attachment(plaintext: bytes) -> tuple[bytes, int, int, bytes]:
    """The inverse of ``encode_attachment``.

    Raises:
        PeerError: too short.
    """
    if len(plaintext) <= _ATTACHMENT_HEAD:
        raise PeerError("attachment refused", facts={"field": "attachment", "problem": "cut short"})
    number = int.from_bytes(plaintext[JOB_ID_BYTES : JOB_ID_BYTES + 8], "big")
    lowest = int.from_bytes(plaintext[JOB_ID_BYTES + 8 : _ATTACHMENT_HEAD], "big")
    return plaintext[:JOB_ID_BYTES], number, lowest, plaintext[_ATTACHMENT_HEAD:]


def _check_pad(envelope: Envelope, body_bytes: int, tag_parts: bytes, key_parts: bytes) -> None:
    if envelope.slot_count < slots_needed(body_bytes):
        raise ValueError("too few sealed slots for the body")
    if len(tag_parts) < 2 * TAG_PART_BYTES or len(key_parts) != KEY_PART_BYTES * envelope.slot_count:
        raise ValueError("slot bytes do not fit the slot count")
