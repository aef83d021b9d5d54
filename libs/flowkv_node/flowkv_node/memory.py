"""The pool's memory: how much there is, and a KV pool that fits into it.

On Linux the kernel kills a process that takes too much. A container's limit shows in its cgroup (version 1 or
2) and in each cgroup around it, the host's in `/proc/meminfo`. File pages that the kernel can drop count as
free in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch

from flowkv_common.config import NodeSettings
from flowkv_common.errors import CannotStart
from flowkv_common.wire.messages import PoolLayout
from flowkv_engine.kv.pool import KVPool, Pool
from flowkv_node.cgroups import cgroups, first_line, lines

DEFAULT_BYTES = 1 << 30
# What a node on a GPU needs besides weights and pool: activations of a step, graphs, tables, libraries. An
# estimate for 8 billion parameters, not measured.
WORKING_BYTES = 3 << 30

# By a cgroup's version: the files with limit and use, and the counts in `memory.stat` that can be dropped.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    2: ("memory.max", "memory.current", ("active_file", "inactive_file")),
}


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
        from flowkv_engine.kv.cuda_pool import CudaPool  # CuPy is an extra

        return CudaPool(layout, num_blocks, device.index or 0)
    available = free_memory()
    if available is not None and num_blocks * layout.block_bytes > available.num_bytes:
        # Else the kernel would kill the process while it zeroes the pool, without a word.
        raise NoRoomForPool(
            f"a KV cache of {num_blocks * layout.block_bytes} bytes does not fit into the "
            f"{max(0, available.num_bytes)} left of {available.limit}: set FLOWKV_KV_CACHE_BYTES to less"
        )
    return KVPool(layout, num_blocks)


def bytes_left(total: int, free: int, weights: int, share: float) -> int:
    """For the pool, of a GPU of `total` bytes with `free` ones, of which the node may have a `share`.

    What others already use is respected: a second node on the GPU gets less than its share, or nothing.
    """
    return min(int(total * share) - weights, free) - WORKING_BYTES


class Free(NamedTuple):
    """Bytes, and what sets the limit, for people."""

    num_bytes: int
    limit: str


def free_memory(root: Path = Path("/")) -> Free | None:
    """The least of all limits; None where the kernel tells none. `root` is where `proc` and `sys` lie."""
    return min([*_of_host(root), *_of_cgroups(root)], default=None)


def _of_host(root: Path) -> Iterator[Free]:
    for line in lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield Free(int(line.split()[1]) * 1024, "the host's memory")


def _of_cgroups(root: Path) -> Iterator[Free]:
    for folder, version in cgroups("memory", root):
        limit_file, usage_file, droppable = _FILES[version]
        limit, usage = first_line(folder / limit_file), first_line(folder / usage_file)
        if not limit.isdigit() or not usage.isdigit():
            continue  # no limit ("max"), or not a cgroup that we can see
        counts = dict(line.split() for line in lines(folder / "memory.stat"))
        dropped = sum(int(counts.get(name, 0)) for name in droppable)
        yield Free(int(limit) - int(usage) + dropped, f"the limit of {folder}")
