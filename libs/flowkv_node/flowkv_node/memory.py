"""How much memory this process can still take on Linux, before the kernel kills it.

A container's limit shows in its cgroup (version 1 or 2) and that of each cgroup around it, the host's in
`/proc/meminfo`. File pages that the kernel can drop count as free in both.
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

_ROOT = Path("/")


class Free(NamedTuple):
    """Bytes, and what sets the limit, for people."""

    num_bytes: int
    limit: str


class _Names(NamedTuple):
    """Of files in a cgroup's folder, and of the counts in its `memory.stat` that can be dropped."""

    limit: str
    usage: str
    droppable: tuple[str, str]


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_V2 = _Names("memory.max", "memory.current", ("active_file", "inactive_file"))


def free_memory(root: Path = _ROOT) -> Free | None:
    """The least of all limits; None where the kernel tells none. `root` is where `proc` and `sys` lie."""
    return min([*_of_host(root), *_of_cgroups(root)], default=None)


def _of_host(root: Path) -> Iterator[Free]:
    for line in _lines(root / "proc/meminfo"):
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            yield Free(int(amount.split()[0]) * 1024, "the host's memory")


def _of_cgroups(root: Path) -> Iterator[Free]:
    """Of this process's cgroup and all around it; a container sees its own alone, as the root."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            yield from _of_cgroup(folder, names)
            if folder == top:
                break


def _of_cgroup(folder: Path, names: _Names) -> Iterator[Free]:
    limit = next(iter(_lines(folder / names.limit)), "max")
    usage = next(iter(_lines(folder / names.usage)), "")
    if not limit.isdigit() or not usage.isdigit():
        return  # no limit, or not a cgroup that we can see
    counts = dict(line.split() for line in _lines(folder / "memory.stat"))
    droppable = sum(int(counts.get(name, 0)) for name in names.droppable)
    yield Free(int(limit) - int(usage) + droppable, f"the limit of {folder}")


def _lines(file: Path) -> list[str]:
    """Empty where there is no such file."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


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
        from flowkv_engine.kv.cuda_pool import CudaPool  # CuPy is an extra

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
