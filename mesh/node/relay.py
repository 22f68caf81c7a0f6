"""What happens to a share that came over a link: on to the next hop, or into the target's collector.

Owns protocol 3.3 at every hop (an item counts only if it came on the link that its route names), and
3.9 (policy, and a bound on second-leg pad per source, before any is spent). A share lives here for one
call: it is unwrapped by the link it came on and wrapped by the link it leaves on.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.core.network import check_routes
from mesh.core.transfer import TransferHeader, TransferId, check_hop
from mesh.errors import ErrorReason, MeshError, PeerError, ShortageError
from mesh.node.appends import Appender
from mesh.node.keyports import DocumentView, Surroundings
from mesh.node.ports import LinkPlanePort, LinkPort
from mesh.node.reports import Reports
from mesh.ops.logging import clean_request_id, log_soon, serving
from mesh.ops.tracing import span
from mesh.v1.link_pb2 import ShareItem

_MAX_HEADERS = 512
_WINDOW_S = 10.0
#: A source that used less than this within the window may use a lane to its end.
_LIGHT_BYTES = 64 * 1024
_MOST_KEPT_BYTES = 4 * 1024 * 1024
_MAX_SOURCES = 4096

_LOG = logging.getLogger("keymesh.relay")


def kept_bytes(usable_bytes: int) -> int:
    """Lane bytes that a relay keeps for sources which have used little, from those that use much (3.9)."""
    return min(_MOST_KEPT_BYTES, usable_bytes // 4)


@dataclass(slots=True)
class _Spent:
    """Second-leg pad that one source used on one link within the current window.

    Attributes:
        kept: what the lane keeps for lighter sources, from its level when the window began.
    """

    since_s: float
    kept: int
    spent: int = 0


class Relay:
    """Sends shares on. Also what a hub is: a node whose shares never end here.

    Args:
        bulk_floor_bytes: lane bytes that bulk shares leave for those on demand.
    """

    def __init__(
        self, around: Surroundings, *, links: LinkPlanePort, directory: DocumentView, bulk_floor_bytes: int
    ) -> None:
        self._around = around
        self._links = links
        self._directory = directory
        self._bulk_floor_bytes = bulk_floor_bytes
        self._spent: OrderedDict[tuple[str, str], _Spent] = OrderedDict()

    def forward(self, header: TransferHeader, item: ShareItem, value: bytes, next_hop: str) -> None:
        """Queues the share for the next hop, or drops it.

        Raises:
            PeerError: our own configuration does not permit the pair's routes.
            ShortageError: no link, too little material, or the rest is kept for other sources.
        """
        document = self._directory.document
        if document is None:
            raise ShortageError("no network document yet", reason=ErrorReason.DIRECTORY_UNAVAILABLE)
        transfer = header.transfer
        check_routes(document, transfer.source, transfer.target, header.grade, header.routes)
        link = self._links.link(next_hop)
        if link is None or not link.is_open:
            raise ShortageError("no open link to the next hop", reason=ErrorReason.NO_ROUTE)
        spent = self._check_room(link, transfer.source, len(value), is_bulk=item.priority == 0)
        self._permit(transfer, len(value))
        spent.spent += len(value)
        onward = ShareItem(
            header=item.header,
            tag=item.tag,
            route=item.route,
            hop=item.hop + 1,
            length_bytes=item.length_bytes,
            is_raw=False,
            request_id=item.request_id,
            priority=item.priority,
        )
        link.enqueue(onward, value)
        if item.priority:
            log_soon(
                _LOG,
                "share relayed",
                source=transfer.source,
                target=transfer.target,
                slot=transfer.first_slot,
                route=item.route,
                next_hop=next_hop,
            )

    def _permit(self, transfer: TransferId, nbytes: int) -> None:
        """The last word, when nothing else stands in the way: what it counts is spent. Here nobody's."""

    def _check_room(self, link: LinkPort, source: str, nbytes: int, *, is_bulk: bool) -> _Spent:
        """Whoever uses much leaves something for the others, and bulk something for keys on demand (3.9)."""
        now_s = self._around.monotonic_s()
        usable = link.status().transmit.usable
        key = (source, link.peer)
        spent = self._spent.get(key)
        if spent is None or now_s - spent.since_s >= _WINDOW_S:
            spent = self._spent[key] = _Spent(now_s, kept_bytes(usable))
            self._spent.move_to_end(key)
            while len(self._spent) > _MAX_SOURCES:
                self._spent.popitem(last=False)
        if is_bulk and usable < self._bulk_floor_bytes + nbytes:
            raise ShortageError("lane material is kept for keys on demand", retry_after_s=2.0)
        if spent.spent + nbytes > _LIGHT_BYTES and usable < spent.kept + nbytes:
            raise ShortageError(
                "the rest of the lane is kept for other sources", reason=ErrorReason.BUSY, retry_after_s=2.0
            )
        return spent


class ShareRouter:
    """The link plane's ``SharesHandler``: checks the hop, then relays or collects.

    Args:
        appender: None at a hub: no route ends there.
        reports: tells sources of shares that were not relayed; None tells nobody.
    """

    def __init__(
        self,
        around: Surroundings,
        *,
        relay: Relay,
        appender: Appender | None,
        reports: Reports | None = None,
    ) -> None:
        self._around = around
        self._relay = relay
        self._appender = appender
        self._reports = reports
        self._headers: OrderedDict[bytes, TransferHeader] = OrderedDict()
        self.dropped = 0

    def on_shares(self, came_from: str, shares: Sequence[tuple[ShareItem, bytes]]) -> None:
        """Takes the shares of one frame; what one of them does wrong costs only itself."""
        for item, value in shares:
            # Not the id of the stream that the frame came on; a refill serves no request.
            identifier = clean_request_id(item.request_id) if item.request_id else ""
            with serving(identifier), span("share", came_from=came_from, route=item.route):
                try:
                    self._take(came_from, item, value)
                except MeshError as exc:
                    self.dropped += 1
                    self._around.metrics.shares_refused.labels(came_from, exc.reason.value).inc()
                    _LOG.warning(
                        "share dropped",
                        extra={"link": came_from, "cause": str(exc), "reason": exc.reason.value},
                    )

    def on_link_open(self, peer: str) -> None:
        """Nothing waits for a link here; establishes ask the link itself."""

    def on_link_closed(self, peer: str) -> None:
        """Shares under way are forfeited; their sources learn by a timeout."""

    def _take(self, came_from: str, item: ShareItem, value: bytes) -> None:
        header = self._header(item.header)
        next_hop = check_hop(
            header,
            route=item.route,
            hop=item.hop,
            came_from=came_from,
            own_id=self._around.own_id,
            length_bytes=len(value),
        )
        if len(item.tag) != 16:
            raise PeerError("share refused", facts={"field": "tag", "problem": "not 16 bytes"})
        if next_hop is not None:
            try:
                self._relay.forward(header, item, value, next_hop)
            except MeshError as exc:
                if self._reports is not None:
                    self._reports.refused(header.transfer, item.route, exc)
                raise
        elif self._appender is None:
            raise PeerError("no route ends at a hub")
        else:
            self._appender.take(
                header, item.header, item.tag, route=item.route, came_from=came_from, share=value
            )

    def _header(self, encoded: bytes) -> TransferHeader:
        """Decoded headers are kept: the n shares of a transfer carry the same bytes."""
        header = self._headers.get(encoded)
        if header is None:
            header = self._headers[encoded] = TransferHeader.decode(encoded)
            while len(self._headers) > _MAX_HEADERS:
                self._headers.popitem(last=False)
        return header
