"""``make kills``: many short lives of three whole nodes, each ended by SIGKILL, then an audit of them all.

One process holds the stores, lanes, frames and key planes of a line of nodes (no TLS, gateways or
etcd: ``make torture`` has those), so all nodes die together and nobody is left who knows more than
the disks. A life is a fork that ends itself at a failpoint, each as often as the others, or is ended
at a random moment; sometimes the proofs of a mere restart vanish in between, as in a reboot. What a
life told before it ended is held against all later ones.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from mesh.errors import CallerError, MeshError, NotAuthorizedError
from mesh.node.links import LinkConfig, LinkPlane
from mesh.node.pad_recorder import JsonlPadRecorder
from mesh.node.transport import Transport
from mesh.store import failpoints
from mesh.store.store import Store
from tests.fakes.key_network import HASTY, LINE, REFILLED, KeyNetwork, until
from tests.fakes.link_sites import FAST_INGEST, DevicePair, Document, MemoryTransport, Wire, WireStream
from tests.torture.client import Key
from tests.torture.history import Fate, Fetchable, History
from tests.torture.kills import plan_failpoints
from tests.torture.pads import audit_pads

NEIGHBOURS = {"kme-a": ("kme-b",), "kme-b": ("kme-a", "kme-c"), "kme-c": ("kme-b",)}
HOMES = {sae: entry["home"] for sae, entry in LINE["saes"].items()}
MATERIAL_BYTES = 1 << 20
"""What the devices of a link give in one life."""
FAILPOINT_WAIT_S = 5.0
HEAL_TIMEOUT_S = 120.0
WORKERS = 4
_MAX_OPEN = 200


class Streams(Wire):
    """The streams of one link, accepted by a plane."""

    plane: LinkPlane | None = None

    def dial_as(self, own: str, peer: str) -> Transport:
        """Open a stream to the plane that accepts."""
        del peer
        stream = WireStream(self)
        task = asyncio.get_running_loop().create_task(self._accept(own, stream))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return MemoryTransport(stream, is_dialler=True)

    async def _accept(self, own: str, stream: WireStream) -> None:
        try:
            if self.plane is not None:
                await self.plane.accept(own, MemoryTransport(stream, is_dialler=False))
        except MeshError:
            stream.cut()


class LinkedLine(KeyNetwork):
    """a - b - c with real link planes over streams in memory, and the pad audit of every node."""

    def __init__(self, root: Path, rng: random.Random, **options: Any) -> None:
        super().__init__(root, LINE, **options)
        pairs = [(a, b) for a, peers in NEIGHBOURS.items() for b in peers if a < b]
        self.devices = {pair: DevicePair(MATERIAL_BYTES, seed=rng.getrandbits(64)) for pair in pairs}
        self.streams = {pair: Streams() for pair in pairs}
        self.planes: dict[str, LinkPlane] = {}

    def links_of(self, kme: str, store: Store, incarnation: bytes) -> LinkPlane:
        """A link plane fed by device pairs in memory."""
        links = []
        for peer in NEIGHBOURS[kme]:
            pair = self.devices[min(kme, peer), max(kme, peer)]
            links.append(
                LinkConfig(
                    peer,
                    pair.leader if kme < peer else pair.follower,
                    pool_max_bytes=2 << 20,
                    redial_min_s=0.02,
                    redial_max_s=0.1,
                    ingest=FAST_INGEST,
                )
            )
        plane = self.planes[kme] = LinkPlane(
            kme,
            "metro",
            store,
            incarnation,
            links,
            dial=lambda peer: self.streams[kme, peer].dial_as(kme, peer),
            alarms=self.sites[kme].alarms,
            document=Document(),
            recorder=JsonlPadRecorder(self.root / f"{kme}.pads.jsonl", kme),
        )
        for peer in NEIGHBOURS[kme]:
            if peer < kme:
                self.streams[peer, kme].plane = plane
        return plane

    async def start_links(self, kme: str) -> None:
        """Streams may open once all planes are there: those that accept find out by themselves."""
        self.planes[kme].handler = self.plane(kme).shares
        await self.planes[kme].start()

    async def until_open(self) -> None:
        """Every link is open."""
        links = [link for plane in self.planes.values() for link in plane.links.values()]
        await until(lambda: all(link.is_open for link in links), timeout_s=HEAL_TIMEOUT_S)


class Ledger:
    """What a life told: applied in the life itself, which chooses by it, and by whoever watches it."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.asking: dict[int, Fetchable] = {}
        self.is_up = False

    def apply(self, told: dict[str, Any]) -> None:
        """One line."""
        history = self.history
        match told["event"]:
            case "up":
                self.is_up = True
            case "acked":
                history.acknowledged(told["master"], told["slaves"], keys_of(told))
            case "asking":
                self.asking[told["worker"]] = history.take_just(told["master"], told["slave"], keys_of(told))
            case "got":
                batch = self.asking.pop(told["worker"])
                history.fetched(batch, keys_of(told))
            case "refused":
                batch = self.asking.pop(told["worker"])
                if len(batch.keys) == 1:
                    history.refused(batch, 400)
                history.put_back(batch)
            case "unsure":
                self._cut(told["worker"])
            case "doubled":
                history.wrong(f"{told['key_id']} was delivered twice")
            case "wrong":
                history.wrong(told["text"])
            case what:
                history.asked(what)

    def _cut(self, worker: int) -> None:
        batch = self.asking.pop(worker)
        self.history.cut(batch)
        self.history.put_back(batch)

    def ended(self) -> None:
        """The life is over: what it was asking for may have happened."""
        for worker in list(self.asking):
            self._cut(worker)
        self.is_up = False


