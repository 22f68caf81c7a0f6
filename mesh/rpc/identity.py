"""The identity inside a certificate of the node root.

Owns reading exactly one identity from a certificate, and refusing certificates
that could be read as two. Must not decide what an identity may do; that is
``mesh.rpc.roles``.
"""

from __future__ import annotations

from cryptography import x509

from mesh.core.identity import DNS_SUFFIX, SCHEME, Identity, Role, parse_identity
from mesh.errors import CallerError, ErrorReason, NotAuthorizedError

__all__ = ["Identity", "Role", "identity_of", "parse_identity"]


def identity_of(certificate: x509.Certificate) -> Identity:
    """Reads the one identity that a certificate speaks for.

    Raises:
        NotAuthorizedError: reason CERTIFICATE, when there is no URI of ours, more
            than one, or the DNS name that clients pin belongs to another identity.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError, x509.DuplicateExtension) as exc:
        raise _refusal("certificate has no readable subject alternative name") from exc
    uris = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if _is_ours(uri)]
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


def _is_ours(uri: str) -> bool:
    return uri.lower().startswith(SCHEME)


def _refusal(message: str) -> NotAuthorizedError:
    return NotAuthorizedError(message, reason=ErrorReason.CERTIFICATE)
