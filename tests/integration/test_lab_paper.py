"""The paper's network as it ships: three key managers, two borders, an ocean; nodes and a gateway die."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mesh.core.border import SETTLED_INBOUND, SETTLED_OUTBOUND
from mesh.lab.encryptor import Encryptor, FetchedKey, RefusedError
from mesh.lab.ready import encryptor
from mesh.store.tables.keystore import KeyState
from tests.labs import keymesh, lab_json, running_lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
A, B = "can-sae-a", "uk-sae-b"
BORDERS = ["can-site-z", "dske-can-site-z", "dske-uk-site-x", "uk-site-x"]
ENDS = {"can-site-x", "uk-site-z"}
#: Killed together, round by round: a border's gateway, a border, both homes, the SAEs' own borders.
VICTIMS = [
    ["gw-dske-uk-site-x"],
    ["dske-can-site-z"],
    ["can-site-x", "uk-site-z"],
    ["can-site-z", "uk-site-x"],
]
CLIENTS = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with running_lab("paper", tmp_path_factory.mktemp("paper") / "lab") as root:
        yield root


class Master:
    """SAE A asking for keys, over several connections, until told to stop."""

    def __init__(self, lab: dict[str, Any]) -> None:
        self.keys: list[FetchedKey] = []
        self._lab = lab
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def wait_for_more(self, count: int) -> None:
        wanted, deadline_s = len(self.keys) + count, time.monotonic() + 90
        while len(self.keys) < wanted:
            assert time.monotonic() < deadline_s, f"{len(self.keys)} of {wanted} keys"
            time.sleep(0.02)

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(30)

    def _ask(self) -> None:
        with encryptor(self._lab, A) as sae:
            while not self._is_over.is_set():
                try:
                    self.keys += sae.enc_keys(B)
                except (RefusedError, OSError, http.client.HTTPException):
                    time.sleep(0.1)


def fetched(sae: Encryptor, keys: list[FetchedKey], master: str = A) -> list[FetchedKey]:
    found: list[FetchedKey] = []
    for at in range(0, len(keys), 64):
        part = {key.key_id: key for key in sae.dec_keys(master, [key.key_id for key in keys[at : at + 64]])}
        found += [part[key.key_id] for key in keys[at : at + 64]]
    return found


def query(root: Path, kme_id: str, sql: str) -> list[tuple[Any, ...]]:
    """Of the disk of a node that does not run."""
    with closing(sqlite3.connect(root / "data" / kme_id / "state.db")) as database:
        return database.execute(sql).fetchall()


def settled_at_rest(root: Path) -> None:
    """Nothing is under way at any border any more; the nodes do not run then."""
    nodes = [*BORDERS, *ENDS]
    deadline_s, pause_s = time.monotonic() + 240, 2.0
    while True:
        # Each look stops the nodes: what is under way needs longer and longer to get to its end.
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 16.0)
        pids = {node["id"]: node["pid"] for node in lab_json(root)["nodes"]}
        for kme_id in nodes:
            os.kill(pids[kme_id], signal.SIGTERM)
        while any(Path(f"/proc/{pids[kme_id]}").exists() for kme_id in nodes):
            time.sleep(0.05)
        under_way = {
            (kme_id, is_outbound, state)
            for kme_id in BORDERS
            for is_outbound, state in query(root, kme_id, "SELECT is_outbound, state FROM border_keys")
            if state not in (SETTLED_OUTBOUND if is_outbound else SETTLED_INBOUND)
        }
        if not under_way:
            return
        assert time.monotonic() < deadline_s, under_way
        assert keymesh("lab", "restart", "--dir", str(root), *nodes).returncode == 0


def test_keys_cross_both_borders_and_the_ocean_in_either_direction(root: Path) -> None:
    lab = lab_json(root)
    assert {entry["node"] for entry in lab["gateways"] if "url020" in entry} == set(BORDERS)
    assert [domain["id"] for domain in lab["domains"]] == ["can", "dske", "uk"]
    with encryptor(lab, A) as a, encryptor(lab, B) as b:
        keys = a.enc_keys(B, number=3)
        assert fetched(b, keys) == keys
        keys = b.enc_keys(A, size_bits=1024)
        assert fetched(a, keys, master=B) == keys
    status = keymesh("status", "--lab", str(root))
    assert status.returncode == 0, status.stderr
    assert all(entry["id"] in status.stdout for entry in lab["nodes"] + lab["hubs"])
    saes = keymesh("sae", "list", "--lab", str(root)).stdout
    assert A in saes
    assert B in saes


def test_one_request_id_leads_through_both_borders_and_the_hubs(root: Path) -> None:
    lab = lab_json(root)
    with encryptor(lab, A) as a, encryptor(lab, B) as b:
        keys = a.enc_keys(B)
        request_id = a.request_id
        assert fetched(b, keys) == keys

    def told(member: str) -> set[str]:
        lines = (root / "log" / f"{member}.log").read_text().splitlines()
        return {json.loads(line)["event"] for line in lines if request_id in line}

    for border in BORDERS:
        is_entry = border in ("dske-can-site-z", "uk-site-x")
        assert ("foreign keys taken" if is_entry else "border request performed") in told(border), border
        if not is_entry:
            assert "posted to a key manager" in told(f"gw-{border}")
    assert (root / "audit" / "can-site-x.jsonl").read_text().count(request_id) == 1


def test_kill_9_in_the_middle_of_hand_overs_leaves_no_key_at_one_end_only(root: Path) -> None:
    held_by_b = f"SELECT hex(key_id) FROM stored_keys WHERE state = '{KeyState.HELD.value}'"
    lab = lab_json(root)
    pids = {entry["id"]: entry["pid"] for section in ("nodes", "gateways") for entry in lab[section]}
    with encryptor(lab, B) as b:
        master = Master(lab)
        for victims in VICTIMS:
            master.wait_for_more(4)
            for victim in victims:
                os.kill(pids[victim], signal.SIGKILL)
            restarted = keymesh("lab", "restart", "--dir", str(root), *victims)
            assert restarted.returncode == 0, restarted.stderr
        master.wait_for_more(4)
        master.stop()
        # Everything that A was given waits for B, once, and is the same.
        assert fetched(b, master.keys) == master.keys
    settled_at_rest(root)
    # Nothing waits for B any more but the key of the lab's own first question, which nobody fetched, and
    # what A's node had decided to release when it was killed, before it could answer either request.
    assert len(query(root, "uk-site-z", held_by_b)) <= 1 + CLIENTS
    borders = {
        kme_id: set(query(root, kme_id, "SELECT hex(key_id) FROM border_keys WHERE state = 'relayed'"))
        for kme_id in BORDERS
    }
    assert len(set(map(frozenset, borders.values()))) == 1
    assert {key.key_id.replace("-", "").upper() for key in master.keys} <= {
        key_id for (key_id,) in borders["can-site-z"]
    }
