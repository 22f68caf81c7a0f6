"""The methods of ETSI GS QKD 020 V1.1.1 that peers call: decode, ask the node, encode.

Knows no sockets and no TLS. Owns one promise: 400 and 401 to ``ext_keys`` say that nothing is held for any
key of the request, so before this interface refuses a peer's by itself it asks the node, and says 503 where
that would be a lie (clause on key association). The node decides everything else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Final

from gateway.etsi020.errors import (
    Kind,
    Refusal,
    answer_of,
    from_http,
    missing,
    refusal_of,
    unauthorized,
)
from gateway.etsi020.schema import (
    SYNCHRONOUS,
    VERSION,
    Versions,
    decode_acks,
    decode_ext_keys,
    decode_void,
    encode_ack_containers,
    encode_versions,
    key_ids_of,
)
from gateway.exchange import Answer, HttpRefusal, Request, read_json
from mesh.client import MeshError
from mesh.client.border import BorderClient

MAX_IDS_ASKED: Final = 4096

_PATHS: Final[Mapping[str, tuple[str, str]]] = {
    "/kmapi/versions": ("versions", "GET"),
    f"/kmapi/{VERSION}/ext_keys": ("ext_keys", "POST"),
    f"/kmapi/{VERSION}/ext_keys/ack": ("ext_keys_ack", "POST"),
    f"/kmapi/{VERSION}/ext_keys/void": ("ext_keys_void", "POST"),
}
METHODS: Final = tuple(method for method, _ in _PATHS.values())


class Etsi020:
    """The methods over one node's border service.

    Args:
        border: the node.
        timeout_s: deadline of each call to it.
        synchronous_wait_s: how long a synchronous request may wait for its keys; 0 offers none.
    """

    methods = METHODS

    def __init__(self, border: BorderClient, *, timeout_s: float, synchronous_wait_s: float) -> None:
        self._border = border
        self._timeout_s = timeout_s
        self._wait_s = synchronous_wait_s
        self._versions = encode_versions(Versions((VERSION,), (SYNCHRONOUS,) if synchronous_wait_s else ()))
        self._handlers: Mapping[str, Callable[[Request, bytes], Awaitable[Answer]]] = {
            "ext_keys": self._ext_keys,
            "ext_keys_ack": self._ack,
            "ext_keys_void": self._void,
        }

    async def answer(self, request: Request) -> Answer:
        """Answer one request; never raises what the request or the node caused."""
        method = "other"
        try:
            method = _method(request)
            if method == "versions":
                return Answer(HTTPStatus.OK, self._versions, method)
            body = await read_json(request)
        except HttpRefusal as cause:
            return self.refused(cause, method)
        try:
            return await self._handlers[method](request, body)
        except (Refusal, MeshError) as error:
            refusal = error if isinstance(error, Refusal) else refusal_of(error)
            return answer_of(await self._truthful(refusal, request.caller, method, body), method)

    async def refuse_stranger(self, request: Request) -> Answer:
        """401, whatever was asked and whatever is held: another answer would tell which keys there are."""
        return answer_of(unauthorized(), "other")

    def refused(self, refusal: HttpRefusal, method: str = "other") -> Answer:
        """The answer for what HTTP itself refused."""
        return answer_of(from_http(refusal), method, allow=refusal.allow, close=refusal.close)

    async def _truthful(self, refusal: Refusal, peer: str, method: str, body: bytes) -> Refusal:
        if method != "ext_keys" or not refusal.promises_nothing_held:
            return refusal
        key_ids = key_ids_of(body)
        try:
            is_held = len(key_ids) > MAX_IDS_ASKED or (
                bool(key_ids) and await self._border.holds_keys(peer, key_ids, timeout_s=self._timeout_s)
            )
        except MeshError as error:
            return refusal_of(error)
        return refusal.as_held() if is_held else refusal

    async def _ext_keys(self, request: Request, body: bytes) -> Answer:
        asked = decode_ext_keys(body)
        if asked.mandatory:
            names = ", ".join(asked.mandatory)
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                Kind.UNSUPPORTED_EXTENSION,
                "a mandatory extension is not supported",
                unsupported_mandatory_extension=names,
            )
        wait_s = self._patience(asked.callback)
        acks = await self._border.import_keys(
            request.caller,
            asked.association,
            asked.keys,
            callback=asked.callback or "",
            extension=asked.extension,
            wait_s=wait_s,
            request_id=request.request_id,
            timeout_s=self._timeout_s + wait_s,
        )
        if wait_s:
            return Answer(HTTPStatus.OK, encode_ack_containers(acks), "ext_keys")
        return Answer(HTTPStatus.ACCEPTED, b"", "ext_keys")

    async def _ack(self, request: Request, body: bytes) -> Answer:
        await self._border.ack_keys(
            request.caller, decode_acks(body), request_id=request.request_id, timeout_s=self._timeout_s
        )
        return Answer(HTTPStatus.OK, b"", "ext_keys_ack")

    async def _void(self, request: Request, body: bytes) -> Answer:
        asked = decode_void(body)
        wait_s = self._patience(asked.callback)
        acks = await self._border.void_keys(
            request.caller,
            asked.association,
            asked.key_ids,
            is_all=asked.is_all,
            callback=asked.callback or "",
            wait_s=wait_s,
            request_id=request.request_id,
            timeout_s=self._timeout_s + wait_s,
        )
        if wait_s:
            return Answer(HTTPStatus.OK, encode_ack_containers(acks), "ext_keys_void")
        return Answer(HTTPStatus.ACCEPTED, b"", "ext_keys_void")

    def _patience(self, callback: str | None) -> float:
        """Seconds that a request without a callback may wait; 0 with one."""
        if callback is not None:
            return 0.0
        if not self._wait_s:
            raise missing("ack_callback_url")
        return self._wait_s


def _method(request: Request) -> str:
    path = request.target.partition("?")[0]
    if path.startswith("https://"):  # absolute form, RFC 9112 clause 3.2.2
        path = "/" + path[8:].partition("/")[2]
    found = _PATHS.get(path)
    if found is None:
        raise HttpRefusal(
            HTTPStatus.NOT_FOUND, f"no such path: use {', '.join(_PATHS)}", reason="no-such-path"
        )
    method, verb = found
    if request.verb != verb:
        raise HttpRefusal(
            HTTPStatus.METHOD_NOT_ALLOWED,
            f"{path} is called with {verb}",
            reason="method-not-allowed",
            allow=verb,
        )
    return method
