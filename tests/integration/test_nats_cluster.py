"""Leases, the registry and connections on three NATS servers, of which one is gone, frozen or cut off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, NamedTuple

import msgspec
import pytest

from flowkv.doctor.bus import check_buckets
from flowkv_common import errors
from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.lease import Lease
from flowkv_common.bus.registry import keep_announced, open_bucket, read_key, watch_nodes
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.config import NatsSettings
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted
from flowkv_common.wire.nodes import BlockCounts, Check, Checked, NodeDescriptor
from tests.described_nodes import descriptor
from tests.echo import ANSWER, ask, echo
from tests.nats_cluster import NUM_SERVERS, NatsCluster
from tests.waiting import until

# A server that is gone without a word leaves an election of 4 to 9 s behind.
ELECTED_S = 15.0


@pytest.fixture
def servers() -> Iterator[NatsCluster]:
    with NatsCluster() as servers:
        yield servers


def settings(servers: NatsCluster) -> NatsSettings:
    return NatsSettings(nats_url=servers.url, nats_replicas=NUM_SERVERS)


def server_of(bus: Bus, servers: NatsCluster) -> int | None:
    url = bus.nc.connected_url
    return None if url is None else servers.number_of(url.geturl())


async def move(bus: Bus, servers: NatsCluster, number: int) -> None:
    """Have it connected to one server."""
    async with asyncio.timeout(10):
        while server_of(bus, servers) != number:
            await bus.change_server("the test wants another")
            await until(lambda: bus.is_connected)


class Terms(NamedTuple):
    """Who led, by epoch; and how often two did at once."""

    leaders: dict[int, str]
    num_doubled: list[int]

    def newest(self) -> int:
        return max(self.leaders, default=0)


@contextlib.asynccontextmanager
async def campaigning(*leases: Lease) -> AsyncIterator[Terms]:
    terms = Terms({}, [])

    def lead(lease: Lease) -> Callable[[], Coroutine[Any, Any, None]]:
        async def leading() -> None:
            assert lease.epoch not in terms.leaders
            terms.leaders[lease.epoch] = lease.holder_id
            await asyncio.Event().wait()

        return leading

    async def look() -> None:
        while True:
            if (num_held := sum(lease.is_held for lease in leases)) > 1:
                terms.num_doubled.append(num_held)
            await asyncio.sleep(0.002)

    async with running(look(), *(lease.campaign(lead(lease)) for lease in leases)):
        yield terms


@contextlib.asynccontextmanager
async def node(bus: Bus, node_id: str) -> AsyncIterator[None]:
    """As a node that lives: it is announced, and answers when it is asked."""
    mine = descriptor(node_id, "prefill")

    async def check(_: Check) -> Checked:
        counts = BlockCounts(total=1, free=1, cached=0, leased=0, quarantined=0, longest_free_run=1)
        return Checked(node=mine.node, blocks=counts, num_requests=0, num_reservations=0)

    endpoints = [Endpoint(subjects.at(subjects.NODE_CHECK, node_id), Check, check)]
    async with (
        Service(bus, name="node", version="1.0.0", service_id=node_id, endpoints=endpoints),
        running(keep_announced(bus, lambda: mine)),
    ):
        yield


class Party(NamedTuple):
    """Two schedulers, two nodes and one who watches the nodes, each with a connection of its own."""

    leases: list[Lease]
    terms: Terms
    buses: dict[str, Bus]
    told: list[set[str]]

    def bus_of_holder(self) -> Bus:
        return self.buses[next(lease.holder_id for lease in self.leases if lease.is_held)]

    async def until_led(self, after: int) -> None:
        await until(lambda: self.terms.newest() > after and any(x.is_held for x in self.leases), ELECTED_S)


@contextlib.asynccontextmanager
async def party(servers: NatsCluster) -> AsyncIterator[Party]:
    told: list[set[str]] = []

    def on_nodes(nodes: dict[str, NodeDescriptor]) -> None:
        told.append(set(nodes))

    async with contextlib.AsyncExitStack() as opened:
        buses = {
            name: await opened.enter_async_context(connect(settings(servers), name=name))
            for name in ("a", "b", "p", "d", "watcher")
        }
        for node_id in ("p", "d"):
            await opened.enter_async_context(node(buses[node_id], node_id))
        for name in ("a", "b", "p", "d"):
            await opened.enter_async_context(running(watch_nodes(buses[name], lambda _: None, own_id=name)))
        await opened.enter_async_context(echo(buses["p"]))
        await opened.enter_async_context(running(watch_nodes(buses["watcher"], on_nodes)))
        leases = [Lease(buses[name], name) for name in ("a", "b")]
        terms = await opened.enter_async_context(campaigning(*leases))
        all_there = Party(leases, terms, buses, told)
        await until(lambda: told and told[-1] == {"p", "d"}, ELECTED_S)
        await all_there.until_led(0)
        for bucket in (subjects.LEADER_BUCKET, subjects.NODES_BUCKET):
            await asyncio.to_thread(servers.wait_kept_by_all, bucket)
        told.clear()
        yield all_there
        assert not terms.num_doubled
        assert all(nodes == {"p", "d"} for nodes in told), told


async def ask_until_answered(bus: Bus) -> Accepted:
    """Again and again, as a gateway does."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await ask(bus, timeout_s=0.5)
            except errors.FlowKVError:
                await asyncio.sleep(0.05)


