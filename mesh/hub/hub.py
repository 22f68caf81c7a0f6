"""A hub: a node with fewer rights. Shares come in on one lane and leave on another, nothing ends here.

Owns what a hub leaves out: no reserves, no key delivery, no peer service, no SAEs; its
certificate's role is hub, so that other nodes refuse it wherever a route ends (protocol 3.3,
3.9). What it adds is its operator's policy, asked before second-leg pad is spent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path

from mesh.core.identity import Role
from mesh.core.transfer import TransferHeader, TransferId
from mesh.errors import ConfigError, MeshError, PeerError
from mesh.hub.config import HubConfig, build_policy, load_hub_config
from mesh.hub.policy import PolicyHook
from mesh.node.config import NodeConfig
from mesh.node.keymetrics import KeyMetrics
from mesh.node.keyplane import KeyPlane
from mesh.node.keyports import DocumentView, KeyPlaneConfig, Surroundings
from mesh.node.node import Node
from mesh.node.peers import GrpcPeers
from mesh.node.ports import LinkPlanePort
from mesh.node.relay import Relay, ShareRouter
from mesh.node.reports import Reports
from mesh.ops.logging import setup_logging
from mesh.ops.metrics import Metrics
from mesh.ops.runtime import EXIT_CONFIG
from mesh.ops.runtime import run as run_process
from mesh.ops.tracing import close_tracing, setup_tracing
from mesh.rpc.channels import ChannelPool
from mesh.v1.link_pb2 import ShareItem


class HubRelay(Relay):
    """A relay that asks the hub's policy before it spends; refused shares take no token of the source's.

    Args:
        policy: decides about each share.
        metrics: counts shares forwarded and refused, by source and reason.
    """

    def __init__(
        self,
        around: Surroundings,
        *,
        links: LinkPlanePort,
        directory: DocumentView,
        bulk_floor_bytes: int,
        policy: PolicyHook,
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__(around, links=links, directory=directory, bulk_floor_bytes=bulk_floor_bytes)
        self._policy = policy
        metrics = metrics or Metrics(with_process=False)
        self._forwarded = metrics.counter("hub_shares_forwarded", "Shares sent on.", ["source"])
        self._bytes = metrics.counter("hub_share_bytes_forwarded", "Bytes of shares sent on.", ["source"])
        self._refused = metrics.counter("hub_shares_refused", "Shares dropped.", ["source", "reason"])

    def forward(self, header: TransferHeader, item: ShareItem, value: bytes, next_hop: str) -> None:
        """Queues the share for its target if the policy lets it pass.

        Raises:
            MeshError: the policy, the network document or the lane says no; nothing is spent.
        """
        if item.hop != 0:
            raise PeerError("a hub stands right behind its client")
        transfer = header.transfer
        try:
            super().forward(header, item, value, next_hop)
        except MeshError as error:
            self._refused.labels(transfer.source, error.reason.value).inc()
            raise
        self._forwarded.labels(transfer.source).inc()
        self._bytes.labels(transfer.source).inc(len(value))

    def _permit(self, transfer: TransferId, nbytes: int) -> None:
        self._policy.check(transfer.source, transfer.target, nbytes, self._around.monotonic_s())


class Hub(Node):
    """A running hub. Build with ``Hub.serving(config, node_config)``.

    Args:
        settings: the hub's own part.
        config: what it shares with a node, paths absolute.
        policy: None takes the configured one.
    """

    def __init__(self, settings: HubConfig, config: NodeConfig, *, policy: PolicyHook | None = None) -> None:
        super().__init__(config, role=Role.HUB)
        self._settings = settings
        self._policy = policy or build_policy(settings)

    @classmethod
    def serving(
        cls, settings: HubConfig, config: NodeConfig, *, policy: PolicyHook | None = None
    ) -> contextlib.AbstractAsyncContextManager[Node]:
        """Start a hub, and stop it in the reverse order; raises as ``Node.running``."""
        return cls(settings, config, policy=policy)._running()

    def _build_plane(self, channels: ChannelPool, settings: KeyPlaneConfig) -> None:
        del settings
        around = Surroundings(
            own_id=self.config.kme_id,
            now_s=time.time,
            monotonic_s=time.monotonic,
            randomness=os.urandom,
            alarms=self.alarms,
            metrics=KeyMetrics(self.metrics),
        )
        peers = GrpcPeers(lambda peer: self._channel(channels, peer, Role.NODE))
        relay = HubRelay(
            around,
            links=self.links,
            directory=self.directory,
            bulk_floor_bytes=self._settings.bulk_floor_bytes,
            policy=self._policy,
            metrics=self.metrics,
        )
        self.links.handler = ShareRouter(
            around, relay=relay, appender=None, reports=Reports(around, peers, self.tasks.spawn)
        )

    async def _start_plane(self, stack: contextlib.AsyncExitStack) -> None:
        """Nothing ends here, nothing to start."""

    def _reserve_levels(self) -> dict[str, int]:
        return {}

    def _key_plane(self) -> KeyPlane | None:
        return None


async def _serve(settings: HubConfig, config: NodeConfig, stop: asyncio.Event) -> None:
    async with Hub.serving(settings, config):
        await stop.wait()


def run(config_path: str | Path) -> int:
    """The process ``keymesh hub run``: configuration in, exit status out."""
    try:
        settings, config = load_hub_config(Path(config_path))
        setup_logging(
            level=config.log.level,
            file=None if config.log.file is None else Path(config.log.file),
            facts={"hub": config.kme_id},
        )
        setup_tracing(config.tracing, role="hub", member=config.kme_id)
    except ConfigError as error:
        sys.stderr.write(f"keymesh: hub: {error}\n")
        return EXIT_CONFIG
    try:
        return run_process(lambda stop: _serve(settings, config, stop), name=f"hub {config.kme_id}")
    finally:
        close_tracing()
