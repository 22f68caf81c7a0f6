"""What the key plane counts: establishes by grade, routes named, shares refused. No key facts.

Labels are grades and ids from the network document, reasons and verdicts from enums: a stranger
cannot multiply them.
"""

from __future__ import annotations

from mesh.ops.metrics import Metrics

_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class KeyMetrics:
    """The key plane's counters and histograms.

    Args:
        metrics: the process's; None for one of its own (tests).
    """

    def __init__(self, metrics: Metrics | None = None) -> None:
        metrics = metrics or Metrics(with_process=False)
        self.establish_s = metrics.histogram(
            "establish_seconds",
            "From assigning slots to the confirm, of establishes that succeeded.",
            ["grade", "priority"],
            buckets=_BUCKETS_S,
        )
        self.establishes = metrics.counter(
            "establishes",
            "Establishes ended, by the pair's grade; result is ok or a reason.",
            ["grade", "result"],
        )
        self.established_bytes = metrics.counter(
            "established_key_bytes", "Key bytes established as source.", ["grade"]
        )
        self.keys_asked = metrics.counter(
            "keys_asked",
            "Keys that gateways and tools asked for, before any check; method is draw or redeem.",
            ["method"],
        )
        self.keys_refused = metrics.counter(
            "keys_refused", "Calls for keys that failed; method is draw or redeem.", ["method", "reason"]
        )
        self.stored_expired = metrics.counter(
            "stored_keys_expired", "Keys of the key store whose life ended with slaves that had not asked."
        )
        self.unfetched_bytes = metrics.counter(
            "reserve_unfetched_bytes",
            "Key bytes retired here that nobody had fetched.",
            ["peer"],
        )
        self.routes_named = metrics.counter(
            "routes_named",
            "Times a route, by the nodes between its ends, lied, was suspected or stayed silent.",
            ["via", "verdict"],
        )
        self.shares_refused = metrics.counter(
            "shares_refused", "Shares dropped at this node, by the link they came on.", ["link", "reason"]
        )
        self.refusals_heard = metrics.counter(
            "share_refusals_heard", "Refusals that relays told this node as source.", ["via", "reason"]
        )
        self.border_acks = metrics.counter(
            "border_acks",
            "Keys of ours that another key manager acked; status unknown: not under way with it.",
            ["peer", "status"],
        )
        self.border_ack_s = metrics.histogram(
            "border_ack_seconds", "From posting keys to the ack that they are relayed.", ["peer"]
        )
