"""Natural batching: what travels together, what does not wait, and what a cancel costs.

No clock is waited for: batches are held by futures that a test resolves. Only the
tests of slowness lower the threshold to zero and let the loop turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import pytest

from mesh.client import batching
from mesh.client.batching import Batcher
from mesh.errors import (
    NOTHING_HAPPENED,
    CallerError,
    ErrorReason,
    MeshError,
    PeerError,
    ShortageError,
    UnavailableError,
)


class Node:
    """Holds each batch until a test lets it go."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.timeouts_s: list[float] = []
        self.held: list[asyncio.Future[None]] = []
        self.failure: Exception | None = None

    async def send(self, requests: Sequence[str], timeout_s: float) -> Sequence[str | MeshError]:
        self.batches.append(list(requests))
        self.timeouts_s.append(timeout_s)
        self.held.append(asyncio.get_running_loop().create_future())
        await self.held[-1]
        if self.failure is not None:
            raise self.failure
        return [CallerError("refused") if request == "bad" else request.upper() for request in requests]


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def batcher(node: Node, monkeypatch: pytest.MonkeyPatch) -> Batcher[str, str]:
    """With one RPC in flight, so that one that is held makes the others wait."""
    monkeypatch.setattr(batching, "IN_FLIGHT", 1)
    return Batcher(node.send)


def ask(
    batcher: Batcher[str, str], request: str, *, pair: str = "p", weight: int = 1, timeout_s: float = 60
) -> asyncio.Task[str]:
    return asyncio.ensure_future(batcher.submit(request, pair=pair, weight=weight, timeout_s=timeout_s))


