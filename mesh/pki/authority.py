"""Certificate authorities for labs and small installations.

Owns the certificate profiles: RFC 5280 as OpenSSL checks it under
``X509_V_FLAG_X509_STRICT`` (critical basicConstraints and keyUsage, SKI, AKI, EKU,
at least one subject alternative name), EC P-256 with SHA-256. One root per plane, so
that a certificate of one plane proves nothing in another. Real installations bring
their own authority and follow the same profiles.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.core.identity import Identity, Role
from mesh.errors import CallerError, ConfigError

_BACKDATE = timedelta(minutes=5)
ROOT_VALIDITY = timedelta(days=3650)
LEAF_VALIDITY = timedelta(days=397)
LOCAL_HOSTS = ("localhost", "127.0.0.1")


@dataclass(frozen=True, slots=True)
class CredentialFiles:
    """Where a certificate and its key lie."""

    cert: Path
    key: Path


@dataclass(frozen=True, slots=True, repr=False)
class Credential:
    """A certificate and its private key, PEM."""

    certificate: x509.Certificate
    cert_pem: bytes
    key_pem: bytes

    def __repr__(self) -> str:
        return f"Credential({self.certificate.subject.rfc4514_string()})"

    def save(self, directory: Path, stem: str) -> CredentialFiles:
        """Writes ``stem.pem`` and ``stem.key`` (mode 0600), replacing older ones at once."""
        # An SAE id may contain what a file name may not.
        stem = quote(stem, safe="")
        files = CredentialFiles(directory / f"{stem}.pem", directory / f"{stem}.key")
        write_file(files.key, self.key_pem, mode=0o600)
        write_file(files.cert, self.cert_pem, mode=0o644)
        return files


class Authority:
    """One root that issues certificates.

    Args:
        certificate: the self-signed root.
        key: its private key.
    """

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self._key = key

    @classmethod
    def create(
        cls, common_name: str, *, now: datetime | None = None, validity: timedelta = ROOT_VALIDITY
    ) -> Authority:
        """Makes a new root named ``common_name`` (1 to 64 characters)."""
        now = now or datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(common_name, "authority")
        ski = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = (
            _builder(name, name, key.public_key(), now, validity)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(ski, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier(ski.digest, None, None), critical=False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, files: CredentialFiles) -> Authority:
        """Reads a root that ``save`` wrote.

        Raises:
            ConfigError: a file is missing, unreadable, not PEM, or the two do not fit.
        """
        try:
            certificate = x509.load_pem_x509_certificate(files.cert.read_bytes())
            key = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as exc:
            raise ConfigError(
                "the authority cannot be read; run 'keymesh pki init' or give its directory",
                facts={"cert": files.cert, "key": files.key, "cause": exc},
            ) from exc
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError("the authority's key is not its certificate's", facts={"key": files.key})
        return cls(certificate, key)

    @property
    def pem(self) -> bytes:
        """The root certificate, PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def save(self, directory: Path, stem: str) -> CredentialFiles:
        """Writes ``stem.pem`` and ``stem.key`` (mode 0600)."""
        return Credential(self.certificate, self.pem, _key_pem(self._key)).save(directory, stem)

    def issue(
        self,
        common_name: str,
        *,
        kind: str,
        uris: Sequence[str] = (),
        hosts: Sequence[str] = (),
        is_server: bool,
        is_client: bool,
        now: datetime | None = None,
        validity: timedelta = LEAF_VALIDITY,
    ) -> Credential:
        """Issues a certificate with a fresh key.

        Args:
            common_name: subject CN, 1 to 64 characters.
            kind: subject OU, for people.
            uris: URI names.
            hosts: DNS names and IP addresses, told apart by their look.
            is_server: EKU serverAuth.
            is_client: EKU clientAuth.
            now: issue time, timezone-aware.
            validity: how long it is valid; never beyond the root.

        Raises:
            CallerError: a name is empty, too long or not a name.
        """
        now = now or datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        public = key.public_key()
        names: list[x509.GeneralName] = [_uri_name(uri) for uri in uris]
        names += [_host_name(host) for host in dict.fromkeys(hosts)]
        if not names:
            raise CallerError("a certificate needs a URI or a host name", facts={"name": common_name})
        usages = [
            usage
            for wanted, usage in (
                (is_server, ExtendedKeyUsageOID.SERVER_AUTH),
                (is_client, ExtendedKeyUsageOID.CLIENT_AUTH),
            )
            if wanted
        ]
        validity = min(validity, self.certificate.not_valid_after_utc - now)
        root_ski = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            _builder(_name(common_name, kind), self.certificate.subject, public, now, validity)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(root_ski), critical=False
            )
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        return Credential(certificate, certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))


