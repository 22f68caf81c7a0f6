"""Spans of one request from gateway, node, hub and the other node, over real OTLP; and none when off."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from gateway.exchange import Answer, HttpRefusal, Request
from gateway.tracing import Traced, traced
from mesh.errors import ConfigError
from mesh.node import establish
from mesh.node.services.keys import KeyDeliveryService
from mesh.ops import tracing
from mesh.ops.logging import serving
from mesh.ops.otel import trace_ids
from mesh.ops.tracing import TracingSection, close_tracing, setup_tracing, span
from mesh.v1.keys_pb2 import GetKeysRequest, KeyRequest
from tests.fakes.hub_network import NODES, HubNetwork

pytestmark = pytest.mark.slow
REQUEST_ID = "4f1c20aa-0000002a"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []

    async def Export(self, request: Any, context: object) -> Any:
        """See the OTLP specification."""
        for scoped in request.resource_spans:
            self.resources.append({one.key: one.value.string_value for one in scoped.resource.attributes})
            self.spans += [one for scope in scoped.scope_spans for one in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    kept = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)  # type: ignore[no-untyped-call]  # generated
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield kept, f"127.0.0.1:{port}"
    finally:
        await asyncio.to_thread(close_tracing)
        await server.stop(None)


class OneAnswer:
    """An ``Api`` that draws keys at a node, as the 014 interface would."""

    methods: Sequence[str] = ("enc_keys",)

    def __init__(self, service: KeyDeliveryService) -> None:
        self._service = service

    async def answer(self, request: Request) -> Answer:
        one = KeyRequest(master_sae_id="sae-a", slave_sae_id="sae-b", number=1, request_id=request.request_id)
        answer = await self._service.GetKeys(GetKeysRequest(requests=[one]), None)
        return Answer(200 if answer.results[0].HasField("keys") else 503, b"", "enc_keys")

    async def refuse_stranger(self, request: Request) -> Answer:
        raise NotImplementedError

    def refused(self, refusal: HttpRefusal) -> Answer:
        raise NotImplementedError


async def no_body() -> bytes:
    return b""


async def test_one_trace_holds_gateway_node_hub_and_the_other_node(
    tmp_path: Path, collector: tuple[Collector, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(establish, "_FIRST_QUERY_S", 60.0)  # a query about a late confirm is a span, too
    kept, endpoint = collector
    setup_tracing(TracingSection(endpoint=endpoint), role="node", member="kme-a")
    network = HubNetwork(tmp_path, hubs=("hub-1",), grade="dske(1,1)")
    async with contextlib.AsyncExitStack() as stack:
        for kme in NODES:
            await network.supply("hub-1", kme)
        await network.start()
        stack.push_async_callback(network.stop)
        await network.until_open()
        api = traced(
            OneAnswer(
                KeyDeliveryService(network.node("kme-a").plane, staleness_s=lambda: 0.0, admit=lambda: None)
            )
        )
        assert isinstance(api, Traced)
        answer = await api.answer(Request("GET", "/", "sae-a", REQUEST_ID, "", "", no_body))
        assert answer.status == 200
    await asyncio.to_thread(close_tracing)
    trace_id, first_id = (
        number.to_bytes(size, "big") for number, size in zip(trace_ids(REQUEST_ID), (16, 8), strict=True)
    )
    assert {one.trace_id for one in kept.spans} == {trace_id}
    (first,) = (one for one in kept.spans if not one.parent_span_id)
    assert (first.name, first.span_id) == ("GET enc_keys", first_id)
    by_id = {one.span_id: one for one in kept.spans}
    assert len(by_id) == len(kept.spans)
    assert all(one.parent_span_id in by_id for one in kept.spans if one is not first)
    shares = [one for one in kept.spans if one.name == "share"]
    assert len(shares) == 2, "at the hub and at the other node"
    assert {one.name for one in kept.spans} == {
        "GET enc_keys", "draw", "establish", "share", "append", "Peer/Confirm",
    }  # fmt: skip
    assert all(first.start_time_unix_nano <= one.start_time_unix_nano for one in kept.spans)
    assert kept.resources[0]["service.name"] == "keymesh-node"
    assert kept.resources[0]["service.instance.id"] == "kme-a"


async def test_a_failed_span_tells_the_kind_of_failure_and_never_its_text(
    collector: tuple[Collector, str],
) -> None:
    kept, endpoint = collector
    setup_tracing(TracingSection(endpoint=endpoint), role="node", member="kme-a")
    with serving(REQUEST_ID), pytest.raises(ValueError, match="quoted"), span("draw", number=3):
        raise ValueError("quoted input")
    with span("no request, no span"):
        pass
    await asyncio.to_thread(close_tracing)
    (one,) = kept.spans
    assert one.status.message == "ValueError"
    assert not one.events
    assert b"quoted" not in one.SerializeToString()


def test_all_processes_sample_the_same_requests(collector: tuple[Collector, str]) -> None:
    _, endpoint = collector
    chosen = []
    for member in ("kme-a", "kme-b"):
        setup_tracing(TracingSection(endpoint=endpoint, sample_ratio=0.5), role="node", member=member)
        sampled = set()
        for number in range(64):
            with serving(f"r{number}"), span("draw") as own:
                if own._inner.is_recording():  # type: ignore[attr-defined]
                    sampled.add(number)
        chosen.append(sampled)
        close_tracing()
    assert chosen[0] == chosen[1]
    assert 8 < len(chosen[0]) < 56


def test_a_collectors_root_that_is_not_there_is_named(tmp_path: Path) -> None:
    section = TracingSection(endpoint="collector:4317", ca="none.pem")
    with pytest.raises(ConfigError, match=r"tracing\.ca"):
        setup_tracing(section, role="node", member="kme-a", base=tmp_path)


def test_off_costs_nothing_and_imports_nothing() -> None:
    assert not tracing.is_traced()
    with serving(REQUEST_ID):
        assert span("draw") is span("establish", target="kme-b")
    program = (
        "import sys, gateway.main, mesh.hub.hub\n"
        "from mesh.ops.tracing import setup_tracing\n"
        "setup_tracing(None, role='node', member='kme-a')\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
