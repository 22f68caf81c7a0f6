"""Who is at the other end of a connection.

Owns turning a connection's certificate into an ``Identity`` and refusing those on
the deny list; what an identity may do stands in ``mesh.rpc.roles``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cryptography import x509

from mesh.core.identity import Identity, Role, parse_identity
from mesh.errors import ErrorReason, NotAuthorizedError
from mesh.ops.certificates import UNREADABLE, fingerprint_of, identity_of, serial_of
from mesh.ops.denylist import DenyList

__all__ = ["Identity", "PeerReader", "Role", "identity_of", "parse_identity"]

_CACHE_LIMIT = 1024


@dataclass(frozen=True, slots=True)
class _Known:
    identity: Identity
    fingerprint: str
    serial: str
    not_after_s: float


class PeerReader:
    """Reads the identity behind a connection; parsed certificates are remembered.

    Args:
        domain: the only domain whose members are admitted.
        deny_list: certificates that are refused, asked at every call.
    """

    def __init__(self, domain: str, deny_list: DenyList) -> None:
        self._domain = domain
        self._deny_list = deny_list
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    def read(self, auth_context: Mapping[str, Iterable[bytes]], now_s: float) -> Identity:
        """The identity behind a connection.

        Args:
            auth_context: what ``ServicerContext.auth_context()`` returns.
            now_s: seconds since the epoch; a certificate that expired while its
                connection stayed open is refused.

        Raises:
            NotAuthorizedError: reason CERTIFICATE.
        """
        pem = next(iter(auth_context.get("x509_pem_cert", ())), None)
        if not pem:
            raise _refusal("connection has no client certificate")
        known = self._known.get(pem)
        if known is None:
            known = self._remember(pem)
        if now_s > known.not_after_s:
            raise _refusal("certificate has expired")
        if self._deny_list.denies(fingerprint=known.fingerprint, serial=known.serial):
            raise _refusal("certificate is on the deny list")
        return known.identity

    def _remember(self, pem: bytes) -> _Known:
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            identity = identity_of(certificate)
        except UNREADABLE as exc:
            raise _refusal("certificate cannot be read") from exc
        if identity.domain != self._domain:
            raise _refusal("certificate belongs to another domain")
        known = _Known(
            identity,
            fingerprint_of(certificate),
            serial_of(certificate),
            certificate.not_valid_after_utc.timestamp(),
        )
        self._known[pem] = known
        if len(self._known) > _CACHE_LIMIT:
            self._known.popitem(last=False)
        return known


def _refusal(message: str) -> NotAuthorizedError:
    return NotAuthorizedError(message, reason=ErrorReason.CERTIFICATE)
