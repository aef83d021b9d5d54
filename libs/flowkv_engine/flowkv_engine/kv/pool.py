"""The memory of the KV cache: one block-major tensor that other processes can map."""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
from typing import Protocol, Self

import numpy as np
import torch

from flowkv_common.wire.messages import PoolLayout, Run


class Pool(Protocol):
    """A pool wherever its bytes lie; those of a block, over all layers, are contiguous.

    `tensor`: [num_blocks, numbers of a block] of the layout's dtype, from the first byte of the pool on.
    """

    layout: PoolLayout
    num_blocks: int
    tensor: torch.Tensor


def layer_views(tensor: torch.Tensor, layout: PoolLayout) -> list[torch.Tensor]:
    """Of each layer its part of a pool's `tensor`: [num_blocks, sides, block_size, num_kv_heads, head_dim].

    Sides are keys and values, or latents alone. From a block to the next it is a whole block's numbers.
    """
    shapes = [(kv.num_sides, layout.block_size, kv.num_kv_heads, kv.head_dim) for kv in layout.each_layer]
    parts = torch.split(tensor, [math.prod(shape) for shape in shapes], dim=1)
    return [part.view(len(part), *shape) for part, shape in zip(parts, shapes, strict=True)]


class KVPool:
    """`num_blocks` zeroed blocks of `layout` in host memory. A `Pool`.

    `buffer`: all bytes as a writable memoryview; `fd`: the memfd behind them, sealed against resizing.
    """

    def __init__(self, layout: PoolLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.num_bytes = num_blocks * layout.block_bytes
        self.fd = os.memfd_create("flowkv-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.num_bytes)
            # A peer that maps the pool must never find a page gone: that would kill it with SIGBUS.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._mapping = mmap.mmap(self.fd, self.num_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        with contextlib.suppress(OSError):  # a kernel without huge pages serves small ones
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = memoryview(self._mapping)
        # By way of numpy, which keeps the mapping open for views that outlive the pool; torch alone does not.
        self.tensor = (
            torch.from_numpy(np.frombuffer(self._mapping, dtype=np.uint8))
            .view(getattr(torch, layout.dtype))
            .view(num_blocks, -1)
        )
        self.tensor.zero_()  # touches every page now, or else the first transfer pays for it

    def bytes_of(self, run: Run) -> memoryview:
        """The bytes of a run of blocks, writable."""
        block_bytes = self.layout.block_bytes
        return self.buffer[run.start * block_bytes : (run.start + run.length) * block_bytes]

    def close(self) -> None:
        """Gives the memory back once the last view of it is gone. Idempotent."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        self.tensor = torch.empty(0)
        with contextlib.suppress(BufferError):  # views that others hold keep the pages until they go
            self.buffer.release()
            self._mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
