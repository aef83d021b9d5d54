"""Attention over the KV pool: what a backend promises, the one in plain torch, and how one is chosen."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowkv_common.errors import CannotStart
from flowkv_engine.engine.batch import PackedBatch


class Span(NamedTuple):
    """How far back a layer's queries see; both 0: to the first token.

    `window`: a query sees itself and the `window - 1` tokens before it. `chunk`: it sees, up to itself, the
    tokens of its own run of `chunk` positions, counted from the first token (Llama 4).
    """

    window: int = 0
    chunk: int = 0

    def first_seen(self, positions: Tensor) -> Tensor:
        """The first position that a query at each of `positions` sees."""
        if self.chunk:
            return positions - positions % self.chunk
        return (positions - self.window + 1).clamp(min=0) if self.window else torch.zeros_like(positions)


class Rule(NamedTuple):
    """How a layer weighs what its queries see: the softmax of `scale` times each product of query and key."""

    scale: float
    span: Span = Span()
    # Not 0: a score becomes `softcap * tanh(score / softcap)` before the softmax (Gemma 2).
    softcap: float = 0.0
    # [num_heads]: one more score of each head, of a token without a value (GPT-OSS).
    sinks: Tensor | None = None


def narrowed(states: Tensor, dtype: torch.dtype) -> Tensor:
    """As a pool of `dtype` stores them. What is too large for 8 bits becomes the largest, not NaN."""
    if dtype == torch.float8_e4m3fn:
        largest = torch.finfo(dtype).max
        states = states.clamp(-largest, largest)
    return states.to(dtype)


class Attention(Protocol):
    """Causal attention over the layers of a pool, as `layer_views` has them; each may have its own sizes.

    `bind` once per step, then per layer `write` before `attend`. One thread only.
    """

    name: str  # "torch", "cpu" or "triton"

    def bind(self, batch: PackedBatch) -> None:
        """Prepares for the step of `batch`."""

    def write(self, layer: int, key: Tensor, value: Tensor | None) -> None:
        """Stores the step's keys and values, both [T, num_kv_heads, head_dim], at the batch's slots.

        Of a layer with one side only keys, which are its values.
        """

    def attend(self, layer: int, query: Tensor, rule: Rule) -> Tensor:
        """`query` [T, num_heads, head_dim] attends to its items' contexts: the same shape and dtype."""
        ...


class Prefill(NamedTuple):
    """One item of several query tokens: its rows, its blocks, and the tokens it attends to."""

    rows: slice
    blocks: Tensor  # [blocks of the item]
    context_len: int


