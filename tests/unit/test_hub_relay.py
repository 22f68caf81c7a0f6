"""A hub's policy has the last word: what it counts is what was spent, and it hides no other reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from mesh.core.network import Grade
from mesh.core.network_parse import parse_document
from mesh.core.policy import Rate
from mesh.core.secret import Buffer
from mesh.core.transfer import SlotKind, TransferHeader, TransferId
from mesh.errors import ErrorReason, MeshError
from mesh.hub.hub import HubRelay
from mesh.hub.policy import HubRule, RulePolicy
from mesh.node.keyports import Surroundings
from mesh.ops.alarms import Alarms
from mesh.v1.link_pb2 import ShareItem
from tests.fakes.key_network import Documents
from tests.fakes.link_wire import Wire
from tests.fault.test_key_attacks import DIAMOND

ROUTES = tuple(("kme-a", hub, "kme-z") for hub in ("hub-1", "hub-2", "hub-3"))
HEADER = TransferHeader(
    TransferId("kme-a", "kme-z", 0, 0), 1, SlotKind.KEYS, Grade.parse("dske(2,3)"), ROUTES, 2_000_000_000
)
SIZE = HEADER.length_bytes


class Hub:
    """A hub whose policy has tokens for one share, and its link with the target."""

    def __init__(self) -> None:
        wire = Wire([("kme-a", "hub-1"), ("hub-1", "kme-z")], filled=1 << 20)
        around = Surroundings(
            own_id="hub-1",
            now_s=lambda: 0.0,
            monotonic_s=lambda: 0.0,
            randomness=os.urandom,
            alarms=Alarms(),
        )
        self.relay = HubRelay(
            around,
            links=wire.planes["hub-1"],
            directory=Documents(parse_document(DIAMOND)),
            bulk_floor_bytes=4096,
            policy=RulePolicy((HubRule(("kme-a",), ("*",), rate=Rate(1, SIZE)),)),
        )
        self.link = wire.planes["hub-1"].ends["kme-z"]
        self.sent: list[Buffer] = []

        def enqueue(share: ShareItem, value: Buffer) -> None:
            self.sent.append(value)

        self.link.enqueue = enqueue  # type: ignore[method-assign]

    def forward(self, header: TransferHeader = HEADER, *, priority: int = 1) -> ErrorReason | None:
        """One share; the reason of its refusal."""
        item = ShareItem(
            header=header.encode(), tag=bytes(16), route=0, hop=0, length_bytes=SIZE, priority=priority
        )
        try:
            self.relay.forward(header, item, bytes(SIZE), "kme-z")
        except MeshError as error:
            return error.reason
        return None


def closed(hub: Hub) -> None:
    hub.link.is_open = False


def empty(hub: Hub) -> None:
    hub.link.lane.position = hub.link.lane.filled - 4096


def untouched(_hub: Hub) -> None:
    """Nothing is wrong with it."""


@pytest.mark.parametrize(
    ("trouble", "header", "reason"),
    [
        (closed, HEADER, ErrorReason.NO_ROUTE),
        (empty, HEADER, ErrorReason.OUT_OF_MATERIAL),
        (untouched, replace(HEADER, grade=Grade.parse("dske(1,3)")), ErrorReason.PROTOCOL_VIOLATION),
    ],
    ids=["closed", "empty", "not-granted"],
)
async def test_a_share_that_cannot_go_on_takes_no_token(
    trouble: Callable[[Hub], None], header: TransferHeader, reason: ErrorReason
) -> None:
    hub = Hub()
    is_open, position = hub.link.is_open, hub.link.lane.position
    trouble(hub)
    for _ in range(3):
        assert hub.forward(header, priority=0) is reason
    hub.link.is_open, hub.link.lane.position = is_open, position
    assert hub.forward() is None
    assert hub.forward() is ErrorReason.QUOTA_EXCEEDED
    assert hub.sent == [bytes(SIZE)]
