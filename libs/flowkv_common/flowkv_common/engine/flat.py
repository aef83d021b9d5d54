"""The forward pass of the Llama family as one loop over fused weights.

The modules stay valid: their weights become views of the fused ones, so nothing is held twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm, silu

from flowkv_common.engine.attention import Attention
from flowkv_common.engine.flat_weights import FlatWeights, Layer


class Linear(NamedTuple):
    """`x @ weight.T + bias`."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class Fused(NamedTuple):
    """A layer's projections of one input as one."""

    qkv: Linear
    gate_up: Linear


class FlatForward:
    """Equal to `ModulesForward` up to rounding, by test."""

    name = "flat"

    def __init__(self, weights: FlatWeights) -> None:
        """The model's projections are fused in place."""
        self._weights = weights
        self._fused = fuse_layers(weights)

    def __call__(
        self, token_ids: Tensor, position_ids: Tensor, attention: Attention, logits_indices: Tensor
    ) -> Tensor:
        weights = self._weights
        hidden = embedding(token_ids, weights.embedding)  # [T, hidden]
        cos = weights.cos[position_ids].unsqueeze(1)  # [T, 1, dim]
        sin = weights.sin[position_ids].unsqueeze(1)
        for index, (layer, fused) in enumerate(zip(weights.layers, self._fused, strict=True)):
            qkv = linear(self._rms(hidden, layer.input_norm), *fused.qkv)
            hidden = hidden + self._attend(index, layer, qkv, cos, sin, attention)
            gate, up = linear(self._rms(hidden, layer.mlp_norm), *fused.gate_up).chunk(2, dim=-1)
            hidden = hidden + linear(silu(gate) * up, layer.down.weight, layer.down.bias)
        return linear(self._rms(hidden[logits_indices], weights.norm), weights.head)

    def _attend(
        self, index: int, layer: Layer, qkv: Tensor, cos: Tensor, sin: Tensor, attention: Attention
    ) -> Tensor:
        weights = self._weights
        qkv = qkv.view(len(qkv), -1, weights.head_dim)  # [T, heads + 2 kv heads, dim]
        num_heads, num_kv_heads = weights.num_heads, weights.num_kv_heads
        qk, value = torch.split(qkv, [num_heads + num_kv_heads, num_kv_heads], dim=1)
        if layer.qk_norm is not None:
            qk = rms_norm(qk, (weights.head_dim,), eps=weights.eps) * layer.qk_norm
        first, second = qk.chunk(2, dim=-1)
        qk = qk * cos + torch.cat((-second, first), dim=-1) * sin
        query, key = torch.split(qk, [num_heads, num_kv_heads], dim=1)
        attention.write(index, key, value)
        attended = attention.attend(index, query, weights.scale).flatten(1)
        return linear(attended, layer.output.weight, layer.output.bias)

    def _rms(self, states: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(states, weight.shape, weight, self._weights.eps)


def fuse_layers(weights: FlatWeights) -> list[Fused]:
    """The projections of every layer, those of one input as one; the model's own become views of them."""
    fused = []
    for layer in weights.layers:
        fused.append(Fused(qkv=_fuse(*layer.qkv), gate_up=_fuse(layer.gate, layer.up)))
        if weights.head.is_cuda:
            torch.cuda.empty_cache()  # what was fused is free now, and too small for the next
    return fused


@torch.no_grad()
def _fuse(*linears: nn.Linear) -> Linear:
    """One projection in place of several of the same input; theirs become views of it."""
    sizes = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    for part, view in zip(linears, torch.split(weight, sizes), strict=True):
        part.weight.data = view
    return Linear(weight, torch.cat(biases) if biases else None)
