"""Slots for sealed messages: more where messages flow, less where material is scarce."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.core.transfer import SLOT_BYTES
from mesh.errors import ShortageError
from mesh.v1.peer_pb2 import SealedMessage, VoidKeys
from tests.fakes.key_network import LINE, KeyNetwork

MESSAGE = SealedMessage(void_keys=VoidKeys(master_sae_id="sae-a", key_ids=[bytes(16)]))


async def test_a_scarce_route_is_asked_for_what_a_message_needs_after_more_has_failed(tmp_path: Path) -> None:
    network = KeyNetwork(tmp_path, LINE, filled=24 * SLOT_BYTES)
    await network.start()
    try:
        jobs = network.plane("kme-a").jobs
        with pytest.raises(ShortageError):
            await jobs.send("kme-c", MESSAGE, timeout_s=3.0)
        answer = await jobs.send("kme-c", MESSAGE, timeout_s=30.0)
        assert answer.lineage
    finally:
        await network.stop()


async def test_bursts_of_messages_are_given_more_at_a_time(tmp_path: Path) -> None:
    network = KeyNetwork(tmp_path, LINE)
    await network.start()
    try:
        jobs = network.plane("kme-a").jobs
        for _ in range(60):
            await jobs.send("kme-c", MESSAGE, timeout_s=30.0)
        book = network.plane("kme-a").reserves.outbound["kme-c"]
        transfers = sum(kind == "confirm" for kind, *_ in network.calls)
        # In batches of 32 they would be more.
        assert book.slots.assign_position > 100
        assert transfers <= 4
    finally:
        await network.stop()
