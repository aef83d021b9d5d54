"""One node of one process: a pool in host or device memory, filled with bytes that the other process knows.

`memory` is host or cuda; on host memory, stand-ins for the CUDA libraries serve.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import msgspec
import torch

from flowkv_common.wire.messages import PoolLayout
from flowkv_engine.kv.pool import KVPool, Pool
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport import make_connectors
from flowkv_engine.transport.base import KVConnector
from tests.contract.kv_nodes import connector_on_host

MULTI_RANK_SINCE = 23003


class Setup(msgspec.Struct):
    """What both processes have in common."""

    kind: str
    memory: str
    layout: PoolLayout
    num_blocks: int


class Send(msgspec.Struct):
    """One transfer over a new link."""

    address: str
    link_token: str
    num_peer_blocks: int
    transfer_id: str
    token: str
    copies: list[Copy]


class Outcome(msgspec.Struct):
    error: str | None = None
    num_bytes: int = 0
    num_calls: int = 0


@dataclass
class GpuNode:
    pool: Pool
    connector: KVConnector

    def read(self, block: int) -> bytes:
        return bytes(self._bytes()[block].cpu().numpy().tobytes())

    def fill(self, seed: int) -> None:
        """Returns when the bytes are there, as a step does before it is told of."""
        self._bytes().copy_(pattern(self.pool, seed))
        if self.pool.tensor.is_cuda:
            torch.cuda.synchronize(self.pool.tensor.device)

    def _bytes(self) -> torch.Tensor:  # [num_blocks, block_bytes] uint8
        return self.pool.tensor.view(self.pool.num_blocks, -1).view(torch.uint8)


def pattern(pool: Pool, seed: int) -> torch.Tensor:
    """Random bytes [num_blocks, block_bytes], the same in every process."""
    shape = (pool.num_blocks, pool.layout.block_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@contextlib.asynccontextmanager
async def opened(
    setup: Setup, reservations: Reservations, admits: Callable[[str], bool]
) -> AsyncIterator[GpuNode]:
    async with contextlib.AsyncExitStack() as stack:
        if setup.memory == "host":
            host_pool = stack.enter_context(KVPool(setup.layout, setup.num_blocks))
            connector = connector_on_host(setup.kind, host_pool, reservations, admits)
            yield GpuNode(host_pool, await stack.enter_async_context(connector))
        else:
            from flowkv_engine.kv.cuda_pool import CudaPool

            pool = stack.enter_context(CudaPool(setup.layout, setup.num_blocks))
            [connector] = make_connectors([setup.kind], pool, reservations, admits)
            yield GpuNode(pool, await stack.enter_async_context(connector))


def nccl_environment(name: str) -> dict[str, str]:
    """What lets two processes on one GPU be two ranks; `name` is that of the process. Never for speed."""
    from cupy.cuda import nccl

    shared = {"NCCL_MAX_CTAS": "4", "NCCL_RAS_ENABLE": "0"}
    if nccl.available and nccl.get_version() >= MULTI_RANK_SINCE:
        return shared | {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    apart = {"NCCL_HOSTID": name, "NCCL_SOCKET_IFNAME": "lo", "NCCL_NET": "Socket", "NCCL_MNNVL_ENABLE": "0"}
    return shared | apart


def environment(setup: Setup, name: str) -> dict[str, str]:
    wanted = nccl_environment(name) if (setup.kind, setup.memory) == ("nccl", "cuda") else {}
    return dict(os.environ) | wanted
