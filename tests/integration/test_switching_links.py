"""A pair of nodes uses the best connector that works now: while a slow one is made, after one has failed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.errors import TransferFailed, Unavailable
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import NodeRef, PoolLayout
from flowkv_common.wire.nodes import LinkOffer, LinkRequest
from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport import make_connectors
from flowkv_engine.transport.base import ConnectorUnavailable, KVConnector, KVLink
from flowkv_engine.transport.sockets import Place
from flowkv_engine.transport.stream import StreamLink
from flowkv_node import links as links_module
from flowkv_node.links import Links, SwitchedLink
from tests.inprocess_connector import InProcessConnector, Switchboard
from tests.nats_server import NatsServer
from tests.waiting import until
from tests.wrapped_links import WrappedConnector

SMALL = PoolLayout(num_layers=2, block_size=4, num_kv_heads=2, head_dim=8, dtype="float32")
NUM_BLOCKS = 24
B = NodeRef(node_id="b", incarnation="1")
NO_BUS: Any = None  # for links that ask no peer


class Gated(WrappedConnector):
    """A connector under another name, whose `connect` first waits for what the test wants."""

    def __init__(self, name: str, connector: KVConnector, before: Callable[[], Awaitable[object]]) -> None:
        super().__init__(connector)
        self.name = name
        self.connect_timeout_s = 60.0
        self.num_tries = 0
        self._before = before

    async def connect(self, address: str, token: str, num_blocks: int) -> KVLink:
        self.num_tries += 1
        await self._before()
        link = await super().connect(address, token, num_blocks)
        link.name = self.name  # type: ignore[misc]
        return link


class Side:
    """What a node has of links."""

    def __init__(self, bus: Bus, ref: NodeRef, pool: KVPool) -> None:
        self.pool = pool
        self.reservations = Reservations(Blocks(NUM_BLOCKS))
        self.links = Links(bus, ref, SMALL, "f", NUM_BLOCKS)


async def nothing() -> None:
    pass


@contextlib.asynccontextmanager
async def two_sides(bus: Bus) -> AsyncIterator[tuple[Side, Side, contextlib.AsyncExitStack]]:
    """Nodes a and b without links; b answers to those who want one."""
    async with contextlib.AsyncExitStack() as stack:
        a, b = (
            Side(
                bus, NodeRef(node_id=node_id, incarnation="1"), stack.enter_context(KVPool(SMALL, NUM_BLOCKS))
            )
            for node_id in "ab"
        )

        async def link(request: LinkRequest) -> LinkOffer:
            return b.links.offer(request)

        endpoint = Endpoint(subjects.at(subjects.NODE_LINK, "b"), LinkRequest, link)
        await stack.enter_async_context(
            Service(bus, name="node", version="1.0.0", service_id="b", endpoints=[endpoint])
        )
        yield a, b, stack


@contextlib.asynccontextmanager
async def keeping(side: Side) -> AsyncIterator[None]:
    """Links of `side` to b."""
    side.links._peers["b"] = B
    running = asyncio.create_task(side.links.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait([running])


async def send(a: Side, b: Side, transfer_id: str) -> None:
    """One block, and a look at whether it has arrived."""
    reserved = b.reservations.reserve(transfer_id, 1, [], [], 60.0)
    link = await a.links.link_to(B)
    await link.send_blocks(transfer_id, reserved.token, [Copy(5, reserved.block_ids[0], 1)])
    assert a.pool.tensor[5].equal(b.pool.tensor[reserved.block_ids[0]])


def hang_up(link: KVLink) -> None:
    """Close the connection under the link: the next send dials anew."""
    assert isinstance(link, SwitchedLink)
    assert isinstance(link._link, StreamLink)
    link._link._hang_up()


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "HEAD_START_S", 0.01)
    monkeypatch.setattr(links_module, "FIRST_PROBE_AGAIN_S", 0.02)
    monkeypatch.setattr(links_module, "FIRST_RETRY_S", 0.02)


async def gated(
    side: Side, stack: contextlib.AsyncExitStack, board: Switchboard, **gates: Callable[[], Awaitable[object]]
) -> list[Gated]:
    """Connectors of these names, the first one preferred."""
    made = []
    for name, before in gates.items():
        connector = InProcessConnector(side.pool, side.reservations, side.links.admits, board)
        made.append(Gated(name, connector, before))
        await side.links.listen(await stack.enter_async_context(made[-1]))
    return made


@pytest.mark.usefixtures("_soon")
async def test_while_a_slow_connector_is_made_the_next_one_serves(
    nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    may_go, board = asyncio.Event(), Switchboard()
    async with connect(nats_server.url, name="test") as bus, two_sides(bus) as (a, b, stack):
        a.pool.tensor.normal_()
        await gated(b, stack, board, slow=nothing, fast=nothing)
        slow, fast = await gated(a, stack, board, slow=may_go.wait, fast=nothing)
        async with keeping(a):
            await until(lambda: a.links.connectors_in_use() == {"b": "fast"})
            await send(a, b, "r1.0")
            link = await a.links.link_to(B)
            may_go.set()
            await until(lambda: a.links.connectors_in_use() == {"b": "slow"})
            await send(a, b, "r2.0")
            assert await a.links.link_to(B) is link  # who holds it needs to know nothing
        assert (slow.num_tries, fast.num_tries) == (1, 1)
        assert "KV goes to b by fast, not by slow: takes long" in caplog.messages
        assert "linked to b by slow" in caplog.messages


@pytest.mark.usefixtures("_soon")
async def test_a_connector_that_failed_is_tried_again_and_used(nats_server: NatsServer) -> None:
    num_failures, board = iter(range(3)), Switchboard()

    async def fail_thrice() -> None:
        if next(num_failures, None) is not None:
            raise ConnectorUnavailable("not today")

    async with connect(nats_server.url, name="test") as bus, two_sides(bus) as (a, b, stack):
        await gated(b, stack, board, best=nothing, next=nothing, last=nothing)
        best, second, last = await gated(a, stack, board, best=fail_thrice, next=nothing, last=nothing)
        async with keeping(a):
            await until(lambda: a.links.connectors_in_use() == {"b": "next"})
            await until(lambda: a.links.connectors_in_use() == {"b": "best"})
        assert (best.num_tries, second.num_tries, last.num_tries) == (4, 1, 0)


@pytest.mark.usefixtures("_soon")
async def test_a_connector_has_as_long_as_it_says_and_no_longer(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(links_module, "OFFER_TIMEOUT_S", 0.3)

    async def take_longer_than_an_offer() -> None:
        await asyncio.sleep(0.5)

    board = Switchboard()
    async with connect(nats_server.url, name="test") as bus, two_sides(bus) as (a, b, stack):
        await gated(b, stack, board, stuck=nothing, slow=nothing)
        stuck, slow = await gated(a, stack, board, stuck=asyncio.Event().wait, slow=take_longer_than_an_offer)
        stuck.connect_timeout_s = 0.05
        async with keeping(a):
            await until(lambda: a.links.connectors_in_use() == {"b": "slow"})
        assert slow.num_tries == 1
        assert "KV goes to b by slow, not by stuck: not within 0.05 s" in caplog.messages


@pytest.mark.usefixtures("_soon")
async def test_a_better_one_ends_the_tries_of_lesser_ones(nats_server: NatsServer) -> None:
    may_go, ended, board = asyncio.Event(), asyncio.Event(), Switchboard()

    async def be_cancelled() -> None:
        may_go.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with connect(nats_server.url, name="test") as bus, two_sides(bus) as (a, b, stack):
        await gated(b, stack, board, best=nothing, last=nothing)
        await gated(a, stack, board, best=may_go.wait, last=be_cancelled)
        async with keeping(a), asyncio.timeout(10):
            await ended.wait()
            assert a.links.connectors_in_use() == {"b": "best"}


@pytest.mark.usefixtures("_soon")
async def test_where_one_fails_another_takes_over_and_later_gives_it_back(
    nats_server: NatsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Real ones: the folder of the Unix sockets goes, as where somebody tidies /tmp, and is put back."""
    place = Place(socket_dir=str(tmp_path))
    async with connect(nats_server.url, name="test") as bus, two_sides(bus) as (a, b, stack):
        a.pool.tensor.normal_()
        for side in (b, a):
            for connector in make_connectors(
                ["shm", "tcp"], side.pool, side.reservations, side.links.admits, place=place
            ):
                await side.links.listen(await stack.enter_async_context(connector))
        async with keeping(a):
            await until(lambda: a.links.connectors_in_use() == {"b": "shm"})
            await send(a, b, "r1.0")
            folder = Path(b.links._addresses["shm"]).parent
            aside = shutil.move(folder, tmp_path / "aside")
            hang_up(await a.links.link_to(B))
            with pytest.raises(TransferFailed, match="No such file"):
                await send(a, b, "r2.0")
            await until(lambda: a.links.connectors_in_use() == {"b": "tcp"})
            await send(a, b, "r3.0")
            shutil.move(aside, folder)
            await until(lambda: a.links.connectors_in_use() == {"b": "shm"})
            await send(a, b, "r4.0")
    assert any(
        message.startswith("KV goes to b by tcp, not by shm: shm to ") and "No such file" in message
        for message in caplog.messages
    )


