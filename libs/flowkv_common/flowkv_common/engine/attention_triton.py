"""Attention on a GPU, in Triton kernels that walk the block table (`kernels_triton.py`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from flowkv_common.engine import kernels_triton as kernels
from flowkv_common.engine import kernels_triton_rows as row_kernels
from flowkv_common.engine.batch import PackedBatch

# A context is cut into so many parts, each a program of its own, whatever the batch is: a sequence is summed
# in one order, a single one fills the GPU, and the grid of a recorded graph never changes.
NUM_PARTS = 16
# A short context has fewer: what the parts give is written and read once more.
LEAST_PART_LEN = 128
# Keys per step of the online softmax, and queries of a prompt per program.
TILE_LEN = 64
NUM_ROWS = 64
# The matrix units take at least so many rows.
LEAST_ROWS = 16


class Decoding(NamedTuple):
    """Items of one token, on the device. A place with a context of 0 tokens is empty."""

    rows: Tensor  # [N] int32, of the step's queries
    tables: Tensor  # [N, blocks] int32
    context_lens: Tensor  # [N] int32


class Prompts(NamedTuple):
    """Items of several tokens, on the device, and the tiles of queries that they are cut into."""

    tables: Tensor  # [N, blocks] int32
    context_lens: Tensor  # [N] int32
    query_starts: Tensor  # [N + 1] int32
    tile_items: Tensor  # [tiles] int32
    tile_firsts: Tensor  # [tiles] int32


class TritonAttention:
    """Equal to `TorchAttention` up to rounding, by test. On a GPU; on the CPU by interpretation."""

    def __init__(self, pool: Tensor) -> None:
        self._pool = pool
        _, _, _, self._block_size, self._num_kv_heads, self._head_dim = pool.shape
        self._strides = (pool.stride(0), pool.stride(2), pool.stride(3), pool.stride(4))
        self._padded_dim = max(16, triton.next_power_of_2(self._head_dim))
        self._slots = torch.empty(0, dtype=torch.int64, device=pool.device)
        self._decoding: Decoding | None = None
        self._prompts: Prompts | None = None

    def bind(self, batch: PackedBatch) -> None:
        starts, decode = batch.query_starts, batch.query_lens == 1
        self._slots = self._to_device(batch.slots)
        self._decoding = self._prompts = None
        if decode.any():
            self._decoding = Decoding(
                rows=self._to_device(starts[:-1][decode]),
                tables=self._to_device(batch.block_tables[decode]),
                context_lens=self._to_device(batch.context_lens[decode]),
            )
        if not decode.all():
            items, firsts = _tiles(batch.query_lens)
            self._prompts = Prompts(
                tables=self._to_device(batch.block_tables),
                context_lens=self._to_device(batch.context_lens),
                query_starts=self._to_device(starts),
                tile_items=self._to_device(items),
                tile_firsts=self._to_device(firsts),
            )

    def bind_static(self, slots: Tensor, decoding: Decoding) -> None:
        """A step of decode whose numbers are read from these tensors when the kernels run: for graphs."""
        self._slots, self._decoding, self._prompts = slots, decoding, None

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        key, value = key.to(self._pool.dtype), value.to(self._pool.dtype)
        kernels.write_kv[(len(self._slots), self._num_kv_heads)](
            self._pool[:, layer],
            key,
            value,
            self._slots,
            *self._strides,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            block_size=self._block_size,
            head_dim=self._head_dim,
            padded_dim=self._padded_dim,
        )

    def rotate_and_write(
        self,
        layer: int,
        qkv: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Instead of `write`: stores keys, turned by position, and values; returns the turned queries.

        `qkv` [T, num_heads + 2 * num_kv_heads, head_dim], contiguous, `positions` [T], `cos` and `sin`
        [max positions, head_dim], `norm` [num_heads + num_kv_heads, head_dim] of a model that normalizes
        each head. Returns [T, num_heads, head_dim].
        """
        num_tokens, num_heads = len(qkv), qkv.shape[1] - 2 * self._num_kv_heads
        group_size = num_heads // self._num_kv_heads
        query = torch.empty(num_tokens, num_heads, self._head_dim, dtype=qkv.dtype, device=qkv.device)
        row_kernels.rotate_and_write[(num_tokens, self._num_kv_heads)](
            qkv,
            query,
            self._pool[:, layer],
            self._slots,
            positions,
            cos,
            sin,
            cos if norm is None else norm,
            eps,
            *self._strides,
            has_norm=norm is not None,
            group_size=group_size,
            padded_rows=triton.next_power_of_2(group_size + 1),
            block_size=self._block_size,
            head_dim=self._head_dim,
            padded_half=triton.next_power_of_2(self._head_dim // 2),
            num_warps=1,
        )
        return query

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        pool, result = self._pool[:, layer], torch.empty_like(query, memory_format=torch.contiguous_format)
        if self._decoding is not None:
            self._decode(pool, query, result, scale * math.log2(math.e), self._decoding)
        if self._prompts is not None:
            self._prefill(pool, query, result, scale * math.log2(math.e), self._prompts)
        return result

    def _decode(self, pool: Tensor, query: Tensor, result: Tensor, scale: float, decoding: Decoding) -> None:
        num_items, num_heads = len(decoding.rows), query.shape[1]
        group_size = num_heads // self._num_kv_heads
        shape = (num_items, num_heads, NUM_PARTS)
        parts = torch.empty((*shape, self._head_dim), dtype=torch.float32, device=query.device)
        log_sums = torch.empty(shape, dtype=torch.float32, device=query.device)
        kernels.attend_part[(num_items, self._num_kv_heads, NUM_PARTS)](
            pool,
            query,
            parts,
            log_sums,
            *decoding,
            scale,
            decoding.tables.stride(0),
            query.stride(0),
            query.stride(1),
            *self._strides,
            num_parts=NUM_PARTS,
            least_part_len=LEAST_PART_LEN,
            group_size=group_size,
            padded_group=max(LEAST_ROWS, triton.next_power_of_2(group_size)),
            block_size=self._block_size,
            head_dim=self._head_dim,
            padded_dim=self._padded_dim,
            tile_len=TILE_LEN,
        )
        kernels.join_parts[(num_items, num_heads)](
            parts,
            log_sums,
            result,
            decoding.rows,
            decoding.context_lens,
            result.stride(0),
            result.stride(1),
            num_parts=NUM_PARTS,
            least_part_len=LEAST_PART_LEN,
            tile_len=TILE_LEN,
            head_dim=self._head_dim,
            padded_dim=self._padded_dim,
        )

    def _prefill(self, pool: Tensor, query: Tensor, result: Tensor, scale: float, prompts: Prompts) -> None:
        num_heads = query.shape[1]
        kernels.attend_prompts[(len(prompts.tile_items), num_heads)](
            pool,
            query,
            result,
            *prompts,
            scale,
            prompts.tables.stride(0),
            query.stride(0),
            query.stride(1),
            result.stride(0),
            result.stride(1),
            *self._strides,
            group_size=num_heads // self._num_kv_heads,
            block_size=self._block_size,
            head_dim=self._head_dim,
            padded_dim=self._padded_dim,
            num_rows=NUM_ROWS,
            tile_len=TILE_LEN,
            # Tiles that are loaded ahead: of fp32 few GPUs could hold more.
            num_stages=1 if query.dtype == torch.float32 else 3,
        )

    def _to_device(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array).to(self._pool.device)


def _tiles(query_lens: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Items with several queries in tiles of `NUM_ROWS`: each tile's item, and its first query there."""
    num_tiles = np.where(query_lens > 1, -(-query_lens // NUM_ROWS), 0)
    items = np.repeat(np.arange(len(query_lens)), num_tiles)
    numbers = np.arange(num_tiles.sum()) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    return items.astype(np.int32), (numbers * NUM_ROWS).astype(np.int32)
