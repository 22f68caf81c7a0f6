"""The certificate profiles: strict verification passes, and each plane has a root of its own."""

from __future__ import annotations

import argparse
import ssl
import stat
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store

from mesh.errors import CallerError, ConfigError
from mesh.pki import cli
from mesh.pki.authority import ROOTS, Authority, Credential, CredentialFiles, Pki


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki.create("metro")


def usages(credential: Credential) -> set[x509.ObjectIdentifier]:
    return set(credential.certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> None:
    """A TLS handshake in memory; raises what either side raises."""
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
    # In TLS 1.3 the client learns only while reading that its certificate was refused.
    at_server.write(b"x")
    assert at_client.read(1) == b"x"


def context(side: int, root: Path, files: CredentialFiles) -> ssl.SSLContext:
    made = ssl.SSLContext(side)
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(root)
    made.load_cert_chain(files.cert, files.key)
    return made


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_strict_verification_passes_both_ways(pki: Pki, tmp_path: Path, host: str) -> None:
    roots = pki.save(tmp_path)
    server = context(ssl.PROTOCOL_TLS_SERVER, roots["sae"], pki.gateway_server("gw-a").save(tmp_path, "gw"))
    client = context(ssl.PROTOCOL_TLS_CLIENT, roots["gateway"], pki.sae("sae-a").save(tmp_path, "sae"))
    handshake(server, client, host)


def test_another_planes_certificate_fails(pki: Pki, tmp_path: Path) -> None:
    roots = pki.save(tmp_path)
    server = context(ssl.PROTOCOL_TLS_SERVER, roots["sae"], pki.gateway_server("gw-a").save(tmp_path, "gw"))
    client = context(ssl.PROTOCOL_TLS_CLIENT, roots["gateway"], pki.node("kme-a").save(tmp_path, "node"))
    with pytest.raises(ssl.SSLError):
        handshake(server, client, "localhost")


def test_webpki_profile_of_servers(pki: Pki) -> None:
    """The cryptography package's own verifier (CA/Browser Forum rules) takes them as well."""
    credential = pki.gateway_server("gw-a")
    verifier = (
        PolicyBuilder()
        .store(Store([pki.roots["gateway"].certificate]))
        .build_server_verifier(x509.DNSName("localhost"))
    )
    assert verifier.verify(credential.certificate, [])


def test_usages_by_kind(pki: Pki) -> None:
    server, client = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
    assert usages(pki.node("kme-a")) == usages(pki.hub("hub-1")) == {server, client}
    assert usages(pki.etcd_server("etcd-1")) == {server, client}
    assert usages(pki.gateway_server("gw-a")) == usages(pki.device_server("dev-1")) == {server}
    for credential in (
        pki.gateway_client("gw-a"),
        pki.tool("t"),
        pki.sae("sae-a"),
        pki.device_client("kme-a"),
        pki.etcd_client("kme-a"),
    ):
        assert usages(credential) == {client}


def test_sae_names(pki: Pki) -> None:
    certificate = pki.sae("A/b c").certificate
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "A/b c"
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["sae://metro/A%2Fb%20c"]


def test_never_valid_beyond_the_root() -> None:
    now = datetime(2024, 1, 1, tzinfo=UTC)
    root = Authority.create("r", now=now, validity=timedelta(days=2))
    leaf = root.issue("x", kind="x", hosts=["x"], is_server=True, is_client=False, now=now)
    assert leaf.certificate.not_valid_after_utc == root.certificate.not_valid_after_utc


def test_files_are_private_and_load_again(pki: Pki, tmp_path: Path) -> None:
    pki.save(tmp_path)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*-ca.key")}
    assert modes == {f"{name}-ca.key": 0o600 for name in ROOTS}
    again = Pki.load(tmp_path)
    assert again.domain == "metro"
    assert again.roots["node"].pem == pki.roots["node"].pem
    again.node("kme-a").certificate.verify_directly_issued_by(pki.roots["node"].certificate)


def test_an_sae_id_is_no_path(pki: Pki, tmp_path: Path) -> None:
    files = pki.sae("../x").save(tmp_path, "sae-../x")
    assert files.cert.parent == tmp_path


def test_unreadable_authorities(pki: Pki, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pki init"):
        Pki.load(tmp_path)
    pki.save(tmp_path)
    (tmp_path / "node-ca.key").write_bytes((tmp_path / "sae-ca.key").read_bytes())
    with pytest.raises(ConfigError, match="not its certificate's"):
        Pki.load(tmp_path)
    (tmp_path / "node-ca.key").write_text("nonsense")
    with pytest.raises(ConfigError, match="cannot be read"):
        Pki.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "hosts"), [("", ["x"]), ("x" * 65, ["x"]), ("x", []), ("x", ["é"]), ("x", ["1.2.3.4.5"])]
)
def test_bad_names_are_refused(pki: Pki, name: str, hosts: Sequence[str]) -> None:
    with pytest.raises(CallerError):
        pki.roots["node"].issue(name, kind="x", hosts=hosts, is_server=True, is_client=False)


def test_private_keys_stay_out_of_reprs(pki: Pki) -> None:
    assert "PRIVATE" not in repr(pki.sae("sae-a"))
    assert "sae-a" in repr(pki.sae("sae-a"))


def keymesh(*words: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["pki", *words])
    status: int = arguments.handler(arguments)
    return status


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(tmp_path / "pki")
    assert keymesh("init", "--domain", "metro", "--dir", directory) == 0
    with pytest.raises(ConfigError, match="roots already"):
        keymesh("init", "--domain", "metro", "--dir", directory)
    for command in (
        "issue-node",
        "issue-hub",
        "issue-gateway",
        "issue-tool",
        "issue-sae",
        "issue-device",
        "issue-device-client",
        "issue-etcd",
        "issue-etcd-client",
    ):
        assert keymesh(command, "x-1", "--dir", directory) == 0
    capsys.readouterr()
    node = f"{directory}/node-x-1"
    good = ["explain", f"{node}.pem", "--key", f"{node}.key", "--ca", f"{directory}/node-ca.pem"]
    assert keymesh(*good, "--as", "node", "--host", "localhost") == 0
    assert "nothing wrong found" in capsys.readouterr().out
    assert keymesh("explain", f"{node}.pem", "--ca", f"{directory}/sae-ca.pem") == 1
    assert "wrong-root" in capsys.readouterr().out
