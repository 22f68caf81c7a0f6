"""Natural batching: many callers share one RPC, and nobody waits for company.

Owns when a batch leaves and which requests it carries. A request that finds fewer than
two RPCs in flight leaves in this turn of the event loop, together with whatever else came
in it; under load the next batch is what gathered meanwhile. There is no timer in front
of a request and no fixed size. (With one RPC, gateway and node wait for each other: a
tenth to a fifth fewer calls of one key, a third fewer keys in calls of 128. With three,
batches are so small that calls of one key get dearer.)

The answer to a batch comes when its slowest element is done, so slowness must not be
shared: an RPC that takes long no longer counts as in flight, and the pairs in it
travel apart from all others until they are quick again.

A caller that gives up before its request left costs nothing. Afterwards whatever the
node hands out for it counts as handed out.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

import grpc

from mesh.errors import NOTHING_HAPPENED, ErrorReason, MeshError, PeerError, ShortageError, UnavailableError
from mesh.rpc.status import error_from_rpc, make_error

_LOG = logging.getLogger("keymesh.client")
IN_FLIGHT = 2
MAX_BATCH = 256
# A batch's answers must fit into one message of 4 MiB.
MAX_BATCH_BYTES = 3 * 1024 * 1024
QUEUE_LIMIT = 8192
MAX_RPCS = 64
SLOW_AFTER_S = 0.025
_APART_LIMIT = 1024

_Request = TypeVar("_Request")
_Result = TypeVar("_Result")


class _Item(Generic[_Request, _Result]):
    """One caller's request, waiting or sent."""

    __slots__ = ("deadline_s", "future", "has_left", "pair", "request", "weight")

    def __init__(
        self,
        request: _Request,
        pair: Hashable,
        weight: int,
        deadline_s: float,
        future: asyncio.Future[_Result],
    ) -> None:
        self.request = request
        self.pair = pair
        self.weight = weight
        self.deadline_s = deadline_s
        self.future = future
        self.has_left = False


