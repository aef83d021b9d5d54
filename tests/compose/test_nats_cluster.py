"""Three NATS servers (compose.cluster.yaml): each dies under load, and all take new passwords under load."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import nats.errors
import pytest

from tests.compose.composed import Composed, docker
from tests.compose.test_breaking import AT_ONCE, check_all, load_on, run, wait_nodes
from tests.e2e.observer import observe
from tests.nats_server import log_in

pytestmark = pytest.mark.compose

FILES = ("compose.yaml", "compose.cluster.yaml", "tests/compose/override.yaml")
SERVERS = ("nats", "nats-2", "nats-3")
ADDRESS = ",".join(f"{server}:4222" for server in SERVERS)
RELOADED = "Reloaded server configuration"


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


async def test_new_passwords(clustered: Composed, model_path: Path) -> None:
    """By the steps of docs/operations.md: no request fails, and who has a former password is refused."""
    former = clustered.nats_url
    write = ("run", "--rm", "-T", "keys", "flowkv.accounts", "/keys", "--address", ADDRESS)
    async with load_on(clustered) as load:
        for options in (("--rotate",), ()):
            num_reloads = {server: clustered.logs(server).count(RELOADED) for server in SERVERS}
            await run(clustered.compose, *write, *options)
            await run(clustered.compose, "kill", "--signal", "HUP", *SERVERS)
            async with asyncio.timeout(20):
                for server, before in num_reloads.items():
                    while (await asyncio.to_thread(clustered.logs, server)).count(RELOADED) == before:
                        continue
            await load.wait_for_more(AT_ONCE)
    check_all(model_path, load)
    with pytest.raises(nats.errors.Error, match="Authorization"):
        await log_in(former)
