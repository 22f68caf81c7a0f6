"""What a node shows on ``/metrics`` and ``/readyz``: levels, rates, states; no key facts.

Sampled, not counted on the hot path. Labels are KME ids from the configuration and the
network document, never SAE ids or key_IDs.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mesh.directory.port import Directory
from mesh.node.keyplane import KeyPlane
from mesh.node.links import LinkPlane
from mesh.node.psrd_desk import PsrdDesk
from mesh.node.userate import UseRate
from mesh.ops.certificate_expiry import CertificateExpiry
from mesh.ops.metrics import Followed, Levels, Metrics
from mesh.v1.admin_pb2 import LinkStatus

_BORDER_EVERY_S = 15.0
_DEVICE_STATES_UP = frozenset({"ready", "empty"})


class Telemetry:
    """Gauges of one node; ``sample`` brings them up to date.

    Args:
        plane: None at a hub.
        psrd: levels of links that courier files feed.
        certificates: those of the process.
        data_dir: whose disk's room is shown.
        missing: what keeps the node from serving.
        clock, now_s: monotonic seconds; seconds since 1970.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        links: LinkPlane,
        plane: KeyPlane | None,
        directory: Directory,
        psrd: PsrdDesk,
        certificates: CertificateExpiry,
        data_dir: Path,
        missing: Callable[[], Sequence[str]],
        clock: Callable[[], float] = time.monotonic,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._links = LinkGauges(metrics, links, now_s=now_s)
        self._couriers = CourierGauges(metrics, psrd)
        self._reserves = None if plane is None else ReserveGauges(metrics, plane)
        is_border = plane is not None and plane.border.config.peers
        self._border = BorderGauges(metrics, plane) if plane is not None and is_border else None
        self._directory = directory
        self._certificates = certificates
        self._data_dir = data_dir
        self._missing = missing
        self._clock = clock
        self._sampled_at_s: float | None = None
        self._staleness = metrics.gauge("directory_staleness_seconds", "Age of what the directory said.")
        self._serial = metrics.gauge("network_document_serial", "Serial of the network document in force.")
        self._ready = metrics.gauge("ready", "1 while the process can do its work.")
        self._free = metrics.gauge("disk_free_bytes", "Room left where data_dir lies.")

    def sample(self) -> None:
        """Read everything once."""
        now_s = self._clock()
        seconds = 0.0 if self._sampled_at_s is None else now_s - self._sampled_at_s
        self._sampled_at_s = now_s
        self._links.sample(seconds)
        self._couriers.sample()
        if self._reserves is not None:
            self._reserves.sample(seconds)
        if self._border is not None:
            self._border.sample(now_s)
        self._certificates.sample()
        self._staleness.set(min(self._directory.staleness_s(), 1e9))
        document = self._directory.document
        self._serial.set(0 if document is None else document.serial)
        self._ready.set(not self._missing())
        self._free.set(shutil.disk_usage(self._data_dir).free)


