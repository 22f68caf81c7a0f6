"""Says in words what is wrong with a certificate, before TLS says it in its own.

Owns the list of findings and their wording. Used by ``keymesh pki explain`` and at
the start of every process, so that a wrong file is a readable error and not a
handshake failure hours later. Must not decide who is admitted: TLS verifies, and
``mesh.rpc`` reads identities.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from mesh.core.identity import Identity, Role
from mesh.errors import ConfigError, ErrorReason, NotAuthorizedError
from mesh.ops.certificates import (
    UNREADABLE,
    alternative_names,
    fingerprint_of,
    identity_of,
    names_of,
    serial_of,
)

SOON = timedelta(days=14)


class Problem(StrEnum):
    """What can be wrong; stable names for scripts and tests."""

    UNREADABLE = "unreadable"
    EXPIRED = "expired"
    NOT_YET_VALID = "not-yet-valid"
    EXPIRES_SOON = "expires-soon"
    WRONG_ROOT = "wrong-root"
    ROOT_EXPIRED = "root-expired"
    NOT_A_ROOT = "not-a-root"
    IS_A_ROOT = "is-a-root"
    NO_SAN = "no-san"
    MISSING_SERVER_AUTH = "missing-server-auth"
    MISSING_CLIENT_AUTH = "missing-client-auth"
    NOT_STRICT = "not-strict"
    KEY_MISMATCH = "key-mismatch"
    KEY_EXPOSED = "key-exposed"
    WEAK = "weak"
    WRONG_ROLE = "wrong-role"
    WRONG_IDENTITY = "wrong-identity"
    WRONG_HOST = "wrong-host"


# These do not stop a process.
WARNINGS = frozenset({Problem.EXPIRES_SOON, Problem.KEY_EXPOSED, Problem.NOT_STRICT})


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, and what to do about it."""

    problem: Problem
    words: str

    @property
    def is_fatal(self) -> bool:
        """Whether TLS or admission would fail because of it."""
        return self.problem not in WARNINGS


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a certificate is meant for.

    Attributes:
        is_server: it must carry EKU serverAuth.
        is_client: it must carry EKU clientAuth.
        roles: admitted roles of the node plane; empty when it is not of that plane.
        identity: exactly this identity, when known.
        hosts: DNS names or addresses that it must be valid for.
    """

    is_server: bool = False
    is_client: bool = False
    roles: frozenset[Role] = frozenset()
    identity: Identity | None = None
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a certificate is, and what is wrong with it; ``leaf`` is None if unreadable."""

    findings: list[Finding]
    leaf: x509.Certificate | None = None
    summary: dict[str, str] = field(default_factory=dict)

    @property
    def fatal(self) -> list[Finding]:
        """The findings that make it unusable."""
        return [finding for finding in self.findings if finding.is_fatal]


def diagnose(
    cert: Path,
    *,
    key: Path | None = None,
    ca: Path | None = None,
    expected: Expectation | None = None,
    now: datetime | None = None,
) -> Diagnosis:
    """Reads a certificate (and key, and roots) and names all that is wrong.

    Args:
        cert: PEM file, the certificate first, then intermediates if any.
        key: PEM file with the private key, unencrypted.
        ca: PEM file with the roots that its other ends trust.
        expected: what it is meant for.
        now: timezone-aware.
    """
    now = now or datetime.now(UTC)
    try:
        chain = _load_chain(cert)
    except ConfigError as exc:
        return Diagnosis([Finding(Problem.UNREADABLE, exc.message)])
    leaf = chain[0]
    try:
        findings = [*_validity(leaf, now), *_strength(leaf), *_shape(leaf)]
        if ca is not None:
            findings += _trust(chain, ca, now)
        if key is not None:
            findings += _key(leaf, key)
        if expected is not None:
            findings += _purpose(leaf, expected)
        return Diagnosis(findings, leaf, _summary(leaf))
    except UNREADABLE:
        words = f"{cert} holds a certificate with a damaged part; have it issued again"
        return Diagnosis([Finding(Problem.UNREADABLE, words)])


