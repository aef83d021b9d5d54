"""Attention by gathering blocks and calling torch's SDPA: slow, on any device, and what others must equal."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from flowkv_common.errors import CannotStart
from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.servable import UnsupportedModel


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


AUTO, TORCH, CPU, TRITON = "auto", "torch", "cpu", "triton"


def make_attention(name: str, pool: Tensor) -> tuple[str, Attention]:
    """The backend `name` over `pool`, and the name of what was chosen.

    Raises `CannotStart` if there is none of that name, or it can't run here or on this pool.
    """
    obstacles = {TORCH: None, CPU: _cpu_obstacle(pool), TRITON: _triton_obstacle(pool)}
    if name == AUTO:
        name = next(one for one in (TRITON, CPU, TORCH) if not obstacles[one] and not _is_slow(one, pool))
    if name not in obstacles:
        raise CannotStart(f"unknown attention {name!r}: auto, {', '.join(obstacles)} are")
    if obstacle := obstacles[name]:
        raise CannotStart(f"attention {name} can't be used: {obstacle}")
    if name == TRITON:
        from flowkv_engine.engine.gpu.attention import TritonAttention

        return name, TritonAttention(pool)
    if name == CPU:
        from flowkv_engine.engine.cpu.attention import CpuAttention

        return name, CpuAttention(pool)
    return name, TorchAttention(pool)


def _is_slow(name: str, pool: Tensor) -> bool:
    """Triton interprets its kernels on the CPU, for tests."""
    return name == TRITON and pool.device.type == "cpu"


def _triton_obstacle(pool: Tensor) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if pool.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the pool is on {pool.device}, it has to be on a GPU"
    return None


def _cpu_obstacle(pool: Tensor) -> str | None:
    if pool.device.type != "cpu":
        return f"the pool is on {pool.device}"
    if pool.dtype not in (torch.float32, torch.bfloat16):
        return f"its pool is float32 or bfloat16, not {pool.dtype}"
    if find_spec("numba") is None:
        return "numba is not installed"
    from flowkv_engine.engine.cpu.simd import LANES

    if pool.shape[5] % LANES:
        return f"its heads have a multiple of {LANES} dimensions, not {pool.shape[5]}"
    return None


IMPLEMENTATION = "flowkv"
# What some models want of attention, and we don't do.
UNSUPPORTED = {"softcap": "caps on scores", "s_aux": "attention sinks", "position_bias": "a position bias"}


class Attention(Protocol):
    """Causal attention over a pool `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`.

    `bind` once per step, then per layer `write` before `attend`. One thread only.
    """

    def bind(self, batch: PackedBatch) -> None:
        """Makes `batch` the one that the calls below are about."""
        ...

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Stores the step's keys and values, both [T, num_kv_heads, head_dim], at the batch's slots."""
        ...

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """`query` [T, num_heads, head_dim] attends to its items' contexts: the same shape and dtype."""
        ...


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, T, head_dim]
    key: Tensor,  # [1, num_kv_heads, T, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    flowkv: Attention | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that `transformers` calls; the step's `Attention` comes as keyword `flowkv`.

    Raises `UnsupportedModel` if a model asks for anything but causal attention over one cache per layer.
    """
    if flowkv is None:
        raise UnsupportedModel("its attention does not hand on the keyword arguments of the forward pass")
    for name, wanted in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedModel(f"its attention has {wanted}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModel("its attention is not causal")
    if attention_mask is not None:
        raise UnsupportedModel("its attention has a mask of its own, other than the causal one")
    if key.shape != value.shape or query.shape[2:] != key.shape[2:] or query.shape[1] % key.shape[1]:
        sizes = ", ".join(f"{x.shape[1]} x {x.shape[3]}" for x in (query, key, value))
        raise UnsupportedModel(f"its queries, keys and values don't fit one cache: {sizes}")
    layer = module.layer_idx
    assert isinstance(layer, int)
    flowkv.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return flowkv.attend(layer, query[0].transpose(0, 1), scale).unsqueeze(0), None  # [1, T, heads, dim]


AttentionInterface.register(IMPLEMENTATION, paged_attention)
