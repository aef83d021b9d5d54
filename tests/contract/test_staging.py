"""Pools on GPUs by way of pinned host memory, whatever moves that; the GPUs are host memory, too."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import cast

import pytest

from flowkv_common.wire.messages import PoolLayout
from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.pool import KVPool, Pool
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.transport import make_connectors
from flowkv_engine.transport.base import ConnectorUnavailable
from flowkv_engine.transport.nixl import NixlConnector
from flowkv_engine.transport.staging import CopyQueue
from flowkv_engine.transport.tcp import StagedTcpConnector
from tests.contract.cupy_on_host import cupy_on_host, host_device, pinned
from tests.contract.kv_nodes import (
    LINK_TOKEN,
    NIXL,
    SMALL,
    STAGED,
    STAGED_TCP,
    Network,
    copies_between,
    network,
)
from tests.contract.test_connectors import assert_serves
from tests.waiting import until

__all__ = ["cupy_on_host"]

however_staged = pytest.mark.parametrize(
    "kind", [*STAGED_TCP, *(pytest.param(kind, marks=NIXL.marks) for kind in STAGED)]
)

# Blocks of 640 KiB, so that a buffer ends within one.
ODD = PoolLayout(num_layers=5, block_size=16, num_kv_heads=8, head_dim=128, dtype="float32")


@contextlib.asynccontextmanager
async def staged_network(kind: str) -> AsyncIterator[Network]:
    """Afterwards no memory is pinned any more."""
    async with network(kind) as net:
        yield net
    await until(lambda: not pinned)


class Unpinnable:
    """A device at its limit."""

    def pin(self, address: int, num_bytes: int) -> None:
        raise OSError("no memory can be pinned")

    def unpin(self, address: int) -> None:
        raise AssertionError("nothing was pinned")

    def new_queue(self) -> CopyQueue:
        return host_device().new_queue()


@however_staged
async def test_pieces_of_many_runs_arrive_in_their_places(kind: str) -> None:
    async with staged_network(kind) as net:
        receiver, sender = await net.node(ODD, 75), await net.node(ODD, 75)
        receiver.scatter()
        sender.scatter()
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 75)
        expected = [receiver.block(block) for block in range(75)]
        reserved = receiver.reserve(47)  # 29 MiB, of buffers of 8
        copies = copies_between(sender, 47, reserved)
        assert len(copies) > 20
        for seed in (8, 9):
            sender.fill(seed)
            await link.send_blocks("r.1", reserved.token, copies)
        for src, dst, length in copies:
            expected[dst : dst + length] = [sender.block(src + i) for i in range(length)]
        assert [receiver.block(block) for block in range(75)] == expected


@pytest.mark.usefixtures("cupy_on_host")
@pytest.mark.parametrize("kind", ["tcp", NIXL])
def test_a_node_on_a_gpu_can_stage(kind: str) -> None:
    with KVPool(SMALL, 1) as memory:
        pool = cast(Pool, SimpleNamespace(layout=SMALL, num_blocks=1, tensor=memory.tensor))
        [connector] = make_connectors([kind], pool, Reservations(Blocks(1)), LINK_TOKEN.__eq__)
        assert isinstance(connector, NixlConnector | StagedTcpConnector)
        from flowkv_engine.transport.cuda import CudaDevice

        assert isinstance(connector.device, CudaDevice)


@pytest.mark.parametrize("whose", ["sender", "receiver"])
async def test_an_end_without_memory_to_pin_gets_no_link(whose: str) -> None:
    async with staged_network("tcp, staged") as net:
        receiver, sender = await net.node(), await net.node()
        connector = (sender if whose == "sender" else receiver).connector
        assert isinstance(connector, StagedTcpConnector)
        device, connector.device = connector.device, Unpinnable()
        with pytest.raises(ConnectorUnavailable, match="no memory can be pinned"):
            await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        connector.device = device
        await assert_serves(receiver, sender)
