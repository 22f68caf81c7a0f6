"""One long-lived stream for all batches to a node: half the cost of a call for each.

Owns the pairing of answers with batches. A stream that breaks fails every batch on it,
whose keys count as handed out; the next batch opens another. When the certificate is
renewed the channel changes: new batches take a new stream, the old one ends when its
last answer is there.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import grpc

from mesh.errors import NOTHING_HAPPENED, ErrorReason, MeshError, PeerError, UnavailableError
from mesh.rpc.status import error_from_failure, error_from_rpc, make_error
from mesh.v1.keys_pb2 import DeliverRequest, DeliverResponse, KeyResult
from mesh.v1.keys_pb2_grpc import KeyDeliveryStub

if TYPE_CHECKING:
    Call = grpc.aio.StreamStreamCall[DeliverRequest, DeliverResponse]


class _Stream:
    """One call of ``Deliver``."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._pending: dict[int, asyncio.Future[Sequence[KeyResult]]] = {}
        self._writing = asyncio.Lock()
        self._is_draining = False
        self.is_broken = False
        self.reader = asyncio.get_running_loop().create_task(self._read())

    async def ask(self, request: DeliverRequest, timeout_s: float) -> Sequence[KeyResult]:
        """Send a batch and wait for its results."""
        answer: asyncio.Future[Sequence[KeyResult]] = asyncio.get_running_loop().create_future()
        self._pending[request.batch_id] = answer
        facts = NOTHING_HAPPENED
        try:
            async with asyncio.timeout(timeout_s):
                async with self._writing:
                    facts = {}
                    await self._call.write(request)
                return await answer
        except TimeoutError as exc:
            raise UnavailableError(
                "node did not answer in time", reason=ErrorReason.DEADLINE_EXCEEDED, facts=facts
            ) from exc
        except (grpc.RpcError, asyncio.InvalidStateError) as exc:
            # The call ended before the batch was written; the reader knows why.
            await asyncio.wait([self.reader])
            error = answer.exception()
            cause = error if isinstance(error, MeshError) else _gone()
            raise make_error(
                cause.reason, cause.message, retry_after_s=cause.retry_after_s, facts=NOTHING_HAPPENED
            ) from exc
        finally:
            self._pending.pop(request.batch_id, None)
            self._end_if_drained()

    def drain(self) -> None:
        """Takes no more batches; ends once the last answer is there."""
        self._is_draining = True
        self._end_if_drained()

    def _end_if_drained(self) -> None:
        if self._is_draining and not self._pending:
            self._call.cancel()

    def close(self) -> None:
        """Ends the stream at once."""
        self._call.cancel()

    async def _read(self) -> None:
        error: MeshError = _gone()
        try:
            while isinstance(response := await self._call.read(), DeliverResponse):
                answer = self._pending.get(response.batch_id)
                if answer is None or answer.done():
                    continue
                if response.HasField("failure"):
                    answer.set_exception(error_from_failure(response.failure))
                else:
                    answer.set_result(response.results)
        except grpc.RpcError as exc:
            error = error_from_rpc(exc)
        except asyncio.CancelledError:
            # Cancelling the call ends a read this way; the batches below are told.
            error = _gone()
        finally:
            self.is_broken = True
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_exception(error)


class DeliveryStreams:
    """The stream in use to one node, and older ones that still owe answers.

    Args:
        channel: returns the channel to use now.
    """

    def __init__(self, channel: Callable[[], grpc.aio.Channel]) -> None:
        self._channel = channel
        self._used: grpc.aio.Channel | None = None
        self._stream: _Stream | None = None
        self._readers: set[asyncio.Task[None]] = set()
        self._batch_ids = itertools.count(1)

    async def ask(self, request: DeliverRequest, timeout_s: float, count: int) -> Sequence[KeyResult]:
        """Send a batch of ``count`` elements; one result for each.

        Raises:
            MeshError: the stream broke, time ran out, or the node refused the whole batch.
        """
        request.batch_id = next(self._batch_ids)
        request.timeout_ms = max(1, int(timeout_s * 1000))
        results = await self._current().ask(request, timeout_s)
        if len(results) != count:
            raise PeerError("node answered another number of results than requests")
        return results

    def _current(self) -> _Stream:
        channel = self._channel()
        stream = self._stream
        if stream is not None and not stream.is_broken and channel is self._used:
            return stream
        if stream is not None:
            stream.drain()
        self._used = channel
        self._stream = stream = _Stream(KeyDeliveryStub(channel).Deliver())
        self._readers.add(stream.reader)
        stream.reader.add_done_callback(self._readers.discard)
        return stream

    async def close(self) -> None:
        """End the stream; what is in flight fails, its keys count as handed out."""
        if self._stream is not None:
            self._stream.close()
        await asyncio.gather(*self._readers, return_exceptions=True)


def _gone() -> UnavailableError:
    return UnavailableError("the stream to the node ended", retry_after_s=1.0)