ROOTS = ("node", "sae", "gateway", "border", "device", "etcd")


class Pki:
    """The roots of one domain, and the profiles of what they issue.

    ``node`` signs nodes, hubs, gateways (as clients) and tools: the node plane;
    ``sae`` the applications; ``gateway`` the REST servers; ``border`` this domain's key
    managers towards other owners' (ETSI GS QKD 020); ``device`` both ends of a QKD
    device's interface; ``etcd`` the directory's servers and clients.

    Args:
        domain: domain id.
        roots: an authority per name of ``ROOTS``.
    """

    def __init__(self, domain: str, roots: dict[str, Authority]) -> None:
        self.domain = domain
        self.roots = roots

    @classmethod
    def create(cls, domain: str, *, now: datetime | None = None) -> Pki:
        """Makes fresh roots for a domain (id as in ``mesh.core.identity``)."""
        Identity(domain, Role.NODE, "check")
        return cls(domain, {name: Authority.create(f"{domain[:48]} {name} root", now=now) for name in ROOTS})

    @classmethod
    def load(cls, directory: Path) -> Pki:
        """Reads the domain and the roots that ``save`` wrote; see ``Authority.load`` for errors."""
        path = directory / "domain"
        try:
            domain = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(
                "no authority in this directory; run 'keymesh pki init'", facts={"dir": directory}
            ) from exc
        return cls(domain, {name: Authority.load(_root_files(directory, name)) for name in ROOTS})

    def save(self, directory: Path) -> dict[str, Path]:
        """Writes all roots as ``NAME-ca.pem`` and ``NAME-ca.key``; returns the certificates' paths."""
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory / "domain", f"{self.domain}\n".encode("ascii"), mode=0o644)
        return {name: root.save(directory, f"{name}-ca").cert for name, root in self.roots.items()}

    def member(
        self,
        role: Role,
        member_id: str,
        *,
        hosts: Sequence[str] = (),
        now: datetime | None = None,
        validity: timedelta = LEAF_VALIDITY,
    ) -> Credential:
        """A certificate of the node plane; nodes and hubs may also serve."""
        identity = Identity(self.domain, role, member_id)
        return self.roots["node"].issue(
            _short(member_id),
            kind=role.value,
            uris=[identity.uri],
            hosts=[identity.dns_name, *hosts],
            is_server=role in (Role.NODE, Role.HUB),
            is_client=True,
            now=now,
            validity=validity,
        )

    def node(self, kme_id: str, *, hosts: Sequence[str] = ()) -> Credential:
        """A node's certificate: serves and dials the node plane."""
        return self.member(Role.NODE, kme_id, hosts=hosts)

    def hub(self, kme_id: str, *, hosts: Sequence[str] = ()) -> Credential:
        """A hub's certificate."""
        return self.member(Role.HUB, kme_id, hosts=hosts)

    def tool(self, tool_id: str) -> Credential:
        """A certificate for operators' tools: the admin service."""
        return self.member(Role.TOOL, tool_id)

    def gateway_client(self, gateway_id: str) -> Credential:
        """A gateway's certificate towards its node."""
        return self.member(Role.GATEWAY, gateway_id)

    def gateway_server(
        self, gateway_id: str, *, hosts: Sequence[str] = LOCAL_HOSTS, validity: timedelta = LEAF_VALIDITY
    ) -> Credential:
        """A gateway's REST certificate."""
        return self.roots["gateway"].issue(
            _short(gateway_id),
            kind="gateway",
            hosts=hosts,
            is_server=True,
            is_client=False,
            validity=validity,
        )

    def sae(self, sae_id: str, *, validity: timedelta = LEAF_VALIDITY) -> Credential:
        """An application's certificate: CN is the SAE id, URI ``sae://domain/id`` (escaped)."""
        return self.roots["sae"].issue(
            sae_id,
            kind="sae",
            uris=[f"sae://{self.domain}/{quote(sae_id, safe='')}"],
            is_server=False,
            is_client=True,
            validity=validity,
        )

    def border(self, kme_id: str, *, hosts: Sequence[str] = LOCAL_HOSTS) -> Credential:
        """A KME's certificate towards other owners' key managers, as server and as client."""
        return self.roots["border"].issue(
            _short(kme_id),
            kind="border",
            hosts=[f"{kme_id}.border.{self.domain}.keymesh.internal", *hosts],
            is_server=True,
            is_client=True,
        )

    def device_server(self, device_id: str, *, hosts: Sequence[str] = LOCAL_HOSTS) -> Credential:
        """The certificate of one end of a QKD device's key interface."""
        return self.roots["device"].issue(
            _short(device_id), kind="qkd-device", hosts=hosts, is_server=True, is_client=False
        )

    def device_client(self, sae_id: str) -> Credential:
        """The certificate with which a node fetches from its own device: CN is its id there."""
        return self.roots["device"].issue(
            sae_id,
            kind="qkd-device-client",
            uris=[f"sae://{self.domain}/{quote(sae_id, safe='')}"],
            is_server=False,
            is_client=True,
        )

    def etcd_server(self, member_id: str, *, hosts: Sequence[str] = LOCAL_HOSTS) -> Credential:
        """An etcd member's certificate, for clients and peers alike."""
        return self.roots["etcd"].issue(
            _short(member_id), kind="etcd", hosts=hosts, is_server=True, is_client=True
        )

    def etcd_client(self, client_id: str) -> Credential:
        """A certificate for reaching etcd."""
        return self.roots["etcd"].issue(
            _short(client_id),
            kind="etcd-client",
            hosts=[f"{client_id}.etcd-client.{self.domain}.keymesh.internal"],
            is_server=False,
            is_client=True,
        )


