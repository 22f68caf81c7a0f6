"""The first span of each request: the others of the trace are its children, in whatever process."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.exchange import Answer, Api, HttpRefusal, Request
from mesh.ops.logging import origin, serving
from mesh.ops.tracing import is_traced, span


def traced(api: Api) -> Api:
    """The same interface with a span around each answer; the very same where tracing is off."""
    return Traced(api) if is_traced() else api


class Traced:
    """An ``Api`` whose requests are traced."""

    def __init__(self, api: Api) -> None:
        self._api = api

    @property
    def methods(self) -> Sequence[str]:
        """See ``Api``."""
        return self._api.methods

    async def answer(self, request: Request) -> Answer:
        """See ``Api``."""
        # A request that another operator passed on has its first span there.
        is_first = origin(request.request_id) == request.request_id
        with serving(request.request_id), span(request.verb, is_first=is_first) as own:
            answer = await self._api.answer(request)
            own.name(f"{request.verb} {answer.method}")
            own.note({"http.response.status_code": answer.status, "keymesh.reason": answer.reason})
            return answer

    async def refuse_stranger(self, request: Request) -> Answer:
        """See ``Api``; strangers leave no traces."""
        return await self._api.refuse_stranger(request)

    def refused(self, refusal: HttpRefusal) -> Answer:
        """See ``Api``."""
        return self._api.refused(refusal)
