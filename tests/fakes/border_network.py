"""Two domains of key planes in one process, joined at their borders without HTTP.

A ``Courier`` stands for a border's gateways: it leases requests and performs them at whatever it is told
is there, another domain's border or a scripted peer, and a test may lose, delay or double them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mesh.core.border_rules import Association, BorderConfig, BufferSpec, Peer
from mesh.errors import CallerError, MeshError
from mesh.node.border.border import Border
from mesh.node.border.ports import Ack, Arrival
from mesh.node.border.posts import status_from_proto
from mesh.node.border.routing import Refused
from mesh.v1.border_pb2 import LeasedJob
from tests.fakes.key_network import HASTY, Clock, KeyNetwork

CAN_URL, UK_URL, THIRD_URL = "https://can-z.test", "https://uk-x.test", "https://third.test"

Perform = Callable[[LeasedJob], Awaitable[int | None]]


class RealClock(Clock):
    """Wall-clock seconds that pass, and may be moved."""

    def now_s(self) -> float:
        """Seconds since 1970."""
        return time.time() + self.offset_s


def can_document() -> dict[str, Any]:
    """Domain ``can``: SAE can-a at can-x, the border at can-z."""
    return {
        "format": "keymesh-network/1",
        "serial": 1,
        "domain": "can",
        "nodes": {"can-x": {}, "can-y": {}, "can-z": {}},
        "links": [{"between": ["can-x", "can-y"]}, {"between": ["can-y", "can-z"]}],
        "saes": {"can-a": {"home": "can-x"}, "can-b": {"home": "can-y"}, "can-z1": {"home": "can-z"}},
        "foreign": [
            {"prefix": "uk-", "border": "can-z", "domain": "uk"},
            {"prefix": "third-", "border": "can-z", "domain": "third"},
        ],
    }


def uk_document() -> dict[str, Any]:
    """Domain ``uk``: the border at uk-x, SAEs at uk-z and at the border itself."""
    return {
        "format": "keymesh-network/1",
        "serial": 1,
        "domain": "uk",
        "nodes": {"uk-x": {}, "uk-z": {}},
        "links": [{"between": ["uk-x", "uk-z"]}],
        "saes": {"uk-b": {"home": "uk-z"}, "uk-b2": {"home": "uk-z"}, "uk-x1": {"home": "uk-x"}},
        "foreign": [{"prefix": "can-", "border": "uk-x", "domain": "can"}],
    }


def can_border(**changes: Any) -> BorderConfig:
    """The border of ``can``: peers uk-x and third-p."""
    peers = (Peer("uk-x", UK_URL, ("uk-",)), Peer("third-p", THIRD_URL, ("third-",)))
    return replace(BorderConfig(frozenset({"gw"}), CAN_URL, peers, void_repeat_s=0.3), **changes)


def uk_border(**changes: Any) -> BorderConfig:
    """The border of ``uk``: peer can-z."""
    peers = (Peer("can-z", CAN_URL, ("can-",)),)
    return replace(BorderConfig(frozenset({"gw"}), UK_URL, peers, void_repeat_s=0.3), **changes)


@dataclass
class Courier:
    """The gateways of one border. ``perform`` answers with an HTTP status, None for no answer."""

    border: Border
    perform: Perform
    gateway: str = "gw"
    capacity: int = 16
    log: list[tuple[str, int | None]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    running: set[asyncio.Task[None]] = field(default_factory=set)

    def start(self) -> None:
        """Connects."""
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Is gone, with whatever it performed."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, *self.running, return_exceptions=True)
            self.task = None

    async def _run(self) -> None:
        try:
            async for job in self.border.lease(self.gateway, os.urandom(16), self.capacity):
                task = asyncio.get_running_loop().create_task(self._one(job))
                self.running.add(task)
                task.add_done_callback(self.running.discard)
        finally:
            for task in self.running:
                task.cancel()

    async def _one(self, job: LeasedJob) -> None:
        try:
            status = await self.perform(job)
            was_sent = True
        except ConnectionRefusedError:
            status, was_sent = None, False
        self.log.append((str(job.WhichOneof("body")), status))
        await self.border.complete(self.gateway, job.lease_id, http_status=status, was_sent=was_sent)


async def deliver(border: Border, sender: str, job: LeasedJob) -> int:
    """Performs a request at another border, as its gateway would answer it."""
    try:
        body = job.WhichOneof("body")
        if body == "post_keys":
            keys = job.post_keys
            named = keys.association
            await border.import_keys(
                sender,
                Association.of(named.initiator_sae_id, named.target_sae_ids),
                [Arrival(key.key_id, key.value, key.extension) for key in keys.keys],
                callback=keys.ack_callback_url,
                extension=keys.extension_optional,
            )
            return 202
        if body == "post_void":
            void = job.post_void
            named = void.association
            await border.void_keys(
                sender,
                Association.of(named.initiator_sae_id, named.target_sae_ids),
                void.key_ids,
                is_all=False,
                callback=void.ack_callback_url,
            )
            return 202
        await border.ack_keys(sender, acks_of(job))
    except Refused as refused:
        return 503 if "is_held" in refused.facts else 400
    except CallerError:
        return 400
    except MeshError:
        return 503
    return 200


def acks_of(job: LeasedJob) -> Sequence[Ack]:
    """The acks that a request carries."""
    return [
        Ack(
            status_from_proto(one.status),
            tuple(one.key_ids),
            Association.of(one.association.initiator_sae_id, one.association.target_sae_ids),
        )
        for one in job.post_acks.acks
    ]


class TwoDomains:
    """Domains can and uk, joined; ``can`` and ``uk`` are their networks."""

    def __init__(
        self,
        root: Path,
        *,
        buffers: Sequence[BufferSpec] = (),
        can_changes: dict[str, Any] | None = None,
        uk_changes: dict[str, Any] | None = None,
    ) -> None:
        for name in ("can", "uk"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.can = KeyNetwork(root / "can", can_document(), config=HASTY)
        self.uk = KeyNetwork(root / "uk", uk_document(), config=HASTY)
        self.can.clock = self.uk.clock = RealClock()
        self.can.configs["can-z"] = replace(HASTY, border=can_border(**(can_changes or {})))
        self.can.configs["can-x"] = replace(HASTY, buffers=tuple(buffers))
        self.uk.configs["uk-x"] = replace(HASTY, border=uk_border(**(uk_changes or {})))
        self.couriers: dict[str, Courier] = {}
        #: (sender, job) -> an answer instead of the peer's, or None to let it through.
        self.meddle: Callable[[str, LeasedJob], Awaitable[int | None] | None] = lambda *_: None
        self.after: Callable[[str, LeasedJob, int], int | None] = lambda _s, _j, status: status

    async def start(self) -> None:
        """Starts all nodes and both couriers."""
        await self.can.start()
        await self.uk.start()
        self.connect("can-z")
        self.connect("uk-x")

    def border(self, kme: str) -> Border:
        """The border of a node."""
        return (self.can if kme.startswith("can") else self.uk).plane(kme).border

    def connect(self, kme: str) -> None:
        """A border's gateway connects."""
        other = "uk-x" if kme == "can-z" else "can-z"

        async def perform(job: LeasedJob) -> int | None:
            meddled = self.meddle(kme, job)
            if meddled is not None:
                return await meddled
            if job.peer_kme_id != other:
                raise ConnectionRefusedError
            network = self.uk if other == "uk-x" else self.can
            if network.sites[other].plane is None:
                raise ConnectionRefusedError
            return self.after(kme, job, await deliver(self.border(other), kme, job))

        self.couriers[kme] = Courier(self.border(kme), perform)
        self.couriers[kme].start()

    async def disconnect(self, kme: str) -> None:
        """A border's gateway dies."""
        await self.couriers.pop(kme).stop()

    async def restart(self, kme: str) -> None:
        """A node (and, for a border, its gateway) starts again."""
        network = self.can if kme.startswith("can") else self.uk
        if kme in self.couriers:
            await self.disconnect(kme)
        await network.restart(kme)
        if kme in ("can-z", "uk-x"):
            self.connect(kme)

    async def stop(self) -> None:
        """Ends everything."""
        for kme in list(self.couriers):
            await self.disconnect(kme)
        await self.can.stop()
        await self.uk.stop()

    def states(self, kme: str) -> dict[str, int]:
        """How many border keys are in which state at a border."""
        found: dict[str, int] = {}
        for (is_outbound, _, state), count in self.border(kme).counts().items():
            name = f"{'out' if is_outbound else 'in'}:{state}"
            found[name] = found.get(name, 0) + count
        return found
