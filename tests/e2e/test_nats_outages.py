"""Requests while NATS servers die, freeze, lose each other and restart, and while passwords change.

They print the table of docs/failures.md: `python -m pytest tests/e2e/test_nats_outages.py -m full -s`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest

from flowkv.accounts import write_accounts
from flowkv.local_cluster import Cluster
from flowkv_common.config import NodeSettings
from flowkv_common.wire import subjects
from flowkv_common.wire.nodes import StepFit
from tests.e2e.observer import observe
from tests.e2e.steady_load import SteadyLoad, steady_load
from tests.nats_cluster import NUM_SERVERS, NatsCluster
from tests.nats_server import NatsServer
from tests.paced.cluster import MODEL_NAME, READY_TIMEOUT_S, services, variables, wait_linked
from tests.paced.digest import paced_tokens
from tests.paced.engine import Pace
from tests.paced.nodes import pace_of, paced_layout, paced_nodes

STEP = StepFit(base_s=0.05, prefill_token_s=0.001, attended_token_s=0.0, sequence_s=0.0, context_token_s=0.0)
NUM_TOKENS = 40  # so a stream takes 2 s
RATE_PER_S = 4.0


class System(NamedTuple):
    """Two nodes of each kind, two schedulers and a gateway."""

    cluster: Cluster
    pace: Pace
    http: httpx.AsyncClient

    def load(self) -> contextlib.AbstractAsyncContextManager[SteadyLoad]:
        return steady_load(self.http, RATE_PER_S, NUM_TOKENS)

    def expected(self, prompt_ids: list[int], num_tokens: int) -> list[int]:
        return paced_tokens(prompt_ids, num_tokens, self.pace.words)


@contextlib.asynccontextmanager
async def serving(
    folder: Path, model_path: Path, nats_url: str, for_services: dict[str, str], for_nodes: dict[str, Any]
) -> AsyncIterator[System]:
    """A system that is ready. The settings of NATS are given for its services and for its nodes."""
    pace = pace_of(str(model_path), STEP)
    options = {"num_schedulers": 2, "nats_url": nats_url}
    with services(folder / "run", model_path, variables(max_wait_s=60) | for_services, **options) as cluster:
        settings = NodeSettings(
            model_path=str(model_path),
            model_name=MODEL_NAME,
            kv_cache_bytes=2048 * paced_layout(block_size=16).block_bytes,
            token_budget=64,
            **for_nodes,
        )
        counts = {"prefill": 2, "decode": 2}
        async with (
            paced_nodes(settings, pace, counts),
            httpx.AsyncClient(base_url=cluster.url, timeout=60) as http,
        ):
            await wait_linked(nats_url, sum(counts.values()))
            await asyncio.to_thread(cluster.wait_ready, READY_TIMEOUT_S)
            yield System(cluster, pace, http)


@contextlib.asynccontextmanager
async def on_three_servers(folder: Path, model_path: Path) -> AsyncIterator[tuple[System, NatsCluster]]:
    with NatsCluster() as servers:
        nats = {"nats_url": servers.url, "nats_replicas": NUM_SERVERS}
        async with serving(folder, model_path, servers.url, variables(**nats), nats) as system:
            yield system, servers


# --- what happens to the servers: until all of them are well again ---------------------------------------

OUTAGE_S = 12.0  # longer than the others need to choose new leaders


async def leaders_first(servers: NatsCluster) -> list[int]:
    """All servers, the one first that leads those that keep the scheduler's lease: its loss costs most."""
    leader = await asyncio.to_thread(servers.bucket_leader, subjects.LEADER_BUCKET)
    assert leader is not None
    return [leader, *(number for number in range(NUM_SERVERS) if number != leader)]


async def kill_each(servers: NatsCluster) -> None:
    for number in await leaders_first(servers):
        servers.servers[number].kill()
        await asyncio.sleep(OUTAGE_S)  # the outage itself, as below
        servers.servers[number].start()
        await asyncio.to_thread(servers.wait_healthy)


async def kill_the_meta_leader(servers: NatsCluster) -> None:
    leader = await asyncio.to_thread(servers.meta_leader)
    assert leader is not None
    servers.servers[leader].kill()
    await asyncio.sleep(OUTAGE_S)
    servers.servers[leader].start()
    await asyncio.to_thread(servers.wait_healthy)


async def freeze_each(servers: NatsCluster) -> None:
    for number in await leaders_first(servers):
        with servers.servers[number].frozen():
            await asyncio.sleep(OUTAGE_S)
        await asyncio.to_thread(servers.wait_healthy)


async def cut_each_off(servers: NatsCluster) -> None:
    for number in await leaders_first(servers):
        with servers.cut_off(number):
            await asyncio.sleep(OUTAGE_S)
        await asyncio.to_thread(servers.wait_healthy)


async def restart_all_in_turn(servers: NatsCluster) -> None:
    """As upgrades do it, the next one when the last one is well; three times, so that requests see it."""
    for _ in range(3):
        for number in await leaders_first(servers):
            await asyncio.to_thread(servers.servers[number].restart)
            await asyncio.to_thread(servers.wait_healthy)


@pytest.mark.full
@pytest.mark.parametrize(
    "break_servers", [kill_each, kill_the_meta_leader, freeze_each, cut_each_off, restart_all_in_turn]
)
async def test_no_request_fails_while_one_of_three_servers_does(
    tmp_path: Path, model_path: Path, break_servers: Callable[[NatsCluster], Awaitable[None]]
) -> None:
    async with on_three_servers(tmp_path, model_path) as (system, servers):
        async with observe(servers.url) as observer:
            ends = await observer.events("flowkv.v1.event.request_finished.>")
            async with system.load() as load:
                await break_servers(servers)
        failures = load.failures(system.expected)
        first_s, gap_s = load.longest_s
        num_retried = sum(event["attempts"] > 1 for _, event in ends.events)
        what = break_servers.__name__.replace("_", " ")
        print(
            f"\n| {what} | {load.num_requests} | {len(failures)} | {num_retried} | "
            f"{first_s:.1f} s | {gap_s:.1f} s |"
        )
    assert not failures


@pytest.mark.full
async def test_no_request_fails_while_passwords_change(tmp_path: Path, model_path: Path) -> None:
    keys = tmp_path / "keys"
    write_accounts(keys, "nats:4222")
    with NatsServer("-c", str(keys / "nats" / "nats.conf")) as server:
        address = urlsplit(server.url).netloc
        write_accounts(keys, address)
        server.reload()
        url = (keys / "operator" / "nats_url").read_text().strip()
        for_services = variables(nats_url_file=keys / "operator" / "nats_url")
        for_nodes = {"nats_url_file": str(keys / "node" / "nats_url")}
        async with serving(tmp_path, model_path, url, for_services, for_nodes) as system:
            async with system.load() as load:
                for _ in range(3):
                    write_accounts(keys, address, is_rotation=True)
                    await asyncio.to_thread(server.reload)
                    await asyncio.sleep(1.0)  # both are valid
                    write_accounts(keys, address)
                    await asyncio.to_thread(server.reload)
                    await asyncio.sleep(4.0)  # as often as an operator in a hurry would
            failures = load.failures(system.expected)
            first_s, gap_s = load.longest_s
            print(
                f"\n| change passwords three times | {load.num_requests} | {len(failures)} | | "
                f"{first_s:.1f} s | {gap_s:.1f} s |"
            )
    assert not failures
