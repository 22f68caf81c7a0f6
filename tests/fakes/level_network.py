"""A ``KeyNetwork`` whose routes come from a directory that tells levels, as they really are or as it says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mesh.core.network import NetworkDocument
from mesh.directory.port import LinkLevel, NodeLevels
from mesh.node.keyports import KeyPlaneConfig, RoutePort
from mesh.node.routing import DirectoryRoutes
from tests.fakes.key_network import KeyNetwork


class LevelDirectory:
    """What ``DirectoryRoutes`` asks of a directory."""

    def __init__(self, document: NetworkDocument) -> None:
        self.document = document
        self.levels: Mapping[str, NodeLevels] = {}
        self._listeners: list[Callable[[], None]] = []

    def subscribe(self, changed: Callable[[], None]) -> Callable[[], None]:
        """As the port's."""
        self._listeners.append(changed)
        return lambda: self._listeners.remove(changed)

    def tell(self, levels: Mapping[str, NodeLevels]) -> None:
        """Everybody hears new levels."""
        self.levels = levels
        for listener in self._listeners:
            listener()


class LevelNetwork(KeyNetwork):
    """Nodes that learn the levels of all links every ``told_every_s``."""

    def __init__(
        self,
        root: Path,
        document: Mapping[str, Any],
        *,
        filled: int = 16 << 20,
        config: KeyPlaneConfig,
        told_every_s: float = 0.2,
    ) -> None:
        super().__init__(root, document, filled=filled, config=config)
        self.directory = LevelDirectory(self.document)
        self.told_every_s = told_every_s
        self._teller: asyncio.Task[None] | None = None

    def routes_of(self, kme: str) -> RoutePort:
        """The real finder of routes."""

        def is_open(peer: str) -> bool | None:
            link = self.wire.planes[kme].link(peer)
            return None if link is None else link.is_open

        return DirectoryRoutes(kme, self.directory, link_is_open=is_open)  # type: ignore[arg-type]  # all it uses

    def tell(self) -> None:
        """Publishes the levels as they are."""
        self.directory.tell(
            {
                own: NodeLevels(
                    own,
                    {
                        peer: LinkLevel(
                            (usable := link.status().transmit.usable), max(usable, 1), is_up=link.is_open
                        )
                        for peer, link in plane.ends.items()
                    },
                )
                for own, plane in self.wire.planes.items()
            }
        )

    async def start(self, *kmes: str, is_proven: bool | None = None) -> None:
        """Starts nodes, and the telling of levels."""
        self.tell()
        await super().start(*kmes, is_proven=is_proven)
        if self._teller is None and self.told_every_s:
            self._teller = asyncio.get_running_loop().create_task(self._keep_telling())

    async def stop(self, *kmes: str) -> None:
        """Stops nodes; the telling when all stop."""
        if not kmes and self._teller is not None:
            self._teller.cancel()
            self._teller = None
        await super().stop(*kmes)

    async def _keep_telling(self) -> None:
        while True:
            await asyncio.sleep(self.told_every_s)
            self.tell()