def require_usable(
    cert: Path,
    key: Path,
    ca: Path | None,
    expected: Expectation,
    *,
    what: str,
    now: datetime | None = None,
) -> Diagnosis:
    """Refuses to start on files that cannot work.

    Args:
        what: for the message, for example ``tls`` or ``node_tls``: the configuration's section.

    Raises:
        ConfigError: reason CERTIFICATE, naming the file and everything fatal.
    """
    diagnosis = diagnose(cert, key=key, ca=ca, expected=expected, now=now)
    if diagnosis.fatal:
        raise ConfigError(
            f"{what}.cert cannot be used: " + "; ".join(finding.words for finding in diagnosis.fatal),
            reason=ErrorReason.CERTIFICATE,
            facts={"cert": cert},
        )
    return diagnosis


def _load_chain(path: Path) -> list[x509.Certificate]:
    data = _read(path)
    if b"PRIVATE KEY-----" in data and b"-----BEGIN CERTIFICATE-----" not in data:
        raise ConfigError(f"{path} holds a private key, not a certificate; are cert and key swapped?")
    if b"-----BEGIN CERTIFICATE REQUEST-----" in data:
        raise ConfigError(f"{path} holds a signing request; let the authority sign it first")
    if b"-----BEGIN" not in data:
        raise ConfigError(f"{path} is not PEM; convert it with 'openssl x509 -inform der'")
    try:
        return x509.load_pem_x509_certificates(data)
    except UNREADABLE as exc:
        raise ConfigError(f"{path} cannot be read as certificates: it is damaged or cut short") from exc


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {(exc.strerror or 'error').lower()}") from exc


def _validity(leaf: x509.Certificate, now: datetime) -> list[Finding]:
    until, since = leaf.not_valid_after_utc, leaf.not_valid_before_utc
    if now > until:
        return [Finding(Problem.EXPIRED, f"it expired on {_day(until)}; issue a new one")]
    if now < since:
        words = f"it is not valid before {_day(since)} and it is {_day(now)} here; check the clock"
        return [Finding(Problem.NOT_YET_VALID, words)]
    if now + SOON > until:
        return [Finding(Problem.EXPIRES_SOON, f"it expires on {_day(until)}; issue a new one soon")]
    return []


def _strength(certificate: x509.Certificate) -> list[Finding]:
    try:
        public = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return [Finding(Problem.UNREADABLE, "its public key is of a kind that cannot be read")]
    found = []
    if isinstance(public, rsa.RSAPublicKey) and public.key_size < 2048:
        found.append(f"its RSA key has {public.key_size} bits; use EC P-256 or RSA of 2048 and more")
    if isinstance(public, ec.EllipticCurvePublicKey) and public.key_size < 256:
        found.append(f"its EC key has {public.key_size} bits; use P-256 or larger")
    if isinstance(public, dsa.DSAPublicKey):
        found.append("its key is DSA, which TLS 1.3 does not know; use EC P-256")
    digest = certificate.signature_hash_algorithm
    if isinstance(digest, hashes.MD5 | hashes.SHA1):
        found.append(f"it is signed with {digest.name.upper()}, which TLS refuses; sign with SHA-256")
    return [Finding(Problem.WEAK, words) for words in found]


