"""Who may ask a node for what: its own gateways, by the access table of now, within quotas; peers by role."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from mesh.client import ErrorReason, MeshClient, MeshError
from mesh.core.identity import Identity, Role
from mesh.node.services.link import SERVICE
from mesh.ops.tls import TlsFiles
from mesh.rpc.channels import ChannelPool
from mesh.rpc.status import error_from_rpc
from tests.fakes.hub_network import DOMAIN, HubNetwork

pytestmark = pytest.mark.slow
OPEN = {"saes": ["*"], "peers": ["*"]}


class Site(HubNetwork):
    """kme-a and kme-b behind one hub; kme-a knows gw-a and follows an access table."""

    @property
    def table(self) -> Path:
        """The access table's file."""
        return self.root / "access.yaml"

    @property
    def denied(self) -> Path:
        """Certificates that kme-a refuses."""
        return self.root / "denied.txt"

    def put_rules(self, *rules: dict[str, Any]) -> None:
        """Replace the table as an editor does."""
        new = self.table.with_suffix(".new")
        new.write_text(yaml.safe_dump({"rules": list(rules)}))
        new.rename(self.table)

    def files_of(self, name: str, role: Role, one: str) -> TlsFiles:
        """A certificate of the node plane."""
        files = self.pki.member(role, one).save(self.root / "pki", name)
        return TlsFiles(self.root / "pki" / "node-ca.pem", files.cert, files.key)

    def client(self, gateway: str) -> MeshClient:
        """What a gateway uses, at kme-a."""
        files = self.files_of(gateway, Role.GATEWAY, gateway)
        return MeshClient.connect(self.grpc["kme-a"], domain_id=DOMAIN, kme_id="kme-a", tls=files)


@pytest.fixture
def gateways() -> Any:
    """What kme-a's configuration says."""
    return ["gw-a"]


@pytest.fixture
async def site(tmp_path: Path, gateways: Any) -> AsyncIterator[Site]:
    site = Site(tmp_path, hubs=("hub-1",), grade="dske(1,1)")
    site.put_rules(OPEN)
    config = yaml.safe_load(site.path("kme-a").read_text())
    del config["access"]
    config |= {"access_file": str(site.table), "gateways": gateways}
    site.denied.touch()
    config["tls"]["deny_list"] = str(site.denied)
    site.path("kme-a").write_text(yaml.safe_dump(config))
    for kme in ("kme-a", "kme-b"):
        await site.supply("hub-1", kme)
    await site.start()
    await site.until_open()
    yield site
    await site.stop()


async def refusal(call: Any) -> ErrorReason:
    """Why a call failed."""
    with pytest.raises(MeshError) as caught:
        await call
    return caught.value.reason


async def until_refused(client: MeshClient, reason: ErrorReason) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                await client.get_keys("sae-a", "sae-b", number=1, size_bytes=32, request_id="")
            except MeshError as error:
                assert error.reason is reason
                return
            await asyncio.sleep(0.1)


async def until_had(client: MeshClient) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                await client.get_keys("sae-a", "sae-b", number=1, size_bytes=32, request_id="")
            except MeshError as error:
                assert error.reason in (ErrorReason.NOT_AUTHORIZED, ErrorReason.LIMIT_EXCEEDED)
                await asyncio.sleep(0.1)
            else:
                return


async def test_5_2_a_gateway_of_another_site_neither_draws_nor_redeems_nor_looks(site: Site) -> None:
    """Its certificate is good and its domain is ours; the SAEs of this node are not registered to it."""
    own, other = site.client("gw-a"), site.client("gw-b")
    try:
        keys = await own.get_keys("sae-a", "sae-b", number=1, size_bytes=32, request_id="")
        ids = [key.key_id for key in keys.keys]
        used = site.node("kme-a").links.links["hub-1"].status().transmit.position
        calls = (
            other.get_keys("sae-a", "sae-b", number=1, size_bytes=32, request_id=""),
            other.get_keys_by_id("sae-a", "sae-b", ids, request_id=""),
            other.get_status("sae-a", "sae-b", request_id=""),
            anext(aiter(other.watch_levels("kme-b"))),
        )
        for call in calls:
            assert await refusal(call) is ErrorReason.NOT_AUTHORIZED
        assert site.node("kme-a").links.links["hub-1"].status().transmit.position == used
    finally:
        await own.close()
        await other.close()


