"""TLS for REST: contexts for servers and clients, replaced without a restart.

Owns the minimum version, the cipher suites and the renewal of certificates. TLS 1.3
is preferred; TLS 1.2, where admitted, is limited to ECDHE with AEAD. Key exchange
groups are left to OpenSSL, whose default prefers a hybrid one where it has it.
Session tickets are off, so that every TLS 1.3 connection proves its certificate
against the roots of now; Python offers no way to switch off the session cache of
TLS 1.2, so a client refused since may resume there until the session times out:
listeners check their deny list per connection as well.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Gauge

from mesh.errors import ConfigError, ErrorReason, MeshError
from mesh.ops.diagnosis import Expectation, diagnose, require_usable
from mesh.ops.watch import FileWatch

_LOG = logging.getLogger("keymesh.tls")
TLS12_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where roots, certificate and key lie (PEM).

    Attributes:
        ca: roots that the other end's certificate must lead to.
        cert: own certificate, then intermediates.
        key: its private key, unencrypted.
        deny_list: see ``mesh.ops.denylist``; None refuses nobody.
        more_ca: further roots.
    """

    ca: Path
    cert: Path
    key: Path
    deny_list: Path | None = None
    more_ca: tuple[Path, ...] = ()

    @property
    def watched(self) -> list[Path]:
        """What is loaded anew when it changes."""
        return [self.ca, *self.more_ca, self.cert, self.key]


def server_context(
    files: TlsFiles, *, minimum: str = "1.2", expected: Expectation | None = None, what: str = "tls"
) -> ssl.SSLContext:
    """Builds a context that requires client certificates.

    Args:
        files: roots of the clients, and the server's own certificate.
        minimum: ``1.2`` or ``1.3``.
        expected: what the certificate must be fit for; serverAuth by default.
        what: section of the configuration, for messages.

    Raises:
        ConfigError: an unusable file or version, in words.
    """
    require_usable(files.cert, files.key, None, expected or Expectation(is_server=True), what=what)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _prepare(context, files, minimum, what)
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 0
    return context


def client_context(
    files: TlsFiles, *, minimum: str = "1.2", expected: Expectation | None = None, what: str = "tls"
) -> ssl.SSLContext:
    """Builds a context that verifies the server and its host name, and shows a certificate.

    Raises:
        ConfigError: an unusable file or version, in words.
    """
    require_usable(files.cert, files.key, None, expected or Expectation(is_client=True), what=what)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _prepare(context, files, minimum, what)
    return context


def _prepare(context: ssl.SSLContext, files: TlsFiles, minimum: str, what: str) -> None:
    if minimum not in VERSIONS:
        raise ConfigError(f"{what}: the minimum TLS version must be 1.2 or 1.3", facts={"value": minimum})
    context.minimum_version = VERSIONS[minimum]
    context.set_ciphers(TLS12_CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        for ca in (files.ca, *files.more_ca):
            context.load_verify_locations(cafile=str(ca))
        context.load_cert_chain(str(files.cert), str(files.key))
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(
            f"{what}: ca, cert or key cannot be loaded; 'keymesh pki explain' says why",
            reason=ErrorReason.CERTIFICATE,
            facts={"ca": files.ca, "cert": files.cert, "cause": exc.strerror or type(exc).__name__},
        ) from exc


class ServerTls:
    """A server's TLS that follows its files.

    ``context`` goes to the listener once. Every handshake is moved to the newest
    context by its server-name callback (which OpenSSL calls with or without a name),
    so roots that were taken away are gone too. Files that do not fit are refused in
    words, and the last good ones stay in force.

    Args:
        files: roots of the clients, and the server's own certificate.
        minimum: ``1.2`` or ``1.3``.
        expected: what the certificate must be fit for; serverAuth by default.
        what: section of the configuration, for messages.
        expiry: gauge with the certificate's end, seconds since the epoch.
        interval_s: least time between two looks at the files.

    Raises:
        ConfigError: an unusable file or version, in words.
    """

    def __init__(
        self,
        files: TlsFiles,
        *,
        minimum: str = "1.2",
        expected: Expectation | None = None,
        what: str = "tls",
        expiry: Gauge | None = None,
        interval_s: float = 1.0,
    ) -> None:
        self._files = files
        self._minimum = minimum
        self._expected = expected or Expectation(is_server=True)
        self._what = what
        self._expiry = expiry
        self._watch = FileWatch(files.watched, interval_s=interval_s)
        self.context = self._current = self._build()
        self.context.sni_callback = self._on_handshake

    def reload_if_changed(self) -> bool:
        """Loads changed files; returns whether new ones are in force."""
        if not self._watch.changed():
            return False
        try:
            self._current = self._build()
        except MeshError as exc:
            _LOG.error("certificate not renewed, the last one stays in force", extra={"cause": str(exc)})
            return False
        _LOG.info("certificate renewed", extra={"cert": str(self._files.cert)})
        return True

    async def follow(self, interval_s: float = 5.0) -> None:
        """Looks at the files until cancelled, so that the expiry gauge is right without traffic."""
        while True:
            await asyncio.sleep(interval_s)
            self.reload_if_changed()

    def _on_handshake(
        self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext
    ) -> None:
        self.reload_if_changed()
        connection.context = self._current

    def _build(self) -> ssl.SSLContext:
        files = self._files
        context = server_context(files, minimum=self._minimum, expected=self._expected, what=self._what)
        diagnosis = diagnose(files.cert, key=files.key)
        for finding in diagnosis.findings:
            _LOG.warning("certificate doubtful", extra={"cert": str(files.cert), "finding": finding.words})
        if self._expiry is not None and diagnosis.leaf is not None:
            self._expiry.set(diagnosis.leaf.not_valid_after_utc.timestamp())
        return context
