"""Who calls: from a verified client certificate to one SAE ID.

The standard leaves open where a certificate carries the SAE ID, so the mapping is the operator's:
an explicit table first, then the subject names in a configured order. Whatever could be read as two
SAE IDs is refused, and so are certificates of the node plane. Nothing but the certificate that TLS
verified counts: no header, no path, no body. (ETSI GS QKD 014 V1.1.1 clause 5.1; 020 for the ID's
alphabet.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import unquote_to_bytes

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from gateway.settings import read_settings
from mesh.client import ConfigError, NotAuthorizedError
from mesh.ops.certificates import UNREADABLE

NODE_PLANE_SCHEME: Final = "keymesh://"

# RFC 3986: unreserved, gen-delims, sub-delims, and % only before two hex digits.
_SAE_ID: Final = re.compile(r"(?=.{1,64}\Z)(?:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})+")
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9a-fA-F]{2})")


def is_sae_id(text: str) -> bool:
    """True for 1 to 64 characters that RFC 3986 allows in a URI."""
    return _SAE_ID.fullmatch(text) is not None


class NameSource(StrEnum):
    """A place of a certificate where an SAE ID may stand."""

    URI_SAN = "uri-san"
    DNS_SAN = "dns-san"
    CN = "cn"


class TableEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One row of the explicit table: all selectors that are given must match.

    ``fingerprint`` is SHA-256 over the DER form (hex, colons allowed), ``subject`` and ``issuer``
    are RFC 4514 strings, ``serial`` is an integer or a hex string. A serial or subject
    is unique only per issuer: name the issuer if the SAE root has several.
    """

    sae_id: str
    fingerprint: str | None = None
    subject: str | None = None
    serial: int | str | None = None
    issuer: str | None = None


class TableFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A mapping table in a file of its own, read again whenever it changes."""

    version: Annotated[int, msgspec.Meta(ge=1, le=1)]
    entries: list[TableEntry] = []


class MappingSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``sae_mapping`` of the gateway's configuration.

    ``sources`` are tried in order after the table; the first that has a name decides. A URI that
    starts with one of ``uri_prefixes`` stands for the percent-decoded rest, any other for itself;
    None means ``sae://<domain>/``.
    """

    sources: tuple[NameSource, ...] = (NameSource.URI_SAN, NameSource.DNS_SAN, NameSource.CN)
    uri_prefixes: tuple[str, ...] | None = None
    table_file: str | None = None
    table: list[TableEntry] = []


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a mapping may look at; times in seconds since the epoch."""

    fingerprint: bytes
    serial: int
    subject: x509.Name
    issuer: x509.Name
    uris: tuple[str, ...]
    dns_names: tuple[str, ...]
    common_names: tuple[str, ...]
    not_after_s: float


@dataclass(frozen=True, slots=True)
class Caller:
    """An identified SAE, what a deny list knows it by, and when its certificate ends."""

    sae_id: str
    fingerprint: str
    serial: str
    not_after_s: float

    @property
    def caller_id(self) -> str:
        """Under which id it calls."""
        return self.sae_id


def read_certificate(der: bytes) -> CertificateFacts:
    """Take out of a certificate what mappings use.

    Raises:
        NotAuthorizedError: the certificate cannot be read without doubt.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        uris: list[str] = []
        dns_names: list[str] = []
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
            dns_names = names.get_values_for_type(x509.DNSName)
        except x509.ExtensionNotFound:
            pass  # a certificate may have no alternative names: table and CN remain
        common_names = [
            attribute.value if isinstance(attribute.value, str) else ""
            for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        ]
        return CertificateFacts(
            certificate.fingerprint(hashes.SHA256()),
            certificate.serial_number,
            certificate.subject,
            certificate.issuer,
            tuple(uris),
            tuple(dns_names),
            tuple(common_names),
            certificate.not_valid_after_utc.timestamp(),
        )
    except UNREADABLE as error:
        raise NotAuthorizedError("the client certificate cannot be read") from error


