"""The scheduler's index of prefixes on a real server, fed by nodes whose messages get lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import keep_announced, watch_nodes
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.errors import Stale, Unavailable
from flowkv_common.fingerprint import block_hashes
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import BlockList, BlocksChanged, ListBlocks
from flowkv_engine.kv.blocks import Blocks
from flowkv_node.reporting import BlockNews
from flowkv_scheduler import prefixes as follow_prefixes_module
from flowkv_scheduler.prefixes import PrefixIndex, following_prefixes, keys_of
from tests.described_nodes import blocks_by_node, descriptor, knows, num_hashes
from tests.nats_server import NatsServer
from tests.waiting import reconnected

BLOCK_SIZE = 16
CHAIN = block_hashes("f", list(range(8 * BLOCK_SIZE)), BLOCK_SIZE)
OTHER = block_hashes("g", list(range(8 * BLOCK_SIZE)), BLOCK_SIZE)


class WatchedIndex(PrefixIndex):
    """An index that one can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.has_changed = asyncio.Event()

    def apply_change(self, event: BlocksChanged) -> bool:
        self.has_changed.set()
        return super().apply_change(event)

    def load_page(self, page: BlockList, number: int) -> bool:
        self.has_changed.set()
        return super().load_page(page, number)

    def drop_node(self, node_id: str) -> None:
        self.has_changed.set()
        super().drop_node(node_id)

    def blocks_of(self, hashes: list[str]) -> dict[str, int]:
        return blocks_by_node(self.hits(keys_of(hashes), 0.0))

    async def until_hits(self, hits: dict[str, int], hashes: list[str] = CHAIN) -> None:
        await self.until(lambda: self.blocks_of(hashes) == hits)

    async def until(self, is_met: Callable[[], bool], timeout_s: float = 8.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not is_met():
                self.has_changed.clear()
                await self.has_changed.wait()


class Node:
    """The side of a node that tells of its blocks; each message is sent, or lost, when the test says so."""

    def __init__(self, bus: Bus, node_id: str = "n0", incarnation: str = "i1") -> None:
        self.bus = bus
        self.ref = NodeRef(node_id=node_id, incarnation=incarnation)
        self.blocks = Blocks(num_blocks=32)
        self.news = BlockNews(self.ref, self.blocks)
        self.num_lists = 0
        self.refusals: list[Exception] = []  # of the next lists asked for

    def compute(self, hashes: list[str]) -> None:
        cached = self.blocks.match_prefix(hashes)
        block_ids = cached + self.blocks.allocate(len(hashes) - len(cached))
        for i, block_hash in enumerate(hashes):
            self.blocks.commit(block_ids[i], block_hash, hashes[i - 1] if i else None)
        self.blocks.release(block_ids)

    def evict_all(self) -> None:
        self.blocks.release(self.blocks.allocate(self.blocks.num_blocks))

    async def tell(self, *, is_lost: bool = False) -> None:
        change = self.news.next_change()
        assert change is not None
        if not is_lost:
            await self.bus.publish(subjects.blocks(self.ref.node_id), change)

    async def list_blocks(self, request: ListBlocks) -> BlockList:
        self.num_lists += 1
        if self.refusals:
            raise self.refusals.pop(0)
        if request.node != self.ref:
            raise Stale("another life")
        return self.news.page(request.page)

    @contextlib.asynccontextmanager
    async def living(self) -> AsyncIterator[None]:
        node_id = self.ref.node_id
        endpoint = Endpoint(subjects.at(subjects.NODE_BLOCKS, node_id), ListBlocks, self.list_blocks)
        known = descriptor(node_id, "prefill", incarnation=self.ref.incarnation)
        async with (
            Service(self.bus, name="node", version="0.1.0", service_id=node_id, endpoints=[endpoint]),
            running(keep_announced(self.bus, lambda: known)),
        ):
            yield


@contextlib.asynccontextmanager
async def following(nats_server: NatsServer) -> AsyncIterator[tuple[Bus, WatchedIndex]]:
    """The connection of the nodes, and the index of a scheduler on a connection of its own."""
    index = WatchedIndex()
    async with connect(nats_server.url, name="nodes") as nodes, connect(nats_server.url, name="s") as bus:
        async with following_prefixes(bus, index) as set_nodes, running(watch_nodes(bus, set_nodes)):
            yield nodes, index


async def test_follows_a_node_and_loads_its_list_only_when_a_message_was_lost(
    nats_server: NatsServer,
) -> None:
    async with following(nats_server) as (bus, index):
        node = Node(bus)
        async with node.living():
            await index.until(lambda: knows(index, node.ref))
            assert node.num_lists == 1
            node.compute(CHAIN[:3])
            await node.tell()
            await index.until_hits({"n0": 3})
            assert node.num_lists == 1
            node.compute(CHAIN[:5])
            await node.tell(is_lost=True)
            node.compute(CHAIN[:6])
            await node.tell()
            await index.until_hits({"n0": 6})
            await index.until(lambda: knows(index, node.ref))
            assert node.num_lists == 2
            node.evict_all()
            await node.tell()
            await index.until_hits({})
            assert node.num_lists == 2


async def test_a_scheduler_that_comes_late_learns_of_nodes_that_have_no_news(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="nodes") as bus:
        node, other = Node(bus), Node(bus, "n1")
        async with node.living(), other.living():
            node.compute(CHAIN[:4])
            other.compute(CHAIN[:2])
            await node.tell()
            await other.tell()
            async with following(nats_server) as (_, index):
                await index.until_hits({"n0": 4, "n1": 2})


async def test_a_node_that_leaves_is_forgotten_and_a_new_life_begins_with_nothing(
    nats_server: NatsServer,
) -> None:
    async with following(nats_server) as (bus, index):
        node = Node(bus)
        async with node.living():
            node.compute(CHAIN)
            await node.tell()
            await index.until_hits({"n0": 8})
        await index.until_hits({})
        assert not knows(index, node.ref)
        again = Node(bus, incarnation="i2")
        async with again.living():
            again.compute(CHAIN[:1])
            await again.tell()
            await index.until_hits({"n0": 1})
            assert knows(index, again.ref)


async def test_an_error_beside_it_leaves_as_itself_and_ends_all_loads(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="s") as bus:

        async def fail() -> None:
            async with asyncio.timeout(5), following_prefixes(bus, PrefixIndex()) as set_nodes:
                set_nodes({"n0": descriptor("n0", "prefill")})  # it never answers
                raise Unavailable("the lease is lost")

        with pytest.raises(Unavailable, match="the lease is lost"):
            await fail()


async def test_asks_again_until_the_node_answers(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_prefixes_module, "FIRST_RETRY_S", 0.01)
    async with following(nats_server) as (bus, index):
        node = Node(bus)
        node.refusals = [Unavailable("not yet"), Unavailable("still not")]
        node.compute(CHAIN[:2])
        assert node.news.next_change() is not None  # nobody has heard it
        async with node.living():
            await index.until_hits({"n0": 2})
            assert node.num_lists == 3


async def test_after_a_reconnect_everything_is_loaded_again(nats_server: NatsServer) -> None:
    async with following(nats_server) as (bus, index):
        node = Node(bus)
        async with node.living():
            node.compute(CHAIN[:2])
            await node.tell()
            await index.until_hits({"n0": 2})
            nats_server.stop()
            node.compute(CHAIN[:7])
            await node.tell(is_lost=True)
            nats_server.start()
            await index.until_hits({"n0": 7})


async def test_a_node_that_was_cut_off_leaves_a_gap_even_if_it_has_no_news(nats_server: NatsServer) -> None:
    """Its last message may have been lost, and only the next one would show that."""
    told: asyncio.Queue[BlocksChanged] = asyncio.Queue()
    async with connect(nats_server.url, name="node") as bus, connect(nats_server.url, name="s") as listener:
        node = Node(bus)
        node.compute(CHAIN[:2])
        subject = subjects.blocks(node.ref.node_id)
        async with (
            await listener.subscribe(subject, BlocksChanged, told.put),
            running(node.news.publish(bus, period_s=0.02)),
            asyncio.timeout(15),
        ):
            assert (await told.get()).seq == 1
            is_back = reconnected(listener)
            nats_server.stop()
            nats_server.start()
            await is_back.wait()
            node.compute(CHAIN[:3])  # should its reconnect have come first, this is heard after the gap
            seqs = [1]
            while seqs[-1] < 3:
                seqs.append((await told.get()).seq)
            assert set(range(1, seqs[-1])) - set(seqs), "no number is missing"


async def test_follows_what_a_cache_really_does(nats_server: NatsServer) -> None:
    """A small pool that evicts all the time, and tells by itself."""
    async with following(nats_server) as (bus, index):
        node = Node(bus)
        async with node.living(), running(node.news.publish(bus, period_s=0.01)):
            for number in range(20):
                mine = block_hashes(f"{number}", list(range(12 * BLOCK_SIZE)), BLOCK_SIZE)
                node.compute(mine)
                node.compute(CHAIN[: number % 8])
                await index.until_hits(node_hits(node, mine), mine)
                await index.until_hits(node_hits(node, CHAIN))
            node.evict_all()
            await index.until(lambda: num_hashes(index) == 0)
            node.blocks.check_integrity()


def node_hits(node: Node, hashes: list[str]) -> dict[str, int]:
    matched = node.blocks.match_prefix(hashes)
    node.blocks.release(matched)
    return {node.ref.node_id: len(matched)} if matched else {}
