"""The configuration file of a simulated QKD device pair.

Owns the shape of that file and the messages for what is wrong in it. Sizes are
bytes, rates bit/s, as everywhere outside ETSI JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from mesh.errors import ConfigError
from mesh.ops.yamltext import decode_yaml

MAX_KEY_BITS = 65536
"""Largest key the device hands out, in bits."""
MAX_KEYS_PER_REQUEST = 128

Port = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9.\-\[\]:]+:[0-9]{1,5}$")]
Identifier = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._~-]{1,64}$")]


class TlsFiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PEM files: the roots that clients must chain to, and the end's own certificate and key."""

    ca: str
    cert: str
    key: str


class EndConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One end of the pair.

    Attributes:
        kme_id: the device's own KME ID, as it appears in Status.
        sae_id: the only client that this end serves (the node beside it).
        listen: ``host:port`` of the mTLS listener; port 0 picks a free one.
    """

    kme_id: Identifier
    sae_id: Identifier
    listen: Port
    tls: TlsFiles


class Faults(msgspec.Struct, forbid_unknown_fields=True):
    """Faults that are on; the control endpoint changes the same fields.

    Attributes:
        stall: secret key production stops; what is buffered is still served.
        hang: requests get no answer at all while this is on.
        mismatch_keys: the next so many keys differ in one bit at the other end.
        lose_keys: the next so many keys never arrive at the other end.
    """

    stall: bool = False
    hang: bool = False
    mismatch_keys: Annotated[int, msgspec.Meta(ge=0)] = 0
    lose_keys: Annotated[int, msgspec.Meta(ge=0)] = 0


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One simulated device pair, one process.

    Attributes:
        device_id: name for logs and status.
        rate_bps: secret key rate in bit/s (paper: 3.95e6, 2.89e6, 352e3, 741e3).
        qber: quantum bit error rate as a fraction, told in ``status_extension``.
        buffer_bytes: fresh key that the pair holds at most; production stops above it.
        pending_bytes: handed out at one end, not yet fetched at the other; the
            oldest is lost above it.
        initial_bytes: fresh key there at start.
        a, b: the two ends.
        control: loopback ``host:port`` for health, metrics and fault injection.
    """

    device_id: Identifier
    rate_bps: Annotated[float, msgspec.Meta(ge=0)]
    a: EndConfig
    b: EndConfig
    control: Port
    qber: Annotated[float, msgspec.Meta(ge=0, lt=0.5)] = 0.02
    buffer_bytes: Annotated[int, msgspec.Meta(ge=4096)] = 64 << 20
    pending_bytes: Annotated[int, msgspec.Meta(ge=4096)] = 16 << 20
    initial_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    default_key_bits: Annotated[int, msgspec.Meta(ge=8, le=MAX_KEY_BITS, multiple_of=8)] = 256
    faults: Faults = msgspec.field(default_factory=Faults)

    def __post_init__(self) -> None:
        """Refuse what single fields cannot show to be wrong."""
        if self.a.sae_id == self.b.sae_id:
            raise ValueError(f"a.sae_id and b.sae_id are both {self.a.sae_id}: give each end its own client")
        host = self.control.rpartition(":")[0]
        if host not in {"127.0.0.1", "localhost", "[::1]"}:
            raise ValueError(f"control is {self.control}: faults are injected on loopback only")


def load_config(path: Path) -> DeviceConfig:
    """Read a device pair's configuration.

    Raises:
        ConfigError: names the file, the field, the problem and the remedy.
    """
    try:
        return msgspec.convert(decode_yaml(path.read_bytes()), DeviceConfig)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{path} is {error.message}", facts=error.facts) from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error
