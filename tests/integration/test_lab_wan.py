"""A user's own network file, with a delay between the nodes and three etcd members."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mesh.lab.control import Progress, restart_processes, start_lab, stop_lab
from mesh.lab.encryptor import RefusedError
from mesh.lab.networks import load_lab
from mesh.lab.ready import encryptor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
ONE_WAY_MS = 20.0
NETWORK = f"""
name: ocean
domain: lab
nodes:
  - {{id: kme-a, gateways: [{{id: gw-a, saes: [sae-a]}}]}}
  - {{id: kme-b, gateways: [{{id: gw-b, saes: [sae-b]}}]}}
links:
  - {{between: [kme-a, kme-b], initial_bytes: 1048576, one_way_delay_ms: {ONE_WAY_MS}}}
etcd: {{members: 3}}
reserves: {{high_water_bytes: 0, prefill: false}}
"""


def test_keys_on_demand_cross_the_emulated_path_and_come_back_after_it_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "ocean.yaml"
    file.write_text(NETWORK)
    progress = Progress()
    directory = start_lab(load_lab(str(file)), tmp_path / "lab", progress)
    try:
        lab = directory.read_lab()
        assert len(lab["etcd"]["endpoints"]) == len(lab["etcd"]["pids"]) == 3
        (relay,) = lab["relays"]
        assert relay["one_way_delay_ms"] == ONE_WAY_MS
        with encryptor(lab, "sae-a") as a, encryptor(lab, "sae-b") as b:
            for master, slave, enc, dec in (("sae-a", "sae-b", a, b), ("sae-b", "sae-a", b, a)):
                for _ in range(3):
                    began_s = time.monotonic()
                    (key,) = enc.enc_keys(slave)
                    # A fact of the relay: establishing takes one round trip at least.
                    assert time.monotonic() - began_s >= 2 * ONE_WAY_MS / 1000
                    assert dec.dec_keys(master, [key.key_id]) == [key]
            os.kill(relay["pid"], signal.SIGKILL)
            with pytest.raises(RefusedError) as refused:
                a.enc_keys("sae-b")
            assert refused.value.status == 503
            restart_processes(directory, [relay["id"]], progress)
            deadline_s = time.monotonic() + 60
            while True:
                try:
                    (key,) = a.enc_keys("sae-b")
                    break
                except RefusedError as error:
                    assert error.status == 503
                    assert time.monotonic() < deadline_s
                    time.sleep(0.2)
            assert b.dec_keys("sae-a", [key.key_id]) == [key]
    finally:
        stop_lab(directory, progress)
