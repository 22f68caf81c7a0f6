"""Draw a key for one SAE and fetch it for another, straight from the nodes.

    python examples/mesh_client.py LAB_DIR

LAB_DIR is what ``keymesh lab up --dir LAB_DIR`` made. Gateways use the same client;
an application would speak ETSI GS QKD 014 to its gateway instead.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from mesh.client import MeshClient, MeshError
from mesh.ops.tls import TlsFiles


async def main(lab_dir: Path) -> int:
    """Draws at the first SAE's node, redeems at another's, and compares."""
    lab = json.loads((lab_dir / "lab.json").read_text())
    master = lab["saes"][0]
    slave = next(sae for sae in lab["saes"] if sae["node"] != master["node"])
    async with client_for(lab, master) as at_master, client_for(lab, slave) as at_slave:
        try:
            status = await at_master.get_status(master["id"], slave["id"])
            print(f"{status.source_kme_id} -> {status.target_kme_id}: {status.stored_key_count} keys ready")
            drawn = await at_master.get_keys(master["id"], slave["id"], number=2, size_bytes=32)
            redeemed = await at_slave.get_keys_by_id(
                slave["id"], master["id"], [key.key_id for key in drawn.keys]
            )
        except MeshError as error:
            print(f"failed: {error} [{error.reason}]")
            return 1
    same = [a.value == b.value for a, b in zip(drawn.keys, redeemed.keys, strict=True)]
    print(f"{drawn.grade}: {drawn.keys}, equal at both ends: {all(same)}")
    return 0 if all(same) else 1


def client_for(lab: dict[str, Any], sae: dict[str, Any]) -> MeshClient:
    """A client of the SAE's node, with its gateway's own certificate of the node plane."""
    node = next(node for node in lab["nodes"] if node["id"] == sae["node"])
    gateway = next(gateway for gateway in lab["gateways"] if gateway["id"] == sae["gateway"])
    pki = Path(node["cert"]).parent
    return MeshClient.connect(
        node["grpc"],
        domain_id=node["domain"],
        kme_id=node["id"],
        tls=TlsFiles(
            ca=Path(lab["ca"]["node"]),
            cert=pki / f"{gateway['id']}-node.pem",
            key=pki / f"{gateway['id']}-node.key",
        ),
    )


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Path(sys.argv[1]))))
