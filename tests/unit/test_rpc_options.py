"""gRPC ignores options that it does not know: a misspelt one would silently do nothing."""

from __future__ import annotations

from pathlib import Path

import grpc

from mesh.rpc import channels, server


def test_the_library_knows_every_option() -> None:
    (path,) = (Path(grpc.__file__).parent / "_cython").glob("cygrpc.*.so")
    library = path.read_bytes()
    unknown = [name for name, _ in (*channels.OPTIONS, *server.OPTIONS) if name.encode() not in library]
    assert unknown == []