async def findings(bus: Bus) -> list[tuple[str, str]]:
    """What the doctor says of the buckets."""
    return [(one.level, one.said) for one in await check_buckets(bus)]


async def until_found(bus: Bus, *expected: tuple[str, str]) -> None:
    """A server that has a copy is told to be up to date a moment later."""
    async with asyncio.timeout(ELECTED_S):
        while await findings(bus) != list(expected):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def leader_of(servers: NatsCluster, bucket: str) -> int:
    leader = await asyncio.to_thread(servers.bucket_leader, bucket)
    assert leader is not None
    return leader


async def test_a_server_that_keeps_a_copy_dies_and_nobody_minds(servers: NatsCluster) -> None:
    async with party(servers) as all_there:
        leads = await leader_of(servers, subjects.LEADER_BUCKET)
        victim = next(number for number in range(NUM_SERVERS) if number != leads)
        await move(all_there.buses["p"], servers, victim)
        await move(all_there.bus_of_holder(), servers, victim)
        await all_there.until_led(0)
        before = all_there.terms.newest()
        servers.servers[victim].kill()
        assert await ask_until_answered(all_there.buses["watcher"]) == ANSWER
        await until(lambda: any(lease.is_held for lease in all_there.leases), ELECTED_S)
        assert all_there.terms.newest() <= before + 1


async def test_a_bucket_of_one_server_is_given_to_three(servers: NatsCluster) -> None:
    """And the doctor says how many keep it."""
    name = subjects.LEADER_BUCKET
    alone = msgspec.structs.replace(settings(servers), nats_replicas=1)
    async with connect(alone, name="before") as before, connect(settings(servers), name="after") as after:
        assert await findings(after) == []
        bucket = await open_bucket(before, name)
        async with asyncio.timeout(10):
            await bucket.put("kept", b"as it was")
            said = f"{name} is kept by one of several servers, and dies with it"
            assert await findings(after) == [("look", said)]
            bucket = await open_bucket(after, name)
        await asyncio.to_thread(servers.wait_kept_by_all, name)
        assert (await read_key(bucket, "kept")).value == b"as it was"
        await until_found(after, ("good", f"{name} is kept by 3 servers"))


@pytest.mark.full
async def test_the_server_that_leads_the_buckets_dies(servers: NatsCluster) -> None:
    async with party(servers) as all_there:
        before = all_there.terms.newest()
        victim = await leader_of(servers, subjects.LEADER_BUCKET)
        servers.servers[victim].kill()
        await until(lambda: not any(lease.is_held for lease in all_there.leases), ELECTED_S)
        await all_there.until_led(before)
        await until(lambda: all_there.buses["watcher"].is_connected)
        await asyncio.sleep(8.0)  # longer than records live: nobody could renew them meanwhile
        said = f"n{victim} of the servers that keep it is away, or not up to date"
        expected = (("look", f"{name}: {said}") for name in (subjects.NODES_BUCKET, subjects.LEADER_BUCKET))
        await until_found(all_there.buses["watcher"], *expected)


@pytest.mark.full
async def test_a_frozen_server_is_left_for_another(servers: NatsCluster) -> None:
    async with party(servers) as all_there:
        victim = await leader_of(servers, subjects.LEADER_BUCKET)
        await move(all_there.buses["watcher"], servers, victim)
        await move(all_there.bus_of_holder(), servers, victim)
        await all_there.until_led(0)
        before = all_there.terms.newest()
        with servers.servers[victim].frozen():
            await until(lambda: server_of(all_there.buses["watcher"], servers) not in (victim, None), 6.0)
            await all_there.until_led(before)
        await asyncio.to_thread(servers.wait_healthy)


@pytest.mark.full
@pytest.mark.parametrize("is_leader", [True, False])
async def test_a_server_that_is_cut_off_is_left_and_two_never_lead(
    servers: NatsCluster, is_leader: bool
) -> None:
    """Who leads the schedulers is connected to the server that is cut off, which leads the bucket or not."""
    async with party(servers) as all_there:
        leads = await leader_of(servers, subjects.LEADER_BUCKET)
        victim = leads if is_leader else next(n for n in range(NUM_SERVERS) if n != leads)
        for bus in (all_there.bus_of_holder(), all_there.buses["watcher"]):
            await move(bus, servers, victim)
        await all_there.until_led(0)
        before = all_there.terms.newest()
        for name in ("p", "d"):
            if server_of(all_there.buses[name], servers) == victim:
                await move(all_there.buses[name], servers, (victim + 1) % NUM_SERVERS)
        with servers.cut_off(victim):
            await until(lambda: server_of(all_there.buses["watcher"], servers) not in (victim, None), 8.0)
            assert await ask_until_answered(all_there.buses["watcher"]) == ANSWER
            await all_there.until_led(before)
        await asyncio.to_thread(servers.wait_healthy)
        await asyncio.sleep(3.0)  # what the lost server believed would show now


@pytest.mark.full
async def test_no_epoch_is_forgotten_when_all_servers_restart_in_turn(servers: NatsCluster) -> None:
    async with party(servers) as all_there:
        for server in servers.servers:
            before = all_there.terms.newest()
            await asyncio.to_thread(server.restart)
            await asyncio.to_thread(servers.wait_healthy)
            await until(lambda: any(lease.is_held for lease in all_there.leases), ELECTED_S)
            assert all_there.terms.newest() >= before