class _Queue(Generic[_Request, _Result]):
    """Requests that may share an RPC, and the start times of their quick RPCs."""

    __slots__ = ("in_flight", "is_scheduled", "relief", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[_Item[_Request, _Result]] = deque()
        self.in_flight: set[_Batch[_Request, _Result]] = set()
        self.is_scheduled = False
        self.relief: asyncio.TimerHandle | None = None


class _Batch(Generic[_Request, _Result]):
    """Requests that travel together."""

    __slots__ = ("items", "queue", "started_s")

    def __init__(
        self,
        items: list[_Item[_Request, _Result]],
        queue: _Queue[_Request, _Result],
        started_s: float,
    ) -> None:
        self.items = items
        self.queue = queue
        self.started_s = started_s


class Batcher(Generic[_Request, _Result]):
    """Gathers requests of one method into RPCs.

    Args:
        send: performs one RPC: requests and seconds to its deadline in, one result per
            request out, in order. A result that is a MeshError is raised to its caller.
    """

    def __init__(
        self, send: Callable[[Sequence[_Request], float], Awaitable[Sequence[_Result | MeshError]]]
    ) -> None:
        self._send = send
        self._shared: _Queue[_Request, _Result] = _Queue()
        self._apart: OrderedDict[Hashable, _Queue[_Request, _Result]] = OrderedDict()
        self._rpcs: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._is_closed = False

    async def submit(self, request: _Request, *, pair: Hashable, weight: int, timeout_s: float) -> _Result:
        """Sends a request in the next batch and waits for its own result.

        Args:
            request: one element.
            pair: whom it concerns; what is slow for one pair must not slow others.
            weight: upper bound of the bytes of its answer.
            timeout_s: seconds after which the caller gets DEADLINE_EXCEEDED.

        Raises:
            MeshError: the element's own failure, or why the RPC failed.
            ShortageError: BUSY, too many requests wait already.
        """
        if self._is_closed:
            raise UnavailableError(
                "client is closed", reason=ErrorReason.SHUTTING_DOWN, facts=NOTHING_HAPPENED
            )
        if self._waiting >= QUEUE_LIMIT:
            raise ShortageError("too many requests wait", reason=ErrorReason.BUSY, retry_after_s=1.0)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Result] = loop.create_future()
        queue = (self._apart.get(pair) if self._apart else None) or self._shared
        item = _Item(request, pair, weight, loop.time() + timeout_s, future)
        queue.waiting.append(item)
        self._waiting += 1
        self._wake(queue, loop)
        timer = loop.call_later(timeout_s, _expire, item)
        try:
            return await future
        finally:
            timer.cancel()

    async def close(self) -> None:
        """Fails what waits and what is in flight; the keys of the latter count as handed out."""
        self._is_closed = True
        for queue in (self._shared, *self._apart.values()):
            for item in queue.waiting:
                closed = UnavailableError(
                    "client is closed", reason=ErrorReason.SHUTTING_DOWN, facts=NOTHING_HAPPENED
                )
                _fail(item.future, closed)
            queue.waiting.clear()
            if queue.relief is not None:
                queue.relief.cancel()
        self._waiting = 0
        for task in self._rpcs:
            task.cancel()
        await asyncio.gather(*self._rpcs, return_exceptions=True)

    def _wake(self, queue: _Queue[_Request, _Result], loop: asyncio.AbstractEventLoop) -> None:
        if queue.is_scheduled:
            return
        if len(queue.in_flight) < IN_FLIGHT and len(self._rpcs) < MAX_RPCS:
            queue.is_scheduled = True
            loop.call_soon(self._flush, queue, loop)
        elif queue.relief is None:
            queue.relief = loop.call_later(SLOW_AFTER_S, self._relieve, queue, loop)

    def _flush(self, queue: _Queue[_Request, _Result], loop: asyncio.AbstractEventLoop) -> None:
        queue.is_scheduled = False
        items = self._gather(queue)
        if items:
            batch = _Batch(items, queue, loop.time())
            queue.in_flight.add(batch)
            task = loop.create_task(self._perform(batch, loop))
            self._rpcs.add(task)
            task.add_done_callback(self._rpcs.discard)
        if queue.waiting:
            self._wake(queue, loop)

    def _gather(self, queue: _Queue[_Request, _Result]) -> list[_Item[_Request, _Result]]:
        items: list[_Item[_Request, _Result]] = []
        total = 0
        while queue.waiting and len(items) < MAX_BATCH:
            item = queue.waiting[0]
            if not item.future.done():
                total += item.weight
                if items and total > MAX_BATCH_BYTES:
                    break
                item.has_left = True
                items.append(item)
            queue.waiting.popleft()
            self._waiting -= 1
        return items

    def _relieve(self, queue: _Queue[_Request, _Result], loop: asyncio.AbstractEventLoop) -> None:
        """Stops counting RPCs that take long, so that what waits behind them may go."""
        queue.relief = None
        if not queue.waiting:
            return
        if queue is self._shared:
            limit_s = loop.time() - SLOW_AFTER_S
            for batch in [batch for batch in queue.in_flight if batch.started_s <= limit_s]:
                queue.in_flight.discard(batch)
                self._set_apart(batch, loop)
        if queue.waiting:
            self._wake(queue, loop)

    def _set_apart(self, batch: _Batch[_Request, _Result], loop: asyncio.AbstractEventLoop) -> None:
        for item in batch.items:
            if item.pair not in self._apart:
                self._apart[item.pair] = _Queue()
        together: deque[_Item[_Request, _Result]] = deque()
        for item in self._shared.waiting:
            queue = self._apart.get(item.pair)
            if queue is None:
                together.append(item)
            else:
                queue.waiting.append(item)
                self._wake(queue, loop)
        self._shared.waiting = together
        while len(self._apart) > _APART_LIMIT:
            oldest = next((pair for pair, queue in self._apart.items() if _is_idle(queue)), None)
            if oldest is None:
                return
            del self._apart[oldest]

    async def _perform(self, batch: _Batch[_Request, _Result], loop: asyncio.AbstractEventLoop) -> None:
        timeout_s = max(item.deadline_s for item in batch.items) - loop.time()
        try:
            results = await self._send([item.request for item in batch.items], max(timeout_s, 0.001))
            _require_one_each(batch, results)
        except asyncio.CancelledError:
            self._fail_all(
                batch, UnavailableError("client is closed", reason=ErrorReason.SHUTTING_DOWN), None
            )
            raise
        except MeshError as exc:
            self._fail_all(batch, exc, exc)
        except grpc.RpcError as exc:
            self._fail_all(batch, error_from_rpc(exc), exc)
        except Exception as exc:  # noqa: BLE001 - whatever it is, callers must not wait for their deadline
            _LOG.error("batch failed for an internal reason", exc_info=exc)
            self._fail_all(batch, UnavailableError("internal error", reason=ErrorReason.INTERNAL), exc)
        else:
            for item, result in zip(batch.items, results, strict=True):
                if item.future.done():
                    continue
                if isinstance(result, MeshError):
                    item.future.set_exception(result)
                else:
                    item.future.set_result(result)
        finally:
            self._finish(batch, loop)

    def _finish(self, batch: _Batch[_Request, _Result], loop: asyncio.AbstractEventLoop) -> None:
        queue = batch.queue
        queue.in_flight.discard(batch)
        is_slow = loop.time() - batch.started_s > SLOW_AFTER_S
        if queue is not self._shared:
            pair = batch.items[0].pair
            if not is_slow and _is_idle(queue) and self._apart.get(pair) is queue:
                del self._apart[pair]
        elif is_slow:
            self._set_apart(batch, loop)
        if queue.waiting and not self._is_closed:
            self._wake(queue, loop)

    def _fail_all(
        self, batch: _Batch[_Request, _Result], error: MeshError, cause: BaseException | None
    ) -> None:
        for item in batch.items:
            # An exception of its own for each: one instance raised in many tasks grows tracebacks.
            own = make_error(
                error.reason, error.message, retry_after_s=error.retry_after_s, facts=error.facts
            )
            own.__cause__ = cause
            _fail(item.future, own)


def _require_one_each(batch: _Batch[_Request, _Result], results: Sequence[object]) -> None:
    if len(results) != len(batch.items):
        raise PeerError(
            "node answered another number of results than requests",
            facts={"requests": len(batch.items), "results": len(results)},
        )


def _is_idle(queue: _Queue[_Request, _Result]) -> bool:
    return not queue.waiting and not queue.in_flight and not queue.is_scheduled


def _expire(item: _Item[_Request, _Result]) -> None:
    late = UnavailableError(
        "node did not answer in time",
        reason=ErrorReason.DEADLINE_EXCEEDED,
        facts={} if item.has_left else NOTHING_HAPPENED,
    )
    _fail(item.future, late)


def _fail(future: asyncio.Future[_Result], error: MeshError) -> None:
    if not future.done():
        future.set_exception(error)
