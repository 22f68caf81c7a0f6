"""Each thing that can be wrong with a certificate is named in words, and only it."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from mesh.core.identity import Identity, Role
from mesh.errors import ConfigError, ErrorReason
from mesh.ops.diagnosis import Diagnosis, Expectation, Problem, diagnose, require_usable
from mesh.pki.authority import LEAF_VALIDITY, Authority, CredentialFiles, Pki
from mesh.pki.explain import explain, report


class Site:
    """A domain's roots and one node's files."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.pki = Pki.create("metro")
        self.roots = self.pki.save(directory)
        self.node: CredentialFiles = self.pki.node("kme-a", hosts=["localhost", "10.0.0.1"]).save(
            directory, "node"
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("pki"))


def problems(diagnosis: Diagnosis) -> list[Problem]:
    return [finding.problem for finding in diagnosis.findings]


def one(diagnosis: Diagnosis, problem: Problem, words: str) -> None:
    assert problems(diagnosis) == [problem]
    assert words in diagnosis.findings[0].words


def test_nothing_wrong(site: Site) -> None:
    diagnosis = explain(
        site.node.cert,
        key=site.node.key,
        ca=site.roots["node"],
        purpose="node",
        hosts=["localhost", "10.0.0.1"],
    )
    assert problems(diagnosis) == []
    text = report(site.node.cert, diagnosis)
    assert "keymesh://metro/node/kme-a" in text
    assert "nothing wrong found" in text


def test_validity(site: Site) -> None:
    now = datetime.now(UTC)
    one(explain(site.node.cert, now=now + LEAF_VALIDITY + timedelta(days=1)), Problem.EXPIRED, "expired on")
    one(explain(site.node.cert, now=now - timedelta(days=1)), Problem.NOT_YET_VALID, "check the clock")
    soon = explain(site.node.cert, now=now + LEAF_VALIDITY - timedelta(days=2))
    one(soon, Problem.EXPIRES_SOON, "expires on")
    assert soon.fatal == []


def test_roots(site: Site, tmp_path: Path) -> None:
    one(explain(site.node.cert, ca=site.roots["sae"]), Problem.WRONG_ROOT, "metro sae root")
    made_anew = Pki.create("metro").save(tmp_path)["node"]
    one(explain(site.node.cert, ca=made_anew), Problem.WRONG_ROOT, "made anew")
    one(explain(site.node.cert, ca=site.node.cert), Problem.NOT_A_ROOT, "no authority")
    one(explain(site.node.cert, ca=tmp_path / "none.pem"), Problem.UNREADABLE, "no such file")
    short = Authority.create("short", validity=timedelta(seconds=1), now=datetime(2024, 1, 1, tzinfo=UTC))
    leaf = short.issue(
        "x",
        kind="x",
        hosts=["x"],
        is_server=True,
        is_client=True,
        now=datetime(2024, 1, 1, tzinfo=UTC),
    ).save(tmp_path, "leaf")
    late = explain(leaf.cert, ca=short.save(tmp_path, "short").cert, now=datetime(2024, 1, 2, tzinfo=UTC))
    assert problems(late) == [Problem.EXPIRED, Problem.ROOT_EXPIRED]


