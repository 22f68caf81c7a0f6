"""Routes that lied, may have lied, or stayed silent: told to operators once, avoided for a while.

Owns the consequences of protocol 3.8 at a node, whichever end it is: metric, log event, alarm, and
which nodes the next establishes leave out *where the policy has others*. Avoiding can only take
choices away, like the directory (5.1), and ends by itself; so what a target reports may be believed
without more proof than its certificate. Names nodes and routes only, never what was shared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from mesh.core.collector import Verdict
from mesh.errors import ShortageError
from mesh.node.keymetrics import KeyMetrics
from mesh.node.keyports import AlarmPort, RoutePort

Route = tuple[str, ...]

#: Avoided for the first time so long, and at most so long; doubled each time it happens again.
_HOLD_S = {Verdict.LIED: (300.0, 3600.0), Verdict.SUSPECTED: (60.0, 900.0), Verdict.SILENT: (15.0, 300.0)}
_WORDS = {Verdict.LIED: "culprits", Verdict.SUSPECTED: "suspects", Verdict.SILENT: "silent"}
_MESSAGES = {
    Verdict.LIED: "shares do not fit a verified secret",
    Verdict.SUSPECTED: "shares of a transfer do not fit together",
    Verdict.SILENT: "shares did not come over a route",
}
_NEXT_STEPS = {
    Verdict.LIED: "look into the nodes or hub on this route, and both their links: bytes were changed there",
    Verdict.SUSPECTED: "compare with other alarms: the route named again and again has the fault",
    Verdict.SILENT: "see whether the nodes or hub on this route run, and have material towards the target",
}
_LOG_EVERY_S = 1.0
_QUIET_AFTER_S = 60.0
_MAX_NAMED = 4096

_LOG = logging.getLogger("keymesh.routes")


@dataclass(slots=True)
class _Held:
    """One node that is avoided."""

    verdict: Verdict
    until_s: float
    hold_s: float


def via(route: Route) -> str:
    """What a route is known by: the nodes between its ends; ``direct`` without any."""
    return "+".join(route[1:-1]) or "direct"


def _alarm_id(via_nodes: str, verdict: Verdict) -> str:
    return f"route/{via_nodes[:180]}/{verdict.value}"


class RouteWatch:
    """What one node thinks of routes.

    Args:
        alarms: told of every route named.
        metrics: counts them.
        monotonic_s: seconds.
    """

    def __init__(self, alarms: AlarmPort, metrics: KeyMetrics, monotonic_s: Callable[[], float]) -> None:
        self._alarms = alarms
        self._metrics = metrics
        self._monotonic_s = monotonic_s
        self._held: dict[str, _Held] = {}
        self._logged: dict[tuple[str, Verdict], tuple[float, int]] = {}
        self._silent: dict[str, float] = {}

    def name(
        self, routes: Sequence[Route], verdict: Verdict, *, source: str, target: str, seen_by: str
    ) -> None:
        """Routes of one transfer did this; ``seen_by`` is the KME whose word it is."""
        for route in routes:
            self._metrics.routes_named.labels(via(route), verdict.value).inc()
            self.hold(route, verdict)
            self._log(route, verdict, source=source, target=target, seen_by=seen_by)
            if verdict is Verdict.SILENT:
                self._silent[via(route)] = self._monotonic_s()
            self._alarms.raise_alarm(
                _alarm_id(via(route), verdict),
                "critical" if verdict is Verdict.LIED else "warning",
                f"{_MESSAGES[verdict]}; {_WORDS[verdict]}: {'-'.join(route)}"[:500],
                _NEXT_STEPS[verdict],
            )

    def hold(self, route: Route, verdict: Verdict) -> None:
        """Leaves the nodes of a route out for a while, without a word."""
        for node in route[1:-1]:
            self._hold(node, verdict)

    def tidy(self) -> None:
        """Closes alarms of routes that have not been silent for a while; call now and then."""
        now_s = self._monotonic_s()
        for key, last_s in list(self._silent.items()):
            if now_s - last_s > _QUIET_AFTER_S:
                del self._silent[key]
                self._alarms.clear(_alarm_id(key, Verdict.SILENT))

    def avoided(self) -> Iterator[frozenset[str]]:
        """Which nodes to leave out, best first: all that were named, then liars only, then none."""
        now_s = self._monotonic_s()
        held = [(node, one.verdict) for node, one in self._held.items() if one.until_s > now_s]
        if held:
            everyone = frozenset(node for node, _ in held)
            yield everyone
            liars = frozenset(node for node, verdict in held if verdict is Verdict.LIED)
            if liars and liars != everyone:
                yield liars
        yield frozenset()

    def _hold(self, node: str, verdict: Verdict) -> None:
        now_s = self._monotonic_s()
        first_s, most_s = _HOLD_S[verdict]
        held = self._held.get(node)
        if held is None or now_s > held.until_s + held.hold_s:
            hold_s = first_s
        elif now_s < held.until_s and held.verdict is verdict:
            return  # the same trouble goes on: transfers that were under way
        else:
            hold_s = max(first_s, min(2 * held.hold_s, most_s))
        if held is not None and now_s < held.until_s and held.verdict is Verdict.LIED:
            return  # a proof outlives a suspicion
        self._held[node] = _Held(verdict, now_s + hold_s, hold_s)
        while len(self._held) > _MAX_NAMED:
            del self._held[next(iter(self._held))]

    def _log(self, route: Route, verdict: Verdict, *, source: str, target: str, seen_by: str) -> None:
        """One line per route, verdict and second; the next line says how many were left out."""
        key = via(route), verdict
        now_s = self._monotonic_s()
        last_s, left_out = self._logged.get(key, (-_LOG_EVERY_S, 0))
        if now_s - last_s < _LOG_EVERY_S:
            self._logged[key] = last_s, left_out + 1
            return
        self._logged[key] = now_s, 0
        while len(self._logged) > _MAX_NAMED:
            del self._logged[next(iter(self._logged))]
        _LOG.warning(
            "%s; %s: %s",
            _MESSAGES[verdict],
            _WORDS[verdict],
            "-".join(route),
            extra={
                "source": source,
                "target": target,
                "verdict": verdict.value,
                "via": via(route),
                "route": "-".join(route),
                "seen_by": seen_by,
                "more": left_out,
            },
        )


class CarefulRoutes:
    """Routes that leave out what was named lately, as far as the pair's policy has others.

    A pair whose n routes are all there are (k = n on two hubs) cannot avoid: it gets them, and fails
    with a reason if they fail. Never fewer than n, never another grade.
    """

    def __init__(self, routes: RoutePort, watch: RouteWatch) -> None:
        self._routes = routes
        self._watch = watch

    def routes(self, target: str, *, avoid: Collection[str] = ()) -> tuple[Route, ...]:
        """The n routes of the pair's grade.

        Raises:
            ShortageError: as the port's.
        """
        for held in self._watch.avoided():
            try:
                return self._routes.routes(target, avoid=held.union(avoid))
            except ShortageError:
                if not held:
                    raise
        raise AssertionError("the last set to avoid is empty")

    def spare_bytes(self, route: Route) -> int | None:
        """As the port's."""
        return self._routes.spare_bytes(route)

    def spend(self, route: Route, nbytes: int) -> None:
        """As the port's."""
        self._routes.spend(route, nbytes)
