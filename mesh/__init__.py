"""keymesh: the same secret key at two places, with information-theoretic security."""

import os

__version__ = "0.1.0"

# grpcio reads these once, when it is first imported, so they stand in front of every import of
# ours. It cannot refuse TLS 1.2 (see mesh.rpc.credentials): ECDHE with AEAD is what stays of it,
# whatever the environment says. Its core logs every stranger's failed handshake to standard error
# in lines of its own; an operator may switch that on again.
os.environ["GRPC_SSL_CIPHER_SUITES"] = ":".join(
    f"ECDHE-{signature}-{cipher}"
    for cipher in ("AES256-GCM-SHA384", "AES128-GCM-SHA256", "CHACHA20-POLY1305")
    for signature in ("ECDSA", "RSA")
)
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
