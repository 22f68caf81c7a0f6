"""``make demo``: a metro network comes up and two encryptors get the same keys from it.

Shows and measures what a user would see through the REST interface alone, next to the
paper's figures, and that what must be refused is refused. Everything runs on this one
machine, and the figures say so.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mesh.errors import ErrorReason, IntegrityError, MeshError
from mesh.lab.control import Progress, restart_processes, rewrite_config, start_lab, stop_lab
from mesh.lab.encryptor import Encryptor, FetchedKey, RefusedError
from mesh.lab.measure import PAPER_DEC_MS, PAPER_ENC_MS, Stopwatch, Summary, summarise
from mesh.lab.networks import Lab, Network, load_network
from mesh.lab.picture import Bar, draw_bars
from mesh.lab.ready import DeliveryCheck, encryptor, wait_until
from mesh.lab.state import LabDirectory
from mesh.node.config import Reserves

ON_DEMAND_KEYS = 200
RESERVE_KEYS = 600
RESERVE_BYTES = 512 * 1024
# What the devices hold at start: enough for all of it, soon ingested, so that little else runs meanwhile.
DEVICE_BYTES = 8 << 20
_KEY_BYTES = 32
_WARM_UP = 10
_FILL_TIMEOUT_S = 40.0


class Demo:
    """One run.

    Args:
        network: what to bring up; SAEs at its first and at its last node get keys.
        folder: where results go; the lab runs in ``folder/lab``.
    """

    def __init__(self, network: Network, folder: Path) -> None:
        self._folder = folder
        self._network = network
        self._progress = Progress()
        self._keys_checked = 0
        self._mismatches = 0
        first, last = network.nodes[0], network.nodes[-1]
        self._master, *_ = [sae for gateway in first.gateways for sae in gateway.saes]
        self._slave, self._stranger, *_ = [sae for gateway in last.gateways for sae in gateway.saes]

    def run(self) -> None:
        """Run all of it; the lab is stopped whatever happens.

        Raises:
            MeshError: something did not come up, or was not as it must be.
        """
        lab_root = self._folder / "lab"
        # Reserves start empty and are not filled, so that the first keys are made on demand.
        empty = msgspec.structs.replace(
            self._network,
            reserves=Reserves(high_water_bytes=0, prefill=False),
            links=[msgspec.structs.replace(link, initial_bytes=DEVICE_BYTES) for link in self._network.links],
        )
        directory = start_lab(Lab.of(empty), lab_root, self._progress)
        try:
            lab = directory.read_lab()
            with (
                encryptor(lab, self._master) as a,
                encryptor(lab, self._slave) as b,
                encryptor(lab, self._stranger) as stranger,
            ):
                self._check_refusals(a, b, stranger)
                on_demand, _ = self._measure(a, b, ON_DEMAND_KEYS)
                self._say(f"{ON_DEMAND_KEYS} keys made on demand, both ends compared")
            self._fill_reserves(directory, lab)
            with encryptor(lab, self._master) as a, encryptor(lab, self._slave) as b:
                reserve, dec = self._measure(a, b, RESERVE_KEYS)
                self._say(f"{RESERVE_KEYS} keys from the reserve, both ends compared")
        finally:
            stop_lab(directory, self._progress)
        self._report(on_demand, reserve, dec)
        if self._mismatches:
            raise IntegrityError(
                "keys differ between the two ends",
                reason=ErrorReason.POOL_MISMATCH,
                facts={"mismatches": self._mismatches},
            )

    def _say(self, text: str) -> None:
        self._progress.done(text)

    def _check_refusals(self, a: Encryptor, b: Encryptor, stranger: Encryptor) -> None:
        """One key works for the two it was made for, once, and for nobody else."""
        (key,) = a.enc_keys(self._slave)
        self._expect(lambda: stranger.dec_keys(self._master, [key.key_id]), "a stranger's fetch")
        self._expect(lambda: b.dec_keys(self._master, [_forged(key.key_id)]), "a forged key_ID")
        (fetched,) = b.dec_keys(self._master, [key.key_id])
        self._compare(key, fetched)
        self._say(f"{self._master} and {self._slave} hold the same {8 * len(key.value)}-bit key {key.key_id}")
        self._expect(lambda: b.dec_keys(self._master, [key.key_id]), "a second fetch")

    def _expect(self, call: Callable[[], object], what: str) -> None:
        try:
            call()
        except RefusedError as error:
            if error.status in (400, 401):
                self._say(f"{what} is refused with {error.status}")
                return
            raise IntegrityError(f"{what} was answered with {error.status}, not refused") from error
        raise IntegrityError(f"{what} was not refused")

    def _compare(self, ours: FetchedKey, theirs: FetchedKey) -> None:
        self._keys_checked += 1
        self._mismatches += (ours.key_id, ours.value) != (theirs.key_id, theirs.value)

    def _measure(self, a: Encryptor, b: Encryptor, count: int) -> tuple[Summary, Summary]:
        """Get ``count`` keys one at a time and fetch each at the other end; latencies of both calls."""
        enc, dec = Stopwatch(), Stopwatch()
        for index in range(_WARM_UP + count):
            if index == _WARM_UP:
                # Connections are open and code is warm: what an encryptor sees from its second call on.
                enc.samples_ms.clear()
                dec.samples_ms.clear()
            with enc:
                (key,) = a.enc_keys(self._slave)
            with dec:
                (fetched,) = b.dec_keys(self._master, [key.key_id])
            self._compare(key, fetched)
        return summarise(enc.samples_ms), summarise(dec.samples_ms)

    def _fill_reserves(self, directory: LabDirectory, lab: dict[str, Any]) -> None:
        """Give every node water marks and wait until the reserves of all pairs are full."""
        nodes = [node["id"] for node in lab["nodes"]]
        reserves = msgspec.to_builtins(Reserves(high_water_bytes=RESERVE_BYTES))
        for node_id in nodes:
            rewrite_config(directory, node_id, lambda config: config.update(reserves=reserves))
        restart_processes(directory, nodes, self._progress)
        wanted_keys = RESERVE_BYTES // _KEY_BYTES * 95 // 100
        wait_until(
            DeliveryCheck(lab, wanted_keys=wanted_keys).missing,
            deadline_s=time.monotonic() + _FILL_TIMEOUT_S,
            processes=directory.read_processes(),
            progress=self._progress.waiting,
        )
        self._say(f"nodes restarted with water marks, {RESERVE_BYTES // _KEY_BYTES} keys in each reserve")

    def _report(self, on_demand: Summary, reserve: Summary, dec: Summary) -> None:
        result = {
            "network": self._network.name,
            "keys_checked": self._keys_checked,
            "mismatches": self._mismatches,
            "enc_on_demand_ms": on_demand,
            "enc_reserve_ms": reserve,
            "dec_ms": dec,
        }
        hops = len(self._network.links)
        (self._folder / "result.json").write_text(
            msgspec.json.format(msgspec.json.encode(result)).decode() + "\n", encoding="utf-8"
        )
        note = (
            f"Here: {hops} QKD links (simulated devices), all on one machine "
            f"({platform.machine()}, Python {platform.python_version()}), no network delay. "
            "Paper: 2 + 2 QKD links and DSKE across an ocean."
        )
        draw_bars(
            [
                Bar("get a key\npaper", *PAPER_ENC_MS, is_paper=True),
                Bar("get a key\nreserve empty, made on demand", on_demand["mean"], on_demand["std"], False),
                Bar("get a key\nfrom the reserve", reserve["mean"], reserve["std"], False),
                Bar("fetch it at the other end\npaper", *PAPER_DEC_MS, is_paper=True),
                Bar("fetch it at the other end", dec["mean"], dec["std"], False),
            ],
            title=f"A key between {self._network.nodes[0].id} and {self._network.nodes[-1].id}",
            note=note,
            path=self._folder / "latency.png",
        )
        rows = [
            ("get a key, reserve empty (on demand)", on_demand, PAPER_ENC_MS),
            ("get a key, reserve filled", reserve, PAPER_ENC_MS),
            ("fetch it at the other end", dec, PAPER_DEC_MS),
        ]
        print()
        print(f"{'milliseconds per 256-bit key':38}{'n':>6}{'mean':>9}{'std':>8}{'p50':>8}{'p99':>8}   paper")
        for text, summary, (mean, std) in rows:
            print(
                f"{text:38}{summary['n']:6}{summary['mean']:9.2f}{summary['std']:8.2f}"
                f"{summary['p50']:8.2f}{summary['p99']:8.2f}   {mean:.0f} ± {std:.0f}"
            )
        print(f"\n{note}")
        print(f"{self._keys_checked} keys compared at both ends, {self._mismatches} differ.")
        print(f"Written: {self._folder / 'result.json'}, {self._folder / 'latency.png'}")


def _forged(key_id: str) -> str:
    """The same key_ID with its last bit changed: a well-formed one that nobody issued."""
    return f"{key_id[:-1]}{int(key_id[-1], 16) ^ 1:x}"


def run_demo(folder: Path, network: str = "metro") -> int:
    """Run the demo into ``folder``; return the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        Demo(load_network(network), folder.resolve()).run()
    except (MeshError, RefusedError) as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m mesh.lab.demo``."""
    parser = argparse.ArgumentParser(prog="mesh.lab.demo", description="Run the demo.")
    parser.add_argument("--dir", type=Path, default=Path("build/demo"), metavar="DIR")
    return run_demo(parser.parse_args(argv).dir)


if __name__ == "__main__":
    raise SystemExit(main())