def write_file(path: Path, data: bytes, *, mode: int) -> None:
    """Replaces a file at once, with its mode from the start; not synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as stream:
        os.fchmod(stream.fileno(), mode)
        stream.write(data)
    fresh.replace(path)


def _root_files(directory: Path, name: str) -> CredentialFiles:
    return CredentialFiles(directory / f"{name}-ca.pem", directory / f"{name}-ca.key")


def _short(name: str) -> str:
    return name[:64]


def _name(common_name: str, kind: str) -> x509.Name:
    if not 1 <= len(common_name) <= 64:
        raise CallerError("common name must have 1 to 64 characters", facts={"name": common_name})
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "keymesh"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, kind),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime,
    validity: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + validity)
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _uri_name(uri: str) -> x509.UniformResourceIdentifier:
    try:
        return x509.UniformResourceIdentifier(uri)
    except ValueError as exc:
        raise CallerError("not a URI in ASCII", facts={"uri": uri}) from exc


def _host_name(host: str) -> x509.GeneralName:
    if host.replace(".", "").isdigit() or ":" in host:
        try:
            return x509.IPAddress(ipaddress.ip_address(host))
        except ValueError as exc:
            raise CallerError("not an IP address", facts={"host": host}) from exc
    try:
        return x509.DNSName(host)
    except ValueError as exc:
        raise CallerError("not a host name in ASCII", facts={"host": host}) from exc


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
