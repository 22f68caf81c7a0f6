"""Whom a foreign key manager may name, and where its keys go.

Routing follows our own configuration and the network document, never the peer's words (protocol 6.1).
Everything here is decided before anything is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mesh.core.border_rules import Association, BorderConfig, Peer, Problem
from mesh.core.network import NetworkDocument
from mesh.errors import CallerError, ErrorReason, NotAuthorizedError, ShortageError
from mesh.node.border.ports import DocumentPort, peer_of_place, peer_place
from mesh.node.keyports import RoutePort


class Refused(CallerError):  # noqa: N818 - it is a refusal, not a fault of ours
    """A peer's request is refused; nothing of it was stored.

    Args:
        is_held: some key of the request is held from before, so that 400 or 401 would lie.
    """

    def __init__(self, problem: Problem, message: str, *, is_held: bool = False, **facts: object) -> None:
        reason = ErrorReason.NOT_AUTHORIZED if problem is Problem.FOREIGN_INITIATOR else None
        details: dict[str, object] = {"problem": problem.value}
        if is_held:
            details["is_held"] = "true"
        super().__init__(message, reason=reason, facts={**details, **facts})
        self.problem = problem

    def holding(self) -> Refused:
        """The same, for a request of which some key is held."""
        rest = {name: value for name, value in self.facts.items() if name not in ("problem", "is_held")}
        return Refused(self.problem, self.message, is_held=True, **rest)


class Routing:
    """Peers, callbacks and targets.

    Args:
        has_material: whether sealed messages to a KME can be had without establishing any.
    """

    def __init__(
        self,
        own_id: str,
        *,
        config: BorderConfig,
        document: DocumentPort,
        routes: RoutePort,
        has_material: Callable[[str], bool],
    ) -> None:
        self._own_id = own_id
        self._config = config
        self._document = document
        self._routes = routes
        self._has_material = has_material

    def peer(self, kme_id: str) -> Peer:
        """The configured peer.

        Raises:
            NotAuthorizedError: it is not configured here.
        """
        peer = self._config.peer(kme_id)
        if peer is None:
            raise NotAuthorizedError("this key manager is not configured as a peer of the node")
        return peer

    def check_callback(self, peer: Peer, url: str, *, is_synchronous: bool) -> None:
        """A callback lies at the configured peer; a synchronous request has none.

        Raises:
            Refused: CALLBACK.
        """
        if (is_synchronous and not url) or (not is_synchronous and peer.admits_callback(url)):
            return
        raise Refused(
            Problem.CALLBACK,
            "ack_callback_url is not at the configured peer",
            field="ack_callback_url",
        )

    def places(self, peer: Peer, association: Association) -> dict[str, list[str]]:
        """Where the targets are: SAE ids by KME of ours or further peer.

        Raises:
            Refused: who may not be named, is not known, or cannot be reached.
        """
        document = self._document()
        self._check_initiator(document, peer, association.initiator)
        if len(association.targets) > self._config.max_targets:
            raise Refused(
                Problem.TOO_MANY_TARGETS,
                "more targets than this key manager serves at once",
                at_most=self._config.max_targets,
            )
        places: dict[str, list[str]] = {}
        for target in association.targets:
            places.setdefault(self._place(document, peer, target), []).append(target)
        for place in places:
            if peer_of_place(place) is None and place != self._own_id:
                self._check_route(place)
        return places

    def _check_initiator(self, document: NetworkDocument, peer: Peer, initiator: str) -> None:
        """A peer may name only initiators in prefixes pinned to it, whose border is here (6.1)."""
        is_ours = document.home(initiator) is not None
        if is_ours or not peer.serves(initiator) or document.border_for(initiator) != self._own_id:
            raise Refused(
                Problem.FOREIGN_INITIATOR, "this peer may not name that initiator", field="initiator_sae_id"
            )

    def onward(self, targets: Iterable[str]) -> dict[str, list[str]]:
        """Foreign SAEs behind this border, by the peer that serves them.

        Raises:
            Refused: UNKNOWN_TARGET or NO_ROUTE.
        """
        document = self._document()
        found: dict[str, list[str]] = {}
        for target in targets:
            peer = self._config.peer_for(target)
            if document.home(target) is not None or document.border_for(target) != self._own_id:
                raise Refused(Problem.UNKNOWN_TARGET, "a target does not lie behind this border")
            if peer is None:
                raise Refused(Problem.NO_ROUTE, "no key manager is configured for a target")
            found.setdefault(peer.kme_id, []).append(target)
        return found

    def _place(self, document: NetworkDocument, peer: Peer, target: str) -> str:
        home = document.home(target)
        if home is not None:
            return home
        border = document.border_for(target)
        if border is None:
            raise Refused(
                Problem.UNKNOWN_TARGET, "a target is not known here", field="target_sae_ids", target=target
            )
        if border != self._own_id:
            return border
        if peer.serves(target):
            raise Refused(
                Problem.BOUNCE, "a target lies behind the key manager that asks", field="target_sae_ids"
            )
        onward = self._config.peer_for(target)
        if onward is None:
            raise Refused(Problem.NO_ROUTE, "no key manager is configured for a target", target=target)
        return peer_place(onward.kme_id)

    def _check_route(self, kme: str) -> None:
        """Early words for what could only fail: no route, and nothing in reserve to do without one."""
        if self._has_material(kme):
            return
        try:
            self._routes.routes(kme)
        except ShortageError as exc:
            raise Refused(Problem.NO_ROUTE, "a target cannot be reached now", target_kme=kme) from exc
