"""Which configured key manager a certificate belongs to (ETSI GS QKD 020 V1.1.1, transport).

Owns the pins: TLS says that a certificate leads to a root that some peer brought; here it must be issued
directly by an authority of *that* peer and show one of its names or fingerprints, so that no peer's
authority speaks for another. Used for callers and for the servers that we call alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from gateway.config import KeyManager
from mesh.client import ConfigError, NotAuthorizedError
from mesh.ops.certificates import UNREADABLE, alternative_names, fingerprint_of, serial_of

_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class PeerCaller:
    """A configured key manager, and its certificate as a deny list knows it."""

    caller_id: str
    fingerprint: str
    serial: str
    not_after_s: float


@dataclass(frozen=True, slots=True)
class Pin:
    """What a peer's certificate must show."""

    kme_id: str
    names: frozenset[str]
    fingerprints: frozenset[str]
    issuers: tuple[x509.Certificate, ...]

    def fits(self, certificate: x509.Certificate) -> bool:
        """Whether a certificate that TLS verified is this peer's."""
        is_named = bool(self.names & _names(certificate)) or fingerprint_of(certificate) in self.fingerprints
        return is_named and any(_is_issued_by(certificate, issuer) for issuer in self.issuers)


class Pins:
    """All peers' pins, read from their files once; make a new one when they change.

    Args:
        peers: the configured key managers.
        base: directory that relative paths start from.

    Raises:
        ConfigError: names the peer and what is wrong with it.
    """

    def __init__(self, peers: Sequence[KeyManager], *, base: Path) -> None:
        self._pins = {peer.kme_id: _pin(peer, base) for peer in peers}
        if len(self._pins) != len(peers):
            raise ConfigError("etsi020.peers names a kme_id twice")

    def of(self, kme_id: str) -> Pin:
        """The pin of a configured peer."""
        return self._pins[kme_id]

    def identify(self, der: bytes) -> PeerCaller:
        """The one peer that a verified certificate belongs to.

        Raises:
            NotAuthorizedError: of nobody, or of several; the message is for the log.
        """
        certificate = read_der(der)
        found = [pin.kme_id for pin in self._pins.values() if pin.fits(certificate)]
        if len(found) != 1:
            whose = "no" if not found else "more than one"
            raise NotAuthorizedError(f"the certificate belongs to {whose} configured key manager")
        return PeerCaller(
            found[0],
            fingerprint_of(certificate),
            serial_of(certificate),
            certificate.not_valid_after_utc.timestamp(),
        )


def read_der(der: bytes) -> x509.Certificate:
    """Reads a certificate.

    Raises:
        NotAuthorizedError: it cannot be read without doubt.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        alternative_names(certificate)
    except UNREADABLE as error:
        raise NotAuthorizedError("the certificate cannot be read") from error
    return certificate


def _pin(peer: KeyManager, base: Path) -> Pin:
    facts: dict[str, object] = {"peer": peer.kme_id}
    fingerprints = frozenset(text.replace(":", "").lower() for text in peer.fingerprints)
    if not all(_FINGERPRINT.fullmatch(one) for one in fingerprints):
        raise ConfigError("etsi020.peers: a fingerprint must be SHA-256 in hex, 64 digits", facts=facts)
    if not fingerprints and not peer.names:
        raise ConfigError("etsi020.peers: give names or fingerprints, or anybody's would do", facts=facts)
    try:
        issuers = tuple(x509.load_pem_x509_certificates((base / peer.ca).read_bytes()))
    except (OSError, *UNREADABLE) as error:
        raise ConfigError("etsi020.peers: ca cannot be read", facts={**facts, "ca": peer.ca}) from error
    return Pin(peer.kme_id, frozenset(name.lower() for name in peer.names), fingerprints, issuers)


def _names(certificate: x509.Certificate) -> set[str]:
    names = alternative_names(certificate)
    if names is None:
        return set()
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return {name.lower() for name in [*uris, *names.get_values_for_type(x509.DNSName)]}


def _is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *UNREADABLE):
        return False
    return True