class LinkGauges:
    """Links, their lanes and their devices.

    Args:
        now_s: seconds since 1970.
    """

    def __init__(self, metrics: Metrics, links: LinkPlane, *, now_s: Callable[[], float]) -> None:
        self._links = links
        self._now_s = now_s
        self._use: dict[tuple[str, str], UseRate] = {}
        self._states: dict[str, tuple[str, int]] = {}
        lane = ["peer", "direction"]
        self._usable = metrics.gauge("lane_usable_bytes", "Lane bytes that can still be used.", lane)
        self._position = metrics.gauge("lane_position_bytes", "First lane offset not used yet.", lane)
        self._filled = metrics.gauge("lane_filled_bytes", "End of the lane's material.", lane)
        self._capacity = metrics.gauge("lane_capacity_bytes", "Most unused material held.", lane)
        self._rate = metrics.gauge("lane_use_bytes_per_second", "Use, smoothed over a minute.", lane)
        self._to_empty = metrics.gauge(
            "lane_seconds_to_empty", "How long the lane lasts at that rate; infinite when idle.", lane
        )
        peer = ["peer"]
        self._is_open = metrics.gauge("link_open", "1 while the link's stream is open.", peer)
        self._changed = metrics.gauge(
            "link_changed_timestamp_seconds", "When the link last changed its state.", peer
        )
        self._opened = Followed(metrics.counter("link_opened", "Times the link opened.", peer))
        self._failed = Followed(metrics.counter("link_failed_tags", "Frames whose tag failed.", peer))
        self._quarantined = metrics.gauge(
            "link_quarantined_blocks", "Blocks that differ between both ends.", peer
        )
        self._ingest = metrics.gauge(
            "link_ingest_bytes_per_second", "Key material taken from the device.", peer
        )
        self._device_up = metrics.gauge(
            "link_device_up", "1 while the link's QKD device answers; absent without one.", peer
        )
        self._device = Levels(
            metrics.gauge("link_device_stored_bytes", "Key that the device holds ready.", peer),
            metrics.gauge("link_device_capacity_bytes", "Most that it holds; it loses the rest.", peer),
        )
        self._key_rate = Levels(
            metrics.gauge("link_secret_key_rate_bits_per_second", "As the device says.", peer)
        )
        self._qber = Levels(metrics.gauge("link_qber_ratio", "Bit errors, as the device says.", peer))

    def sample(self, seconds: float) -> None:
        """Read every link; ``seconds`` since the last time."""
        statuses = {peer: link.status() for peer, link in self._links.links.items()}
        for peer, status in statuses.items():
            self._sample_link(peer, status, seconds)
        devices = {peer: status.device for peer, status in statuses.items() if status.HasField("device")}
        self._device.show({(peer,): (one.stored_bytes, one.capacity_bytes) for peer, one in devices.items()})
        self._key_rate.show(
            {
                (peer,): (one.secret_key_rate_bits_per_s,)
                for peer, one in devices.items()
                if one.HasField("secret_key_rate_bits_per_s")
            }
        )
        self._qber.show({(peer,): (one.qber,) for peer, one in devices.items() if one.HasField("qber")})

    def _sample_link(self, peer: str, status: LinkStatus, seconds: float) -> None:
        self._is_open.labels(peer).set(status.state == "open")
        state = (status.state, status.times_opened)
        if self._states.get(peer) != state:
            self._states[peer] = state
            self._changed.labels(peer).set(self._now_s())
        self._opened.follow(status.times_opened, peer)
        self._failed.follow(status.failed_tags, peer)
        self._quarantined.labels(peer).set(status.quarantined_blocks)
        self._ingest.labels(peer).set(status.ingest_bytes_per_s)
        if status.device_state != "none":
            self._device_up.labels(peer).set(status.device_state in _DEVICE_STATES_UP)
        for direction, lane in (("out", status.transmit), ("in", status.receive)):
            use = self._use.setdefault((peer, direction), UseRate())
            use.look(lane.position, seconds)
            self._usable.labels(peer, direction).set(lane.usable)
            self._position.labels(peer, direction).set(lane.position)
            self._filled.labels(peer, direction).set(lane.filled)
            self._capacity.labels(peer, direction).set(lane.capacity)
            self._rate.labels(peer, direction).set(use.bytes_per_s)
            self._to_empty.labels(peer, direction).set(use.seconds_to_empty(lane.usable))


class CourierGauges:
    """Pre-shared random data: what is on its way, and what is little. The levels are the lanes'."""

    def __init__(self, metrics: Metrics, psrd: PsrdDesk) -> None:
        self._psrd = psrd
        self._waiting = Levels(
            metrics.gauge("psrd_waiting_bytes", "Issued, and not known to be imported.", ["peer"])
        )
        self._low_water = Levels(
            metrics.gauge("psrd_low_water_bytes", "Below it more is to be carried.", ["peer", "direction"])
        )

    def sample(self) -> None:
        """Read every link that courier files feed."""
        links = self._psrd.status().links
        self._waiting.show({(one.peer_kme_id,): (one.transmit.waiting_bytes,) for one in links})
        self._low_water.show(
            {
                (one.peer_kme_id, direction): (level.low_water_bytes,)
                for one in links
                for direction, level in (("out", one.transmit), ("in", one.receive))
            }
        )


