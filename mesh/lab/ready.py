"""Asking a lab's processes whether they can serve.

``/readyz`` says what a process thinks of itself; a gateway counts as ready only when
an SAE, over the real interface, sees keys towards every other node that has SAEs.
"""

from __future__ import annotations

import http.client
import math
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from mesh.errors import ErrorReason, UnavailableError
from mesh.lab.encryptor import Encryptor, RefusedError
from mesh.lab.processes import Process

_POLL_S = 0.1


def get_plain(place: str, path: str, *, timeout_s: float = 2.0) -> tuple[int, bytes]:
    """GET from a plain HTTP port.

    Returns:
        Status and body; status 0 when nobody answers.
    """
    host, _, port = place.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def wait_until(
    check: Callable[[], str],
    *,
    deadline_s: float,
    processes: Iterable[Process],
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Poll ``check`` until it returns "": nothing is missing any more.

    Args:
        check: returns what is missing, for people.
        deadline_s: on the monotonic clock.
        processes: must keep running meanwhile.
        progress: told what is missing whenever that changes.

    Raises:
        UnavailableError: a process ended, or the deadline passed; says what was missing.
    """
    watched = list(processes)
    said = ""
    while missing := check():
        for process in watched:
            process.check_running()
        if time.monotonic() > deadline_s:
            raise UnavailableError(f"not ready in time: {missing}", reason=ErrorReason.DEADLINE_EXCEEDED)
        if missing != said:
            progress(missing)
            said = missing
        time.sleep(_POLL_S)


def missing_health(places: dict[str, str], path: str, *, deadline_s: float = math.inf) -> str:
    """What is missing until every place answers 200 on ``path``; "" for nothing.

    Args:
        places: ``host:port`` by process id.
        path: ``/healthz`` or ``/readyz``.
        deadline_s: on the monotonic clock: no answer is waited for longer.
    """
    for process_id, place in places.items():
        status, body = get_plain(place, path, timeout_s=_within(2.0, deadline_s))
        if status != 200:
            return f"{process_id}: {_reasons(body) or 'starting'}"
    return ""


def _within(timeout_s: float, deadline_s: float) -> float:
    """What a call may take of the time that is left, and a moment where none is."""
    return min(timeout_s, max(0.1, deadline_s - time.monotonic()))


def _reasons(body: bytes) -> str:
    try:
        missing = msgspec.json.decode(body, type=dict[str, Any]).get("missing", [])
    except msgspec.DecodeError:
        return ""
    return ", ".join(str(entry) for entry in missing)


class DeliveryCheck:
    """Whether keys can be had through every gateway, towards every other node.

    Args:
        lab: the content of ``lab.json``.
        wanted_keys: that status must count; 0 where reserves are not kept filled. There, and
            across a border, one key is asked for (and spent): nothing is in stock to be counted.
        deadline_s: on the monotonic clock: no answer is waited for longer, nobody asked later.
    """

    def __init__(self, lab: dict[str, Any], *, wanted_keys: int, deadline_s: float = math.inf) -> None:
        self._deadline_s = deadline_s
        self._lab = lab
        self._wanted_keys = wanted_keys
        self._open = list(_pairs(lab))
        self._domain = {node["id"]: node["domain"] for node in lab["nodes"]}

    def missing(self) -> str:
        """What is missing; "" for nothing."""
        while self._open:
            problem = self._try(*self._open[0])
            if problem:
                return problem
            self._open.pop(0)
            if self._open and time.monotonic() > self._deadline_s:
                return f"{self._open[0][0]['gateway']}: not asked yet"
        return ""

    def _try(self, caller: dict[str, Any], other: dict[str, Any]) -> str:
        what = f"{caller['gateway']}: too few keys for {other['id']} yet"
        try:
            with encryptor(self._lab, caller["id"], timeout_s=_within(10.0, self._deadline_s)) as sae:
                if self._wanted_keys and self._domain[caller["node"]] == self._domain[other["node"]]:
                    is_there = sae.status(other["id"])["stored_key_count"] >= self._wanted_keys
                else:
                    is_there = bool(sae.enc_keys(other["id"]))
        except RefusedError as error:
            return f"{what} ({error})"
        except (OSError, http.client.HTTPException, ssl.SSLError) as error:
            return f"{what} ({error or type(error).__name__})"
        return "" if is_there else what


def _pairs(lab: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Per gateway its first SAE, with the first SAE of every other node."""
    first_of_gateway: dict[str, dict[str, Any]] = {}
    first_of_node: dict[str, dict[str, Any]] = {}
    for sae in lab["saes"]:
        first_of_gateway.setdefault(sae["gateway"], sae)
        first_of_node.setdefault(sae["node"], sae)
    for caller in first_of_gateway.values():
        for node_id, other in first_of_node.items():
            if node_id != caller["node"]:
                yield caller, other


def encryptor(lab: dict[str, Any], sae_id: str, *, timeout_s: float = 15.0) -> Encryptor:
    """An SAE of the lab at its own gateway.

    Raises:
        KeyError: the lab has no such SAE.
    """
    sae = next((entry for entry in lab["saes"] if entry["id"] == sae_id), None)
    if sae is None:
        raise KeyError(sae_id)
    gateway = next(entry for entry in lab["gateways"] if entry["id"] == sae["gateway"])
    domain = next(
        domain
        for domain in lab["domains"]
        for node in lab["nodes"]
        if node["id"] == sae["node"] and node["domain"] == domain["id"]
    )
    return Encryptor(
        gateway["url"], ca=domain["ca"]["gateway"], cert=sae["cert"], key=sae["key"], timeout_s=timeout_s
    )
