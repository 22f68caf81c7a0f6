"""gRPC's TLS credentials from files.

grpcio cannot refuse TLS 1.2. Our own ends negotiate 1.3; what is left of 1.2 is
limited to ECDHE with AEAD by ``GRPC_SSL_CIPHER_SUITES``, which grpcio reads when it
is first imported and ``mesh/__init__.py`` therefore sets. No ITS claim rests on
this layer.
"""

from __future__ import annotations

import grpc

from mesh.core.identity import Identity, Role
from mesh.errors import ConfigError
from mesh.ops.diagnosis import Expectation, require_usable
from mesh.ops.tls import TlsFiles

MAX_MESSAGE_BYTES = 4 * 1024 * 1024


def server_configuration(files: TlsFiles, identity: Identity) -> grpc.ServerCertificateConfiguration:
    """Reads a server's certificate and the roots of its clients.

    Raises:
        ConfigError: an unusable file, or a certificate of somebody else, in words.
    """
    ca, cert, key = _read(files, Expectation(is_server=True, is_client=True, identity=identity))
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)


def channel_credentials(files: TlsFiles, roles: frozenset[Role]) -> grpc.ChannelCredentials:
    """Reads a client's certificate and the roots of the servers it dials.

    Args:
        files: roots, certificate and key.
        roles: what the client's own certificate may be for.

    Raises:
        ConfigError: an unusable file, or a certificate of another role, in words.
    """
    ca, cert, key = _read(files, Expectation(is_client=True, roles=roles))
    return grpc.ssl_channel_credentials(ca, key, cert)


def _read(files: TlsFiles, expected: Expectation) -> tuple[bytes, bytes, bytes]:
    require_usable(files.cert, files.key, files.ca, expected, what="tls")
    try:
        return files.ca.read_bytes(), files.cert.read_bytes(), files.key.read_bytes()
    except OSError as exc:
        raise ConfigError("tls: files changed while being read", facts={"cause": exc.strerror}) from exc
