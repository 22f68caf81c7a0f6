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
from mesh.core.transfer import TransferHeader, check_hop
from mesh.errors import ErrorReason, MeshError, PeerError, ShortageError
from mesh.node.appends import Appender
from mesh.node.keyports import DocumentView, Surroundings
from mesh.node.ports import LinkPlanePort, LinkPort
from mesh.v1.link_pb2 import ShareItem

_MAX_HEADERS = 512
_WINDOW_S = 10.0
_LEAST_BUDGET_BYTES = 64 * 1024
_MAX_SOURCES = 4096

_LOG = logging.getLogger("keymesh.relay")


@dataclass(slots=True)
class _Spent:
    """Second-leg pad that one source used on one link within the current window."""

    since_s: float
    budget: int
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
            ShortageError: no link, too little material, or the source's budget is used up.
        """
        document = self._directory.document
        if document is None:
            raise ShortageError("no network document yet", reason=ErrorReason.DIRECTORY_UNAVAILABLE)
        transfer = header.transfer
        check_routes(document, transfer.source, transfer.target, header.grade, header.routes)
        link = self._links.link(next_hop)
        if link is None or not link.is_open:
            raise ShortageError("no open link to the next hop", reason=ErrorReason.NO_ROUTE)
        self._charge(link, transfer.source, len(value), is_bulk=item.priority == 0)
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

    def _charge(self, link: LinkPort, source: str, nbytes: int, *, is_bulk: bool) -> None:
        """Half of what the lane holds, per source and window; bulk stops above the floor (3.9)."""
        now_s = self._around.monotonic_s()
        key = (source, link.peer)
        spent = self._spent.get(key)
        if spent is None or now_s - spent.since_s >= _WINDOW_S:
            usable = link.status().transmit.usable
            spent = self._spent[key] = _Spent(now_s, max(_LEAST_BUDGET_BYTES, usable // 2))
            while len(self._spent) > _MAX_SOURCES:
                self._spent.popitem(last=False)
        if spent.spent + nbytes > spent.budget:
            spent.budget = max(spent.budget, link.status().transmit.usable // 2)
            if spent.spent + nbytes > spent.budget:
                raise ShortageError("the source's share of this link is used up", reason=ErrorReason.BUSY)
        if is_bulk and link.status().transmit.usable < self._bulk_floor_bytes + nbytes:
            raise ShortageError("lane material is kept for keys on demand")
        spent.spent += nbytes


class ShareRouter:
    """The link plane's ``SharesHandler``: checks the hop, then relays or collects.

    Args:
        appender: None at a hub: no route ends there.
    """

    def __init__(self, around: Surroundings, *, relay: Relay, appender: Appender | None) -> None:
        self._around = around
        self._relay = relay
        self._appender = appender
        self._headers: OrderedDict[bytes, TransferHeader] = OrderedDict()
        self.dropped = 0

    def on_shares(self, came_from: str, shares: Sequence[tuple[ShareItem, bytes]]) -> None:
        """Takes the shares of one frame; what one of them does wrong costs only itself."""
        for item, value in shares:
            try:
                self._take(came_from, item, value)
            except MeshError as exc:
                self.dropped += 1
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
            self._relay.forward(header, item, value, next_hop)
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
