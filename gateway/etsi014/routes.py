"""The three methods of ETSI GS QKD 014 V1.1.1 (clause 5): decode, call the key service, encode.

Knows no sockets and no TLS: a ``Request`` comes in with the caller already identified, an ``Answer``
goes out. Paths are matched on the raw, still encoded target, so that ``%2F`` in an SAE ID stays
inside its segment. A trailing slash is accepted; nothing is ever redirected.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from time import monotonic
from typing import Final

from gateway.config import Profile
from gateway.etsi014.errors import (
    MANDATORY_NOT_MET,
    MANDATORY_UNSUPPORTED,
    answer_error,
    answer_refusal,
    refuse,
)
from gateway.etsi014.schema import (
    KeyRequest,
    decode_key_ids,
    decode_key_ids_query,
    decode_key_request,
    decode_key_request_query,
    encode_key_container,
    encode_status,
    percent_decode,
    printable_name,
    refuse_body_parameters,
)
from gateway.exchange import Answer, HttpRefusal, Request, read_json
from gateway.identity import is_sae_id
from gateway.port import AuditTrail, KeyService
from mesh.client import MeshError, NotAuthorizedError

PREFIX: Final = "/api/v1/keys/"
GRADE_EXTENSION: Final = "keymesh_grade"
MAX_NAMES_REPORTED: Final = 16

_ALLOWED: Final[Mapping[str, tuple[str, ...]]] = {
    "status": ("GET",),
    "enc_keys": ("GET", "POST"),
    "dec_keys": ("GET", "POST"),
}
METHODS: Final = tuple(_ALLOWED)


_NO_HEADERS: Final[Mapping[str, str]] = {}


class Etsi014:
    """The REST methods over one key service.

    Args:
        service: the node's key plane.
        audit: told about every key_ID before the answer leaves, and asked before one is spent.
        profile: switches away from the standard.
        timeout_s: deadline of all calls to the service for one request.
    """

    methods = METHODS

    def __init__(
        self,
        service: KeyService,
        *,
        audit: AuditTrail,
        profile: Profile | None = None,
        timeout_s: float = 8.0,
    ) -> None:
        self._service = service
        self._audit = audit
        self._profile = profile or Profile()
        self._timeout_s = timeout_s

    async def answer(self, request: Request) -> Answer:
        """Answer one request; never raises what the request or the key plane caused."""
        method = "other"
        try:
            method, segment, query = split_target(request.target)
            _check_verb(method, request.verb)
            peer = decode_sae_segment(segment)
            if method == "enc_keys":
                body = await self._enc_keys(request, peer, query)
            elif method == "dec_keys":
                body = await self._dec_keys(request, peer, query)
            else:
                body = await self._status(request, peer)
        except HttpRefusal as refusal:
            return self.refused(refusal, method)
        except MeshError as error:
            out = answer_error(error, unknown_key_status=self._profile.unknown_key_status)
            return Answer(out.status, out.body, method, out.reason, out.headers)
        return Answer(HTTPStatus.OK, body, method, "", _NO_HEADERS)

    async def refuse_stranger(self, request: Request) -> Answer:
        """401, whatever was asked; it has no body."""
        return Answer(HTTPStatus.UNAUTHORIZED, b"", "other", "not-authorized")

    def refused(self, refusal: HttpRefusal, method: str = "other") -> Answer:
        """The answer for what HTTP itself refused."""
        out = answer_refusal(refusal)
        return Answer(out.status, out.body, method, out.reason, out.headers, out.close)

    async def _status(self, request: Request, slave: str) -> bytes:
        _refuse_own(request.caller, slave)
        status = await self._service.get_status(
            request.caller, slave, request_id=request.request_id, timeout_s=self._timeout_s
        )
        return encode_status(status, master=request.caller, slave=slave)

    async def _enc_keys(self, request: Request, slave: str, query: str) -> bytes:
        master = request.caller
        _refuse_own(master, slave)
        if request.verb == "GET":
            wanted = decode_key_request_query(query)
        else:
            refuse_body_parameters(query)
            wanted = decode_key_request(
                await read_json(request),
                master=master,
                slave=slave,
                refuse_empty_body=self._profile.refuse_empty_post,
                refuse_empty_list=self._profile.refuse_empty_additional_slaves,
            )
        grades = _accepted_grades(wanted)
        wants_report = bool(grades) or any(name == GRADE_EXTENSION for name, _ in wanted.optional)
        self._audit.check()
        key_ids: list[str] = []
        result = "failed"
        deadline_s = monotonic() + self._timeout_s
        try:
            if grades:
                await self._require_grade(request, slave, grades)
            delivered = await self._service.get_keys(
                master,
                slave,
                number=wanted.number,
                size_bytes=wanted.size_bytes,
                additional_slaves=wanted.additional_slaves,
                request_id=request.request_id,
                timeout_s=max(0.001, deadline_s - monotonic()),
            )
            key_ids = [key.key_id_text for key in delivered.keys]
            result = "withheld"  # spent without being seen, should what follows refuse
            _check_grade(delivered.grade, grades)
            result = "delivered"
        except MeshError as error:
            if not key_ids:
                result = str(error.reason)
            raise
        finally:
            self._audit.keys_asked(
                method="enc_keys",
                master=master,
                slave=slave,
                key_ids=key_ids,
                result=result,
                request_id=request.request_id,
                additional_slaves=wanted.additional_slaves,
            )
        return encode_key_container(delivered.keys, grade=delivered.grade if wants_report else None)

    async def _require_grade(self, request: Request, slave: str, grades: list[frozenset[str]]) -> None:
        """Ask before drawing, so that a grade that cannot be met costs no key."""
        status = await self._service.get_status(
            request.caller, slave, request_id=request.request_id, timeout_s=self._timeout_s
        )
        _check_grade(status.grade, grades)

    async def _dec_keys(self, request: Request, master: str, query: str) -> bytes:
        slave = request.caller
        if slave == master:
            if self._profile.self_pair_status == 400:
                raise refuse("the master SAE ID is the caller's own", parameter="master_SAE_ID")
            raise NotAuthorizedError("a master may not fetch its own keys by ID")
        if request.verb == "GET":
            key_ids = decode_key_ids_query(query)
        else:
            refuse_body_parameters(query)
            key_ids = decode_key_ids(await read_json(request))
        self._audit.check()
        result = "failed"
        try:
            delivered = await self._service.get_keys_by_id(
                slave, master, key_ids, request_id=request.request_id, timeout_s=self._timeout_s
            )
            result = "delivered"
        except MeshError as error:
            result = str(error.reason)
            raise
        finally:
            self._audit.keys_asked(
                method="dec_keys",
                master=master,
                slave=slave,
                key_ids=[str(key_id) for key_id in key_ids],
                result=result,
                request_id=request.request_id,
            )
        return encode_key_container(delivered.keys)


def split_target(target: str) -> tuple[str, str, str]:
    """Split a raw target into (method, still encoded SAE ID, query).

    Raises:
        HttpRefusal: 404 for any path that is not one of the three methods.
    """
    path, _, query = target.partition("?")
    if path.startswith("https://"):  # absolute form, RFC 9112 clause 3.2.2
        path = "/" + path[8:].partition("/")[2]
    if path.startswith(PREFIX):
        segments = path[len(PREFIX) :].split("/")
        if len(segments) == 3 and not segments[2]:
            segments.pop()
        if len(segments) == 2 and segments[1] in _ALLOWED:
            return segments[1], segments[0], query
    raise HttpRefusal(
        HTTPStatus.NOT_FOUND,
        f"no such path: use {PREFIX}{{SAE ID}}/status, enc_keys or dec_keys",
        reason="no-such-path",
    )


def decode_sae_segment(segment: str) -> str:
    """The SAE ID of a path segment.

    Raises:
        CallerError: empty, longer than 64 characters, broken encoding or characters of no URI.
    """
    if segment.isascii():
        sae_id = percent_decode(segment, "the SAE ID of the path")
        if is_sae_id(sae_id):
            return sae_id
    raise refuse("the SAE ID of the path must be 1 to 64 URI characters", parameter="SAE_ID")


def _check_verb(method: str, verb: str) -> None:
    allowed = _ALLOWED[method]
    if verb not in allowed:
        raise HttpRefusal(
            HTTPStatus.METHOD_NOT_ALLOWED,
            f"{method} is called with {' or '.join(allowed)}",
            reason="method-not-allowed",
            allow=", ".join(allowed),
        )


def _refuse_own(caller: str, slave: str) -> None:
    if caller == slave:
        raise refuse("the slave SAE ID is the caller's own", parameter="slave_SAE_ID")


def _accepted_grades(wanted: KeyRequest) -> list[frozenset[str]]:
    """The grades that each mandatory ``keymesh_grade`` admits (a string, or an array of strings)."""
    if not wanted.mandatory:
        return []
    unknown = [printable_name(name) for name, _ in wanted.mandatory if name != GRADE_EXTENSION]
    if unknown:
        raise refuse(MANDATORY_UNSUPPORTED, extension_mandatory_unsupported=unknown[:MAX_NAMES_REPORTED])
    grades: list[frozenset[str]] = []
    for _, value in wanted.mandatory:
        choices = value if isinstance(value, list) else [value]
        names = frozenset(choice for choice in choices if isinstance(choice, str))
        if not names or len(names) != len(choices):
            raise refuse(
                f"{GRADE_EXTENSION} must be a grade or an array of grades", parameter=GRADE_EXTENSION
            )
        grades.append(names)
    return grades


def _check_grade(grade: str, accepted: list[frozenset[str]]) -> None:
    if any(grade not in names for names in accepted):
        raise refuse(MANDATORY_NOT_MET, **{GRADE_EXTENSION: grade})


__all__ = ["METHODS", "Answer", "Etsi014", "Request", "decode_sae_segment", "split_target"]