@pytest.mark.usefixtures("_soon")
async def test_a_link_that_was_lost_is_made_anew_also_while_nobody_sends(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    place = Place(socket_dir=str(tmp_path))
    async with connect(nats_server.url, name="test") as bus, two_sides(bus) as (a, b, stack):
        a.pool.tensor.normal_()
        for side in (b, a):
            for connector in make_connectors(
                ["shm"], side.pool, side.reservations, side.links.admits, place=place
            ):
                await side.links.listen(await stack.enter_async_context(connector))
        async with keeping(a):
            await until(lambda: bool(a.links.connectors_in_use()))
            folder = Path(b.links._addresses["shm"]).parent
            aside = shutil.move(folder, tmp_path / "aside")
            link = await a.links.link_to(B)
            hang_up(link)
            with pytest.raises(TransferFailed, match="No such file"):
                await send(a, b, "r1.0")
            assert link.is_lost
            shutil.move(aside, folder)
            await until(lambda: not link.is_lost)
            await send(a, b, "r2.0")


@pytest.mark.usefixtures("_soon")
async def test_a_link_that_was_lost_is_replaced_while_a_better_one_takes_long(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    place, board = Place(socket_dir=str(tmp_path)), Switchboard()
    async with connect(nats_server.url, name="test") as bus, two_sides(bus) as (a, b, stack):
        a.pool.tensor.normal_()
        await gated(b, stack, board, slow=nothing)
        [slow] = await gated(a, stack, board, slow=asyncio.Event().wait)
        for side in (b, a):
            for connector in make_connectors(
                ["shm", "tcp"], side.pool, side.reservations, side.links.admits, place=place
            ):
                await side.links.listen(await stack.enter_async_context(connector))
        async with keeping(a):
            await until(lambda: a.links.connectors_in_use() == {"b": "shm"})
            shutil.move(Path(b.links._addresses["shm"]).parent, tmp_path / "aside")
            hang_up(await a.links.link_to(B))
            with pytest.raises(TransferFailed, match="No such file"):
                await send(a, b, "r1.0")
            await until(lambda: a.links.connectors_in_use() == {"b": "tcp"})
            await send(a, b, "r2.0")
            assert slow.num_tries == 2
        shutil.move(tmp_path / "aside", Path(b.links._addresses["shm"]).parent)


@pytest.mark.usefixtures("_soon")
async def test_a_peer_with_an_address_that_is_none_costs_only_that_way(
    nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    """What a peer offers comes from its settings, and may be anything."""
    board = Switchboard()
    async with connect(nats_server.url, name="test") as bus, two_sides(bus) as (a, b, stack):
        for side in (b, a):
            [tcp] = make_connectors(["tcp"], side.pool, side.reservations, side.links.admits, place=Place())
            await side.links.listen(await stack.enter_async_context(tcp))
            await gated(side, stack, board, last=nothing)
        b.links._addresses["tcp"] = "decode..internal:9201"
        async with keeping(a):
            await until(lambda: a.links.connectors_in_use() == {"b": "last"})
    [told] = [message for message in caplog.messages if message.startswith("KV goes to b by last")]
    assert "'decode..internal' is no name of a host" in told


@pytest.mark.usefixtures("_soon")
async def test_an_error_that_nobody_foresaw_fails_one_try_and_no_node(
    nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def start_a_thread() -> None:
        raise RuntimeError("can't start new thread")

    board = Switchboard()
    async with connect(nats_server.url, name="test") as bus, two_sides(bus) as (a, b, stack):
        await gated(b, stack, board, best=nothing, last=nothing)
        await gated(a, stack, board, best=start_a_thread, last=nothing)
        async with keeping(a):
            await until(lambda: a.links.connectors_in_use() == {"b": "last"})
    assert "KV goes to b by last, not by best: RuntimeError: can't start new thread" in caplog.messages


async def test_a_life_of_a_peer_that_the_registry_has_not_told_of_yet_is_worth_waiting_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when an older one is known: whoever asks may have heard of it first."""
    monkeypatch.setattr(links_module, "LINK_PATIENCE_S", 0.05)
    links = Links(NO_BUS, NodeRef(node_id="a", incarnation="1"), SMALL, "f", NUM_BLOCKS)
    links._peers["b"] = B
    for peer in (B, NodeRef(node_id="b", incarnation="2"), NodeRef(node_id="c", incarnation="1")):
        began = time.monotonic()
        with pytest.raises(Unavailable, match=f"no link to {peer.node_id} within 0.05 s"):
            await links.link_to(peer)
        assert time.monotonic() - began >= 0.05


async def test_one_life_of_a_peer_has_one_secret_and_the_next_life_another() -> None:
    def asked_by(incarnation: str) -> LinkRequest:
        peer = NodeRef(node_id="a", incarnation=incarnation)
        return LinkRequest(node=B, peer=peer, layout=SMALL, fingerprint="f")

    links = Links(NO_BUS, B, SMALL, "f", NUM_BLOCKS)
    first = links.offer(asked_by("1")).token
    assert links.offer(asked_by("1")).token == first
    assert links.admits(first)
    second = links.offer(asked_by("2")).token
    assert (links.admits(first), links.admits(second)) == (False, True)
