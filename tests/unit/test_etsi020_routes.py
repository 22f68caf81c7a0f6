"""The methods of ETSI GS QKD 020 over a hand-written node: status, and what 400 and 401 may say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import UUID

import pytest

from gateway.etsi020.routes import Etsi020
from gateway.exchange import Answer, HttpRefusal, Request
from mesh.client import CallerError, MeshError, UnavailableError
from mesh.client.border import Ack, AckStatus, Association, BorderClient, ForeignKey, Problem
from tests.unit.test_etsi020_schema import ID, URL, ack, ext_keys, void


@dataclass
class FakeBorder:
    """A node that does as it is told, and remembers what it was asked."""

    error: MeshError | None = None
    held: set[UUID] = field(default_factory=set)
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    async def import_keys(
        self, peer: str, association: Association, keys: Iterable[ForeignKey], **options: Any
    ) -> list[Ack]:
        return self._called("import", peer, association, [key.key_id for key in keys], options)

    async def void_keys(
        self, peer: str, association: Association, key_ids: Sequence[UUID], **options: Any
    ) -> list[Ack]:
        return self._called("void", peer, association, list(key_ids), options)

    async def ack_keys(self, peer: str, acks: Sequence[Ack], **options: Any) -> None:
        self._called("ack", peer, acks[0].association, list(acks[0].key_ids), options)

    async def holds_keys(self, peer: str, key_ids: Sequence[UUID], *, timeout_s: float) -> bool:
        self.calls.append(("holds", peer))
        return bool(self.held & set(key_ids))

    def _called(
        self, what: str, peer: str, association: Association, ids: list[UUID], options: dict[str, Any]
    ) -> list[Ack]:
        self.calls.append((what, peer, options))
        if self.error is not None:
            raise self.error
        return [Ack(AckStatus.RELAYED, tuple(ids), association)] if options.get("wait_s") else []


async def ask(border: FakeBorder, target: str, body: bytes, *, verb: str = "POST", **options: Any) -> Answer:
    wait_s = options.pop("wait_s", 9.0)
    api = Etsi020(cast(BorderClient, border), timeout_s=1.0, synchronous_wait_s=wait_s)

    async def read() -> bytes:
        if isinstance(body, bytes):
            return body
        raise HttpRefusal(400, "late", reason="slow-body", close=True)

    request = Request(verb, target, options.pop("caller", "uk-x"), "id", "application/json", "", read)
    return await (api.answer(request) if request.caller else api.refuse_stranger(request))


V1 = "/kmapi/v1/ext_keys"


async def test_asynchronous_requests_are_accepted() -> None:
    border = FakeBorder()
    for target, body, status in (
        (V1, ext_keys(), 202),
        (f"{V1}/void", void(), 202),
        (f"{V1}/ack", ack(), 200),
    ):
        answer = await ask(border, target, body)
        assert (answer.status, answer.body) == (status, b"")
    assert [(what, peer) for what, peer, _ in border.calls] == [
        ("import", "uk-x"),
        ("void", "uk-x"),
        ("ack", "uk-x"),
    ]
    assert border.calls[0][2]["callback"] == URL


async def test_synchronous_requests_are_answered_with_acks() -> None:
    for target, body in ((V1, ext_keys(ack_callback_url=None)), (f"{V1}/void", void(ack_callback_url=None))):
        answer = await ask(FakeBorder(), target, body)
        assert answer.status == 200
        assert json.loads(answer.body)[0]["key_id_container"] == [{"key_id": str(ID)}]
        refused = await ask(FakeBorder(), target, body, wait_s=0.0)
        assert (refused.status, json.loads(refused.body)["details"]) == (
            400,
            {"missing_parameters": "ack_callback_url"},
        )


async def test_the_capability_is_listed_as_configured() -> None:
    with_it = json.loads((await ask(FakeBorder(), "/kmapi/versions", b"", verb="GET")).body)
    without = json.loads((await ask(FakeBorder(), "/kmapi/versions", b"", verb="GET", wait_s=0.0)).body)
    assert with_it == {"versions": ["v1"], "capabilities": ["synchronous_mode"]}
    assert without == {"versions": ["v1"]}


async def test_a_mandatory_extension_is_refused_with_503_and_nothing_stored() -> None:
    border = FakeBorder()
    answer = await ask(border, V1, ext_keys(extension_mandatory={"E32473_a": 1}))
    assert answer.status == 503
    assert json.loads(answer.body)["details"] == {"unsupported_mandatory_extension": "E32473_a"}
    assert border.calls == []


@pytest.mark.parametrize(
    ("body", "error", "status"),
    [
        (ext_keys(initiator_sae_id=None), None, 400),
        (ext_keys() + b"}", None, 400),
        (ext_keys(), CallerError("no", facts={"problem": Problem.UNKNOWN_TARGET.value}), 400),
        (ext_keys(), CallerError("no", facts={"problem": Problem.FOREIGN_INITIATOR.value}), 401),
    ],
)
async def test_400_and_401_are_said_to_a_peer_only_while_nothing_is_held_from_it(
    body: bytes, error: MeshError | None, status: int
) -> None:
    assert (await ask(FakeBorder(error), V1, body)).status == status
    border = FakeBorder(error, {ID})
    held = await ask(border, V1, body)
    assert (held.status, json.loads(held.body)["type"].rpartition("/")[2]) == (
        503,
        "server-side-general-error",
    )
    assert border.calls[-1] == ("holds", "uk-x")


@pytest.mark.parametrize("target", [V1, f"{V1}/ack", f"{V1}/void", "/kmapi/versions", "/else"])
async def test_a_stranger_hears_the_same_whatever_is_held_and_the_node_is_not_even_asked(target: str) -> None:
    border = FakeBorder(held={ID})
    answers = {await _stranger(one, target) for one in (border, FakeBorder())}
    assert {answer[0] for answer in answers} == {401}
    assert len(answers) == 1
    assert border.calls == []


async def _stranger(border: FakeBorder, target: str) -> tuple[int, bytes]:
    answer = await ask(border, target, ext_keys(), caller="")
    return answer.status, answer.body


async def test_an_unreachable_node_is_503() -> None:
    answer = await ask(FakeBorder(UnavailableError("gone")), V1, ext_keys())
    assert answer.status == 503
    assert answer.headers["Retry-After"]


async def test_paths_and_verbs() -> None:
    assert (await ask(FakeBorder(), "/kmapi/v2/ext_keys", b"")).status == 404
    wrong = await ask(FakeBorder(), V1, b"", verb="GET")
    assert (wrong.status, wrong.headers["Allow"]) == (405, "POST")
    late = await ask(FakeBorder(), V1, cast(bytes, None))
    assert (late.status, late.close) == (408, True)
