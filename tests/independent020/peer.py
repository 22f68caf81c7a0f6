"""The other owner's key manager: receives and sends keys, honestly unless a ``Plan`` says otherwise.

``held`` are keys that were handed to it, ``lent`` keys that it handed over. It keeps the standard's rules of
association (section "key association" of ETSI GS QKD 020): keys are stored before the 202, released to its
own applications once ``relayed`` is known, voided when an ack cannot be delivered, and never come back after
a void. Whatever it hears that the standard does not allow is a complaint. One event loop, no clock but sleep.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from tests.independent020 import messages as m
from tests.independent020.messages import Ack, Fault, Keys, Names, Void

HELD, RELAYED, FAILED, VOIDED = "held", "relayed", "failed", "voided"
POSTED, VOIDING, FREE, KEPT = "posted", "voiding", "free", "kept"
TRIES = (0.05, 0.2, 0.4, 0.8, 1.6)


@dataclass
class Held:
    """A key that was handed to us. ``state``: held, relayed, failed or voided."""

    value: bytes
    names: Names
    state: str = HELD
    is_given: bool = False
    void_word: str = ""
    """What the other end answered when we asked it to void the key."""


@dataclass
class Lent:
    """A key that we handed over. ``state``: posted, relayed, failed, voiding, voided, kept or free."""

    value: bytes
    names: Names
    state: str = POSTED
    acked: set[str] = field(default_factory=set)
    is_given: bool = False


@dataclass(frozen=True)
class Reply:
    """How one request is answered: by default as the standard demands.

    Attributes:
        status: instead of the right one.
        is_heeded: the request has its effect, whatever is answered.
        wait_s: before the answer.
        is_reset: no answer, the connection is torn down.
        is_cut: half an answer, then the same.
        location: where a redirect points.
        is_early: what follows (acks) is said before the answer.
        document: the body of the answer, instead of the right one.
        is_instant: 200 with the acks, as if it had been asked to wait for them.
    """

    status: int = 0
    is_heeded: bool = True
    wait_s: float = 0.0
    is_reset: bool = False
    is_cut: bool = False
    location: str = ""
    is_early: bool = False
    document: Any = None
    is_instant: bool = False


HONEST = Reply()


@dataclass(frozen=True)
class Answer:
    """What came back; status 0: nothing did."""

    status: int
    document: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def problem(self) -> tuple[str, dict[str, str]]:
        """Suffix of the type, and details, of a problem."""
        return m.check_problem(self.status, self.document)


Part = tuple[str, Iterable[str], Names]


async def relay(kms: Kms, keys: Keys) -> None:
    """What an honest receiver says about keys: they arrived."""
    assert keys.callback is not None
    await kms.ack(keys.callback, (m.RELAYED, keys.values, keys.names))


async def confirm(kms: Kms, void: Void, parts: list[Part]) -> None:
    """What an honest receiver says about a void."""
    assert void.callback is not None
    await kms.ack(void.callback, *parts)


@dataclass
class Plan:
    """How the peer behaves towards one association: replies to successive requests, and what it says."""

    keys: Iterator[Reply] = field(default_factory=lambda: iter(()))
    acks: Iterator[Reply] = field(default_factory=lambda: iter(()))
    voids: Iterator[Reply] = field(default_factory=lambda: iter(()))
    say: Callable[[Kms, Keys], Awaitable[None]] = relay
    say_void: Callable[[Kms, Void, list[Part]], Awaitable[None]] = confirm


class Kms:
    """One key manager.

    Args:
        name: for people.
        server: TLS as a server.
        client: TLS as a client.
        tries: pauses in seconds after each attempt to say something.
    """

    def __init__(
        self,
        name: str,
        *,
        server: ssl.SSLContext,
        client: ssl.SSLContext,
        tries: tuple[float, ...] = TRIES,
    ) -> None:
        self.name = name
        self.tries = tries
        self._server_tls = server
        self._client_tls = client
        self.url = ""
        self.other = ""
        """Base URL of the key manager that we hand keys to."""
        self.held: dict[str, Held] = {}
        self.lent: dict[str, Lent] = {}
        self.buried: set[str] = set()
        self.plans: dict[str, Plan] = {}
        self.log: list[tuple[str, Any]] = []
        self.texts: list[str] = []
        """What was posted here, as it came."""
        self.complaints: list[str] = []
        self.unread: Iterator[bool] = iter(())
        """For successive connections: torn down before the body was read."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    # life

    async def start(self, listener: socket.socket | None = None) -> None:
        """Listens, at a socket if one is given, and is ready to dial."""
        app = web.Application(client_max_size=8 << 20)
        app.router.add_get(m.VERSIONS, self._versions)
        for path in (m.KEYS, m.ACK, m.VOID):
            app.router.add_post(path, self._serve)
        app.router.add_route("*", "/{path:.*}", self._nowhere)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site: web.BaseSite
        if listener is None:
            site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._server_tls)
        else:
            site = web.SockSite(self._runner, listener, ssl_context=self._server_tls)
        await site.start()
        self.url = f"https://localhost:{self._runner.addresses[0][1]}"
        connector = aiohttp.TCPConnector(ssl=self._client_tls, limit=0)
        self._session = aiohttp.ClientSession(connector=connector)

    async def stop(self) -> None:
        """Ends everything."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def callback(self) -> str:
        """Where acks reach us."""
        return self.url + m.ACK

    # the receiving side

    async def _versions(self, request: web.Request) -> web.Response:
        return web.json_response({"versions": ["v1"]})

    async def _nowhere(self, request: web.Request) -> web.Response:
        self.complaints.append(f"{request.method} {request.path}, of which the standard knows nothing")
        return web.Response(status=404)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        if next(self.unread, False):
            request.transport.abort()
            return web.Response()
        if request.content_type != "application/json":
            self.complaints.append(f"content type {request.content_type}")
        body = await request.read()
        self.texts.append(body.decode("utf-8", "replace"))
        try:
            document = m.parse(body)
        except Fault as fault:
            self.complaints.append(str(fault))
            return web.json_response(fault.document(), status=fault.status)
        self.log.append((request.path, document))
        plan = self._plan(document)
        replies = {m.KEYS: plan.keys, m.ACK: plan.acks, m.VOID: plan.voids}[request.path]
        reply = next(replies, HONEST)
        status, answer, follow = 503, None, None
        if reply.is_heeded:
            status, answer, follow = self._heed(request.path, document, plan)
        if isinstance(document, dict) and reply.is_instant:
            keys = m.read_keys(document)
            for one in keys.values:
                self.held[one].state = RELAYED
            status, answer = 200, [m.ack_document(m.RELAYED, keys.values, keys.names)]
        if follow is not None and reply.is_early:
            await follow
        elif follow is not None:
            self._spawn(follow)
        await asyncio.sleep(reply.wait_s)
        if reply.is_reset or reply.is_cut:
            return await _tear(request, reply.is_cut)
        if reply.status or not reply.is_heeded:
            status = reply.status or status
            answer = _excuse(status)
        answer = reply.document or answer
        headers = {"Location": reply.location} if reply.location else None
        if answer is None:
            return web.Response(status=status, headers=headers, content_type="application/json")
        return web.json_response(answer, status=status, headers=headers)

    def _plan(self, document: Any) -> Plan:
        one = document[0] if isinstance(document, list) and document else document
        if isinstance(one, dict):
            for sae in (one.get("initiator_sae_id"), *one.get("target_sae_ids", ())):
                if sae in self.plans:
                    return self.plans[sae]
        return Plan()

    def _heed(self, path: str, document: Any, plan: Plan) -> tuple[int, Any, Awaitable[None] | None]:
        try:
            if path == m.KEYS:
                keys = m.read_keys(document)
                self._take(keys)
                return 202, None, plan.say(self, keys)
            if path == m.VOID:
                void = m.read_void(document)
                parts = self._void_here(void)
                return 202, None, plan.say_void(self, void, parts)
            self._hear(m.read_acks(document))
        except Fault as fault:
            if fault.suffix not in ("key-not-present", "key-voided"):
                self.complaints.append(str(fault))
            return fault.status, fault.document(), None
        return 200, None, None

    def _take(self, keys: Keys) -> None:
        """All or none; the same key again is welcome."""
        if keys.callback is None:
            raise Fault(400, "missing-parameters", missing_parameters="ack_callback_url")
        known = [self.held[one] for one in keys.values if one in self.held]
        for one, value in keys.values.items():
            held = self.held.get(one)
            if held is not None and (held.value, held.names) != (value, keys.names):
                raise Fault(503, "server-side-general-error", server_side_general_error="other content")
        is_gone = any(one in self.buried for one in keys.values)
        is_gone |= any(held.state in (FAILED, VOIDED) for held in known)
        if is_gone:
            holds = any(held.state in (HELD, RELAYED) for held in known)
            raise Fault(503 if holds else 400, "key-voided", malformed_property="key_id")
        for one, value in keys.values.items():
            self.held.setdefault(one, Held(value, keys.names))

    def _void_here(self, void: Void) -> list[Part]:
        ids = void.key_ids or [one for one, key in (self.held | self.lent).items() if key.names == void.names]
        found: dict[str, list[str]] = {}
        for one in ids:
            key: Held | Lent | None = self.held.get(one) or self.lent.get(one)
            if key is None:
                self.buried.add(one)
                word = m.NOT_PRESENT
            elif key.is_given or key.names != void.names:
                word = m.FAILED_TO_VOID
            else:
                key.state = VOIDED
                word = m.VOIDED
            found.setdefault(word, []).append(one)
        return [(word, ids, void.names) for word, ids in found.items()]

    def _hear(self, acks: list[Ack]) -> None:
        """All or none."""
        for ack in acks:
            for one in ack.key_ids:
                key: Held | Lent | None = self.lent.get(one) or self.held.get(one)
                if key is None or not _covers(key.names, ack.names):
                    raise Fault(400, "key-not-present", key_not_present=one)
        for ack in acks:
            for one in ack.key_ids:
                if one in self.lent:
                    self._settle(self.lent[one], ack)
                else:
                    self.held[one].void_word = ack.status

    @staticmethod
    def _settle(key: Lent, ack: Ack) -> None:
        if ack.status == m.RELAYED:
            key.acked |= ack.names.targets
            if key.state == POSTED and key.acked == key.names.targets:
                key.state = RELAYED
        elif ack.status == m.FAILED_TO_VOID:
            if key.state == VOIDING:
                key.state = KEPT
        elif key.state == VOIDING and ack.status != m.FAILED:
            key.state = VOIDED
        elif key.state in (POSTED, RELAYED) and not key.is_given:
            # Unasked words prove nothing: it is asked to void it.
            key.state = FAILED

    # what it says

    async def post(self, path: str, document: Any, *, base: str = "") -> Answer:
        """One POST, as it is; ``document`` may be raw bytes. ``path`` may be a whole URL."""
        assert self._session is not None
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        url = path if path.startswith("https:") else (base or self.other) + path
        headers = {"Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=15)
        try:
            async with self._session.post(
                url, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                return await self._answer(response)
        except (aiohttp.ClientError, OSError, TimeoutError):
            return Answer(0)

    async def get(self, path: str) -> Answer:
        """One GET."""
        assert self._session is not None
        async with self._session.get(self.other + path) as response:
            return await self._answer(response)

    async def _answer(self, response: aiohttp.ClientResponse) -> Answer:
        body = await response.read()
        document = None
        if body:
            if response.content_type != "application/json":
                self.complaints.append(f"answer {response.status} of type {response.content_type}")
            with contextlib.suppress(ValueError):
                document = json.loads(body)
        if response.status >= 400:
            try:
                m.check_problem(response.status, document)
            except (AssertionError, KeyError) as error:
                self.complaints.append(f"answer {response.status} is no problem: {error}")
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status, document, headers)

    async def say(self, url: str, *parts: Part) -> Answer:
        """Posts acks once and draws the conclusion if they are taken."""
        answer = await self.post(url, [m.ack_document(word, ids, names) for word, ids, names in parts])
        if answer.status == 200:
            for word, ids, _ in parts:
                for one in ids:
                    held = self.held.get(one)
                    if held is not None and held.state == HELD and word in (m.RELAYED, m.FAILED):
                        held.state = RELAYED if word == m.RELAYED else FAILED
        return answer

    async def ack(self, url: str, *parts: Part) -> None:
        """Posts acks until they are taken; else voids the keys and says so (rule 5)."""
        for pause in self.tries:
            answer = await self.say(url, *parts)
            if answer.status == 200:
                return
            if answer.status in (400, 401):
                break
            await asyncio.sleep(pause)
        for word, ids, names in parts:
            if word == m.RELAYED:
                mine = [one for one in ids if one in self.held]
                for one in mine:
                    self.held[one].state = VOIDED
                await self.post(m.VOID, m.void_document(names, mine, self.callback))

    async def hand_over(self, names: Names, values: Mapping[str, bytes]) -> Answer:
        """Hands keys over: posts until there is an answer that decides, or voids (rule 3)."""
        self.lend(names, values)
        document = m.keys_document(names, values, self.callback)
        for pause in self.tries:
            answer = await self.post(m.KEYS, document)
            if answer.status == 202:
                return answer
            if answer.status in (400, 401):
                # After a request whose fate is unknown this says nothing about that one.
                for one in values:
                    self.lent[one].state = FREE if pause == self.tries[0] else FAILED
                return answer
            await asyncio.sleep(pause)
        await self.void(names, values)
        return answer

    def lend(self, names: Names, values: Mapping[str, bytes]) -> None:
        """Notes that keys are about to leave."""
        for one, value in values.items():
            self.lent[one] = Lent(value, names)

    async def void(self, names: Names, ids: Iterable[str]) -> Answer:
        """Asks for keys to be voided until the request is taken."""
        for one in ids:
            if one in self.lent:
                self.lent[one].state = VOIDING
        for pause in self.tries:
            answer = await self.post(m.VOID, m.void_document(names, ids, self.callback))
            if answer.status == 202:
                break
            await asyncio.sleep(pause)
        return answer

    async def finish(self, names: Names, *, within_s: float) -> None:
        """Waits for acks; then voids what has none (rule 4) until the other end says so."""
        with contextlib.suppress(TimeoutError):
            await until(lambda: not self.lent_as(names, POSTED), timeout_s=within_s)
        while left := self.lent_as(names, POSTED, FAILED, VOIDING):
            await self.void(names, left)
            with contextlib.suppress(TimeoutError):
                await until(lambda: not self.lent_as(names, VOIDING), timeout_s=0.5)

    def lent_as(self, names: Names, *states: str) -> list[str]:
        """Keys handed over under these names that are in one of these states."""
        return [one for one, key in self.lent.items() if key.names == names and key.state in states]

    # its applications

    def give(self, key_id: str, sae: str) -> bytes | None:
        """A key to one of its applications; only what is known to be at both ends."""
        held, lent = self.held.get(key_id), self.lent.get(key_id)
        if held is not None and held.state == RELAYED and sae in held.names.targets:
            held.is_given = True
            return held.value
        if lent is not None and lent.state == RELAYED and sae == lent.names.initiator:
            lent.is_given = True
            return lent.value
        return None

    def of(self, *saes: str) -> dict[str, Held]:
        """Keys that it was handed for any of these targets."""
        return {one: key for one, key in self.held.items() if key.names.targets & set(saes)}

    def heard(self, path: str, sae: str) -> list[Any]:
        """The requests at a path that name an SAE."""
        return [document for where, document in self.log if where == path and sae in json.dumps(document)]

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.complaints.append(f"what it wanted to say failed: {task.exception()!r}")


async def until(is_so: Callable[[], object], *, timeout_s: float = 10.0) -> None:
    """Waits until something is so."""
    async with asyncio.timeout(timeout_s):
        while not is_so():  # noqa: ASYNC110 - what is waited for is other processes' doing
            await asyncio.sleep(0.02)


def fresh(count: int, size: int = 32) -> dict[str, bytes]:
    """New keys by key_id."""
    return {str(uuid.uuid4()): os.urandom(size) for _ in range(count)}


def _covers(whole: Names, part: Names) -> bool:
    return whole.initiator == part.initiator and part.targets <= whole.targets


def _excuse(status: int) -> Any:
    if status == 408:
        return Fault(408, "timeout", timeout="the complete request did not arrive").document()
    if status >= 400:
        return Fault(status, "server-side-general-error", server_side_general_error="not now").document()
    return None


async def _tear(request: web.Request, is_cut: bool) -> web.StreamResponse:
    assert request.transport is not None
    response = web.StreamResponse(status=202, headers={"Content-Length": "64"})
    if is_cut:
        await response.prepare(request)
        await response.write(b"{")
    request.transport.abort()
    return response
