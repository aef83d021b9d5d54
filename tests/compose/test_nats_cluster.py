"""Three NATS servers (compose.cluster.yaml), each of which dies under load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.composed import Composed, docker
from tests.compose.test_breaking import AT_ONCE, check_all, load_on, run, wait_nodes
from tests.e2e.observer import observe

pytestmark = pytest.mark.compose

FILES = ("compose.yaml", "compose.cluster.yaml", "tests/compose/override.yaml")
SERVERS = ("nats", "nats-2", "nats-3")


@pytest.fixture(scope="module")
def clustered(images: None) -> Iterator[Composed]:
    with Composed("flowkv-cluster", FILES) as composed:
        composed.up()
        yield composed


async def test_each_server_dies_in_turn(clustered: Composed, model_path: Path) -> None:
    """One after the other, so also the one that leads the buckets: no request fails."""
    for server in SERVERS:
        async with load_on(clustered) as load:
            await run(docker, "kill", clustered.containers(server)[0])
            await load.wait_for_more(3 * AT_ONCE)
            await run(clustered.up)  # waits until it is well again
            await load.wait_for_more(AT_ONCE)
        check_all(model_path, load)
    async with observe(clustered.nats_url) as observer:
        await wait_nodes(observer, 4)
        await observer.wait_idle(timeout_s=30)
