"""Which routes a transfer can take now: routes of the pair's grade joined to this node's first links.

Owns the readiness of n first hops at one moment, and how much bulk may use of the scarcest hop. With
k < n a share whose link is closed or empty is left out, as if it had been lost on its way: k shares
still make the secret. Never decides the grade: fewer than k is a shortage with a reason, never less.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.core.collector import Verdict
from mesh.core.network import Grade, NetworkDocument
from mesh.core.transfer import PREFIX_BYTES
from mesh.errors import ErrorReason, MeshError, ShortageError, UnavailableError
from mesh.node.keyports import DocumentView, RoutePort, Surroundings
from mesh.node.ports import LinkPlanePort, LinkPort
from mesh.node.routewatch import Route, RouteWatch

#: Bytes about to be claimed: by first neighbour, as a route of one, and by whole route.
Planned = dict[Route, int]

FRAME_OVERHEAD_BYTES = 32 + PREFIX_BYTES + 64
#: How long a transfer waits for links to open before it says that the grade cannot be had.
_OPEN_WAIT_S = 2.0
#: How long it waits for the last n - k links once k are ready.
_GRACE_S = 0.05
_BULK_GRACE_S = 0.5


@dataclass(frozen=True, slots=True)
class Path:
    """A route and the link of its first hop; None: its share cannot leave now."""

    route: Route
    link: LinkPort | None


class Paths:
    """The paths from this node.

    Args:
        lane_floor_bytes: lane bytes that bulk leaves for keys on demand.
    """

    def __init__(
        self,
        around: Surroundings,
        *,
        links: LinkPlanePort,
        routes: RoutePort,
        directory: DocumentView,
        watch: RouteWatch,
        lane_floor_bytes: int,
    ) -> None:
        self._around = around
        self._links = links
        self._routes = routes
        self._directory = directory
        self._watch = watch
        self._lane_floor_bytes = lane_floor_bytes

    def document(self) -> NetworkDocument:
        """The document in force.

        Raises:
            ShortageError: NO_ROUTE: there is none yet.
        """
        document = self._directory.document
        if document is None:
            raise ShortageError("no network document yet", reason=ErrorReason.NO_ROUTE, retry_after_s=1.0)
        return document

    def grade(self, target: str) -> Grade:
        """The pair's grade (3.4)."""
        return self.document().policy(self._around.own_id, target).grade

    def routes(self, target: str) -> tuple[Route, ...]:
        """The n routes of the pair's grade.

        Raises:
            ShortageError: NO_ROUTE or GRADE_UNAVAILABLE.
        """
        return self._routes.routes(target)

    async def ready(self, target: str, length: int, deadline: float, *, is_bulk: bool) -> list[Path]:
        """n paths of which k or more have ``length`` claimable, those first; no await after it.

        Raises:
            ShortageError: GRADE_UNAVAILABLE when fewer than k links open in time, else what the links
                lack.
            UnavailableError: the one link of a relayed pair is not open.
        """
        k = self.grade(target).k
        paths = self._candidates(target, length, k, is_bulk=is_bulk)
        now_s = self._around.monotonic_s()
        opened_by_s = min(deadline, now_s + _OPEN_WAIT_S) if len(paths) > 1 else deadline
        grace_s: float | None = _BULK_GRACE_S if is_bulk else _GRACE_S
        while True:
            can = [path.link is not None and path.link.claimable() >= length for path in paths]
            if all(can):
                return paths
            short = [
                path.link
                for path, is_ready in zip(paths, can, strict=True)
                if path.link is not None and not is_ready
            ]
            now_s = self._around.monotonic_s()
            if sum(can) >= k:
                short = [link for link in short if link.is_open]
                if grace_s is None or not short:
                    return self._split(target, paths, can)
                timeout_s, grace_s = min(grace_s, deadline - now_s), None
            else:
                is_closed = sum(path.link is not None and path.link.is_open for path in paths) < k
                if len(paths) > 1 and is_closed and now_s >= opened_by_s:
                    raise self._too_few_open(target, paths, k)
                timeout_s = (opened_by_s if is_closed else deadline) - now_s
            problem = await _first_ready(short, length, max(0.0, timeout_s))
            is_over = self._around.monotonic_s() >= deadline
            if problem is not None and sum(can) < k and (is_over or not _may_pass(problem)):
                raise problem

    def _candidates(self, target: str, length: int, k: int, *, is_bulk: bool) -> list[Path]:
        """All routes with their links; bulk leaves out those that are scarce further on."""
        paths = [Path(route, self._links.link(route[1])) for route in self._routes.routes(target)]
        if is_bulk:
            scarce = {path.route for path in paths if self._is_scarce(path.route, length)}
            if len(paths) - len(scarce) < k:
                raise ShortageError(
                    "a route has too little material further on", facts={"target": target}, retry_after_s=2.0
                )
            paths = [Path(path.route, None if path.route in scarce else path.link) for path in paths]
        if sum(path.link is not None for path in paths) < k:
            raise ShortageError("no link to the first node of the route", reason=ErrorReason.NO_ROUTE)
        return paths

    def _is_scarce(self, route: Route, length: int) -> bool:
        spare = self._routes.spare_bytes(route)
        return spare is not None and spare < length + FRAME_OVERHEAD_BYTES

    def _split(self, target: str, paths: Sequence[Path], can: Sequence[bool]) -> list[Path]:
        """The ready ones first: shares 1..k are lane bytes of the first k."""
        ready = [path for path, is_ready in zip(paths, can, strict=True) if is_ready]
        rest = [path for path, is_ready in zip(paths, can, strict=True) if not is_ready]
        closed = [path.route for path in rest if path.link is not None and not path.link.is_open]
        if closed:
            self._name(target, closed)
        return ready + [Path(path.route, None) for path in rest]

    def _too_few_open(self, target: str, paths: Sequence[Path], k: int) -> ShortageError:
        closed = [path.route for path in paths if path.link is None or not path.link.is_open]
        self._name(target, closed)
        return ShortageError(
            "fewer routes than the pair's grade needs can be used now",
            reason=ErrorReason.GRADE_UNAVAILABLE,
            facts={"needed": k, "closed": ", ".join("-".join(route) for route in closed)[:200]},
            retry_after_s=2.0,
        )

    def _name(self, target: str, routes: Sequence[Route]) -> None:
        own = self._around.own_id
        self._watch.name(routes, Verdict.SILENT, source=own, target=target, seen_by=own)

    # bulk

    def frame_bytes(self, target: str) -> int:
        """Bytes of a share that fit one frame on every first link.

        Raises:
            ShortageError: no route, or too few links.
        """
        routes = self._routes.routes(target)
        links = [link for route in routes if (link := self._links.link(route[1])) is not None]
        if len(links) < self.grade(target).k:
            raise ShortageError("no link to the first node of the route", reason=ErrorReason.NO_ROUTE)
        return min(link.max_frame_bytes for link in links) - FRAME_OVERHEAD_BYTES

    def spare_bytes(self, target: str, planned: Planned) -> int:
        """What bulk may use now of each route, floors kept, as far as is known.

        The scarcest of all routes decides, unless it is far behind the k-th best: then it is left
        out, so that one poor hub does not slow the others down.

        Args:
            target: the peer.
            planned: what is about to be claimed already.
        """
        k = self.grade(target).k
        spares = sorted((self._spare(route, planned) for route in self._routes.routes(target)), reverse=True)
        return max(0, spares[-1] if spares[-1] * 4 >= spares[k - 1] else spares[k - 1])

    def _spare(self, route: Route, planned: Planned) -> int:
        link = self._links.link(route[1])
        if link is None or not link.is_open:
            return 0
        usable = link.status().transmit.usable - planned.get(route[1:2], 0)
        spare = usable - self._lane_floor_bytes - FRAME_OVERHEAD_BYTES
        further = self._routes.spare_bytes(route)
        if further is None:
            return spare
        return min(spare, further - planned.get(route, 0) - FRAME_OVERHEAD_BYTES)

    def plan(self, target: str, nbytes: int, planned: Planned) -> None:
        """Counts a bulk transfer that is about to be claimed, on its first links and further on."""
        for route in self._routes.routes(target):
            for key in (route[1:2], route):
                planned[key] = planned.get(key, 0) + nbytes + FRAME_OVERHEAD_BYTES

    def spent(self, path: Path, nbytes: int) -> None:
        """A bulk share of that length has left over the path."""
        self._routes.spend(path.route, nbytes + FRAME_OVERHEAD_BYTES)


def _may_pass(problem: MeshError) -> bool:
    """Whether waiting longer can help."""
    return isinstance(problem, ShortageError | UnavailableError)


async def _first_ready(links: Sequence[LinkPort], length: int, timeout_s: float) -> MeshError | None:
    """Waits until one more of the links has that much claimable; the problem of the last if none has."""
    if len(links) == 1:
        try:
            await links[0].ready(length, timeout_s=timeout_s)
        except MeshError as exc:
            return exc
        return None
    tasks = [asyncio.ensure_future(link.ready(length, timeout_s=timeout_s)) for link in links]
    try:
        pending = set(tasks)
        problem: MeshError | None = None
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is None:
                    return None
                if not isinstance(error, MeshError):
                    raise error
                problem = error
        return problem
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
