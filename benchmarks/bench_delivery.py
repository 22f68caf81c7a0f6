"""Key delivery over the real path: REST with mutual TLS, gateway, gRPC, node, and the relay behind it.

Brings the network ``metro`` up as a lab and drives it as encryptors do, everything
and the load generator on this machine. Floors come from a bare TLS stub of the same
API, driven by the same generator in the same run.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import ssl
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.labs import checked, connections, gateway_url, lab, lab_meter, sae_context, tls_stub
from benchmarks.load import Outcome, fetch_pairs, fetch_repeatedly
from benchmarks.rows import Cpu, Row, percentile, row

CONNECTIONS = 16
SECONDS = float(os.environ.get("KEYMESH_BENCH_SECONDS", "5"))


def _milliseconds(name: str, outcome: Outcome, floor: Outcome, goal: str, cpu: Cpu) -> list[Row]:
    return [
        row(
            f"{name} p{percent}",
            1e3 * percentile(outcome.times_s, percent),
            "ms",
            floor=1e3 * percentile(floor.times_s, percent),
            goal=goal,
            cpu=cpu,
        )
        for percent in (50, 99)
    ]


def _ab(url: str, path: str, lab_json: dict[str, Any], sae: dict[str, Any]) -> float | None:
    """Requests per second as ``ab`` sees them; None where ``ab`` is not installed."""
    program = shutil.which("ab")
    if program is None:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as pem:
        pem.write(Path(sae["cert"]).read_text() + Path(sae["key"]).read_text())
        pem.flush()
        command = [
            program,
            "-q",
            "-k",
            "-c",
            str(CONNECTIONS),
            "-t",
            str(int(SECONDS)),
            "-n",
            "1000000",
            "-E",
            pem.name,
            url + path,
        ]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    failed = re.search(r"Non-2xx responses:\s+(\d+)", text)
    if failed:
        raise RuntimeError(f"{failed[1]} requests failed under ab")
    found = re.search(r"Requests per second:\s+([0-9.]+)", text)
    return float(found[1]) if found else None


async def _filled(lab_json: dict[str, Any], stub: tuple[str, ssl.SSLContext]) -> list[Row]:
    first = lab_json["saes"][0]
    other = next(s for s in lab_json["saes"] if s["node"] != first["node"] and s["id"].startswith("sae-z"))
    enc = f"/api/v1/keys/{other['id']}/enc_keys"
    dec = f"/api/v1/keys/{first['id']}/dec_keys?key_ID="
    master, slave = gateway_url(lab_json, first), gateway_url(lab_json, other)
    rows: list[Row] = []
    async with (
        connections(master, sae_context(lab_json, first), CONNECTIONS) as masters,
        connections(slave, sae_context(lab_json, other), CONNECTIONS) as slaves,
        connections(*stub, CONNECTIONS) as bare,
        connections(*stub, CONNECTIONS) as bare_slaves,
    ):
        floor = checked(await fetch_repeatedly(bare[:1], enc, duration_s=SECONDS / 2), "stub")
        drawn: list[str] = []
        enc_times, dec_times = Outcome(), Outcome()
        meter = lab_meter(lab_json)
        while len(drawn) < 2_000:
            begun = time.perf_counter()
            status, body = await masters[0].get(enc)
            if status != 200:
                raise RuntimeError(f"enc_keys answered {status}: {body!r}")
            enc_times.times_s.append(time.perf_counter() - begun)
            drawn.append(json.loads(body)["keys"][0]["key_ID"])
        enc_cpu, meter = meter.used(), lab_meter(lab_json)
        for key_id in drawn:
            begun = time.perf_counter()
            status, _ = await slaves[0].get(dec + key_id)
            if status != 200:
                raise RuntimeError(f"dec_keys answered {status}")
            dec_times.times_s.append(time.perf_counter() - begun)
        goal = "p50 <= 1.5 ms, p99 <= 8 ms"
        rows += _milliseconds("enc_keys, one key, reserve filled", enc_times, floor, goal, enc_cpu)
        rows += _milliseconds("dec_keys, one key", dec_times, floor, goal, meter.used())

        stub_pairs, _ = await fetch_pairs(bare, bare_slaves, enc, dec, duration_s=SECONDS)
        meter = lab_meter(lab_json)
        pairs, differing = await fetch_pairs(masters, slaves, enc, dec, duration_s=SECONDS)
        if differing:
            raise RuntimeError(f"{differing} keys differ between their ends")
        rows.append(
            row(
                "enc+dec pairs, 16 connections",
                len(checked(pairs, "pairs").times_s) / pairs.elapsed_s,
                "1/s",
                floor=len(stub_pairs.times_s) / stub_pairs.elapsed_s,
                goal=">= 1.0 x floor",
                cpu=meter.used(),
            )
        )

        stub_calls = await fetch_repeatedly(bare, enc, duration_s=SECONDS)
        meter = lab_meter(lab_json)
        per_second = await asyncio.to_thread(_ab, master, enc, lab_json, first)
        generator = "ab"
        if per_second is None:
            calls = checked(await fetch_repeatedly(masters, enc, duration_s=SECONDS), "calls")
            per_second, generator = (
                len(calls.times_s) / calls.elapsed_s,
                "the Python generator; ab is not installed",
            )
        rows.append(
            row(
                f"enc_keys calls, 16 connections ({generator})",
                per_second,
                "1/s",
                floor=len(stub_calls.times_s) / stub_calls.elapsed_s,
                goal=">= 6000 /s (ab)",
                cpu=meter.used(),
            )
        )

        meter = lab_meter(lab_json)
        many = checked(
            await fetch_repeatedly(masters[:4], enc + "?number=128", duration_s=SECONDS, most=400),
            "number=128",
        )
        rate = 128 * len(many.times_s) / many.elapsed_s
        rows.append(row("keys, number=128", rate, "1/s", goal=">= 120000 /s", cpu=meter.used()))
    return rows


async def _on_demand(lab_json: dict[str, Any], stub: tuple[str, ssl.SSLContext]) -> list[Row]:
    """Every request finds the reserve empty: the lab of this run fills none ahead."""
    first = lab_json["saes"][0]
    rows: list[Row] = []
    async with connections(*stub, 1) as bare:
        floor = checked(await fetch_repeatedly(bare, "/", duration_s=SECONDS / 2), "stub")
    for hops, prefix in ((1, "sae-y"), (2, "sae-z")):
        other = next(s for s in lab_json["saes"] if s["id"].startswith(prefix))
        meter = lab_meter(lab_json)
        async with connections(gateway_url(lab_json, first), sae_context(lab_json, first), 1) as one:
            outcome = checked(
                await fetch_repeatedly(
                    one, f"/api/v1/keys/{other['id']}/enc_keys", duration_s=SECONDS, most=300
                ),
                "on demand",
            )
        rows.append(
            row(
                f"enc_keys on demand, reserve empty, {hops} hop(s), p50",
                1e3 * statistics.median(outcome.times_s),
                "ms",
                floor=1e3 * statistics.median(floor.times_s),
                goal="round trip + 5 ms",
                cpu=meter.used(),
            )
        )
    return rows


def run() -> list[Row]:
    """Measure and return the rows."""

    async def filled() -> list[Row]:
        with lab("metro") as lab_json:
            async with tls_stub() as stub:
                return await _filled(lab_json, stub)

    async def on_demand() -> list[Row]:
        with lab(str(Path(__file__).with_name("metro-on-demand.yaml"))) as lab_json:
            async with tls_stub() as stub:
                return await _on_demand(lab_json, stub)

    return uvloop.run(filled()) + uvloop.run(on_demand())


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
