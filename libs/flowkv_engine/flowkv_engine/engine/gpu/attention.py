"""Attention on a GPU, in Triton kernels that walk the block table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from flowkv_engine.engine.attention import Rule, narrowed
from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.flat import Rotary
from flowkv_engine.engine.gpu import kernels, latents

# This many pairs of sequence and KV head fill a GPU without splits.
MANY_PAIRS = 512
# Queries of a prompt per program.
NUM_ROWS = 64
# The matrix units take at least this many rows.
LEAST_ROWS = 16


class SplitKV(NamedTuple):
    """How contexts of decode are split: each split is a program.

    Chosen by the size of the batch alone, so that a recorded graph has one grid. A context has up to
    `num_splits` splits of at least `min_split_len` tokens: the results of several are written and read again.
    """

    num_splits: int
    min_split_len: int


# With few sequences, splits fill the GPU. With many, only a long context is split.
FEW, MANY = SplitKV(32, 128), SplitKV(16, 1024)


class Step(NamedTuple):
    """A step's numbers, on the device: int32, but for the slots. Kernels read them when they run."""

    slots: Tensor  # [T] int64; -1: written nowhere
    tables: Tensor  # [N, blocks]
    context_lens: Tensor  # [N]
    query_starts: Tensor  # [N + 1]
    decode_lens: Tensor | None  # [N], context lengths of items of one token; 0: nothing is read or written
    tiles: Tensor | None  # [2, tiles] of the queries of longer items, as `query_tiles` says; item -1: none


class LatentQueries(NamedTuple):
    """Of each query of a step, on the device, int32 [T]. Its heads fill the matrix units: it is no tile's."""

    rows: Tensor  # 0, 1, 2 ...
    items: Tensor  # whose it is
    context_lens: Tensor  # what it sees, up to itself


