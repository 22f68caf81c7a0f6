"""One gateway over the fake key service: profiles, bounds, identities, reload and drain."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from uuid import UUID

import msgspec
import pytest

from gateway.app import Gateway
from gateway.etsi014.schema import MAX_ADDITIONAL_SLAVES, MAX_KEY_IDS
from mesh.client import ErrorReason, IntegrityError, ShortageError, UnavailableError
from mesh.node.config import Limits
from tests.conformance.wire import Received, Wire, client_context
from tests.fakes.gateway_site import GatewayThread
from tests.fakes.key_service import FakeKeyService, FakeNetwork

HOMES = {"sae-a1": "kme-a", "sae-b1": "kme-b", "sae-b2": "kme-b", "a/b:c": "kme-b", "100%25": "kme-b"}
ENC = "/api/v1/keys/sae-b1/enc_keys"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[GatewayThread]:
    thread = GatewayThread(tmp_path)
    yield thread
    thread.stop()


@pytest.fixture
def network() -> FakeNetwork:
    return FakeNetwork(dict(HOMES))


def connect(host: GatewayThread, gateway: Gateway, sae_id: str = "sae-a1") -> Wire:
    cert, key = host.issue_sae(sae_id.replace("/", "-")) if "/" not in sae_id else _issue(host, sae_id)
    context = client_context(host.roots["gateway"], cert, key)
    return Wire(f"https://localhost:{gateway.https_port}", context)


def _issue(host: GatewayThread, sae_id: str) -> tuple[Path, Path]:
    files = host.pki.sae(sae_id).save(host.directory, "odd-sae")
    return files.cert, files.key


def ask(host: GatewayThread, gateway: Gateway, verb: str, target: str, body: Any = None) -> Received:
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    with connect(host, gateway) as wire:
        return wire.request(verb, target, data)


def audit_lines(host: GatewayThread, gateway_id: str = "gw") -> list[dict[str, Any]]:
    text = (host.directory / f"{gateway_id}.audit.log").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_profile_switches_away_from_the_standard(host: GatewayThread, network: FakeNetwork) -> None:
    gateway = host.start(
        "gw",
        network.site("kme-a"),
        profile={
            "unknown_key_status": 404,
            "self_pair_status": 400,
            "refuse_empty_post": True,
            "refuse_empty_additional_slaves": True,
        },
    )
    unknown = "/api/v1/keys/sae-b1/dec_keys?key_ID=550e8400-e29b-41d4-a716-446655440000"
    received = ask(host, gateway, "GET", unknown)
    assert received.status == 404
    assert received.json()["message"] == "one or more keys specified are not found on KME"
    assert ask(host, gateway, "GET", unknown.replace("sae-b1", "sae-a1")).status == 400
    assert ask(host, gateway, "POST", ENC, b"").status == 400
    assert ask(host, gateway, "POST", ENC, {}).status == 200
    assert ask(host, gateway, "POST", ENC, {"additional_slave_SAE_IDs": []}).status == 400


def test_shortage_is_503_with_retry_after_and_a_reason(host: GatewayThread, network: FakeNetwork) -> None:
    gateway = host.start("gw", network.site("kme-a"))
    network.available_bytes = 40
    received = ask(host, gateway, "POST", ENC, {"number": 2})
    assert received.status == 503
    assert received.headers["retry-after"] == "3"
    assert {"reason": "out-of-material"} in received.json()["details"]
    assert network.available_bytes == 40  # never in part
    assert ask(host, gateway, "GET", ENC).status == 200


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (UnavailableError("node gone", reason=ErrorReason.PEER_UNREACHABLE), "peer-unreachable"),
        (ShortageError("slow down", reason=ErrorReason.QUOTA_EXCEEDED, retry_after_s=7), "quota-exceeded"),
        (IntegrityError("the story"), "state-corrupt"),
        (ZeroDivisionError("a bug with a secret"), "internal"),
    ],
)
def test_trouble_is_503_without_the_story(
    host: GatewayThread, network: FakeNetwork, fault: Exception, reason: str
) -> None:
    gateway = host.start("gw", network.site("kme-a"))
    network.fault = fault
    with connect(host, gateway) as wire:
        for method in ("enc_keys", "status", "dec_keys?key_ID=550e8400-e29b-41d4-a716-446655440000"):
            received = wire.request("GET", f"/api/v1/keys/sae-b1/{method}")
            assert received.status == 503
            assert int(received.headers["retry-after"]) >= 1
            assert {"reason": reason} in received.json()["details"]
            assert b"secret" not in received.body
            assert b"story" not in received.body
        network.fault = None
        assert wire.request("GET", ENC).status == 200


def test_an_unauthorised_pair_is_401_without_a_body(host: GatewayThread, network: FakeNetwork) -> None:
    gateway = host.start("gw", network.site("kme-a"))
    network.denied_pairs.add(("sae-a1", "sae-b1"))
    received = ask(host, gateway, "GET", ENC)
    assert (received.status, received.body) == (401, b"")
    assert ask(host, gateway, "GET", "/api/v1/keys/sae-b2/enc_keys").status == 200


def test_ids_with_slashes_and_percent_signs_reach_the_node_decoded_once(
    host: GatewayThread, network: FakeNetwork
) -> None:
    a, b = host.start("gw", network.site("kme-a")), host.start("gw-b", network.site("kme-b"))
    received = ask(host, a, "GET", "/api/v1/keys/a%2Fb:c/enc_keys")
    key = received.json()["keys"][0]
    assert ask(host, a, "GET", "/api/v1/keys/100%2525/status").json()["slave_SAE_ID"] == "100%25"
    with connect(host, b, "a/b:c") as wire:
        dec = wire.request("GET", f"/api/v1/keys/sae-a1/dec_keys?key_ID={key['key_ID']}")
    assert dec.json()["keys"] == [key]


def test_audit_has_one_line_per_call_and_no_key(host: GatewayThread, network: FakeNetwork) -> None:
    a, b = host.start("gw", network.site("kme-a")), host.start("gw-b", network.site("kme-b"))
    enc = ask(host, a, "POST", ENC, {"number": 2, "additional_slave_SAE_IDs": ["sae-b2"]})
    ids = [key["key_ID"] for key in enc.json()["keys"]]
    (line,) = audit_lines(host)
    assert (line["event"], line["key_ids"], line["result"]) == ("enc_keys", ids, "delivered")
    assert (line["master"], line["slave"], line["additional_slaves"]) == ("sae-a1", "sae-b1", ["sae-b2"])
    assert line["request_id"] == enc.headers["x-request-id"]
    with connect(host, b, "sae-b1") as wire:
        target = f"/api/v1/keys/sae-a1/dec_keys?key_ID={ids[0]}"
        assert [wire.request("GET", target).status for _ in range(2)] == [200, 400]
    results = [(line["event"], line["key_ids"], line["result"]) for line in audit_lines(host, "gw-b")]
    assert results == [("dec_keys", ids[:1], "delivered"), ("dec_keys", ids[:1], "unknown-key")]
    network.available_bytes = 0
    ask(host, a, "GET", ENC)
    assert audit_lines(host)[-1]["result"] == "out-of-material"
    everything = "".join(path.read_text() for path in host.directory.glob("*.audit.log"))
    for key in enc.json()["keys"]:
        assert key["key"] not in everything


@pytest.mark.parametrize(("count", "lines"), [(4096, 0), (1680, 0), (MAX_KEY_IDS, 1), (129, 1)])
def test_more_key_ids_than_a_node_takes_are_400_whatever_their_number(
    host: GatewayThread, network: FakeNetwork, count: int, lines: int
) -> None:
    gateway = host.start("gw-b", network.site("kme-b"))
    ids = [{"key_ID": str(UUID(int=number))} for number in range(count)]
    with connect(host, gateway, "sae-b1") as wire:
        body = json.dumps({"key_IDs": ids}, separators=(",", ":")).encode()
        received = wire.request("POST", "/api/v1/keys/sae-a1/dec_keys", body)
    assert received.status == 400
    written = audit_lines(host, "gw-b")
    assert [(line["result"], len(line["key_ids"])) for line in written] == [("limit-exceeded", count)] * lines


def test_more_keys_and_slaves_than_a_node_takes_are_400_and_stand_in_the_audit_log(
    host: GatewayThread, network: FakeNetwork
) -> None:
    gateway = host.start("gw", network.site("kme-a"))
    slaves = [f"{number:064}" for number in range(MAX_ADDITIONAL_SLAVES)]
    received = ask(host, gateway, "POST", ENC, {"number": 10**9, "additional_slave_SAE_IDs": slaves})
    assert received.status == 400
    (line,) = audit_lines(host)
    assert line["additional_slaves"] == slaves


def test_the_gateway_takes_as_many_key_ids_as_a_node_can_be_told_to() -> None:
    assert msgspec.convert({"max_key_per_request": MAX_KEY_IDS}, Limits).max_key_per_request == MAX_KEY_IDS
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"max_key_per_request": MAX_KEY_IDS + 1}, Limits)


def test_the_request_id_reaches_the_node(host: GatewayThread, network: FakeNetwork) -> None:
    gateway = host.start("gw", network.site("kme-a"))
    received = ask(host, gateway, "GET", ENC)
    assert network.calls == [("enc_keys", received.headers["x-request-id"])]


def test_a_mandatory_grade_that_changes_underway_withholds_the_keys(
    host: GatewayThread, network: FakeNetwork
) -> None:
    class Changing(FakeKeyService):
        async def get_keys(self, *args: Any, **options: Any) -> Any:
            network.grade = "trusted-relay"
            return await super().get_keys(*args, **options)

    network.grade = "dske(2,3)"
    gateway = host.start("gw", Changing(network, "kme-a"))
    received = ask(host, gateway, "POST", ENC, {"extension_mandatory": [{"keymesh_grade": "dske(2,3)"}]})
    assert received.status == 400
    assert received.json()["message"] == "not all extension_mandatory request options could be met"
    assert audit_lines(host)[-1]["result"] == "withheld"


def test_the_question_for_the_grade_and_the_keys_share_one_deadline(
    host: GatewayThread, network: FakeNetwork
) -> None:
    given: list[float] = []

    class Slow(FakeKeyService):
        async def get_status(self, *args: Any, **options: Any) -> Any:
            given.append(options["timeout_s"])
            await asyncio.sleep(0.2)
            return await super().get_status(*args, **options)

        async def get_keys(self, *args: Any, **options: Any) -> Any:
            given.append(options["timeout_s"])
            return await super().get_keys(*args, **options)

    gateway = host.start("gw", Slow(network, "kme-a"), limits={"request_timeout_s": 5.0})
    wanted = {"extension_mandatory": [{"keymesh_grade": network.grade}]}
    assert ask(host, gateway, "POST", ENC, wanted).status == 200
    assert given[0] == 5.0
    assert given[1] <= 4.8


def test_an_unmet_mandatory_grade_draws_nothing(host: GatewayThread, network: FakeNetwork) -> None:
    gateway = host.start("gw", network.site("kme-a"))
    before = network.available_bytes
    ask(host, gateway, "POST", ENC, {"extension_mandatory": [{"keymesh_grade": "dske(2,3)"}]})
    assert network.available_bytes == before
    assert [method for method, _ in network.calls] == ["status"]


def test_certificates_without_an_sae_id_get_401(host: GatewayThread, network: FakeNetwork) -> None:
    gateway = host.start("gw", network.site("kme-a"), sae_mapping={"sources": [], "table": [_row("sae-b1")]})
    with connect(host, gateway) as wire:
        for target in (ENC, "/nowhere", "/api/v1/keys/sae-a1/status"):
            received = wire.request("GET", target)
            assert (received.status, received.body) == (401, b"")
    assert network.calls == []


def _row(sae_id: str) -> dict[str, Any]:
    return {"sae_id": sae_id, "serial": 1}


def test_an_expired_client_certificate_ends_also_on_a_living_connection(
    host: GatewayThread, network: FakeNetwork
) -> None:
    gateway = host.start("gw", network.site("kme-a"))
    files = host.pki.sae("sae-a1", validity=timedelta(seconds=6)).save(host.directory, "brief")
    context = client_context(host.roots["gateway"], files.cert, files.key)
    with Wire(f"https://localhost:{gateway.https_port}", context) as wire:
        assert wire.request("GET", ENC).status == 200
        assert _eventually(lambda: wire.request("GET", ENC).status == 401)

    def is_shut_out() -> bool:
        try:
            with Wire(f"https://localhost:{gateway.https_port}", context) as wire:
                assert wire.request("GET", ENC).status == 401
        except (ssl.SSLError, ConnectionError):
            return True
        return False

    assert _eventually(is_shut_out)  # a handshake counts in whole seconds


def test_the_mapping_table_is_followed_on_living_connections(
    host: GatewayThread, network: FakeNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    table = host.directory / "table.yaml"
    table.write_text("version: 1\n")
    gateway = host.start(
        "gw",
        network.site("kme-a"),
        sae_mapping={"table_file": "table.yaml"},
        limits={"reload_poll_s": 0.05},
    )
    with connect(host, gateway) as wire:
        status = "/api/v1/keys/sae-b1/status"
        assert wire.request("GET", status).json()["master_SAE_ID"] == "sae-a1"
        network.homes["renamed"] = "kme-a"
        rows = "entries:\n- {sae_id: renamed, subject: 'CN=sae-a1,OU=sae,O=keymesh'}\n"
        table.write_text(f"version: 1\n{rows}")
        assert _eventually(lambda: wire.request("GET", status).json()["master_SAE_ID"] == "renamed")
        table.write_text("version: 1\nentries: nonsense\n")
        assert _eventually(lambda: "mapping table refused" in caplog.text)
        assert wire.request("GET", status).json()["master_SAE_ID"] == "renamed"


def test_a_deny_list_ends_a_living_connection(host: GatewayThread, network: FakeNetwork) -> None:
    deny = host.directory / "denied.txt"
    deny.write_text("")
    credential = host.pki.sae("sae-a1")
    files = credential.save(host.directory, "withdrawn")
    gateway = host.start(
        "gw",
        network.site("kme-a"),
        tls={"ca": "sae-ca.pem", "cert": "gw.pem", "key": "gw.key", "deny_list": "denied.txt"},
    )
    context = client_context(host.roots["gateway"], files.cert, files.key)
    with Wire(f"https://localhost:{gateway.https_port}", context) as wire:
        assert wire.request("GET", ENC).status == 200
        deny.write_text(f"{credential.certificate.serial_number:x}\n")
        assert _eventually(lambda: wire.request("GET", ENC).status == 401)


def test_a_renewed_server_certificate_is_used_without_a_restart(
    host: GatewayThread, network: FakeNetwork
) -> None:
    gateway = host.start("gw", network.site("kme-a"), limits={"reload_poll_s": 0.05})

    def serial() -> str:
        with connect(host, gateway) as wire:
            assert wire.request("GET", ENC).status == 200
            shown = wire.socket.getpeercert()
            assert shown
            return str(shown["serialNumber"])

    before = serial()
    host.pki.gateway_server("gw").save(host.directory, "gw")
    assert _eventually(lambda: serial() != before)


def test_a_root_that_was_taken_away_admits_nobody_any_more(
    host: GatewayThread, network: FakeNetwork, tmp_path: Path
) -> None:
    from mesh.pki.authority import Pki

    gateway = host.start("gw", network.site("kme-a"), limits={"reload_poll_s": 0.05})
    cert, key = host.issue_sae("sae-a1")
    context = client_context(host.roots["gateway"], cert, key)
    (host.directory / "sae-ca.pem").write_bytes(Pki.create("new").roots["sae"].pem)

    def is_refused() -> bool:
        try:
            with Wire(f"https://localhost:{gateway.https_port}", context) as wire:
                return wire.request("GET", ENC).status != 200
        except (ssl.SSLError, ConnectionError):
            return True

    assert _eventually(is_refused)


def test_bounds_on_connections_requests_and_bodies(host: GatewayThread, network: FakeNetwork) -> None:
    gateway = host.start(
        "gw",
        network.site("kme-a"),
        limits={"max_connections": 2, "max_body_bytes": 64, "body_timeout_s": 0.3},
    )
    with connect(host, gateway) as one, connect(host, gateway) as two:
        assert two.request("POST", ENC, b"{}" + b" " * 62).status == 200
        assert two.request("POST", ENC, b"{}" + b" " * 63).status == 413
        with pytest.raises((ConnectionError, ssl.SSLError)), connect(host, gateway) as three:
            three.request("GET", ENC)
        one.send(f"POST {ENC} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{{".encode())
        late = one.receive()
        assert late.status == 400
        assert {"reason": "slow-body"} in late.json()["details"]
    brief = host.start("gw-brief", network.site("kme-a"), limits={"keepalive_s": 2})
    with connect(host, brief) as idle:
        assert idle.request("GET", ENC).status == 200
        assert idle.is_closed_by_peer()


def test_too_many_requests_in_flight_are_503(host: GatewayThread, network: FakeNetwork) -> None:
    slow = Slow(network, "kme-a")
    gateway = host.start("gw", slow, limits={"max_requests_in_flight": 1})
    with connect(host, gateway) as one, connect(host, gateway) as two:
        one.send(f"GET {ENC} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert slow.entered.wait(30)
        busy = two.request("GET", ENC)
        assert busy.status == 503
        assert {"reason": "busy"} in busy.json()["details"]
        slow.release.set()
        assert one.receive().status == 200


class Slow(FakeKeyService):
    """Answers enc_keys only when released."""

    def __init__(self, network: FakeNetwork, kme_id: str) -> None:
        super().__init__(network, kme_id)
        self.entered = threading.Event()
        self.release = threading.Event()

    async def get_keys(self, *args: Any, **options: Any) -> Any:
        self.entered.set()
        await asyncio.to_thread(self.release.wait, 60)
        return await super().get_keys(*args, **options)


def test_drain_answers_what_was_asked_and_refuses_the_rest(host: GatewayThread, network: FakeNetwork) -> None:
    slow = Slow(network, "kme-a")
    gateway = host.start("gw", slow, limits={"drain_s": 120})
    ready = f"http://127.0.0.1:{gateway.http_port}/readyz"
    assert urlopen(ready).status == 200
    with connect(host, gateway) as busy, connect(host, gateway) as idle:
        busy.send(f"GET {ENC} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert slow.entered.wait(30)
        stopping = threading.Thread(target=lambda: host.run(gateway.stop()))
        stopping.start()
        assert idle.is_closed_by_peer()
        with pytest.raises(OSError, match="refused"):
            connect(host, gateway)
        slow.release.set()
        last = busy.receive()
        assert last.status == 200
        assert last.headers["connection"] == "close"
        assert busy.is_closed_by_peer()
        stopping.join(25)
        assert not stopping.is_alive(), "far below drain_s: nothing is waited for in vain"


def test_a_client_that_does_not_read_is_cut_off(host: GatewayThread, network: FakeNetwork) -> None:
    gateway = host.start("gw", network.site("kme-a"), limits={"write_timeout_s": 0.3})
    big = f"GET {ENC}?number=100&size=65536 HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with connect(host, gateway) as deaf:
        deaf.send(big * 24)  # 26 MB of answers, far above what sockets hold
        assert _eventually(lambda: _is_cut(gateway))
    assert len(network.keys) < 2400  # what comes behind an unread answer is not drawn
    assert ask(host, gateway, "GET", ENC).status == 200


def _is_cut(gateway: Gateway) -> bool:
    page = urlopen(f"http://127.0.0.1:{gateway.http_port}/metrics").read().decode()
    return "keymesh_gateway_connections 0.0" in page


def test_a_client_that_leaves_does_not_stop_the_request(host: GatewayThread, network: FakeNetwork) -> None:
    slow = Slow(network, "kme-a")
    gateway = host.start("gw", slow)
    with connect(host, gateway) as wire:
        wire.send(f"GET {ENC} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert slow.entered.wait(30)
    slow.release.set()
    assert _eventually(lambda: len(network.keys) == 1)
    assert _eventually(lambda: audit_lines(host)[-1]["result"] == "delivered")
    assert ask(host, gateway, "GET", ENC).status == 200


def _eventually(condition: Any, timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if condition():
                return True
        except IndexError:
            continue
        time.sleep(0.02)
    return False
