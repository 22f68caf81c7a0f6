"""REST contexts: minimum versions, AEAD only, and files followed without a restart."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest

from mesh.errors import ConfigError
from mesh.ops.metrics import Metrics
from mesh.ops.tls import ServerTls, TlsFiles, client_context, server_context
from mesh.pki.authority import Pki


class Site:
    """A gateway and an SAE with files in one directory."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.issue(Pki.create("metro"))
        self.server = TlsFiles(directory / "sae-ca.pem", directory / "gw.pem", directory / "gw.key")
        self.client = TlsFiles(directory / "gateway-ca.pem", directory / "sae.pem", directory / "sae.key")

    def issue(self, pki: Pki) -> None:
        """Makes all files anew."""
        self.pki = pki
        pki.save(self.dir)
        pki.gateway_server("gw-a").save(self.dir, "gw")
        pki.sae("sae-a").save(self.dir, "sae")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def connect(server: ssl.SSLContext, client: ssl.SSLContext, host: str | None = "localhost") -> ssl.SSLObject:
    """A handshake in memory; returns the client's side after a byte came through."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    at_server = server.wrap_bio(to_server, to_client, server_side=True)
    at_client = client.wrap_bio(to_client, to_server, server_hostname=host)
    unfinished = [at_client, at_server]
    for _ in range(10):
        for side in list(unfinished):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            unfinished.remove(side)
    at_server.write(b"x")
    assert at_client.read(1) == b"x"
    return at_client


def serial(connection: ssl.SSLObject) -> str:
    certificate = connection.getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"])


def touch(path: Path) -> None:
    stamp = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(stamp, stamp))


def test_tls13_is_preferred_and_ciphers_are_aead(site: Site) -> None:
    connection = connect(server_context(site.server), client_context(site.client))
    assert connection.version() == "TLSv1.3"
    for context in (server_context(site.server), client_context(site.client)):
        assert all(cipher["aead"] for cipher in context.get_ciphers())


def test_minimum_version_is_enforced(site: Site) -> None:
    old = client_context(site.client)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    connection = connect(server_context(site.server, minimum="1.2"), old)
    cipher = connection.cipher()
    assert connection.version() == "TLSv1.2"
    assert cipher is not None
    assert cipher[0].startswith("ECDHE-")
    with pytest.raises(ssl.SSLError):
        connect(server_context(site.server, minimum="1.3"), old)
    with pytest.raises(ConfigError, match=r"1\.2 or 1\.3"):
        server_context(site.server, minimum="1.1")


def test_cbc_suites_are_refused(site: Site) -> None:
    old = client_context(site.client)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.set_ciphers("ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES128-SHA")
    with pytest.raises(ssl.SSLError):
        connect(server_context(site.server), old)


def test_no_client_certificate_no_entry(site: Site) -> None:
    bare = ssl.create_default_context(cafile=str(site.client.ca))
    with pytest.raises(ssl.SSLError):
        connect(server_context(site.server), bare)


def test_unusable_files_are_words(site: Site, tmp_path: Path) -> None:
    swapped = TlsFiles(site.server.ca, site.server.key, site.server.cert)
    with pytest.raises(ConfigError, match="swapped"):
        server_context(swapped)
    with pytest.raises(ConfigError, match="serverAuth"):
        server_context(TlsFiles(site.server.ca, site.client.cert, site.client.key))
    with pytest.raises(ConfigError, match="clientAuth"):
        client_context(TlsFiles(site.client.ca, site.server.cert, site.server.key))
    (tmp_path / "broken.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match="pki explain"):
        server_context(TlsFiles(tmp_path / "broken.pem", site.server.cert, site.server.key))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_renewed_certificate_serves_the_next_handshake(site: Site, host: str) -> None:
    """``127.0.0.1`` sends no server name: the context moves all the same."""
    tls = ServerTls(site.server, interval_s=0)
    client = client_context(site.client)
    before = serial(connect(tls.context, client, host))
    site.pki.gateway_server("gw-a").save(site.dir, "gw")
    touch(site.server.cert)
    assert serial(connect(tls.context, client, host)) != before


def test_roots_that_were_taken_away_are_gone(site: Site) -> None:
    tls = ServerTls(site.server, interval_s=0)
    old_client = client_context(site.client)
    connect(tls.context, old_client)
    old_gateway_root = site.client.ca.read_bytes()
    site.issue(Pki.create("metro"))
    touch(site.server.ca)
    connect(tls.context, client_context(site.client))
    old_client.load_verify_locations(cadata=site.client.ca.read_text())
    assert site.client.ca.read_bytes() != old_gateway_root
    with pytest.raises(ssl.SSLError):
        connect(tls.context, old_client)


def test_unusable_renewals_leave_the_last_good_one(site: Site) -> None:
    tls = ServerTls(site.server, interval_s=0)
    client = client_context(site.client)
    before = serial(connect(tls.context, client))
    good = site.server.cert.read_bytes()
    site.server.cert.write_text("nonsense")
    assert not tls.reload_if_changed()
    assert serial(connect(tls.context, client)) == before
    site.server.cert.write_bytes(good)
    assert tls.reload_if_changed()


def test_expiry_shows_as_a_metric(site: Site) -> None:
    metrics = Metrics(with_process=False)
    ServerTls(site.server, expiry=metrics.gauge("certificate_expiry_seconds", "x"))
    assert b"keymesh_certificate_expiry_seconds 1." in metrics.render()


def test_every_connection_proves_itself(site: Site) -> None:
    """No tickets: nothing to resume with, so no handshake skips the client's certificate."""
    connection = connect(server_context(site.server), client_context(site.client))
    assert connection.session is None or not connection.session.has_ticket
