"""What only the connectors for GPUs have to keep, tried on host memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from gloo_pair import GlooPair
from kv_nodes import LINK_TOKEN, SMALL, Node, network
from test_communicator import SlowToAbort
from test_connectors import assert_hangs_up, assert_serves, dial, hello

from flowkv_common.errors import TransferFailed
from flowkv_common.kv.alignment import Copy
from flowkv_common.kv.blocks import Blocks
from flowkv_common.kv.connector import ConnectorUnavailable
from flowkv_common.kv.connectors import make_connectors
from flowkv_common.kv.connectors.cuda_ipc import PoolHandle
from flowkv_common.kv.connectors.frames import Transfer
from flowkv_common.kv.connectors.mapped import Written
from flowkv_common.kv.pool import KVPool
from flowkv_common.kv.reservations import Reservations


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
            await channel.send(hello())
            await channel.expect_yes()
            await channel.send(PoolHandle(handle=bytes(shown)))
            await assert_hangs_up(channel)
        await assert_serves(receiver, sender)


async def test_cuda_ipc_copies_nothing_before_the_sender_says_that_it_has_written() -> None:
    async with network("cuda_ipc") as net:
        receiver, sender = await net.node(), await net.node()
        reserved = receiver.reserve(1)
        before = receiver.block(reserved.block_ids[0])
        with await dial(receiver) as channel:
            await channel.send(hello())
            await channel.expect_yes()
            await sender.connector._show_pool(channel)
            await channel.expect_yes()
            copies = [Copy(2, reserved.block_ids[0], 1)]
            await channel.send(Transfer(transfer_id="r.1", token=reserved.token, copies=copies))
            await channel.expect_yes()
            sender.fill(99)  # what a kernel writes that was still queued
            assert receiver.block(reserved.block_ids[0]) == before
            await channel.send(Written())
            await channel.expect_yes()
            assert receiver.block(reserved.block_ids[0]) == sender.block(2)


async def half_sent(receiver: Node, sender: Node) -> asyncio.Task[object]:
    """A transfer whose receives are posted while its sender keeps the bytes to itself."""
    link = await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
    communicator = next(iter(sender.connector._sending.values()))

    async def withhold(*_: object) -> None:
        await asyncio.Event().wait()

    communicator.exchange = withhold
    reserved = receiver.reserve(4)
    entered = asyncio.Event()
    receiver.landings.on_enter = entered.set
    sending = asyncio.create_task(link.send("r.1", reserved.token, [Copy(0, reserved.block_ids[0], 4)]))
    await entered.wait()
    receiver.landings.on_enter = lambda: None
    return sending


async def test_nccl_blocks_stay_quarantined_until_the_abort_has_returned() -> None:
    async with network("nccl") as net:
        receiver, sender = await net.node(io_timeout_s=1.0), await net.node(io_timeout_s=1.0)
        backend = SlowToAbort()
        receiver.connector._new_backend = lambda: backend
        sending = await half_sent(receiver, sender)

        receiver.reservations.cancel("r.1")
        assert await asyncio.to_thread(backend.is_aborting.wait, 5)
        assert receiver.blocks.counts().quarantined == 4
        backend.may_end.set()
        async with asyncio.timeout(5):
            await receiver.landings.ended.wait()
        assert receiver.blocks.counts().free == 24

        receiver.connector._new_backend = GlooPair
        sending.cancel()
        with pytest.raises((asyncio.CancelledError, TransferFailed)):
            await sending
        await assert_serves(receiver, sender)


async def test_nccl_a_sender_that_keeps_its_bytes_is_given_up_in_time() -> None:
    async with network("nccl") as net:
        receiver, sender = await net.node(io_timeout_s=0.5), await net.node()
        sending = await half_sent(receiver, sender)
        async with asyncio.timeout(5):
            await receiver.landings.ended.wait()
        receiver.reservations.cancel("r.1")
        assert receiver.blocks.counts().free == 24
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending


class Older(GlooPair):
    version = "an older gloo"


async def test_nccl_versions_that_differ_get_no_link() -> None:
    async with network("nccl") as net:
        receiver, sender = await net.node(), await net.node()
        sender.connector._new_backend = Older
        reason = "NCCL versions differ: receiver gloo, sender an older gloo"
        with pytest.raises(ConnectorUnavailable, match=reason):
            await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        sender.connector._new_backend = GlooPair
        await assert_serves(receiver, sender)


async def test_nccl_each_connection_has_a_communicator_and_ends_it() -> None:
    async with network("nccl") as net:
        receiver, sender = await net.node(SMALL), await net.node(SMALL)
        links = [await sender.connector.connect(receiver.address, LINK_TOKEN, 24) for _ in range(2)]
        made = set(sender.connector._communicators)
        assert len(made) == 2
        for link in links:
            await link.close()
        assert not sender.connector._sending
        for communicator in made:
            assert await communicator.ended(5.0)


@pytest.mark.parametrize("name", ["cuda_ipc", "nccl"])
def test_connectors_for_gpus_are_not_made_for_host_memory(name: str) -> None:
    reservations = Reservations(Blocks(1, SMALL.block_size))
    with KVPool(SMALL, 1) as pool, pytest.raises(ValueError, match=f"for a KVPool: .*{name}.*; shm, tcp are"):
        make_connectors(["tcp", name], pool, reservations, LINK_TOKEN.__eq__)
