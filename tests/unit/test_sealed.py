"""Sealed messages: what the tag covers, what opens, what does not (protocol 4.8)."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from mesh.core.sealed import (
    Envelope,
    answer_tag,
    decode_attachment,
    encode_attachment,
    seal,
    slots_needed,
    unseal,
    verify_answer,
)
from mesh.errors import PeerError, TagMismatchError

ENVELOPE = Envelope("a", "b", 3, 700, 5, b"j" * 16, 9, 4)
TAGS, KEYS = os.urandom(16 * 5), os.urandom(32 * 5)


@pytest.mark.parametrize(("size", "slots"), [(1, 2), (32, 2), (33, 3), (64, 3), (65, 4)])
def test_one_slot_for_the_answer_and_one_per_32_bytes(size: int, slots: int) -> None:
    assert slots_needed(size) == slots


def test_opens_what_was_sealed_and_hides_it() -> None:
    body = b"x" * 100
    ciphertext, tag = seal(ENVELOPE, body, tag_parts=TAGS, key_parts=KEYS)
    assert len(ciphertext) == 100
    assert unseal(ENVELOPE, ciphertext, tag, tag_parts=TAGS, key_parts=KEYS) == body
    # The first key part is the answer's key: never pad.
    assert ciphertext[:32] == bytes(a ^ b for a, b in zip(body, KEYS[32:64], strict=False))


def test_every_field_is_covered() -> None:
    ciphertext, tag = seal(ENVELOPE, b"x" * 100, tag_parts=TAGS, key_parts=KEYS)
    others = [
        replace(ENVELOPE, source="c"),
        replace(ENVELOPE, target="c"),
        replace(ENVELOPE, epoch=4),
        replace(ENVELOPE, first_slot=701),
        replace(ENVELOPE, job_id=b"k" * 16),
        replace(ENVELOPE, job_number=10),
        replace(ENVELOPE, lowest_open_job=5),
    ]
    for other in others:
        with pytest.raises(TagMismatchError):
            unseal(other, ciphertext, tag, tag_parts=TAGS, key_parts=KEYS)
    with pytest.raises(TagMismatchError):
        unseal(ENVELOPE, b"y" + ciphertext[1:], tag, tag_parts=TAGS, key_parts=KEYS)
    with pytest.raises(PeerError):
        unseal(replace(ENVELOPE, slot_count=6), ciphertext, tag, tag_parts=TAGS, key_parts=KEYS + bytes(32))


def test_too_few_slots_for_a_body_is_our_own_fault() -> None:
    with pytest.raises(ValueError, match="too few"):
        seal(ENVELOPE, bytes(129), tag_parts=TAGS, key_parts=KEYS)


def test_the_answer_is_bound_to_message_and_job() -> None:
    tag = answer_tag(KEYS, ENVELOPE.job_id, b"yes")
    verify_answer(KEYS[:32], ENVELOPE, b"yes", tag)
    for envelope, answer in ((ENVELOPE, b"no"), (replace(ENVELOPE, job_id=b"k" * 16), b"yes")):
        with pytest.raises(TagMismatchError):
            verify_answer(KEYS[:32], envelope, answer, tag)


def test_attachments_carry_their_job() -> None:
    plaintext = encode_attachment(b"j" * 16, 7, 3, b"body")
    assert decode_attachment(plaintext) == (b"j" * 16, 7, 3, b"body")
    with pytest.raises(PeerError):
        decode_attachment(plaintext[:32])
