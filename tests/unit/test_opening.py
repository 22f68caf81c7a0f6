"""Opening a link: who speaks first, and every verdict on a verified hello (protocol 1.8 to 1.10)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.core.lane import SLACK_BYTES, LaneLimits, ReaderLane, WriterLane
from mesh.core.opening import Hello, OurSide, judge, speaks_first
from mesh.core.ranges import Range
from mesh.errors import ErrorReason, PeerError, RolledBackError

LIMITS = LaneLimits.of(64 << 20)
US, BEFORE, PEER, PEER_AGAIN = b"u" * 16, b"v" * 16, b"p" * 16, b"q" * 16


def side(**changes: object) -> OurSide:
    writer = WriterLane(1, LIMITS, mark=2_000_000, reported=1_900_000)
    writer.add_material(Range(0, 30_000_000))
    reader = ReaderLane(1, LIMITS, mark=3_000_000)
    reader.add_material(Range(0, 30_000_000))
    ours = OurSide(
        is_dialler=True,
        writer=writer,
        reader=reader,
        is_unproven=False,
        was_open=False,
        peer_incarnation=PEER,
        incarnations={US, BEFORE},
    )
    return replace(ours, **changes)  # type: ignore[arg-type]


def hello(**changes: object) -> Hello:
    says = Hello(
        is_dialler=False,
        offset=3_000_000,
        receive_position=1_900_000,
        receive_mark=1_950_000,
        transmit_mark=3_050_000,
        known_incarnation=BEFORE,
        document_serial=0,
        window_bytes=LIMITS.window_bytes,
        incarnation=PEER,
    )
    return replace(says, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dialler", "proven", "peer", "first"),
    [
        (True, True, True, True),
        (False, True, True, False),
        (True, False, True, False),
        (False, True, False, True),
        (True, True, False, True),
        (False, False, True, False),
        (True, False, False, True),
        (False, False, False, False),
    ],
)
def test_who_speaks_first(dialler: bool, proven: bool, peer: bool, first: bool) -> None:
    assert speaks_first(is_dialler=dialler, is_proven=proven, peer_is_proven=peer) is first


def test_exactly_one_end_speaks_first() -> None:
    for dialler in (True, False):
        for acceptor in (True, False):
            first = speaks_first(is_dialler=True, is_proven=dialler, peer_is_proven=acceptor)
            second = speaks_first(is_dialler=False, is_proven=acceptor, peer_is_proven=dialler)
            assert first is not second


def test_an_honest_hello_moves_nothing() -> None:
    assert judge(hello(), side()) == 2_000_000


def test_a_writer_behind_its_receiver_jumps() -> None:
    assert judge(hello(receive_position=2_010_000, incarnation=PEER_AGAIN), side()) == 2_010_000


def test_an_unproven_writer_goes_beyond_the_window() -> None:
    expected = 1_900_000 + LIMITS.window_bytes + LIMITS.stride_bytes
    assert judge(hello(), side(is_unproven=True)) == expected
    wider = hello(window_bytes=2 * LIMITS.window_bytes)
    assert judge(wider, side(is_unproven=True)) == expected + LIMITS.window_bytes


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({"known_incarnation": b"x" * 16}, {}),
        ({"receive_position": 2_000_000 + LIMITS.stride_bytes + SLACK_BYTES + 1}, {}),
        ({"offset": 3_000_000 + 2 * (LIMITS.window_bytes + LIMITS.stride_bytes) + 1}, {}),
        ({"receive_position": 2_000_001}, {"was_open": True}),
    ],
    ids=["unknown-start", "receiver-beyond-mark", "hello-far-ahead", "neither-restarted"],
)
def test_we_are_the_rollback(changes: dict[str, object], ours: dict[str, object]) -> None:
    with pytest.raises(RolledBackError):
        judge(hello(**changes), side(**ours))


@pytest.mark.parametrize(
    "changes",
    [
        {"known_incarnation": b""},
        {"receive_position": 2_000_000 + LIMITS.stride_bytes + SLACK_BYTES},
        {"offset": 3_000_000 + 2 * (LIMITS.window_bytes + LIMITS.stride_bytes)},
    ],
    ids=["knows-nobody", "receiver-at-bound", "hello-at-bound"],
)
def test_bounds_are_met_exactly(changes: dict[str, object]) -> None:
    judge(hello(**changes), side())


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({"transmit_mark": 3_000_000 - LIMITS.stride_bytes - SLACK_BYTES - 1}, {}),
        ({"receive_position": 1_900_000 - LIMITS.stride_bytes - SLACK_BYTES - 1}, {}),
        ({"offset": 2_999_999}, {"was_open": True}),
        ({"receive_position": 1_899_999}, {"was_open": True}),
    ],
    ids=["writer-behind", "reader-behind", "same-start-offset", "same-start-position"],
)
def test_the_peer_is_the_rollback(changes: dict[str, object], ours: dict[str, object]) -> None:
    with pytest.raises(PeerError) as caught:
        judge(hello(**changes), side(**ours))
    assert caught.value.reason is ErrorReason.PEER_REFUSED


def test_a_restarted_peer_may_be_a_little_behind() -> None:
    """A reader's mark runs ahead of what a writer that did not restart has sent."""
    judge(hello(offset=2_990_000, incarnation=PEER_AGAIN), side(was_open=True))


def test_both_ends_cannot_play_one_role() -> None:
    with pytest.raises(PeerError):
        judge(hello(is_dialler=True), side())
