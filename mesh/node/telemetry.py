"""What a node shows on ``/metrics`` and ``/readyz``: levels, rates, states; no key facts.

Sampled, not counted on the hot path. Labels are KME ids from the configuration and the
network document, never SAE ids or key_IDs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509

from mesh.directory.port import Directory
from mesh.node.keyplane import KeyPlane
from mesh.node.links import LinkPlane
from mesh.ops.metrics import Metrics
from mesh.v1.admin_pb2 import LaneStatus, LinkStatus


def certificate_expiry_s(path: Path) -> float:
    """Seconds since the epoch at which the first certificate in ``path`` expires; 0 if unreadable."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.timestamp()
    except (OSError, ValueError):
        return 0.0


class Telemetry:
    """Gauges of one node; ``sample`` brings them up to date.

    Args:
        plane: None at a hub.
        cert: the node's own certificate file.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        links: LinkPlane,
        plane: KeyPlane | None,
        directory: Directory,
        cert: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._links = links
        self._plane = plane
        self._directory = directory
        self._cert = cert
        self._clock = clock
        self._before: dict[tuple[str, str], tuple[float, int]] = {}
        lane = ["peer", "direction"]
        self._usable = metrics.gauge("lane_usable_bytes", "Lane bytes that can still be used.", lane)
        self._position = metrics.gauge("lane_position_bytes", "First lane offset not used yet.", lane)
        self._filled = metrics.gauge("lane_filled_bytes", "End of the lane's material.", lane)
        self._to_empty = metrics.gauge(
            "lane_seconds_to_empty",
            "Seconds until the lane is empty at its present rate of use; -1 if idle.",
            lane,
        )
        self._is_open = metrics.gauge("link_open", "1 while the link's stream is open.", ["peer"])
        self._failed = metrics.gauge("link_failed_tags", "Frames whose tag failed.", ["peer"])
        self._quarantined = metrics.gauge(
            "link_quarantined_blocks", "Blocks that differ between both ends.", ["peer"]
        )
        self._ingest = metrics.gauge(
            "link_ingest_bytes_per_second", "Key material taken from the device.", ["peer"]
        )
        reserve = ["peer", "direction"]
        self._reserve = metrics.gauge(
            "reserve_key_bytes", "Key bytes that can be drawn or redeemed now.", reserve
        )
        self._high_water = metrics.gauge("reserve_high_water_bytes", "Level that refills aim at.", ["peer"])
        self._staleness = metrics.gauge("directory_staleness_seconds", "Age of what the directory said.")
        self._expiry = metrics.gauge(
            "certificate_expiry_seconds", "When the certificate expires, epoch.", ["plane"]
        )
        self._serial = metrics.gauge("network_document_serial", "Serial of the network document in force.")

    def sample(self) -> None:
        """Read everything once."""
        for peer, link in self._links.links.items():
            status = link.status()
            self._sample_link(peer, status, is_open=link.is_open)
        for level in self._plane.levels() if self._plane else ():
            self._reserve.labels(level.peer_kme_id, "out").set(level.outbound_bytes)
            self._reserve.labels(level.peer_kme_id, "in").set(level.inbound_bytes)
            self._high_water.labels(level.peer_kme_id).set(level.high_water_bytes)
        self._staleness.set(min(self._directory.staleness_s(), 1e9))
        self._expiry.labels("node").set(certificate_expiry_s(self._cert))
        document = self._directory.document
        self._serial.set(0 if document is None else document.serial)

    def _sample_link(self, peer: str, status: LinkStatus, *, is_open: bool) -> None:
        self._is_open.labels(peer).set(is_open)
        self._failed.labels(peer).set(status.failed_tags)
        self._quarantined.labels(peer).set(status.quarantined_blocks)
        self._ingest.labels(peer).set(status.ingest_bytes_per_s)
        for direction, lane in (("out", status.transmit), ("in", status.receive)):
            self._usable.labels(peer, direction).set(lane.usable)
            self._position.labels(peer, direction).set(lane.position)
            self._filled.labels(peer, direction).set(lane.filled)
            self._to_empty.labels(peer, direction).set(self._seconds_to_empty(peer, direction, lane))

    def _seconds_to_empty(self, peer: str, direction: str, lane: LaneStatus) -> float:
        now_s = self._clock()
        before = self._before.get((peer, direction))
        self._before[peer, direction] = (now_s, lane.position)
        if before is None or now_s <= before[0] or lane.position <= before[1]:
            return -1.0
        return lane.usable * (now_s - before[0]) / (lane.position - before[1])


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
