"""Attention by gathering blocks and calling torch's SDPA: slow, on any device, and what others must equal."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowkv_common.engine.batch import PackedBatch


class Prefill(NamedTuple):
    """One item of several query tokens: its rows, its blocks, and the tokens it attends to."""

    rows: slice
    blocks: Tensor  # [blocks of the item]
    context_len: int


class TorchAttention:
    """The oracle. Items of one token run as one padded batch, the others one by one."""

    def __init__(self, pool: Tensor) -> None:
        self._pool = pool
        self._block_size = pool.shape[3]
        self._write_blocks = self._write_offsets = torch.empty(0)
        self._decode_rows = self._decode_tables = self._decode_mask = torch.empty(0)
        self._prefills: list[Prefill] = []

    def bind(self, batch: PackedBatch) -> None:
        device = self._pool.device
        slots = torch.from_numpy(batch.slots).to(device)
        self._write_blocks, self._write_offsets = slots // self._block_size, slots % self._block_size

        tables = torch.from_numpy(batch.block_tables).to(device)
        context_lens = torch.from_numpy(batch.context_lens).to(device)
        starts = torch.from_numpy(batch.query_starts).to(device)
        decode = torch.from_numpy(batch.query_lens == 1).to(device)
        self._decode_rows = starts[:-1][decode]
        self._decode_tables = tables[decode]
        positions = torch.arange(tables.shape[1] * self._block_size, device=device)
        self._decode_mask = (positions < context_lens[decode, None])[
            :, None, None
        ]  # [N, 1, 1, padded context]

        self._prefills = []
        edges = batch.query_starts.tolist()
        for item, context_len in enumerate(batch.context_lens.tolist()):
            if edges[item + 1] - edges[item] > 1:
                blocks = tables[item, : -(-context_len // self._block_size)]
                self._prefills.append(Prefill(slice(edges[item], edges[item + 1]), blocks, context_len))

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        where = (self._write_blocks, self._write_offsets)
        self._pool[:, layer, 0][where] = key.to(self._pool.dtype)
        self._pool[:, layer, 1][where] = value.to(self._pool.dtype)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        if not self._prefills:
            return self._decode(layer, query, scale)
        out = torch.empty_like(query)
        if len(self._decode_rows):
            out[self._decode_rows] = self._decode(layer, query[self._decode_rows], scale)
        for item in self._prefills:
            out[item.rows] = self._prefill(layer, query[item.rows], item, scale)
        return out

    def _decode(self, layer: int, query: Tensor, scale: float) -> Tensor:
        # Padding may hold anything, NaN too, which no mask on the scores would keep out.
        is_padding = ~self._decode_mask.transpose(2, 3)  # [N, 1, padded context, 1]
        keys, values = (
            self._pool[:, layer, side][self._decode_tables]
            .flatten(1, 2)
            .transpose(1, 2)  # [N, kv heads, padded context, dim]
            .to(query.dtype)
            .masked_fill(is_padding, 0)
            for side in (0, 1)
        )
        out = scaled_dot_product_attention(
            query.unsqueeze(2), keys, values, self._decode_mask, scale=scale, enable_gqa=True
        )
        return out.squeeze(2)

    def _prefill(self, layer: int, query: Tensor, item: Prefill, scale: float) -> Tensor:
        keys, values = self._gathered(layer, item, query.dtype)
        num_cached = item.context_len - len(query)
        mask = None
        if num_cached:  # is_causal would line the triangle up with the first key
            mask = query.new_ones(len(query), item.context_len, dtype=torch.bool).tril(num_cached)
        out = scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)

    def _gathered(self, layer: int, item: Prefill, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of a prompt's context so far, each [context, kv heads, dim]."""
        keys, values = (
            self._pool[:, layer, side][item.blocks].flatten(0, 1)[: item.context_len].to(dtype)
            for side in (0, 1)
        )
        return keys, values
