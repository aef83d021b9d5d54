"""The registry of nodes on a real server: who comes, who leaves, who dies, and a server that forgets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial

import msgspec
import pytest

from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.lease import Lease
from flowkv_common.bus.registry import NodeIdTaken, claim_node_id, keep_announced, watch_nodes
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import BlockCounts, Check, Checked, NodeDescriptor
from flowkv_common.wire.subjects import NODE_CHECK, at
from tests import described_nodes
from tests.nats_server import NatsServer
from tests.waiting import reconnected

TTL_S = 1.2  # the server's shortest marker lives 1 s


def descriptor(node_id: str, cap: int = 512, incarnation: str = "i1") -> NodeDescriptor:
    known = described_nodes.descriptor(node_id, "prefill", incarnation=incarnation)
    return msgspec.structs.replace(known, max_prefill_tokens_per_step=cap)


class Nodes:
    """What a watch has told, as something to wait for."""

    def __init__(self) -> None:
        self.history: list[dict[str, NodeDescriptor]] = []
        self._changed = asyncio.Event()

    def take(self, nodes: dict[str, NodeDescriptor]) -> None:
        self.history.append(nodes)
        self._changed.set()

    async def until(self, *ids: str, timeout_s: float = 8.0) -> None:
        await self.until_true(lambda nodes: set(nodes) == set(ids), timeout_s)

    async def until_true(
        self, is_met: Callable[[dict[str, NodeDescriptor]], bool], timeout_s: float = 8.0
    ) -> None:
        async with asyncio.timeout(timeout_s):
            while not (self.history and is_met(self.history[-1])):
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def running(*loops: asyncio.Task[None]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)


def announce(bus: Bus, node_id: str, ttl_s: float = TTL_S) -> asyncio.Task[None]:
    return asyncio.create_task(keep_announced(bus, lambda: descriptor(node_id), ttl_s))


def watch(bus: Bus, nodes: Nodes, ttl_s: float = TTL_S) -> asyncio.Task[None]:
    return asyncio.create_task(watch_nodes(bus, nodes.take, ttl_s))


async def test_watch_tells_an_empty_registry_then_who_comes_and_leaves(nats_server: NatsServer) -> None:
    nodes = Nodes()
    async with (
        connect(nats_server.url, name="watcher") as bus,
        connect(nats_server.url, name="n") as node_bus,
    ):
        async with running(watch(bus, nodes)):
            await nodes.until()
            async with running(announce(node_bus, "p0")):
                await nodes.until("p0")
                async with running(announce(node_bus, "d0")):
                    await nodes.until("d0", "p0")
                await nodes.until("p0", timeout_s=TTL_S / 2)  # a clean exit does not wait for the expiry
    assert nodes.history[1]["p0"] == descriptor("p0")


async def test_watch_that_comes_late_gets_all_at_once(nats_server: NatsServer) -> None:
    early, late = Nodes(), Nodes()
    async with connect(nats_server.url, name="test") as bus:
        async with running(watch(bus, early), announce(bus, "p0"), announce(bus, "d0")):
            await early.until("d0", "p0")
            async with running(watch(bus, late)):
                await late.until("d0", "p0")
    assert set(late.history[0]) == {"d0", "p0"}


async def test_node_that_lives_longer_than_the_ttl_stays(nats_server: NatsServer) -> None:
    nodes = Nodes()
    async with connect(nats_server.url, name="test") as bus:
        async with running(watch(bus, nodes), announce(bus, "p0")):
            await nodes.until("p0")
            with contextlib.suppress(TimeoutError):
                await nodes.until(timeout_s=2 * TTL_S)
    assert set(nodes.history[-1]) == {"p0"}


async def test_jetstream_that_is_off_is_said_once_in_words(caplog: pytest.LogCaptureFixture) -> None:
    async def lead() -> None:
        raise AssertionError("nobody can lead")

    with NatsServer(jetstream=False) as server:
        async with connect(server.url, name="test") as bus:
            tasks = [
                asyncio.create_task(keep_announced(bus, lambda: descriptor("p"))),
                asyncio.create_task(watch_nodes(bus, lambda _: None)),
                asyncio.create_task(Lease(bus, "a").campaign(lead)),
            ]
            await asyncio.sleep(0.5)  # several tries
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    off = "JetStream is off at this NATS server, and FlowKV needs it: start it as `nats-server -js`"
    assert sorted(caplog.messages) == [
        f"can't look who leads: {off}",
        f"the node is not announced: {off}",
        f"the watch on nodes ended: {off}",
    ]


async def test_dead_node_expires_while_others_live(nats_server: NatsServer) -> None:
    nodes = Nodes()
    async with connect(nats_server.url, name="watcher") as bus, contextlib.AsyncExitStack() as node:
        node_bus = await node.enter_async_context(connect(nats_server.url, name="node"))
        async with running(watch(bus, nodes), announce(bus, "d0")):
            async with running(announce(node_bus, "p0")):
                await nodes.until("d0", "p0")
                await node.aclose()  # its connection goes first, as in a crash: nothing is deleted
            await nodes.until("d0")


async def test_nodes_that_stop_renewing_all_at_once_get_time(nats_server: NatsServer) -> None:
    """It may be the servers that keep the bucket: while they choose a leader nobody can renew."""
    nodes, clock = Nodes(), asyncio.get_running_loop().time
    async with connect(nats_server.url, name="watcher") as bus, contextlib.AsyncExitStack() as dying:
        buses = [await dying.enter_async_context(connect(nats_server.url, name=name)) for name in "pd"]
        async with running(watch(bus, nodes)):
            async with running(announce(buses[0], "p0"), announce(buses[1], "d0")):
                await nodes.until("d0", "p0")
                await dying.aclose()
            died_at = clock()
            await nodes.until(timeout_s=6 * TTL_S)
            assert clock() - died_at > 1.5 * TTL_S
            assert len(nodes.history[-2]) == 2  # both at once


async def test_new_descriptor_is_told(nats_server: NatsServer) -> None:
    nodes = Nodes()
    cap = 512
    async with connect(nats_server.url, name="test") as bus:
        lent = asyncio.create_task(keep_announced(bus, lambda: descriptor("p0", cap), TTL_S))
        async with running(watch(bus, nodes), lent):
            await nodes.until("p0")
            cap = 16
            await nodes.until_true(lambda told: told["p0"].max_prefill_tokens_per_step == 16)


async def test_bucket_lost_by_the_server_is_made_anew_without_a_verdict(nats_server: NatsServer) -> None:
    nodes = Nodes()
    async with (
        connect(nats_server.url, name="watcher") as bus,
        connect(nats_server.url, name="n") as node_bus,
    ):
        async with running(watch(bus, nodes), announce(node_bus, "p0")):
            await nodes.until("p0")
            num_told = len(nodes.history)
            nats_server.kill()
            nats_server.start()  # the bucket was in memory
            async with running(announce(node_bus, "d0")):
                await nodes.until("d0", "p0")
                assert all("p0" in told for told in nodes.history[num_told:])
            await nodes.until("p0")


async def test_reconnect_reopens_the_watch_and_renews_long_before_the_ttl(nats_server: NatsServer) -> None:
    nodes = Nodes()
    async with (
        connect(nats_server.url, name="watcher") as bus,
        connect(nats_server.url, name="n") as node_bus,
    ):
        async with running(watch(bus, nodes, ttl_s=30.0), announce(node_bus, "p0", ttl_s=30.0)):
            await nodes.until("p0")
            nats_server.kill()
            nats_server.start()
            async with running(announce(node_bus, "d0", ttl_s=30.0)):
                await nodes.until("d0", "p0")


async def test_node_that_died_with_the_server_is_dropped_only_after_a_grace(nats_server: NatsServer) -> None:
    nodes = Nodes()
    async with connect(nats_server.url, name="watcher") as bus, contextlib.AsyncExitStack() as node:
        node_bus = await node.enter_async_context(connect(nats_server.url, name="node"))
        async with running(watch(bus, nodes)):
            async with running(announce(node_bus, "p0")):
                await nodes.until("p0")
                await node.aclose()
            back = reconnected(bus)
            nats_server.kill()
            nats_server.start()
            async with asyncio.timeout(5):
                await back.wait()
            async with running(announce(bus, "d0")):
                await nodes.until("d0", "p0")  # the server has forgotten p0, we have not
                await nodes.until("d0")


@contextlib.asynccontextmanager
async def listening(bus: Bus, node_id: str, ref: NodeRef) -> AsyncIterator[None]:
    """As a node that lives: it answers when it is asked to check its books."""

    async def check(_: Check) -> Checked:
        counts = BlockCounts(total=1, free=1, cached=0, leased=0, quarantined=0, longest_free_run=1)
        return Checked(node=ref, blocks=counts, num_requests=0, num_reservations=0)

    endpoints = [Endpoint(at(NODE_CHECK, node_id), Check, check)]
    async with Service(bus, name="node", version="1.0.0", service_id=node_id, endpoints=endpoints):
        yield


async def test_an_id_is_refused_while_its_node_answers(nats_server: NatsServer) -> None:
    nodes = Nodes()
    async with connect(nats_server.url, name="node") as bus, connect(nats_server.url, name="twin") as twin:
        async with running(watch(bus, nodes)), listening(bus, "p0", descriptor("p0").node):
            with pytest.raises(NodeIdTaken, match="'p0' is running already: .* another FLOWKV_NODE_ID"):
                await claim_node_id(twin, "p0", TTL_S)
            async with running(announce(bus, "p0")):
                await nodes.until("p0")
                with pytest.raises(NodeIdTaken, match="'p0' is running already on h, process 1: "):
                    await claim_node_id(twin, "p0", TTL_S)
                await claim_node_id(twin, "p1", TTL_S)
                assert set(nodes.history[-1]) == {"p0"}


async def test_an_id_is_refused_while_its_node_renews_its_record_though_it_is_too_busy_to_answer(
    nats_server: NatsServer,
) -> None:
    nodes, is_over = Nodes(), asyncio.Event()

    async def say_nothing(_: object) -> None:
        await is_over.wait()

    async with connect(nats_server.url, name="node") as bus, connect(nats_server.url, name="twin") as twin:
        async with running(watch(bus, nodes), announce(bus, "p0")):
            await nodes.until("p0")
            async with await bus.subscribe_raw(at(NODE_CHECK, "p0"), say_nothing):
                with pytest.raises(NodeIdTaken):
                    await claim_node_id(twin, "p0", TTL_S)
                is_over.set()


async def test_the_id_of_a_dead_node_is_free_at_once(nats_server: NatsServer) -> None:
    nodes = Nodes()
    ttl_s = 60.0  # nothing expires meanwhile
    async with connect(nats_server.url, name="test") as bus, contextlib.AsyncExitStack() as node:
        node_bus = await node.enter_async_context(connect(nats_server.url, name="node"))
        async with running(watch(bus, nodes)):
            async with running(announce(node_bus, "p0", ttl_s)):
                await nodes.until("p0")
                await node.aclose()  # as in a crash: the record stays
            async with asyncio.timeout(5):
                await claim_node_id(bus, "p0", ttl_s)
            await nodes.until()  # and everyone learns that it is gone
            next_life = keep_announced(bus, lambda: descriptor("p0", incarnation="i2"), ttl_s)
            async with running(asyncio.create_task(next_life)):
                await nodes.until("p0")
                assert nodes.history[-1]["p0"].node.incarnation == "i2"


async def test_of_two_that_come_at_the_same_instant_one_leaves_at_once(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="a") as bus, connect(nats_server.url, name="b") as twin:
        await asyncio.gather(*(claim_node_id(one, "p0", TTL_S) for one in (bus, twin)))
        both = [
            asyncio.create_task(keep_announced(one, partial(descriptor, "p0", incarnation=i), TTL_S))
            for one, i in ((bus, "i1"), (twin, "i2"))
        ]
        async with running(*both):
            done, alive = await asyncio.wait(both, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            assert (len(done), len(alive)) == (1, 1)
            with pytest.raises(NodeIdTaken):
                done.pop().result()


async def test_a_life_that_was_replaced_leaves_and_its_successors_record_stays(
    nats_server: NatsServer,
) -> None:
    nodes = Nodes()
    async with connect(nats_server.url, name="test") as bus:
        async with running(watch(bus, nodes)):
            old = announce(bus, "p0")
            await nodes.until("p0")
            await claim_node_id(bus, "p0", TTL_S)  # nobody listens, as when it is cut off
            next_life = keep_announced(bus, lambda: descriptor("p0", incarnation="i2"), TTL_S)
            async with running(asyncio.create_task(next_life)):
                await nodes.until_true(lambda told: "p0" in told and told["p0"].node.incarnation == "i2")
                async with asyncio.timeout(5):
                    with pytest.raises(NodeIdTaken):
                        await old
                with contextlib.suppress(TimeoutError):
                    await nodes.until(timeout_s=TTL_S / 4)
                assert nodes.history[-1]["p0"].node.incarnation == "i2"
