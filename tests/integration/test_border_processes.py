"""Two owners' sites as processes, joined by ETSI GS QKD 020 only, whose nodes and gateways are killed."""

from __future__ import annotations

import json
import sqlite3
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mesh.core.border import SETTLED_INBOUND, SETTLED_OUTBOUND, Inbound, Outbound
from mesh.lab.ground import free_ports
from mesh.store.tables.keystore import KeyState
from tests.conformance.wire import Wire, client_context
from tests.fakes.border_site import BorderSite, Neighbour

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]
ENC, DEC = "/api/v1/keys/uk-b/enc_keys", "/api/v1/keys/can-a/dec_keys"
CLIENTS = 2


@pytest.fixture
def sites(tmp_path: Path, private_proofs: Path) -> Iterator[dict[str, BorderSite]]:
    ports = dict(zip(("can", "uk"), free_ports(2), strict=True))
    found: dict[str, BorderSite] = {}
    for domain, other in (("can", "uk"), ("uk", "can")):
        directory = tmp_path / domain
        directory.mkdir()
        peer = Neighbour(
            f"{other}-kme",
            f"https://localhost:{ports[other]}",
            f"{other}-",
            tmp_path / other / "border-ca.pem",
            f"{other}-kme.border.{other}.keymesh.internal",
        )
        found[domain] = BorderSite(
            directory,
            proofs=private_proofs,
            neighbours=[peer],
            border={"void_repeat_s": 1.0},
            domain=domain,
            port020=ports[domain],
        )
    try:
        launch(found)
        yield found
    finally:
        for site in found.values():
            site.stop()


class Master:
    """SAE can-a, asking for keys over several connections until told to stop."""

    def __init__(self, site: BorderSite) -> None:
        self._site = site
        self._context = context(site, "can-a")
        self.keys: dict[str, str] = {}
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait_for_more(self, count: int) -> None:
        wanted, deadline = len(self.keys) + count, time.monotonic() + 30
        while len(self.keys) < wanted:
            assert time.monotonic() < deadline, self._site.log("gateway")
            time.sleep(0.01)

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(30)

    def _ask(self) -> None:
        while not self._is_over.is_set():
            try:
                with Wire(self._site.url, self._context) as wire:
                    while not self._is_over.is_set():
                        received = wire.request("GET", ENC)
                        if received.status == 200:
                            (key,) = received.json()["keys"]
                            self.keys[key["key_ID"]] = key["key"]
            except (OSError, ssl.SSLError):
                time.sleep(0.05)


def context(site: BorderSite, sae: str) -> ssl.SSLContext:
    files = site.saes[sae]
    return client_context(site.roots["gateway"], files.cert, files.key)


def states(site: BorderSite, *, is_outbound: bool) -> dict[str, str]:
    """Keys by state, from the disk of a node that does not run."""
    file = site.directory / "data" / "state.db"
    with closing(sqlite3.connect(file)) as database:
        rows = database.execute(
            "SELECT hex(key_id), state FROM border_keys WHERE is_outbound = ?", (int(is_outbound),)
        )
        return {key_id.lower(): state for key_id, state in rows}


def waiting(site: BorderSite) -> set[str]:
    """Keys that a slave could still fetch."""
    with closing(sqlite3.connect(site.directory / "data" / "state.db")) as database:
        rows = database.execute("SELECT hex(key_id) FROM stored_keys WHERE state = ?", (KeyState.HELD.value,))
        return {key_id.lower() for (key_id,) in rows}


def settled_states(sites: dict[str, BorderSite]) -> tuple[dict[str, str], dict[str, str]]:
    """States at both ends once nothing is under way any more; the sites do not run then."""
    deadline, pause_s = time.monotonic() + 240, 2.0
    while True:
        # Each look stops the processes: what is under way needs longer and longer to get to its end.
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 16.0)
        for site in sites.values():
            site.stop()
        out, into = states(sites["can"], is_outbound=True), states(sites["uk"], is_outbound=False)
        open_out = {Outbound(one) for one in out.values()} - SETTLED_OUTBOUND
        open_into = {Inbound(one) for one in into.values()} - SETTLED_INBOUND
        if not open_out | open_into:
            return out, into
        assert time.monotonic() < deadline, f"not settled: {open_out} {open_into}"
        launch(sites)


def launch(sites: dict[str, BorderSite]) -> None:
    for kind in ("node", "gateway"):
        for site in sites.values():
            site.launch(kind)
        for site in sites.values():
            site.wait_ready(kind)


def test_killing_either_end_in_the_middle_leaves_no_key_at_one_end_only(
    sites: dict[str, BorderSite],
) -> None:
    master = Master(sites["can"])
    master.start()
    for victim in ("gateway", "node"):
        for domain in ("uk", "can"):
            master.wait_for_more(5)
            sites[domain].kill(victim)
            time.sleep(0.2)
            sites[domain].launch(victim)
            sites[domain].wait_ready(victim)
    master.wait_for_more(5)
    master.stop()
    # Everything that the master was given waits for the slave, once.
    ids = list(master.keys)
    with Wire(sites["uk"].url, context(sites["uk"], "uk-b")) as wire:
        for at in range(0, len(ids), 100):
            wanted = [{"key_ID": key_id} for key_id in ids[at : at + 100]]
            received = wire.request("POST", DEC, json.dumps({"key_IDs": wanted}).encode())
            assert received.status == 200, received.body
            assert {key["key_ID"]: key["key"] for key in received.json()["keys"]} == {
                key_id: master.keys[key_id] for key_id in ids[at : at + 100]
            }
    out, into = settled_states(sites)
    relayed = {key_id for key_id, state in out.items() if state == Outbound.RELAYED}
    assert relayed == {key_id for key_id, state in into.items() if state == Inbound.RELAYED}
    given = {key_id.replace("-", "") for key_id in master.keys}
    assert given <= relayed
    # What its master never got is no more than died with it between the decision and the answer: of each
    # connection one request, when its gateway and when its node was killed.
    assert len(relayed - given) <= 2 * CLIENTS
    assert waiting(sites["uk"]) == relayed - given
