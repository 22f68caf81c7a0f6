"""What a target tells of refusals: each link speaks for its own share, of transfers whose tag it knows."""

from __future__ import annotations

from mesh.core.transfer import TransferId
from mesh.errors import ErrorReason
from mesh.node.refusals import Refusal, Refusals

HERE = TransferId("a", "z", 0, 7)
TAG, OTHER_TAG = b"t" * 16, b"o" * 16
REFUSAL = Refusal(ErrorReason.PROTOCOL_VIOLATION, 3)


def test_shares_count_once_for_each_link() -> None:
    refusals = Refusals()
    for link in ("h1", "h1", "h2"):
        refusals.add(HERE, TAG, REFUSAL, came_from=link)
    assert refusals.of_shares(HERE, TAG) == [REFUSAL, REFUSAL]
    assert refusals.of_transfer(HERE, TAG) is None


def test_who_does_not_know_the_tag_refuses_nothing() -> None:
    refusals = Refusals()
    refusals.add(HERE, OTHER_TAG, REFUSAL, came_from="h1")
    refusals.add(HERE, OTHER_TAG, REFUSAL)
    assert refusals.of_shares(HERE, TAG) == []
    assert refusals.of_transfer(HERE, TAG) is None
    assert refusals.of_transfer(HERE, OTHER_TAG) == REFUSAL


def test_a_flood_pushes_out_its_own_links_refusals_only() -> None:
    refusals = Refusals()
    refusals.add(HERE, TAG, REFUSAL)
    refusals.add(HERE, TAG, REFUSAL, came_from="h1")
    for slot in range(8, 5000):
        refusals.add(TransferId("a", "z", 0, slot), TAG, REFUSAL, came_from="h2")
    assert refusals.of_transfer(HERE, TAG) == REFUSAL
    assert refusals.of_shares(HERE, TAG) == [REFUSAL]
    assert sum(map(len, refusals._held.values())) == 2 + 1024