def test_two_roots_in_one_file_are_tried_both(site: Site, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(site.roots["sae"].read_bytes() + site.roots["node"].read_bytes())
    assert problems(explain(site.node.cert, ca=both)) == []


def test_keys(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = site.pki.node("kme-b").save(tmp_path, "other")
    one(explain(site.node.cert, key=other.key), Problem.KEY_MISMATCH, "another certificate")
    one(explain(site.node.cert, key=site.node.cert), Problem.UNREADABLE, "swapped")
    exposed = tmp_path / "exposed.key"
    shutil.copy(site.node.key, exposed)
    exposed.chmod(0o644)
    one(explain(site.node.cert, key=exposed), Problem.KEY_EXPOSED, "0644")
    with monkeypatch.context() as elsewhere:
        # As in a pod: a Secret's files belong to root, and are read through the group.
        elsewhere.setattr("os.geteuid", lambda: 10_001)
        exposed.chmod(0o440)
        assert problems(explain(site.node.cert, key=exposed)) == []
        exposed.chmod(0o444)
        one(explain(site.node.cert, key=exposed), Problem.KEY_EXPOSED, "0444")
    encrypted = tmp_path / "encrypted.key"
    key = serialization.load_pem_private_key(site.node.key.read_bytes(), None)
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    one(explain(site.node.cert, key=encrypted), Problem.UNREADABLE, "encrypted with a password")
    encrypted.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    one(explain(site.node.cert, key=encrypted), Problem.UNREADABLE, "damaged")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not PEM"),
        (b"\x30\x82\x01\x02", "not PEM"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "damaged"),
        (b"-----BEGIN CERTIFICATE-----\nMIIB", "damaged"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\n", "signing request"),
        (b"-----BEGIN EC PRIVATE KEY-----\n", "swapped"),
    ],
)
def test_unreadable(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.pem"
    path.write_bytes(content)
    diagnosis = explain(path)
    one(diagnosis, Problem.UNREADABLE, words)
    assert "WRONG" in report(path, diagnosis)


def test_purposes(site: Site, tmp_path: Path) -> None:
    sae = site.pki.sae("sae-a").save(tmp_path, "sae")
    gateway = site.pki.gateway_client("gw-a").save(tmp_path, "gw")
    server = site.pki.gateway_server("gw-a").save(tmp_path, "server")
    one(explain(sae.cert, purpose="rest-server"), Problem.MISSING_SERVER_AUTH, "serverAuth")
    one(explain(server.cert, purpose="sae"), Problem.MISSING_CLIENT_AUTH, "clientAuth")
    one(explain(sae.cert, purpose="tool"), Problem.WRONG_IDENTITY, "not one of the node plane")
    one(explain(gateway.cert, purpose="tool"), Problem.WRONG_ROLE, "for a gateway")
    one(
        explain(server.cert, purpose="rest-server", hosts=["kme.example"]),
        Problem.WRONG_HOST,
        "DNS:localhost",
    )
    one(explain(site.roots["node"]), Problem.IS_A_ROOT, "swapped")
    with pytest.raises(ConfigError, match="purpose"):
        explain(sae.cert, purpose="king")


def test_the_configured_identity_is_meant(site: Site) -> None:
    expected = Expectation(is_server=True, identity=Identity("metro", Role.NODE, "kme-b"))
    one(diagnose(site.node.cert, expected=expected), Problem.WRONG_IDENTITY, "speaks for")


def handmade(
    directory: Path,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    *extensions: x509.ExtensionType,
) -> Path:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "handmade")])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=100))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    path = directory / "handmade.pem"
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


def test_handmade_certificates(site: Site, tmp_path: Path) -> None:
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    strong = ec.generate_private_key(ec.SECP256R1())
    assert problems(explain(handmade(tmp_path, strong))) == [Problem.NO_SAN, Problem.NOT_STRICT]
    path = handmade(tmp_path, strong, names)
    one(explain(path), Problem.NOT_STRICT, "it lacks authorityKeyIdentifier, keyUsage;")
    assert Problem.WRONG_ROOT in problems(explain(path, ca=site.roots["node"]))
    assert "signed by itself" in report(path, explain(path, ca=site.roots["node"]))
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    assert Problem.WEAK in problems(explain(handmade(tmp_path, weak, names)))
    small = ec.generate_private_key(ec.SECP224R1())
    assert "224 bits" in report(path, explain(handmade(tmp_path, small, names)))


def test_at_the_start_everything_fatal_is_said_at_once(site: Site, tmp_path: Path) -> None:
    other = site.pki.node("kme-b").save(tmp_path, "other")
    with pytest.raises(ConfigError, match=r"^tls\.cert cannot be used: it") as caught:
        require_usable(site.node.cert, other.key, site.roots["sae"], Expectation(is_server=True), what="tls")
    assert caught.value.reason is ErrorReason.CERTIFICATE
    assert "another certificate" in caught.value.message
    assert "was issued by" in caught.value.message
