"""What only the connectors for GPUs have to keep, tried on host memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flowkv_common.errors import CannotStart, TransferFailed
from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport import make_connectors
from flowkv_engine.transport import nccl as nccl_module
from flowkv_engine.transport.base import ConnectorUnavailable, KVLink
from flowkv_engine.transport.mapped import ShownPool
from flowkv_engine.transport.nccl import NcclConnector, NcclFailed, Span
from tests.contract.gloo_pair import GlooPair
from tests.contract.kv_nodes import LARGE, LINK_TOKEN, SMALL, Node, network
from tests.contract.test_communicator import SlowToAbort
from tests.contract.test_connectors import assert_hangs_up, assert_serves, dial, hello


@pytest.mark.parametrize("content", [None, b"", b"a secret"])
async def test_cuda_ipc_a_handle_of_no_such_pool_costs_only_its_connection(
    content: bytes | None, tmp_path: Path
) -> None:
    async with network("cuda_ipc") as net:
        receiver, sender = await net.node(), await net.node()
        shown = tmp_path / "shown"
        if content is not None:
            shown.write_bytes(content)
        with await dial(receiver) as channel:
            await channel.send_frame(hello())
            await channel.expect_yes()
            await channel.send_frame(ShownPool(handle=bytes(shown)))
            await assert_hangs_up(channel)
        await assert_serves(receiver, sender)


def nccl(node: Node) -> NcclConnector:
    assert isinstance(node.connector, NcclConnector)
    return node.connector


async def send_block(link: KVLink, receiver: Node, transfer_id: str) -> None:
    reserved = receiver.reserve(1, transfer_id)
    try:
        await link.send_blocks(transfer_id, reserved.token, [Copy(0, reserved.block_ids[0], 1)])
    finally:
        receiver.reservations.cancel(transfer_id)


async def half_sent(receiver: Node, sender: Node) -> asyncio.Task[object]:
    """A transfer whose receives are posted while its sender keeps the bytes to itself."""
    link = await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
    await send_block(link, receiver, "first.1")
    receiver.reservations.ended.clear()
    communicator: Any = next(iter(nccl(sender)._communicators))

    async def withhold(*_: object) -> None:
        await asyncio.Event().wait()

    communicator.exchange = withhold
    reserved = receiver.reserve(4)
    entered = asyncio.Event()
    receiver.reservations.on_enter = entered.set
    sending = asyncio.create_task(
        link.send_blocks("r.1", reserved.token, [Copy(0, reserved.block_ids[0], 4)])
    )
    await entered.wait()
    receiver.reservations.on_enter = lambda: None
    return sending


async def test_nccl_blocks_stay_quarantined_until_the_abort_has_returned() -> None:
    async with network("nccl") as net:
        receiver, sender = await net.node(io_timeout_s=1.0), await net.node(io_timeout_s=1.0)
        backend = SlowToAbort()
        nccl(receiver).new_backend = lambda: backend
        sending = await half_sent(receiver, sender)

        receiver.reservations.cancel("r.1")
        assert await asyncio.to_thread(backend.is_aborting.wait, 5)
        assert receiver.blocks.counts().quarantined == 4
        backend.may_end.set()
        async with asyncio.timeout(5):
            await receiver.reservations.ended.wait()
        assert receiver.blocks.counts().free == 24

        nccl(receiver).new_backend = GlooPair
        sending.cancel()
        with pytest.raises((asyncio.CancelledError, TransferFailed)):
            await sending
        await assert_serves(receiver, sender)


async def test_nccl_a_sender_that_keeps_its_bytes_is_given_up_in_time() -> None:
    async with network("nccl") as net:
        receiver, sender = await net.node(io_timeout_s=0.5), await net.node()
        sending = await half_sent(receiver, sender)
        async with asyncio.timeout(5):
            await receiver.reservations.ended.wait()
        receiver.reservations.cancel("r.1")
        assert receiver.blocks.counts().free == 24
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending


class Slow(GlooPair):
    """Takes 0.8 s for a copy, as a slow network does."""

    def exchange(self, spans: Sequence[Span]) -> None:
        super().exchange(spans)
        self._ends_at = time.monotonic() + (0.8 if len(spans) > 1 else 0.0)

    def poll(self) -> bool:
        return super().poll() and time.monotonic() > self._ends_at


async def test_nccl_a_large_copy_has_more_time_than_a_step() -> None:
    async with network("nccl") as net:
        receiver, sender = (
            await net.node(LARGE, 34, io_timeout_s=0.5),
            await net.node(LARGE, 34, io_timeout_s=0.5),
        )
        for node in (receiver, sender):
            nccl(node).new_backend = Slow
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 34)
        reserved = receiver.reserve(33)
        copies = [Copy(0, reserved.block_ids[0], 32), Copy(32, reserved.block_ids[32], 1)]
        assert (await link.send_blocks("r.1", reserved.token, copies)).num_copies == 2


class Older(GlooPair):
    version = "an older gloo"


async def test_nccl_versions_that_differ_get_no_link() -> None:
    async with network("nccl") as net:
        receiver, sender = await net.node(), await net.node()
        nccl(sender).new_backend = Older
        reason = "NCCL versions differ: receiver gloo, sender an older gloo"
        with pytest.raises(ConnectorUnavailable, match=reason):
            await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        nccl(sender).new_backend = GlooPair
        await assert_serves(receiver, sender)


async def test_nccl_a_link_has_a_communicator_from_its_first_transfer_on_and_ends_it() -> None:
    async with network("nccl") as net:
        receiver, sender = await net.node(SMALL), await net.node(SMALL)
        links = [await sender.connector.connect(receiver.address, LINK_TOKEN, 24) for _ in range(3)]
        assert not nccl(sender)._communicators
        assert not nccl(receiver)._communicators
        for number, link in enumerate([links[0], links[1], links[0]]):
            await send_block(link, receiver, f"r{number}.1")
        made = set(nccl(sender)._communicators)
        assert len(made) == len(nccl(receiver)._communicators) == 2
        for link in links:
            await link.close()
        for communicator in made:
            assert await communicator.ended(5.0)


class Unable(GlooPair):
    """No communicator can be made: as where a firewall lets the port for KV through, and no other."""

    def init(self, unique_id: bytes, rank: int) -> None:
        raise NcclFailed("nobody answers")


@pytest.mark.parametrize("whose", ["sender", "receiver"])
async def test_nccl_a_pair_that_can_not_join_is_lost_until_it_has_shown_that_it_can(whose: str) -> None:
    async with network("nccl") as net:
        receiver, sender = await net.node(io_timeout_s=1.0), await net.node(io_timeout_s=1.0)
        unable = nccl(sender if whose == "sender" else receiver)
        unable.new_backend = Unable
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        assert not link.is_lost
        with pytest.raises(TransferFailed):
            await send_block(link, receiver, "r.1")
        assert link.is_lost
        with pytest.raises(ConnectorUnavailable):
            await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        unable.new_backend = GlooPair
        before = set(nccl(sender)._communicators)  # threads that still wait for the other end
        await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        assert len(nccl(sender)._communicators - before) == 1, "it was joined with the link"
        await assert_serves(receiver, sender)


class Deaf(GlooPair):
    """Its join waits until `may_end` is set: as where a firewall drops what NCCL sends."""

    may_end = threading.Event()

    def init(self, unique_id: bytes, rank: int) -> None:
        assert self.may_end.wait(20)
        raise NcclFailed("nobody answers")


async def test_nccl_a_request_does_not_wait_as_long_for_a_communicator_as_a_link_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nccl_module, "_JOIN_FOR_REQUEST_S", 0.1)
    async with network("nccl") as net:
        receiver, sender = await net.node(), await net.node()
        for node in (receiver, sender):
            nccl(node).new_backend = Deaf
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        with pytest.raises(TransferFailed, match=r"not joined within 0\.1 s"):
            await send_block(link, receiver, "r.1")
        assert link.is_lost
        await asyncio.wait_for(receiver.reservations.ended.wait(), 5)
        Deaf.may_end.set()


async def test_nccl_one_that_invites_at_once_is_joined_at_once() -> None:
    """As a node of the release before does."""
    async with network("nccl") as net:
        receiver, sender = await net.node(), await net.node()
        nccl(sender)._failed_ways.add(receiver.address)
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        assert len(nccl(receiver)._communicators) == 1
        await send_block(link, receiver, "r.1")
        assert len(nccl(receiver)._communicators) == 1


@pytest.mark.parametrize("name", ["cuda_ipc", "nccl"])
def test_connectors_for_gpus_are_not_made_for_host_memory(name: str) -> None:
    reservations = Reservations(Blocks(1))
    with (
        KVPool(SMALL, 1) as pool,
        pytest.raises(CannotStart, match=f"'{name}': .*, nixl .*host memory"),
    ):
        make_connectors(["tcp", name], pool, reservations, LINK_TOKEN.__eq__)