def _shape(leaf: x509.Certificate) -> list[Finding]:
    findings = []
    if _is_ca(leaf):
        words = "it is an authority's certificate, not one for a server or client; are cert and ca swapped?"
        findings.append(Finding(Problem.IS_A_ROOT, words))
    elif alternative_names(leaf) is None:
        words = "it has no subject alternative name; names are read from there only, never from the CN"
        findings.append(Finding(Problem.NO_SAN, words))
    missing = [
        name
        for name, kind in (
            # No subjectKeyIdentifier: leaves do without, cert-manager's for example.
            ("authorityKeyIdentifier", x509.AuthorityKeyIdentifier),
            ("keyUsage", x509.KeyUsage),
        )
        if not _has(leaf, kind)
    ]
    if missing:
        words = f"it lacks {', '.join(missing)}; strict RFC 5280 verification refuses it"
        findings.append(Finding(Problem.NOT_STRICT, words))
    return findings


def _has(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> bool:
    try:
        certificate.extensions.get_extension_for_class(kind)
    except (x509.ExtensionNotFound, *UNREADABLE):
        return False
    return True


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, *UNREADABLE):
        return False


def _trust(chain: Sequence[x509.Certificate], ca: Path, now: datetime) -> list[Finding]:
    try:
        roots = _load_chain(ca)
    except ConfigError as exc:
        return [Finding(Problem.UNREADABLE, f"ca: {exc.message}")]
    if not any(_is_ca(root) for root in roots):
        return [Finding(Problem.NOT_A_ROOT, f"{ca} holds no authority's certificate")]
    current, rest = chain[0], list(chain[1:])
    while True:
        root = next((root for root in roots if _is_ca(root) and _issued(current, root)), None)
        if root is not None:
            break
        step = next((other for other in rest if _is_ca(other) and _issued(current, other)), None)
        if step is None:
            return [Finding(Problem.WRONG_ROOT, _wrong_root(current, roots, ca))]
        rest.remove(step)
        current = step
    if not root.not_valid_before_utc <= now <= root.not_valid_after_utc:
        words = f"the root in {ca} is valid only from {_day(root.not_valid_before_utc)}"
        return [Finding(Problem.ROOT_EXPIRED, f"{words} to {_day(root.not_valid_after_utc)}")]
    return []


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _wrong_root(certificate: x509.Certificate, roots: Sequence[x509.Certificate], ca: Path) -> str:
    issuer = _title(certificate.issuer)
    if certificate.issuer == certificate.subject:
        return f"it is signed by itself and not by a root in {ca}"
    if any(root.subject == certificate.issuer for root in roots):
        return (
            f"it was issued by a root named {issuer}, but with another key than the one in {ca}: "
            "the root was made anew since; issue the certificate again"
        )
    return f"it was issued by {issuer}, but {ca} trusts {', '.join(_title(root.subject) for root in roots)}"


def _key(leaf: x509.Certificate, path: Path) -> list[Finding]:
    try:
        data = _read(path)
    except ConfigError as exc:
        return [Finding(Problem.UNREADABLE, f"key: {exc.message}")]
    if b"-----BEGIN CERTIFICATE-----" in data and b"PRIVATE KEY-----" not in data:
        words = f"key: {path} holds a certificate, not a private key; are cert and key swapped?"
        return [Finding(Problem.UNREADABLE, words)]
    try:
        private = serialization.load_pem_private_key(data, password=None)
    except TypeError:
        words = f"key: {path} is encrypted with a password; store it unencrypted with mode 0600"
        return [Finding(Problem.UNREADABLE, words)]
    except (ValueError, UnsupportedAlgorithm):
        return [Finding(Problem.UNREADABLE, f"key: {path} is not a PEM private key, or is damaged")]
    findings = []
    if private.public_key() != leaf.public_key():
        words = f"the key in {path} belongs to another certificate; renew both files together"
        findings.append(Finding(Problem.KEY_MISMATCH, words))
    status = path.stat()
    exposed = status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if status.st_uid != os.geteuid() and status.st_gid == os.getegid():
        # A mounted Secret belongs to root; our group is our only way to it.
        exposed &= ~stat.S_IRGRP
    if exposed:
        mode = stat.S_IMODE(status.st_mode)
        words = f"the key in {path} can be read by others (mode {mode:04o}); set mode 0600"
        findings.append(Finding(Problem.KEY_EXPOSED, words))
    return findings


