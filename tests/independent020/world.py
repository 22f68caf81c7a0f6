"""keymesh as a border site, and other owners' key managers around it; all that a test does is over the wire.

``near`` and ``third`` are two of them, ``rough`` tears connections down, ``sound`` is configured but another
one, with a certificate of the right root and the wrong name, listens at its address.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import threading
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from tests.fakes.border_site import BorderSite, Neighbour
from tests.independent020.certificates import Papers, Root, client_context, server_context
from tests.independent020.messages import Names
from tests.independent020.peer import FAILED, FREE, RELAYED, VOIDED, Kms, Lent, until

PEERS = ("near", "third", "rough", "sound")
VOID_GIVE_UP_S = 10.0
T = TypeVar("T")


class World:
    """Everything, once per test module.

    Args:
        directory: for files.
        proofs: a folder on tmpfs.
        request_timeout_s: how long applications of the site wait for keys.
    """

    def __init__(self, directory: Path, proofs: Path, *, request_timeout_s: float = 4.0) -> None:
        self.directory = directory
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="peers", daemon=True)
        self._thread.start()
        self.roots = {name: Root(directory, name) for name in PEERS}
        self.papers = {name: root.issue(f"{name}-kme") for name, root in self.roots.items()}
        self.wrong = self.roots["sound"].issue("impostor")
        self.kms: dict[str, Kms] = {}
        # Sockets first: the site's configuration names the peers' ports, and makes the root that they trust.
        sockets = {name: _bound() for name in PEERS}
        ports = {name: int(one.getsockname()[1]) for name, one in sockets.items()}
        neighbours = [
            Neighbour(
                f"{name}-kme",
                f"https://localhost:{ports[name]}",
                f"{name}-",
                self.roots[name].file,
                f"{name}-kme.example",
            )
            for name in PEERS
        ]
        self.site = BorderSite(
            directory,
            proofs=proofs,
            neighbours=neighbours,
            border={"ack_give_up_s": 4.0, "void_give_up_s": VOID_GIVE_UP_S, "void_repeat_s": 0.5},
            request_timeout_s=request_timeout_s,
        )
        self.run(self._join(sockets))
        self.site.start()
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def _join(self, sockets: dict[str, socket.socket]) -> None:
        for name in PEERS:
            papers = self.wrong if name == "sound" else self.papers[name]
            root = self.site.roots["border"]
            kms = Kms(
                name, server=server_context(papers, root), client=client_context(self.papers[name], root)
            )
            await kms.start(sockets[name])
            kms.other = self.site.url020
            self.kms[name] = kms

    @property
    def near(self) -> Kms:
        """The one that most tests use."""
        return self.kms["near"]

    @property
    def third(self) -> Kms:
        """Another one."""
        return self.kms["third"]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs on the peers' loop and waits."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(170)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """Runs on the peers' loop, now; fetch the result with ``run(wait(...))``."""

        async def begin() -> asyncio.Future[T]:
            return asyncio.ensure_future(work)

        return self.run(begin())

    def context(self, papers: Papers | None) -> ssl.SSLContext:
        """TLS towards the site's listener for key managers."""
        return client_context(papers, self.site.roots["border"])

    def stop(self) -> None:
        """Ends everything."""
        self.run(self._stop())
        self.site.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self) -> None:
        for session in self._sessions.values():
            await session.close()
        for kms in self.kms.values():
            await kms.stop()

    async def raw(self, path: str, body: bytes, *, sent: int | None = None, wait_s: float = 0.0) -> int:
        """A POST of near's of which only ``sent`` bytes leave; the status, 0 if we tear the connection down.

        Args:
            path: where to.
            body: whole.
            sent: how much of it leaves; all by default.
            wait_s: above 0: how long we wait for an answer all the same.
        """
        host, port = self.site.url020.removeprefix("https://").split(":")
        context = self.context(self.papers["near"])
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:sent])
        await writer.drain()
        try:
            async with asyncio.timeout(wait_s):
                return int((await reader.readline()).split()[1])
        except (TimeoutError, ConnectionError, IndexError):
            return 0
        finally:
            writer.transport.abort()

    # applications at the site (ETSI GS QKD 014)

    def _session(self, sae: str) -> aiohttp.ClientSession:
        if sae not in self._sessions:
            files = self.site.saes[sae]
            context = client_context(Papers(files.cert, files.key), self.site.roots["gateway"])
            self._sessions[sae] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=context, limit=0), timeout=aiohttp.ClientTimeout(total=30)
            )
        return self._sessions[sae]

    async def enc(
        self, sae: str, *slaves: str, number: int = 1, size: int = 256
    ) -> tuple[int, dict[str, bytes]]:
        """Get key: status, keys by key_ID."""
        slave, *others = slaves
        body: dict[str, Any] = {"number": number, "size": size}
        if others:
            body["additional_slave_SAE_IDs"] = others
        return await self._ask(sae, f"/api/v1/keys/{slave}/enc_keys", body)

    async def dec(self, sae: str, master: str, *key_ids: str) -> tuple[int, dict[str, bytes]]:
        """Get key with key IDs."""
        body = {"key_IDs": [{"key_ID": one} for one in key_ids]}
        return await self._ask(sae, f"/api/v1/keys/{master}/dec_keys", body)

    async def _ask(self, sae: str, path: str, body: Any) -> tuple[int, dict[str, bytes]]:
        async with self._session(sae).post(self.site.url + path, json=body) as response:
            if response.status != 200:
                return response.status, {}
            keys = (await response.json())["keys"]
            return 200, {one["key_ID"]: base64.b64decode(one["key"]) for one in keys}

    # what must hold in the end

    async def settled(self, kms: Kms, *saes: str, timeout_s: float = 40.0) -> None:
        """Nothing is under way about keys for these SAEs of a peer, and nothing more is said."""
        heard, quiet = -1, 0
        async with asyncio.timeout(timeout_s):
            while quiet < 8:
                await asyncio.sleep(0.1)
                now = sum(any(sae in str(document) for sae in saes) for _, document in kms.log)
                is_open = any(key.state == "held" for key in kms.of(*saes).values())
                quiet = 0 if is_open or now != heard else quiet + 1
                heard = now

    async def check_outbound(self, kms: Kms, names: Names, released: dict[str, bytes]) -> None:
        """What our application has, the peer has for the same SAEs; of the rest it has nothing."""
        there = {one: key for one, key in kms.held.items() if key.names.targets & names.targets}
        for one, value in released.items():
            assert (there[one].value, there[one].names, there[one].state) == (value, names, RELAYED)
        for one in there.keys() - released.keys():
            assert there[one].state in (FAILED, VOIDED), (one, there[one])

    async def check_inbound(self, kms: Kms, names: Names, *, stranger: str = "own-c") -> None:
        """What the peer may use, our applications get, once and the same; the rest nobody gets."""
        mine = {one: key for one, key in kms.lent.items() if key.names == names}
        await asyncio.gather(*(self._check_lent(kms, one, key, stranger) for one, key in mine.items()))

    async def _check_lent(self, kms: Kms, one: str, key: Lent, stranger: str) -> None:
        initiator = key.names.initiator
        assert key.state in (RELAYED, VOIDED, FREE), (one, key)
        assert (await self.dec(stranger, initiator, one))[1] == {}
        for target in sorted(key.names.targets):
            status, keys = await self.dec(target, initiator, one)
            if key.state == RELAYED:
                assert (status, keys) == (200, {one: key.value})
                assert kms.give(one, initiator) == key.value
            else:
                assert status in (400, 401)
            assert (await self.dec(target, initiator, one))[0] in (400, 401)

    async def lent(self, kms: Kms, values: Iterable[str], *states: str, timeout_s: float = 20.0) -> None:
        """Waits until keys that a peer handed over are in one of these states."""
        await until(lambda: all(kms.lent[one].state in states for one in values), timeout_s=timeout_s)

    async def void_word(self, kms: Kms, key_id: str) -> str:
        """What the site answered to the void of a key that it had handed over."""
        await until(lambda: kms.held[key_id].void_word)
        return kms.held[key_id].void_word


def _bound() -> socket.socket:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("127.0.0.1", 0))
    return one