class TorchAttention:
    """Gathers blocks and weighs them in torch: slow, on any device, and what the other backends must equal.

    Items of one token run as one padded batch, the others one by one.
    """

    name = "torch"

    def __init__(self, layers: Sequence[Tensor]) -> None:
        self._layers = layers
        self._block_size = layers[0].shape[2]
        self._write_at = (torch.empty(0), torch.empty(0))  # blocks and offsets, [T] each
        self._decode_rows = self._decode_tables = self._decode_lens = torch.empty(0)
        self._prefills: list[Prefill] = []

    def bind(self, batch: PackedBatch) -> None:
        device = self._layers[0].device
        slots = torch.from_numpy(batch.slots).to(device)
        self._write_at = slots // self._block_size, slots % self._block_size

        tables = torch.from_numpy(batch.block_tables).to(device)
        decode = torch.from_numpy(batch.query_lens == 1).to(device)
        self._decode_rows = torch.from_numpy(batch.query_starts[:-1]).to(device)[decode]
        self._decode_tables = tables[decode]
        self._decode_lens = torch.from_numpy(batch.context_lens).to(device)[decode]

        self._prefills = []
        edges = batch.query_starts.tolist()
        for item, context_len in enumerate(batch.context_lens.tolist()):
            if edges[item + 1] - edges[item] > 1:
                blocks = tables[item, : -(-context_len // self._block_size)]
                self._prefills.append(Prefill(slice(edges[item], edges[item + 1]), blocks, context_len))

    def write(self, layer: int, key: Tensor, value: Tensor | None) -> None:
        for side, states in enumerate((key,) if value is None else (key, value)):
            self._layers[layer][:, side][self._write_at] = narrowed(states, self._layers[layer].dtype)

    def attend(self, layer: int, query: Tensor, rule: Rule) -> Tensor:
        if not self._prefills:
            return self._decode(layer, query, rule)
        out = torch.empty_like(query)
        if len(self._decode_rows):
            out[self._decode_rows] = self._decode(layer, query[self._decode_rows], rule)
        for item in self._prefills:
            out[item.rows] = self._prefill(layer, query[item.rows], item, rule)
        return out

    def _decode(self, layer: int, query: Tensor, rule: Rule) -> Tensor:
        positions = torch.arange(self._decode_tables.shape[1] * self._block_size, device=query.device)
        lens = self._decode_lens[:, None]
        seen = (positions < lens) & (positions >= rule.span.first_seen(lens - 1))  # [N, padded context]
        # Padding may hold anything, NaN too, which no mask on the scores would keep out.
        keys, values = (
            self._layers[layer][:, side][self._decode_tables]
            .flatten(1, 2)
            .transpose(1, 2)  # [N, kv heads, padded context, dim]
            .to(query.dtype)
            .masked_fill(~seen[:, None, :, None], 0)
            for side in (0, -1)  # the same, of latents
        )
        return _weigh(query.unsqueeze(2), keys, values, seen[:, None, None], rule).squeeze(2)

    def _prefill(self, layer: int, query: Tensor, item: Prefill, rule: Rule) -> Tensor:
        keys, values = (
            self._layers[layer][:, side][item.blocks]
            .flatten(0, 1)[: item.context_len]
            .transpose(0, 1)  # [kv heads, context, dim]
            .to(query.dtype)
            for side in (0, -1)
        )
        positions = torch.arange(item.context_len, device=query.device)
        places = positions[-len(query) :, None]
        seen = (positions <= places) & (positions >= rule.span.first_seen(places))  # [T, context]
        out = _weigh(query.transpose(0, 1)[None], keys[None], values[None], seen, rule)
        return out[0].transpose(0, 1)


def _weigh(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, rule: Rule) -> Tensor:
    """`query` [N, heads, T, dim], `keys` and `values` [N, kv heads, context, dim] -> as `query`.

    `seen`: what each query sees, bool, spreads to [N, heads, T, context].
    """
    num_heads, length = query.shape[1:3]
    if keys.shape[1] == 1 < num_heads and not rule.softcap and rule.sinks is None:
        # One row for each head and query: else torch copies the keys for each head.
        rows = query.flatten(1, 2).unsqueeze(1)
        seen = seen.expand(*seen.shape[:-2], length, -1).repeat(*[1] * (seen.dim() - 2), num_heads, 1)
        out = scaled_dot_product_attention(rows, keys, values, seen, scale=rule.scale)
        return out.view(query.shape)
    if not rule.softcap and rule.sinks is None:
        return scaled_dot_product_attention(query, keys, values, seen, scale=rule.scale, enable_gqa=True)
    group_size = query.shape[1] // keys.shape[1]
    keys, values = (side.repeat_interleave(group_size, dim=1) for side in (keys, values))
    scores = (query @ keys.transpose(2, 3)).float() * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[2]]
    return weights.to(query.dtype) @ values


def make_attention(name: str, layers: Sequence[Tensor]) -> Attention:
    """The backend `name` over the `layers` of a pool; for "auto" the fastest that works here.

    Raises `CannotStart` if there is none of that name, or it can't run here or on this pool.
    """
    device = layers[0].device
    obstacles = {"torch": None, "cpu": _cpu_obstacle(layers), "triton": _triton_obstacle(device)}
    if name == "auto":  # on the CPU Triton interprets its kernels, for tests
        fastest = ("triton", "cpu", "torch") if device.type != "cpu" else ("cpu", "torch")
        name = next(each for each in fastest if not obstacles[each])
    if name not in obstacles:
        raise CannotStart(f"unknown attention {name!r}: choose one of auto, {', '.join(obstacles)}")
    if obstacle := obstacles[name]:
        raise CannotStart(f"attention {name} can't be used: {obstacle}")
    if name == "triton":
        from flowkv_engine.engine.gpu.attention import TritonAttention

        return TritonAttention(layers)
    if name == "cpu":
        from flowkv_engine.engine.cpu.attention import CpuAttention

        return CpuAttention(layers)
    return TorchAttention(layers)


def _cpu_obstacle(layers: Sequence[Tensor]) -> str | None:
    device, dtype = layers[0].device, layers[0].dtype
    if device.type != "cpu":
        return f"the pool is on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        return f"its pool is float32, bfloat16 or float8_e4m3fn, not {dtype}"
    if find_spec("numba") is None:
        return "numba is not installed"
    from flowkv_engine.engine.cpu.simd import LANES

    for layer in layers:
        if layer.shape[1] == 2 and layer.shape[4] % LANES:
            return f"its heads have a multiple of {LANES} dimensions, not {layer.shape[4]}"
    return None


def _triton_obstacle(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the pool is on {device}, it has to be on a GPU"
    return None