class SaeMapper:
    """The mapping in force: immutable, replaced as a whole on reload.

    Args:
        settings: order of sources and inline rows.
        domain_id: fills in the default URI prefix.
        file: rows of the table file, checked together with the inline ones.

    Raises:
        ConfigError: a row without a selector, a malformed value or SAE ID; names the row.
    """

    def __init__(self, settings: MappingSettings, *, domain_id: str, file: TableFile | None = None) -> None:
        self._sources = settings.sources
        prefixes = settings.uri_prefixes
        self._prefixes = (f"sae://{domain_id}/",) if prefixes is None else prefixes
        entries = [*settings.table, *(file.entries if file else ())]
        self._table = tuple(_entry(row, f"table[{index}]") for index, row in enumerate(entries))
        if len(set(self._sources)) != len(self._sources):
            raise ConfigError("sae_mapping.sources names a source twice: keep one")
        if not self._sources and not self._table:
            raise ConfigError("sae_mapping has neither sources nor a table: no SAE could ever call")

    def identify(self, certificate: CertificateFacts) -> Caller:
        """The one SAE that a verified certificate stands for.

        Raises:
            NotAuthorizedError: of the node plane, unmapped, malformed or ambiguous. The
                message is for the log; the caller learns nothing but 401.
        """
        if any(uri.lower().startswith(NODE_PLANE_SCHEME) for uri in certificate.uris):
            raise NotAuthorizedError("the client certificate belongs to the node plane, not to an SAE")
        found = {sae_id for sae_id, matcher in self._table if matcher.matches(certificate)}
        if not found:
            found = self._from_names(certificate)
        if len(found) > 1:
            raise NotAuthorizedError("the client certificate stands for more than one SAE")
        if not found:
            raise NotAuthorizedError("the client certificate has no SAE ID by the configured mapping")
        sae_id = found.pop()
        if not is_sae_id(sae_id):
            raise NotAuthorizedError("the client certificate's SAE ID is not 1 to 64 URI characters")
        return Caller(
            sae_id, certificate.fingerprint.hex(), f"{certificate.serial:x}", certificate.not_after_s
        )

    def _from_names(self, certificate: CertificateFacts) -> set[str]:
        for source in self._sources:
            if source is NameSource.URI_SAN:
                names = {self._sae_of_uri(uri) for uri in certificate.uris}
            elif source is NameSource.DNS_SAN:
                names = {name if "*" not in name else "" for name in certificate.dns_names}
            else:
                names = set(certificate.common_names)
            if names:
                return names
        return set()

    def _sae_of_uri(self, uri: str) -> str:
        for prefix in self._prefixes:
            if uri.startswith(prefix):
                rest = uri[len(prefix) :]
                if _BAD_ESCAPE.search(rest):
                    return ""
                return unquote_to_bytes(rest).decode("utf-8", "replace")
        return uri


def load_mapper(settings: MappingSettings, *, domain_id: str, base: Path) -> SaeMapper:
    """Build the mapping from the settings and the table file, relative to ``base``.

    Raises:
        ConfigError: the file cannot be read or a row is wrong.
    """
    file = None
    if settings.table_file is not None:
        file = read_settings(base / settings.table_file, TableFile)
    return SaeMapper(settings, domain_id=domain_id, file=file)


@dataclass(frozen=True, slots=True)
class _Matcher:
    fingerprint: bytes | None
    subject: x509.Name | None
    serial: int | None
    issuer: x509.Name | None

    def matches(self, certificate: CertificateFacts) -> bool:
        return (
            (self.fingerprint is None or self.fingerprint == certificate.fingerprint)
            and (self.serial is None or self.serial == certificate.serial)
            and (self.subject is None or self.subject == certificate.subject)
            and (self.issuer is None or self.issuer == certificate.issuer)
        )


def _entry(row: TableEntry, where: str) -> tuple[str, _Matcher]:
    if not is_sae_id(row.sae_id):
        raise ConfigError(
            "sae_id must be 1 to 64 URI characters", facts={"at": f"sae_mapping.{where}.sae_id"}
        )
    return row.sae_id, _matcher(row, where)


def _matcher(row: TableEntry, where: str) -> _Matcher:
    where = f"sae_mapping.{where}"
    if row.fingerprint is None and row.subject is None and row.serial is None:
        raise ConfigError("give fingerprint, subject or serial", facts={"at": where})
    return _Matcher(
        None if row.fingerprint is None else _fingerprint(row.fingerprint, where),
        None if row.subject is None else _name(row.subject, f"{where}.subject"),
        None if row.serial is None else _serial(row.serial, where),
        None if row.issuer is None else _name(row.issuer, f"{where}.issuer"),
    )


def _fingerprint(text: str, where: str) -> bytes:
    try:
        value = bytes.fromhex(text.replace(":", "").removeprefix("sha256"))
    except ValueError:
        value = b""
    if len(value) != 32:
        raise ConfigError(
            "fingerprint must be SHA-256 in hex, 64 digits", facts={"at": f"{where}.fingerprint"}
        )
    return value


def _serial(value: int | str, where: str) -> int:
    if isinstance(value, int):
        return value
    try:
        return int(value.replace(":", ""), 16)
    except ValueError as error:
        raise ConfigError(
            "serial must be an integer or a hex string", facts={"at": f"{where}.serial"}
        ) from error


def _name(text: str, where: str) -> x509.Name:
    try:
        return x509.Name.from_rfc4514_string(text)
    except ValueError as error:
        raise ConfigError("not an RFC 4514 name such as CN=enc-a,O=Example", facts={"at": where}) from error


__all__ = [
    "Caller",
    "CertificateFacts",
    "MappingSettings",
    "NameSource",
    "SaeMapper",
    "TableEntry",
    "TableFile",
    "is_sae_id",
    "load_mapper",
    "read_certificate",
]
