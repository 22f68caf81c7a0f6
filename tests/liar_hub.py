"""A hub that lies: it flips one bit of every share that it sends on. For labs and tests only.

Run in place of an honest one: ``keymesh lab run --scenario hub-liar --stand-in tests/liar_hub.py``.
Frames, tags and certificates are all in order; only the pair's own tag can tell.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mesh.core.transfer import TransferHeader
from mesh.hub import hub
from mesh.v1.link_pb2 import ShareItem


class LyingRelay(hub.HubRelay):
    """Forwards shares that are not what it was given."""

    def forward(self, header: TransferHeader, item: ShareItem, value: bytes, next_hop: str) -> None:
        """Flips the last bit of the share."""
        super().forward(header, item, value[:-1] + bytes([value[-1] ^ 1]), next_hop)


def main() -> int:
    """``liar_hub.py --config FILE``: ``keymesh hub run``, but for the lie."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    hub.HubRelay = LyingRelay  # type: ignore[misc]
    return hub.run(parser.parse_args().config)


if __name__ == "__main__":
    raise SystemExit(main())
