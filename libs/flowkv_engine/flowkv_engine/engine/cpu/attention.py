"""Attention on the CPU, in compiled kernels that walk the block table.

Decode reads KV once, where it lies; a prefill computes enough per byte to pack KV for its tiles first. A
bfloat16 pool is widened while it is read.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowkv_engine.engine.attention import Prefill, TorchAttention
from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.cpu.kernels import PART_LEN, make_decode, prefill, rotate_and_write, write_slots
from flowkv_engine.engine.cpu.simd import LANES

# Tokens per unit of work. Fixed, so that a sequence is summed in the same order in any batch.
SPLIT_LEN = 256


class CpuAttention(TorchAttention):
    """Equal to `TorchAttention` up to rounding, by test. For float32 and bfloat16 pools on the CPU.

    What `attend` returns is valid until it is called again.
    """

    name = "cpu"

    def __init__(self, pool: Tensor) -> None:
        super().__init__(pool)
        self._pool_array = _as_numpy(pool)
        self._slots = np.empty(0, np.int64)
        self._tables = np.empty((0, 0), np.int32)
        self._context_lens = np.empty(0, np.int32)
        self._split_len = max(1, SPLIT_LEN // self._block_size) * self._block_size
        self._num_splits = 0
        self._scratch: dict[str, NDArray[np.float32]] = {}

    def bind(self, batch: PackedBatch) -> None:
        super().bind(batch)
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # of this thread
        decode = batch.query_lens == 1
        self._slots = batch.slots
        self._tables = batch.block_tables[decode]
        self._context_lens = batch.context_lens[decode]
        self._num_splits = -(-int(self._context_lens.max(initial=0)) // self._split_len)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        keys, values = (_as_numpy(states.to(self._pool.dtype)) for states in (key, value))
        write_slots(self._pool_array, layer, keys, values, self._slots)

    def rotate_and_write(
        self,
        layer: int,
        qkv: NDArray[np.float32],
        positions: NDArray[np.int64],
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        norm: NDArray[np.float32],
        eps: np.float32,
        query: NDArray[np.float32],
    ) -> None:
        """Instead of `write`: the kernel of that name at the batch's slots. Queries come unscaled."""
        rotate_and_write(
            self._pool_array, layer, self._slots, qkv, positions, cos, sin, norm, eps, np.float32(1), query
        )

    def _decode(self, layer: int, query: Tensor, scale: float) -> Tensor:
        num_rows, num_heads, head_dim = query.shape
        decode = make_decode(num_heads // self._pool.shape[4], head_dim)
        queries = (query.float() * scale).contiguous().numpy()
        splits = (num_rows, self._num_splits, num_heads)
        out = self._buffer("out", (num_rows, num_heads, head_dim))
        decode(
            self._pool_array,
            layer,
            self._split_len,
            queries,
            self._tables,
            self._context_lens,
            self._buffer("parts", (*splits, head_dim)),
            self._buffer("peaks", splits),
            self._buffer("totals", splits),
            out,
        )
        return torch.from_numpy(out).to(query.dtype)

    def _prefill(self, layer: int, query: Tensor, item: Prefill, scale: float) -> Tensor:
        num_kv_heads, head_dim = self._pool.shape[4:]
        num_parts = -(-item.context_len // PART_LEN)
        out = torch.empty(query.shape)
        prefill(
            self._pool_array,
            layer,
            item.blocks.numpy(),
            item.context_len,
            query.float().contiguous().numpy(),
            np.float32(scale),
            self._buffer("keys", (num_kv_heads, num_parts, PART_LEN // LANES, head_dim, LANES)),
            self._buffer("values", (num_kv_heads, num_parts, head_dim // LANES, PART_LEN, LANES)),
            out.numpy(),
        )
        return out.to(query.dtype)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Memory kept between calls, for they are many and short."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].size < size:
            self._scratch[name] = np.empty(size, np.float32)
        return self._scratch[name][:size].reshape(shape)


def _as_numpy(tensor: Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    """The same memory; bfloat16, which numpy does not know, as its bits."""
    array: NDArray[np.float32] | NDArray[np.uint16]
    array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