def _purpose(leaf: x509.Certificate, expected: Expectation) -> list[Finding]:
    findings = []
    usages = _usages(leaf)
    if expected.is_server and usages is not None and ExtendedKeyUsageOID.SERVER_AUTH not in usages:
        words = "its extended key usage lacks serverAuth, so clients refuse it as a server"
        findings.append(Finding(Problem.MISSING_SERVER_AUTH, words))
    if expected.is_client and usages is not None and ExtendedKeyUsageOID.CLIENT_AUTH not in usages:
        words = "its extended key usage lacks clientAuth, so servers refuse it as a client"
        findings.append(Finding(Problem.MISSING_CLIENT_AUTH, words))
    if expected.roles or expected.identity is not None:
        findings += _membership(leaf, expected)
    absent = [host for host in expected.hosts if not _is_valid_for(leaf, host)]
    if absent:
        words = f"it is not valid for {', '.join(absent)}; it names {', '.join(names_of(leaf)) or 'nothing'}"
        findings.append(Finding(Problem.WRONG_HOST, words))
    return findings


def _membership(leaf: x509.Certificate, expected: Expectation) -> list[Finding]:
    try:
        identity = identity_of(leaf)
    except NotAuthorizedError as exc:
        return [Finding(Problem.WRONG_IDENTITY, exc.message.replace("certificate", "it", 1))]
    if expected.roles and identity.role not in expected.roles:
        roles = " or ".join(sorted(role.value for role in expected.roles))
        words = f"it is a certificate for a {identity.role.value} ({identity.uri}), not for a {roles}"
        return [Finding(Problem.WRONG_ROLE, words)]
    if expected.identity is not None and identity != expected.identity:
        words = f"it speaks for {identity.uri}, but {expected.identity.uri} is configured"
        return [Finding(Problem.WRONG_IDENTITY, words)]
    names = alternative_names(leaf)
    pinned = names.get_values_for_type(x509.DNSName) if names is not None else []
    if expected.is_server and identity.dns_name not in pinned:
        words = f"it lacks the DNS name {identity.dns_name}, which clients pin"
        return [Finding(Problem.WRONG_HOST, words)]
    return []


def _usages(leaf: x509.Certificate) -> frozenset[x509.ObjectIdentifier] | None:
    """Extended key usages; None (any) when the extension is absent, as RFC 5280 4.2.1.12 has it."""
    try:
        return frozenset(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (x509.ExtensionNotFound, *UNREADABLE):
        return None


def _is_valid_for(leaf: x509.Certificate, host: str) -> bool:
    names = alternative_names(leaf)
    if names is None:
        return False
    try:
        return ipaddress.ip_address(host) in names.get_values_for_type(x509.IPAddress)
    except ValueError:
        wanted = host.lower()
    wildcard = "*." + wanted.partition(".")[2]
    return any(name.lower() in (wanted, wildcard) for name in names.get_values_for_type(x509.DNSName))


def _summary(leaf: x509.Certificate) -> dict[str, str]:
    usages = _usages(leaf)
    return {
        "subject": leaf.subject.rfc4514_string(),
        "issuer": leaf.issuer.rfc4514_string(),
        "names": ", ".join(names_of(leaf)) or "none",
        "valid": f"{_day(leaf.not_valid_before_utc)} to {_day(leaf.not_valid_after_utc)}",
        "usage": "any" if usages is None else ", ".join(sorted(_usage_name(oid) for oid in usages)),
        "serial": serial_of(leaf),
        "sha256": fingerprint_of(leaf),
    }


def _usage_name(oid: x509.ObjectIdentifier) -> str:
    known = {ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth", ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth"}
    return known.get(oid, oid.dotted_string)


def _title(name: x509.Name) -> str:
    return f"'{name.rfc4514_string()}'"


def _day(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")
