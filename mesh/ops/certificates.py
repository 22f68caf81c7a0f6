"""What a certificate says: its identity, fingerprint and names.

Owns reading exactly one identity from a certificate, and refusing certificates
that could be read as two. Must not decide what an identity may do
(``mesh.rpc.roles``) nor whether a certificate is good (``mesh.ops.diagnosis``).
"""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes

from mesh.core.identity import DNS_SUFFIX, SCHEME, Identity, parse_identity
from mesh.errors import CallerError, ErrorReason, NotAuthorizedError

#: What reading a certificate, or any part of it (they are parsed when asked for), may raise.
UNREADABLE = (
    ValueError,
    TypeError,  # a BitString in a name
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


def identity_of(certificate: x509.Certificate) -> Identity:
    """Reads the one identity that a certificate speaks for.

    Raises:
        NotAuthorizedError: reason CERTIFICATE, when there is no URI of ours, more
            than one, or the DNS name that clients pin belongs to another identity.
    """
    names = alternative_names(certificate)
    if names is None:
        raise _refusal("certificate has no readable subject alternative name")
    uris = [
        uri
        for uri in names.get_values_for_type(x509.UniformResourceIdentifier)
        if uri.lower().startswith(SCHEME)
    ]
    if not uris:
        raise _refusal("certificate has no keymesh:// name, so it is not one of the node plane")
    if len(uris) > 1:
        raise _refusal("certificate names more than one keymesh:// identity")
    try:
        identity = parse_identity(uris[0])
    except CallerError as exc:
        raise _refusal("certificate has a malformed keymesh:// name") from exc
    pinned = {
        name
        for name in names.get_values_for_type(x509.DNSName)
        if name.lower().rstrip(".").endswith(DNS_SUFFIX)
    }
    if pinned - {identity.dns_name}:
        raise _refusal("certificate carries the pinned DNS name of another identity")
    return identity


def alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    """The subject alternative names, or None when absent or unreadable."""
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, *UNREADABLE):
        return None


def names_of(certificate: x509.Certificate) -> list[str]:
    """All names a certificate carries, for people: ``DNS:…``, ``IP:…``, ``URI:…``."""
    names = alternative_names(certificate)
    if names is None:
        return []
    return [
        *(f"DNS:{name}" for name in names.get_values_for_type(x509.DNSName)),
        *(f"IP:{name}" for name in names.get_values_for_type(x509.IPAddress)),
        *(f"URI:{name}" for name in names.get_values_for_type(x509.UniformResourceIdentifier)),
    ]


def fingerprint_of(certificate: x509.Certificate) -> str:
    """SHA-256 over the DER encoding, 64 lower-case hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def serial_of(certificate: x509.Certificate) -> str:
    """The serial number, lower-case hexadecimal without leading zeros."""
    return f"{certificate.serial_number:x}"


def _refusal(message: str) -> NotAuthorizedError:
    return NotAuthorizedError(message, reason=ErrorReason.CERTIFICATE)