class ReserveGauges:
    """Reserves of keys, by peer, and what leaves them."""

    def __init__(self, metrics: Metrics, plane: KeyPlane) -> None:
        self._plane = plane
        self._use: dict[str, UseRate] = {}
        self._held = Levels(
            metrics.gauge(
                "reserve_key_bytes",
                "Key bytes that can be drawn or redeemed now.",
                ["peer", "direction"],
            )
        )
        self._levels = Levels(
            metrics.gauge("reserve_high_water_bytes", "Level that refills aim at.", ["peer"]),
            metrics.gauge("reserve_use_bytes_per_second", "Drawn keys, smoothed over a minute.", ["peer"]),
            metrics.gauge(
                "reserve_seconds_to_empty",
                "How long the reserve lasts at that rate without a refill; infinite when idle.",
                ["peer"],
            ),
        )
        self._keys_drawn = Followed(metrics.counter("keys_drawn", "Keys handed to masters.", ["peer"]))
        self._bytes_drawn = Followed(metrics.counter("key_bytes_drawn", "Their bytes.", ["peer"]))
        self._keys_redeemed = Followed(metrics.counter("keys_redeemed", "Keys handed to slaves.", ["peer"]))

    def sample(self, seconds: float) -> None:
        """Read every reserve; ``seconds`` since the last time."""
        for peer, (keys, nbytes) in self._plane.supply.drawn.items():
            self._keys_drawn.follow(keys, peer)
            self._bytes_drawn.follow(nbytes, peer)
        for peer, keys in self._plane.redeemer.redeemed.items():
            self._keys_redeemed.follow(keys, peer)
        levels = self._plane.levels()
        held: dict[tuple[str, ...], tuple[float]] = {}
        rows: dict[tuple[str, ...], tuple[float, float, float]] = {}
        for level in levels:
            peer = level.peer_kme_id
            use = self._use.setdefault(peer, UseRate(position=0))
            use.look(self._plane.supply.drawn.get(peer, (0, 0))[1], seconds)
            held[peer, "out"] = (level.outbound_bytes,)
            held[peer, "in"] = (level.inbound_bytes,)
            left_s = use.seconds_to_empty(level.outbound_bytes)
            rows[peer,] = (level.high_water_bytes, use.bytes_per_s, left_s)
        self._held.show(held)
        self._levels.show(rows)


class BorderGauges:
    """Keys that cross to and from other key managers, and requests that gateways perform."""

    def __init__(self, metrics: Metrics, plane: KeyPlane) -> None:
        self._border = plane.border
        self._read_at_s = -math.inf
        self._keys = Levels(
            metrics.gauge(
                "border_keys", "Keys remembered, by how they stand.", ["peer", "direction", "state"]
            )
        )
        self._requests = metrics.gauge("border_requests_open", "Requests that gateways are to perform.")
        self._gateways = metrics.gauge("border_gateways", "Gateways that take such requests now.")

    def sample(self, now_s: float) -> None:
        """Read the border; what costs a query, four times a minute."""
        self._requests.set(self._border.open_posts)
        self._gateways.set(self._border.connected_gateways)
        if now_s - self._read_at_s < _BORDER_EVERY_S:
            return
        self._read_at_s = now_s
        self._keys.show(
            {
                (peer, "out" if is_outbound else "in", state): (count,)
                for (is_outbound, peer, state), count in self._border.counts().items()
            }
        )


def missing_for_service(directory: Directory, *, stopped_by: str, is_stopping: bool) -> Sequence[str]:
    """What keeps a node from serving, in words; a node with reserves serves also without links."""
    missing: list[str] = []
    if is_stopping:
        missing.append("the node is stopping")
    if directory.document is None:
        missing.append("no network document yet")
    if stopped_by:
        missing.append(f"stopped: {stopped_by}")
    return missing
