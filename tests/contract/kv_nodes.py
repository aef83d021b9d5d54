"""Two nodes' worth of KV parts, joined by the connector under test."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from flowkv_common.wire.messages import NodeRef, PoolLayout
from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservation, Reservations
from flowkv_engine.kv.segments import Copy, align
from flowkv_engine.transport.base import KVConnector
from flowkv_engine.transport.mapped import CudaIpcConnector, ShmConnector
from flowkv_engine.transport.nccl import NcclConnector
from flowkv_engine.transport.nixl import NixlConnector
from flowkv_engine.transport.sockets import LOOPBACK, Place
from flowkv_engine.transport.tcp import StagedTcpConnector, TcpConnector
from tests.certificates import trial_tls
from tests.contract.cupy_on_host import host_device
from tests.contract.gloo_pair import GlooPair
from tests.contract.memfd_device import MemfdDevice
from tests.contract.unreachable_pool import library_without
from tests.inprocess_connector import InProcessConnector, Switchboard

# NIXL's library is an extra that comes for some platforms only.
NIXL = pytest.param(
    "nixl",
    marks=pytest.mark.skipif(
        not any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13")),
        reason="NIXL is not installed: pip install -c constraints.txt '.[nixl]'",
    ),
)
# Over TCP for pools on GPUs, with TLS too; over NIXL for those that it can't reach.
STAGED_TCP = ["tcp, staged", "tls, staged"]
STAGED = ["nixl, sender stages", "nixl, receiver stages", "nixl, both stage"]
NIXL_STAGED = [
    *(pytest.param(kind, marks=[*NIXL.marks, pytest.mark.full]) for kind in STAGED[:2]),
    pytest.param(STAGED[2], marks=NIXL.marks),
]
LINK_TOKEN = "open sesame"
SMALL = PoolLayout(num_layers=2, block_size=4, num_kv_heads=2, head_dim=8, dtype="float32")  # 1 KiB blocks
LARGE = PoolLayout(num_layers=8, block_size=16, num_kv_heads=8, head_dim=128, dtype="float32")  # 1 MiB
NODE = NodeRef(node_id="prefill-1", incarnation="a")


class WatchedReservations(Reservations):
    """Reservations whose copies can be watched: `on_enter` runs when one begins, `ended` counts the ends."""

    def __init__(self, blocks: Blocks, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(blocks, clock)
        self.on_enter: Callable[[], object] = lambda: None
        self.num_ended = 0
        self.ended = asyncio.Event()

    @contextlib.contextmanager
    def copying(self, transfer_id: str, token: str, dst_blocks: Sequence[int]) -> Iterator[Reservation]:
        try:
            with super().copying(transfer_id, token, dst_blocks) as reservation:
                self.on_enter()
                yield reservation
        finally:
            self.num_ended += 1
            self.ended.set()


@dataclass
class Node:
    """One side: its pool, its blocks, its connector."""

    pool: KVPool
    blocks: Blocks
    reservations: WatchedReservations
    connector: KVConnector
    clock: list[float]  # its one item is the time
    lifetime: contextlib.AsyncExitStack
    address: str = ""

    async def stop_serving(self) -> None:
        await self.lifetime.aclose()

    def fill(self, seed: int) -> None:
        """Random bytes, other ones for each seed."""
        made = torch.randint(0, 256, (self.pool.num_bytes,), dtype=torch.uint8, generator=_generator(seed))
        self.pool.buffer[:] = made.numpy().data

    def block(self, block_id: int) -> bytes:
        size = self.pool.layout.block_bytes
        return bytes(self.pool.buffer[block_id * size : (block_id + 1) * size])

    def reserve(self, num_blocks: int, transfer_id: str = "r.1") -> Reservation:
        return self.reservations.reserve(transfer_id, num_blocks, [], [], 10.0)

    def scatter(self) -> None:
        """Leaves every third block taken, so that runs are short."""
        taken = self.blocks.allocate(self.blocks.num_blocks)
        self.blocks.release(block for block in taken if block % 3)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def connector_on_host(
    kind: str,
    pool: KVPool,
    reservations: Reservations,
    admits: Callable[[str], bool],
    *,
    io_timeout_s: float = 5.0,
) -> KVConnector:
    """The connector of this name; those for GPUs move host memory by stand-ins for the CUDA libraries.

    `tls` is `tcp` with TLS.
    """
    if kind == "shm":
        return ShmConnector(pool, reservations, admits, io_timeout_s=io_timeout_s)
    if kind in ("tcp", "tls", *STAGED_TCP):
        connector = partial(StagedTcpConnector, device=host_device()) if kind in STAGED_TCP else TcpConnector
        place = Place(tls=trial_tls()) if kind.startswith("tls") else LOOPBACK
        return connector(pool, reservations, admits, place=place, io_timeout_s=io_timeout_s)
    if kind == "nixl":
        return NixlConnector(pool, reservations, admits, io_timeout_s=io_timeout_s)
    if kind in STAGED:
        sender_stages, receiver_stages = kind != STAGED[1], kind != STAGED[0]
        library = library_without(pool.tensor, can_show=not sender_stages, can_read_into=not receiver_stages)
        return NixlConnector(
            pool, reservations, admits, library=library, device=host_device(), io_timeout_s=io_timeout_s
        )
    if kind == "cuda_ipc":
        device = MemfdDevice(pool)
        return CudaIpcConnector(pool, reservations, admits, device=device, io_timeout_s=io_timeout_s)
    return NcclConnector(pool, reservations, admits, new_backend=GlooPair, io_timeout_s=io_timeout_s)


class Network:
    """Makes nodes of one transport and tears them down."""

    def __init__(self, kind: str, stack: contextlib.AsyncExitStack) -> None:
        self.kind = kind
        self._stack = stack
        self._switchboard = Switchboard()
        self.nodes: list[Node] = []

    async def node(
        self, layout: PoolLayout = SMALL, num_blocks: int = 24, *, io_timeout_s: float = 5.0
    ) -> Node:
        pool = self._stack.enter_context(KVPool(layout, num_blocks))
        blocks = Blocks(num_blocks)
        clock = [0.0]
        reservations = WatchedReservations(blocks, lambda: clock[0])
        connector = self._connector(pool, reservations, io_timeout_s)
        lifetime = await self._stack.enter_async_context(contextlib.AsyncExitStack())
        await lifetime.enter_async_context(connector)
        node = Node(pool, blocks, reservations, connector, clock, lifetime)
        node.address = await connector.listen()
        self.nodes.append(node)
        node.fill(len(self.nodes))
        return node

    def _connector(self, pool: KVPool, reservations: Reservations, io_timeout_s: float) -> KVConnector:
        if self.kind == "inprocess":
            return InProcessConnector(pool, reservations, LINK_TOKEN.__eq__, self._switchboard)
        return connector_on_host(self.kind, pool, reservations, LINK_TOKEN.__eq__, io_timeout_s=io_timeout_s)


@contextlib.asynccontextmanager
async def network(kind: str) -> AsyncIterator[Network]:
    """Nodes that end, with their books in order, when the block does."""
    async with contextlib.AsyncExitStack() as stack:
        made = Network(kind, stack)
        yield made
    for node in made.nodes:
        node.blocks.check_integrity()
        assert node.blocks.counts().quarantined == 0


def copies_between(sender: Node, num_blocks: int, reservation: Reservation) -> list[Copy]:
    """Leases `num_blocks` at the sender and aligns them with the reservation."""
    return align(sender.blocks.allocate(num_blocks), reservation.block_ids)
