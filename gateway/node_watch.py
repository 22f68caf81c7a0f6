"""Whether the node can be reached, for ``/readyz``: a stream of levels held open says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from mesh.client import MeshClient, MeshError

_LOG = logging.getLogger("keymesh.gateway")
_RETRY_S = 1.0
_REOPEN_S = 0.1
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
        """Hold the stream open, again and again; one that stood and ended is opened again at once."""
        loop = asyncio.get_running_loop()
        while True:
            stood = False
            cause = "the node ended the stream"
            grace = loop.call_later(_GRACE_S, self._tell, True, "")
            try:
                async for _ in self._client.watch_levels():
                    stood = True
                    self._tell(True, "")
            except MeshError as error:
                cause = str(error)
            finally:
                grace.cancel()
            if not stood:
                self._tell(False, cause)
            await asyncio.sleep(_REOPEN_S if stood else _RETRY_S)

    def _tell(self, is_reachable: bool, cause: str) -> None:
        if is_reachable != self._is_reachable:
            self._is_reachable = is_reachable
            if is_reachable:
                _LOG.info("node reachable")
            else:
                _LOG.warning("node unreachable", extra={"cause": cause})