class TritonAttention:
    """Equal to `TorchAttention` up to rounding, by test. On a GPU; on the CPU by interpretation."""

    name = "triton"

    def __init__(self, layers: Sequence[Tensor]) -> None:
        assert all(layer[0].is_contiguous() for layer in layers)
        self._dtype, self._device = layers[0].dtype, layers[0].device
        is_e4m3 = self._dtype == torch.float8_e4m3fn
        self._layers = [layer.view(torch.uint8) for layer in layers] if is_e4m3 else layers
        none = torch.empty(0, dtype=torch.int64, device=self._device)
        self.step = Step(none, none, none, none, None, None)
        self._latent_queries: LatentQueries | None = None

    def bind(self, batch: PackedBatch) -> None:
        def to_device(array: NDArray[np.integer]) -> Tensor:
            return torch.from_numpy(array).to(self._device)

        decodes = batch.query_lens == 1
        self.step = Step(
            slots=to_device(batch.slots),
            tables=to_device(batch.block_tables),
            context_lens=to_device(batch.context_lens),
            query_starts=to_device(batch.query_starts),
            decode_lens=to_device(batch.decode_lens) if decodes.any() else None,
            tiles=None if decodes.all() else to_device(query_tiles(batch.query_lens)),
        )
        if any(layer.shape[1] == 1 for layer in self._layers):
            num_queries = len(batch.token_ids)
            items = np.repeat(np.arange(len(batch.query_lens), dtype=np.int32), batch.query_lens)
            lens = batch.position_ids.astype(np.int32) + np.int32(1)
            rows = np.arange(num_queries, dtype=np.int32)
            self._latent_queries = LatentQueries(*map(to_device, (rows, items, lens)))

    def write(self, layer: int, key: Tensor, value: Tensor | None) -> None:
        pool, slots = self._layers[layer], self.step.slots
        has_values = value is not None
        key = narrowed(key, self._dtype).view(pool.dtype)
        value = key if value is None else narrowed(value, self._dtype).view(pool.dtype)
        kernels.write_kv[(len(slots), key.shape[1])](
            pool,
            key,
            value,
            slots,
            pool.stride(0),
            *key.stride()[:2],
            *value.stride()[:2],
            **_sizes(pool),
            has_values=has_values,
        )

    def rotate_and_write(
        self,
        layer: int,
        qkv: Tensor,
        positions: Tensor,
        rotary: Rotary,
        norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Instead of `write`: stores keys, rotated by position, and values; returns the rotated queries.

        `qkv` [T, num_heads + 2 * num_kv_heads, head_dim], contiguous, `positions` [T], `norm` [num_heads +
        num_kv_heads, head_dim] of a model that normalizes each head. Returns [T, num_heads, head_dim].
        """
        pool, num_tokens = self._layers[layer], len(qkv)
        num_kv_heads, head_dim = pool.shape[3:]
        num_heads = qkv.shape[1] - 2 * num_kv_heads
        group_size = num_heads // num_kv_heads
        query = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
        kernels.rotate_and_write[(num_tokens, num_kv_heads)](
            qkv,
            query,
            pool,
            self.step.slots,
            positions,
            rotary.cos,
            rotary.sin,
            qkv if norm is None else norm,
            eps,
            pool.stride(0),
            has_norm=norm is not None,
            num_pairs=rotary.cos.shape[1],
            is_interleaved=rotary.is_interleaved,
            group_size=group_size,
            padded_rows=triton.next_power_of_2(group_size + 1),
            **_sizes(pool),
            num_warps=1,
        )
        return query

    def attend(self, layer: int, query: Tensor, rule: Rule) -> Tensor:
        pool, result = self._layers[layer], torch.empty_like(query, memory_format=torch.contiguous_format)
        if pool.shape[1] == 1:
            assert self._latent_queries is not None
            self._attend_latents(pool, query, result, rule, self._latent_queries)
            return result
        if self.step.decode_lens is not None:
            self._decode(pool, query, result, rule, self.step.decode_lens)
        if self.step.tiles is not None:
            self._prefill(pool, query, result, rule, *self.step.tiles)
        return result

    def _decode(self, pool: Tensor, query: Tensor, result: Tensor, rule: Rule, decode_lens: Tensor) -> None:
        num_items, (num_heads, head_dim), num_kv_heads = len(decode_lens), query.shape[1:], pool.shape[3]
        group_size = num_heads // num_kv_heads
        split_kv = MANY if num_items * num_kv_heads >= MANY_PAIRS else FEW
        shape = (num_items, num_heads, split_kv.num_splits)
        splits = torch.empty((*shape, head_dim), dtype=torch.float32, device=query.device)
        log_sums = torch.empty(shape, dtype=torch.float32, device=query.device)
        kernels.attend_splits[(num_items, num_kv_heads, split_kv.num_splits)](
            pool,
            query,
            result,
            splits,
            log_sums,
            self.step.query_starts,
            self.step.tables,
            decode_lens,
            *_weighing(rule, query),
            self.step.tables.stride(0),
            pool.stride(0),
            *query.stride()[:2],
            **_variant(rule),
            **split_kv._asdict(),
            group_size=group_size,
            padded_group=max(LEAST_ROWS, triton.next_power_of_2(group_size)),
            **_sizes(pool),
            num_stages=2,
        )
        kernels.merge_splits[(num_items, num_heads)](
            splits,
            log_sums,
            result,
            self.step.query_starts,
            decode_lens,
            **rule.span._asdict(),
            **split_kv._asdict(),
            head_dim=head_dim,
            padded_dim=_padded(head_dim),
        )

    def _attend_latents(
        self, pool: Tensor, query: Tensor, result: Tensor, rule: Rule, queries: LatentQueries
    ) -> None:
        num_queries, num_heads, head_dim = query.shape
        num_tiles = triton.cdiv(num_heads, latents.NUM_ROWS)
        split_kv = MANY if num_queries * num_tiles >= MANY_PAIRS else FEW
        shape = (num_queries, num_heads, split_kv.num_splits)
        splits = torch.empty((*shape, head_dim), dtype=torch.float32, device=query.device)
        log_sums = torch.empty(shape, dtype=torch.float32, device=query.device)
        main_dim = max(16, int(triton.next_power_of_2(head_dim // 2 + 1)))
        latents.attend_latents[(num_queries, num_tiles, split_kv.num_splits)](
            pool,
            query,
            result,
            splits,
            log_sums,
            self.step.tables,
            queries.items,
            queries.context_lens,
            rule.scale * math.log2(math.e),
            self.step.tables.stride(0),
            pool.stride(0),
            *query.stride()[:2],
            **rule.span._asdict(),
            **split_kv._asdict(),
            num_heads=num_heads,
            num_rows=latents.NUM_ROWS,
            block_size=pool.shape[2],
            head_dim=head_dim,
            main_dim=main_dim,
            rest_dim=_padded(head_dim - main_dim),
            tile_len=latents.tile_len(max(query.element_size(), pool.element_size())),
            num_stages=latents.NUM_STAGES,
        )
        kernels.merge_splits[(num_queries, num_heads)](
            splits,
            log_sums,
            result,
            queries.rows,
            queries.context_lens,
            **rule.span._asdict(),
            **split_kv._asdict(),
            head_dim=head_dim,
            padded_dim=_padded(head_dim),
        )

    def _prefill(
        self, pool: Tensor, query: Tensor, result: Tensor, rule: Rule, items: Tensor, firsts: Tensor
    ) -> None:
        (num_heads, head_dim), num_kv_heads = query.shape[1:], pool.shape[3]
        item_bytes = max(query.element_size(), pool.element_size())
        kernels.attend_prompts[(len(items), num_heads)](
            pool,
            query,
            result,
            self.step.tables,
            self.step.context_lens,
            self.step.query_starts,
            items,
            firsts,
            *_weighing(rule, query),
            self.step.tables.stride(0),
            pool.stride(0),
            *query.stride()[:2],
            **_variant(rule),
            group_size=num_heads // num_kv_heads,
            **_sizes(pool),
            num_rows=NUM_ROWS,
            num_stages=num_stages(item_bytes * _padded(head_dim)),
        )


def _padded(head_dim: int) -> int:
    return max(16, int(triton.next_power_of_2(head_dim)))


def _sizes(pool: Tensor) -> dict[str, int]:
    """Constants of all kernels that read or write a layer of the pool."""
    block_size, num_kv_heads, head_dim = pool.shape[2:]
    return {
        "block_size": block_size,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "padded_dim": _padded(head_dim),
    }


def _weighing(rule: Rule, query: Tensor) -> tuple[Tensor, float, float]:
    """Sinks (any tensor without), scale and softcap as the kernels take them: their powers are of 2."""
    log2_e = math.log2(math.e)
    return query if rule.sinks is None else rule.sinks, rule.scale * log2_e, rule.softcap * log2_e


def _variant(rule: Rule) -> dict[str, int | bool]:
    """What a kernel is compiled for."""
    return {
        **rule.span._asdict(),
        "has_softcap": bool(rule.softcap),
        "has_sinks": rule.sinks is not None,
    }


def num_stages(head_bytes: int) -> int:
    """Tiles of keys that `attend_prompts` loads ahead: shared memory holds one of wide heads."""
    return 3 if head_bytes <= 256 else 1


def query_tiles(query_lens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Items of several queries in tiles of `NUM_ROWS`: the item and the first query of each tile, [2, n].

    The last tiles come first: they attend to the most keys, and would end last.
    """
    num_tiles = np.where(query_lens > 1, -(-query_lens // NUM_ROWS), 0)
    items = np.repeat(np.arange(len(query_lens)), num_tiles)
    numbers = np.arange(num_tiles.sum()) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    tiles: NDArray[np.int32] = np.stack([items, numbers * NUM_ROWS])[:, ::-1].astype(np.int32)
    return tiles
