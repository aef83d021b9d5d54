"""The node's KV pool: how large, and where its memory is."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from flowkv_common.config import NodeSettings
from flowkv_common.errors import CannotStart
from flowkv_common.kv.connector import Pool
from flowkv_common.kv.pool import KVPool
from flowkv_common.node.host_memory import Free, free_memory
from flowkv_common.wire.parts import PoolLayout

DEFAULT_BYTES = 1 << 30
# What a node on a GPU needs besides weights and pool: activations of a step, graphs, tables, libraries. An
# estimate for 8 billion parameters, not measured.
WORKING_BYTES = 3 << 30


class NoRoomForPool(CannotStart):
    """The KV cache does not fit; the message names the setting."""


def make_pool(
    settings: NodeSettings, layout: PoolLayout, device: torch.device
) -> AbstractContextManager[Pool]:
    """A pool on `device`, after the weights are there. Raises `NoRoomForPool`."""
    num_bytes = settings.kv_cache_bytes or DEFAULT_BYTES
    if device.type == "cuda" and not settings.kv_cache_bytes:
        free, total = torch.cuda.mem_get_info(device)
        num_bytes = bytes_left(total, free, torch.cuda.memory_allocated(device), settings.gpu_memory_share)
    num_blocks = num_bytes // layout.block_bytes
    if num_blocks < 1:
        raise NoRoomForPool(
            f"{max(0, num_bytes)} bytes are left for the KV cache, and a block has {layout.block_bytes}: "
            "set FLOWKV_KV_CACHE_BYTES or FLOWKV_GPU_MEMORY_SHARE"
        )
    if device.type == "cuda":
        from flowkv_common.kv.cuda_pool import CudaPool  # CuPy is an extra

        return CudaPool(layout, num_blocks, device.index or 0)
    _check_fits(num_blocks * layout.block_bytes, free_memory())
    return KVPool(layout, num_blocks)


def _check_fits(num_bytes: int, free: Free | None) -> None:
    """Or the kernel would kill the process while it zeroes the pool, without a word."""
    if free is not None and num_bytes > free.num_bytes:
        raise NoRoomForPool(
            f"a KV cache of {num_bytes} bytes does not fit into the {max(0, free.num_bytes)} left of "
            f"{free.limit}: set FLOWKV_KV_CACHE_BYTES to less"
        )


def bytes_left(total: int, free: int, weights: int, share: float) -> int:
    """For the pool, of a GPU of `total` bytes with `free` ones, of which the node may have a `share`.

    What others already use is respected: a second node on the GPU gets less than its share, or nothing.
    """
    return min(int(total * share) - weights, free) - WORKING_BYTES


def handoff_bytes(settings: NodeSettings, layout: PoolLayout, num_blocks: int) -> int:
    """How many bytes of KV a prefill node of `num_blocks` may have in flight.

    What is in flight holds blocks at both ends, at decode before they are computed. So it is a share of the
    pool: decode nodes have pools of the same kind. A quarter lets a long prompt be sent while the next ones
    compute, and leaves decode the most of its own. In small pools it is a step's prompt tokens for each
    handoff that may be in flight: there the count is what bounds them.
    """
    if settings.max_handoff_bytes:
        return settings.max_handoff_bytes
    blocks_per_step = -(-settings.token_budget // settings.block_size)
    return max(num_blocks // 4, settings.max_handoffs * blocks_per_step) * layout.block_bytes