@pytest.mark.parametrize("gateways", [{"gw-a": ["sae-a"], "gw-b": ["sae-x*"]}])
async def test_5_2_a_gateway_of_this_node_acts_only_for_the_saes_registered_to_it(site: Site) -> None:
    """One batch may hold SAEs of either kind: the others' keys are delivered."""
    own, other = site.client("gw-a"), site.client("gw-b")
    try:
        keys = await own.get_keys("sae-a", "sae-b", number=1, size_bytes=32, request_id="")
        ids = [key.key_id for key in keys.keys]
        calls = (
            own.get_keys("sae-x1", "sae-b", number=1, size_bytes=32, request_id=""),
            other.get_keys("sae-a", "sae-b", number=1, size_bytes=32, request_id=""),
            other.get_keys_by_id("sae-a", "sae-b", ids, request_id=""),
            other.get_status("sae-a", "sae-b", request_id=""),
        )
        drawing = asyncio.ensure_future(
            own.get_keys("sae-a", "sae-b", number=1, size_bytes=32, request_id="")
        )
        assert await asyncio.gather(*map(refusal, calls)) == [ErrorReason.NOT_AUTHORIZED] * 4
        assert len((await drawing).keys) == 1
    finally:
        await own.close()
        await other.close()


async def test_a_changed_access_table_is_followed_and_a_broken_one_is_not(site: Site) -> None:
    client = site.client("gw-a")
    alarms = site.node("kme-a").alarms
    try:
        await until_had(client)
        site.put_rules({"saes": ["sae-b"], "peers": ["*"]})
        await until_refused(client, ErrorReason.NOT_AUTHORIZED)
        site.put_rules(OPEN)
        await until_had(client)
        site.table.write_text("rules: {}\n")
        async with asyncio.timeout(60):
            while not alarms.is_open("config/access"):  # noqa: ASYNC110 - an alarm has no event
                await asyncio.sleep(0.05)
        await until_had(client)
        site.put_rules({"saes": ["sae-a"], "peers": ["sae-b"], "max_key_size_bytes": 16})
        await until_refused(client, ErrorReason.LIMIT_EXCEEDED)
        assert not alarms.is_open("config/access")
    finally:
        await client.close()


async def test_a_denied_gateway_gets_nothing_more_over_the_stream_that_it_has(site: Site) -> None:
    client = site.client("gw-a")
    try:
        await until_had(client)
        certificate = x509.load_pem_x509_certificate((site.root / "pki" / "gw-a.pem").read_bytes())
        site.denied.write_text(f"{certificate.fingerprint(hashes.SHA256()).hex()}\n")
        await until_refused(client, ErrorReason.CERTIFICATE)
    finally:
        await client.close()


async def test_a_stopping_node_begins_nothing_more_on_the_streams_that_it_has(site: Site) -> None:
    client = site.client("gw-a")
    try:
        await until_had(client)
        site.node("kme-a").is_stopping = True
        await until_refused(client, ErrorReason.SHUTTING_DOWN)
    finally:
        await client.close()


async def test_a_pair_beyond_its_rate_is_told_when_to_come_back(site: Site) -> None:
    client = site.client("gw-a")
    try:
        site.put_rules({**OPEN, "rate": {"bytes_per_s": 16, "burst_bytes": 64}})
        await until_refused(client, ErrorReason.QUOTA_EXCEEDED)
        with pytest.raises(MeshError) as caught:
            await client.get_keys("sae-a", "sae-b", number=2, size_bytes=32, request_id="")
        assert 0 < caught.value.retry_after_s <= 4
    finally:
        await client.close()


def opener(site: Site, role: Role, one: str) -> Callable[[], Any]:
    """A stream of the link service, opened under an identity."""
    pool = ChannelPool(site.files_of(f"{role.value}-{one}", role, one), frozenset({role}))
    channel = pool.channel(site.grpc["kme-a"], Identity(DOMAIN, Role.NODE, "kme-a"))
    return channel.stream_stream(f"/{SERVICE}/Exchange")


@pytest.mark.parametrize(
    ("role", "one"),
    [(Role.NODE, "hub-1"), (Role.HUB, "kme-b"), (Role.GATEWAY, "hub-1"), (Role.NODE, "kme-x")],
)
async def test_a_link_opens_only_to_the_role_that_the_document_gives_its_peer(
    site: Site, role: Role, one: str
) -> None:
    """A member's certificate in another role, or a stranger's, opens no link in its name."""
    opened = site.node("kme-a").links.links["hub-1"].times_opened
    stream = opener(site, role, one)()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(stream.read(), 30)
    assert error_from_rpc(caught.value).reason in (ErrorReason.NOT_AUTHORIZED, ErrorReason.PEER_REFUSED)
    assert site.is_open("kme-a")
    assert site.node("kme-a").links.links["hub-1"].times_opened == opened
