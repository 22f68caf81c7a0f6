"""Which kind of file this is, and whether it is valid: ``keymesh config check``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gateway.config import load_config as load_gateway
from mesh.devices.config import load_config as load_device
from mesh.directory.document import is_signed
from mesh.directory.tool import list_saes
from mesh.errors import ConfigError
from mesh.hub.config import load_hub_config
from mesh.lab.networks import load_lab
from mesh.node.config import load_node_config
from mesh.ops.yamltext import decode_yaml

_Check = Callable[[Path], object]


_KINDS: tuple[tuple[str, str, _Check], ...] = (
    ("gateway_id", "gateway configuration", load_gateway),
    ("device_id", "device configuration", load_device),
    ("kme_id", "node configuration", load_node_config),
    ("hub_id", "hub configuration", load_hub_config),
    ("format", "network document (unsigned)", list_saes),
    ("nodes", "lab network", lambda path: load_lab(str(path))),
    ("domains", "lab network", lambda path: load_lab(str(path))),
)
"""A field that only this kind has at its top, its name, and what reads it."""


def check_file(path: Path) -> str:
    """Check a file; return its kind in words.

    Raises:
        ConfigError: it cannot be read, is of no known kind, or a field is wrong.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read it: {error.strerror}") from error
    if is_signed(data):
        list_saes(path)
        return "signed network document (the signature is checked by network show)"
    top = decode_yaml(data)
    if isinstance(top, dict):
        for field, kind, check in _KINDS:
            if field in top:
                check(path)
                return kind
    raise ConfigError(
        "no kind of file that keymesh knows: a node has kme_id, a hub hub_id, a gateway gateway_id, a device "
        "device_id, a network document format, a lab network nodes"
    )