def keys_of(told: dict[str, Any]) -> list[Key]:
    return [Key(key_id, bytes.fromhex(value)) for key_id, value in told["keys"]]


class Life:
    """One life, in the process that will be killed."""

    def __init__(
        self, root: Path, ledger: Ledger, rng: random.Random, tell_to: int, *, failpoint: str = ""
    ) -> None:
        self._ledger = ledger
        self._rng = rng
        self._tell_to = tell_to
        # Most die in traffic, the others while they start.
        self._failpoint_when_up = failpoint if rng.random() < 0.7 else ""
        failpoints.kill_at("" if self._failpoint_when_up else failpoint)
        refilled = replace(REFILLED, request_timeout_s=HASTY.request_timeout_s)
        config = rng.choice((HASTY, refilled, replace(refilled, high_water_bytes=128 << 10)))
        self._network = LinkedLine(root, rng, config=config)

    def tell(self, event: str, **facts: Any) -> None:
        """Tell the outside world before anything else is done."""
        told = {"event": event, **facts}
        line = json.dumps(told).encode() + b"\n"
        while line:
            line = line[os.write(self._tell_to, line) :]
        self._ledger.apply(told)

    async def run(self, *, is_last: bool) -> None:
        """Live until killed; the last one fetches all there is and ends."""
        await self._network.start()
        if not is_last:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._say_up())
                for worker in range(WORKERS):
                    group.create_task(self._work(worker))
        await self._say_up()
        deadline_s = time.monotonic() + HEAL_TIMEOUT_S
        while (batch := self._ledger.history.take_open(None, 16)) is not None:
            await self._fetch(0, batch)
            if time.monotonic() > deadline_s:
                self.tell("wrong", text="acknowledged keys could not be fetched in the end")
                break
        for site in self._network.sites.values():
            for alarm in site.alarms.open_alarms():
                if alarm.needs_operator or alarm.severity == "critical":
                    self.tell("wrong", text=f"{site.kme_id}: {alarm.alarm_id}: {alarm.message}")
        await self._network.stop()

    async def _say_up(self) -> None:
        await self._network.until_open()
        self.tell("up")
        if self._failpoint_when_up:
            failpoints.kill_at(self._failpoint_when_up)

    async def _work(self, worker: int) -> None:
        while True:
            await asyncio.sleep(0.01 * self._rng.random())
            dice = self._rng.random()
            history = self._ledger.history
            if dice < 0.5 and history.open_count < _MAX_OPEN:
                await self._get()
            elif dice < 0.95:
                batch = history.take_open(self._rng, self._rng.choice((1, 1, 2, 8)))
                if batch is not None:
                    await self._fetch(worker, batch)
            else:
                await self._fetch_again()

    async def _get(self) -> None:
        master, slave, *others = self._rng.sample(sorted(HOMES), 4)
        more = others[: self._rng.choice((0, 0, 0, 1, 2))]
        number = self._rng.choice((1, 1, 2, 4))
        size_bytes = self._rng.choice((16, 32, 64, 512))
        try:
            keys = await self._network.get(master, slave, number, size_bytes, more)
        except MeshError as error:
            self.tell(f"enc {error.reason.value}")
            return
        told = [(str(uuid.UUID(bytes=key_id)), value.hex()) for key_id, value in keys.keys]
        self.tell("acked", master=master, slaves=[slave, *more], keys=told)

    async def _fetch(self, worker: int, batch: Fetchable) -> None:
        self._ledger.history.put_back(batch)
        ids = [key.key_id for key in batch.keys]
        whose = {"master": batch.master, "slave": batch.slave}
        self.tell("asking", worker=worker, **whose, keys=[(one, "") for one in ids])
        try:
            keys = await self._redeem(batch.slave, batch.master, ids)
        except (CallerError, NotAuthorizedError) as error:
            self.tell("refused", worker=worker, reason=error.reason.value)
            if len(batch.keys) > 1:
                # Nothing was redeemed; one by one shows which key it is.
                for key in batch.keys:
                    await self._fetch(worker, Fetchable(batch.master, batch.slave, (key,)))
        except MeshError as error:
            self.tell("unsure", worker=worker, reason=error.reason.value)
        else:
            self.tell("got", worker=worker, keys=keys)

    async def _fetch_again(self) -> None:
        chosen = self._ledger.history.some(self._rng, Fate.FETCHED)
        if chosen is not None:
            key, slave = chosen
            with contextlib.suppress(MeshError):
                await self._redeem(slave, key.master, [key.key_id])
                self.tell("doubled", key_id=key.key_id)

    async def _redeem(self, slave: str, master: str, ids: list[str]) -> list[tuple[str, str]]:
        keys = await self._network.redeem(slave, master, [uuid.UUID(one).bytes for one in ids])
        return [(str(uuid.UUID(bytes=key_id)), value.hex()) for key_id, value in keys.keys]