async def turn() -> None:
    """Lets everything that is ready run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_alone_a_request_leaves_at_once(node: Node, batcher: Batcher[str, str]) -> None:
    task = ask(batcher, "a")
    await turn()
    assert node.batches == [["a"]]
    node.held[0].set_result(None)
    assert await task == "A"


async def test_what_comes_in_one_turn_travels_together_in_order(
    node: Node, batcher: Batcher[str, str]
) -> None:
    tasks = [ask(batcher, name) for name in "abc"]
    await turn()
    assert node.batches == [["a", "b", "c"]]
    node.held[0].set_result(None)
    assert await asyncio.gather(*tasks) == ["A", "B", "C"]


async def test_one_in_flight_the_rest_gathers(node: Node, batcher: Batcher[str, str]) -> None:
    tasks = []
    for name in "abc":
        tasks.append(ask(batcher, name))
        await turn()
    assert len(node.batches) == 1
    node.held[0].set_result(None)
    await turn()
    assert node.batches == [["a"], ["b", "c"]]
    node.held[1].set_result(None)
    assert await asyncio.gather(*tasks) == ["A", "B", "C"]


async def test_two_in_flight_by_default_the_rest_gathers(node: Node) -> None:
    batcher = Batcher(node.send)
    tasks = []
    for name in "abcd":
        tasks.append(ask(batcher, name))
        await turn()
    assert node.batches == [["a"], ["b"]]
    node.held[1].set_result(None)
    await turn()
    assert node.batches == [["a"], ["b"], ["c", "d"]]
    node.held[0].set_result(None)
    node.held[2].set_result(None)
    assert await asyncio.gather(*tasks) == ["A", "B", "C", "D"]


async def test_batches_are_bounded_by_count_and_bytes(node: Node, batcher: Batcher[str, str]) -> None:
    tasks = [ask(batcher, f"r{number}") for number in range(batching.MAX_BATCH + 1)]
    tasks += [ask(batcher, "h", weight=batching.MAX_BATCH_BYTES) for _ in range(2)]
    for sent in range(4):
        await turn()
        assert len(node.held) == sent + 1
        node.held[sent].set_result(None)
    await asyncio.gather(*tasks)
    assert [len(batch) for batch in node.batches] == [batching.MAX_BATCH, 1, 1, 1]


async def test_one_elements_failure_is_its_own(node: Node, batcher: Batcher[str, str]) -> None:
    tasks = [ask(batcher, name) for name in ("a", "bad", "c")]
    await turn()
    node.held[0].set_result(None)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert (results[0], results[2]) == ("A", "C")
    assert isinstance(results[1], CallerError)


async def test_cancelled_before_it_left_costs_nothing(node: Node, batcher: Batcher[str, str]) -> None:
    first = ask(batcher, "a")
    await turn()
    waiting, other = ask(batcher, "b"), ask(batcher, "c")
    await turn()
    waiting.cancel()
    await turn()
    node.held[0].set_result(None)
    await turn()
    assert node.batches == [["a"], ["c"]]
    node.held[1].set_result(None)
    assert [await first, await other] == ["A", "C"]


async def test_cancelled_after_it_left_the_others_get_theirs(node: Node, batcher: Batcher[str, str]) -> None:
    """The node hands out the key all the same: it counts as handed out."""
    tasks = [ask(batcher, name) for name in "ab"]
    await turn()
    tasks[0].cancel()
    await turn()
    node.held[0].set_result(None)
    assert await tasks[1] == "B"
    assert tasks[0].cancelled()
    assert node.batches == [["a", "b"]]


async def test_only_a_request_that_never_left_certainly_changed_nothing(
    node: Node, batcher: Batcher[str, str]
) -> None:
    sent = ask(batcher, "a", timeout_s=0.01)
    await turn()
    waiting = ask(batcher, "b", timeout_s=0.001)
    for task, facts in ((waiting, NOTHING_HAPPENED), (sent, {})):
        with pytest.raises(UnavailableError) as caught:
            await task
        assert caught.value.facts == facts
    assert node.batches == [["a"]]
    await batcher.close()
    with pytest.raises(UnavailableError) as caught:
        await batcher.submit("c", pair="p", weight=1, timeout_s=1)
    assert caught.value.facts == NOTHING_HAPPENED


async def test_each_caller_has_its_own_deadline_the_rpc_the_longest(
    node: Node, batcher: Batcher[str, str]
) -> None:
    short, long = ask(batcher, "a", timeout_s=0.001), ask(batcher, "b", timeout_s=60)
    with pytest.raises(UnavailableError) as caught:
        await short
    assert caught.value.reason is ErrorReason.DEADLINE_EXCEEDED
    assert 59 < node.timeouts_s[0] <= 60
    node.held[0].set_result(None)
    assert await long == "B"


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata()),
            ErrorReason.PEER_UNREACHABLE,
        ),
        (ShortageError("x", reason=ErrorReason.BUSY), ErrorReason.BUSY),
        (ZeroDivisionError(), ErrorReason.INTERNAL),
    ],
)
async def test_a_failed_rpc_fails_each_with_an_error_of_its_own(
    node: Node, batcher: Batcher[str, str], failure: Exception, reason: ErrorReason
) -> None:
    node.failure = failure
    tasks = [ask(batcher, name) for name in "ab"]
    await turn()
    node.held[0].set_result(None)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [result.reason for result in results if isinstance(result, MeshError)] == [reason] * 2
    assert results[0] is not results[1]


async def test_a_wrong_number_of_results_is_the_nodes_fault() -> None:
    async def send(requests: Sequence[str], timeout_s: float) -> Sequence[str | MeshError]:
        return []

    with pytest.raises(PeerError):
        await Batcher(send).submit("a", pair="p", weight=1, timeout_s=1)


async def test_the_queue_is_bounded(
    node: Node, batcher: Batcher[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "QUEUE_LIMIT", 2)
    tasks = []
    for name in "abc":
        tasks.append(ask(batcher, name))
        await turn()
    with pytest.raises(ShortageError) as caught:
        await batcher.submit("d", pair="p", weight=1, timeout_s=1)
    assert caught.value.reason is ErrorReason.BUSY
    assert caught.value.retry_after_s > 0
    node.held[0].set_result(None)
    await turn()
    node.held[1].set_result(None)
    await asyncio.gather(*tasks)


async def test_closing_fails_what_waits_and_what_flies(node: Node, batcher: Batcher[str, str]) -> None:
    tasks = []
    for name in "abc":
        tasks.append(ask(batcher, name))
        await turn()
    await batcher.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {result.reason for result in results if isinstance(result, MeshError)} == {
        ErrorReason.SHUTTING_DOWN
    }
    with pytest.raises(UnavailableError):
        await batcher.submit("d", pair="p", weight=1, timeout_s=1)


async def test_slow_pairs_hold_nobody_else_up(
    node: Node, batcher: Batcher[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "SLOW_AFTER_S", 0.0)
    slow = ask(batcher, "s1", pair="slow")
    await turn()
    # The RPC in flight does not come back: others go all the same, also of its own pair.
    quick = ask(batcher, "q", pair="quick")
    again = ask(batcher, "s2", pair="slow")
    while len(node.batches) < 3:  # noqa: ASYNC110 - the batcher's own timer is what is waited for
        await asyncio.sleep(0)
    assert sorted(node.batches[1:]) == [["q"], ["s2"]]
    monkeypatch.setattr(batching, "SLOW_AFTER_S", 60.0)
    node.held[node.batches.index(["q"])].set_result(None)
    assert await quick == "Q"
    assert not any(task.done() for task in (slow, again))
    for held in node.held:
        if not held.done():
            held.set_result(None)
    assert [await slow, await again] == ["S1", "S2"]
    # Quick again: together with everybody.
    together = [ask(batcher, name, pair=pair) for name, pair in (("s", "slow"), ("q", "quick"))]
    await turn()
    assert node.batches[-1] == ["s", "q"]
    node.held[-1].set_result(None)
    await asyncio.gather(*together)
