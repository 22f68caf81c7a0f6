"""The container engine; without one these tests are skipped, and the reason says why.

The library's own janitor, a container that it would pull from a registry, stays off: what a test
makes carries a label, and is removed by it, also what an earlier run left behind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import docker
import pytest
from testcontainers.core.config import testcontainers_config

from tests.containers.mesh import remove_all

IMAGE = f"{os.environ.get('IMAGE', 'keymesh')}:latest"


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """A client of the engine, and nothing of ours in it before and after."""
    testcontainers_config.ryuk_disabled = True
    try:
        client = docker.from_env(timeout=60)
        client.ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"no container engine answers: {str(error)[:200]}")
    remove_all(client)
    yield client
    remove_all(client)
    client.close()


@pytest.fixture(scope="session")
def image(engine: docker.DockerClient) -> str:
    """The image that ``make image`` built."""
    try:
        engine.images.get(IMAGE)
    except docker.errors.ImageNotFound:
        pytest.fail(f"the engine has no image {IMAGE}: run make image", pytrace=False)
    return IMAGE