class Lives:
    """All lives on one root, one after another.

    Args:
        root: for the nodes' directories and pad audits.
        seed: decides the plan; what is asked at which moment depends on the machine.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self._root = root
        self._rng = random.Random(f"{seed}/lives")
        self._failpoints = plan_failpoints(self._rng)
        self._ledger = Ledger(History(HOMES))
        self.kills: Counter[str] = Counter()

    @property
    def history(self) -> History:
        """What all of them told."""
        return self._ledger.history

    def one(self) -> None:
        """A life that ends by a kill."""
        if self._rng.random() < 0.1:
            self._reboot()
        if self._rng.random() < 0.7:
            failpoint = next(self._failpoints)
            died = self._live(failpoint=failpoint, kill_in_s=FAILPOINT_WAIT_S)
            self.kills[failpoint.partition(":")[0] if died else "random"] += 1
        else:
            self._live(kill_in_s=self._rng.uniform(0.02, 1.0))
            self.kills["random"] += 1

    def last(self) -> None:
        """A life that heals everything and ends by itself."""
        self._live(kill_in_s=3 * HEAL_TIMEOUT_S, is_last=True)
        if self.history.open_count:
            self.history.wrong("the last life left keys unfetched")

    def _reboot(self) -> None:
        """The proofs of some nodes vanish: they must go beyond all that their peers may have seen."""
        folder = LinkedLine(self._root, self._rng).proof_dir()
        for proof in sorted(folder.iterdir()) if folder is not None else ():
            if self._rng.random() < 0.5:
                proof.unlink()

    def _live(self, *, kill_in_s: float, failpoint: str = "", is_last: bool = False) -> bool:
        """One life; whether it ended before it was killed from outside."""
        reading, writing = os.pipe()
        seed = self._rng.getrandbits(64)
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            self._be(writing, random.Random(seed), failpoint, is_last=is_last)
        os.close(writing)
        deadline_s = time.monotonic() + kill_in_s
        rest = b""
        died = True
        while True:
            if died and not select.select([reading], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
                os.kill(pid, signal.SIGKILL)
                died = False
            data = os.read(reading, 1 << 20)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._ledger.apply(json.loads(line))
        os.close(reading)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != (0 if is_last else -signal.SIGKILL):
            self.history.wrong(f"a life ended with status {status}")
        self._ledger.ended()
        return died

    def _be(self, writing: int, rng: random.Random, failpoint: str, *, is_last: bool) -> None:
        status = 1
        try:
            life = Life(self._root, self._ledger, rng, writing, failpoint=failpoint)
            asyncio.run(life.run(is_last=is_last))
            status = 0
        except BaseException:  # noqa: BLE001 - the fork must not go on as its parent
            traceback.print_exc()
        finally:
            os._exit(status)


def main() -> int:
    """Parse, live, sum up."""
    parser = argparse.ArgumentParser(prog="kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/kills"), metavar="DIR")
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began_s = time.monotonic()
    logging.disable(logging.ERROR)
    lives = Lives(folder, arguments.seed)
    print(f"kills: seed {arguments.seed}, {arguments.kills} lives in {folder}", flush=True)
    for number in range(1, arguments.kills + 1):
        lives.one()
        if number % 100 == 0:
            counts = lives.history.counts
            print(f"kills: {number}; {counts['fetched']} keys fetched and compared", flush=True)
    lives.last()
    result = summed_up(lives, folder) | {"seed": arguments.seed, "took_s": round(time.monotonic() - began_s)}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for note in result["notes"]:
        print(f"kills: {note}")
    words = ("reused", "lost", "differing", "doubled", "wrong", "indeterminate")
    print(
        f"kills: {'ok' if result['ok'] else 'VIOLATED'}: {result['kills']} kills, {result['keys']} keys, "
        f"{result['fetched']} fetched and compared; " + ", ".join(f"{result[word]} {word}" for word in words)
    )
    return 0 if result["ok"] else 1


def summed_up(lives: Lives, folder: Path) -> dict[str, Any]:
    """The verdict over all lives."""
    pads = audit_pads(folder.glob("*.pads.jsonl"))
    counts = lives.history.counts
    violations = {word: counts[word] for word in ("lost", "differing", "doubled", "wrong")}
    violations["reused"] = counts["reused"] + pads.reused_bytes + pads.invented_bytes
    return {
        "ok": not any(violations.values()) and counts["fetched"] > 0 and pads.lines > 0,
        "kills": lives.kills.total(),
        "kills_by": dict(sorted(lives.kills.items())),
        "keys": counts["keys"],
        "fetched": counts["fetched"],
        **violations,
        "indeterminate": counts["indeterminate"],
        "refusals": {name: count for name, count in sorted(counts.items()) if name.startswith("enc ")},
        "pad_bytes": dict(pads.spent),
        "notes": [*lives.history.notes, *pads.notes[:20]],
    }


if __name__ == "__main__":
    sys.exit(main())
