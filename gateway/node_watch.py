"""Whether the node can be reached, for ``/readyz``: a stream of levels held open says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from mesh.client import MeshClient, MeshError

_LOG = logging.getLogger("keymesh.gateway")
_RETRY_S = 1.0
# A node may have no level to tell; a stream that has not failed by then stands.
_GRACE_S = 2.0


class NodeWatch:
    """Follows one node's level stream until cancelled.

    Args:
        client: towards the node.
    """

    def __init__(self, client: MeshClient) -> None:
        self._client = client
        self._is_reachable = False

    def missing(self) -> Sequence[str]:
        """What stands between the gateway and serving; empty while the node is reachable."""
        return [] if self._is_reachable else ["node unreachable"]

    async def follow(self) -> None:
        """Hold the stream open, again and again."""
        loop = asyncio.get_running_loop()
        while True:
            grace = loop.call_later(_GRACE_S, self._tell, True)
            try:
                async for _ in self._client.watch_levels():
                    self._tell(True)
            except MeshError as error:
                _LOG.debug("level stream ended", extra={"cause": str(error), "reason": error.reason})
            finally:
                grace.cancel()
            self._tell(False)
            await asyncio.sleep(_RETRY_S)

    def _tell(self, is_reachable: bool) -> None:
        if is_reachable != self._is_reachable:
            self._is_reachable = is_reachable
            _LOG.info("node reachable" if is_reachable else "node unreachable")
