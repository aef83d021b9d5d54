"""The Llama forward on a GPU: torch's matmuls, and one Triton kernel for all that is between two of them."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn.functional import embedding, linear

from flowkv_engine.engine.gpu import kernels
from flowkv_engine.engine.gpu.attention import TritonAttention
from flowkv_engine.engine.llama import LlamaWeights, fuse

GATE_TILE_LEN = 1024
LONG_ROW = 4096  # numbers; a longer row takes twice the threads


class TritonLlamaForward:
    """Equal to `LlamaForward` up to rounding, by test. It never reads a number from the device."""

    def __init__(self, weights: LlamaWeights, attention: TritonAttention) -> None:
        """The model's projections are fused in place."""
        self.weights = weights
        self.attention = attention
        self._fused = [(fuse(*layer.qkv), fuse(layer.gate, layer.up)) for layer in weights.layers]
        self._input_norms = [*(layer.input_norm for layer in weights.layers[1:]), weights.norm]

    def __call__(self, token_ids: Tensor, position_ids: Tensor, logits_indices: Tensor) -> Tensor:
        weights, attention = self.weights, self.attention
        hidden = embedding(token_ids, weights.embedding)  # [T, hidden]
        normed = self._add_and_norm(hidden, None, weights.layers[0].input_norm)
        for index, (layer, (fused_qkv, gate_up)) in enumerate(zip(weights.layers, self._fused, strict=True)):
            qkv = linear(normed, *fused_qkv).view(len(normed), -1, weights.head_dim)
            query = attention.rotate_and_write(
                index, qkv, position_ids, weights.cos, weights.sin, layer.qk_norm, weights.eps
            )
            attended = attention.attend(index, query, weights.scale).flatten(1)
            if index == len(weights.layers) - 1 and len(logits_indices) < len(hidden):
                # The last layer needs only keys and values of the other rows.
                hidden, attended = (each.index_select(0, logits_indices) for each in (hidden, attended))
            delta = linear(attended, layer.output.weight, layer.output.bias)
            normed = self._add_and_norm(hidden, delta, layer.mlp_norm)
            delta = linear(_gate(linear(normed, *gate_up)), layer.down.weight, layer.down.bias)
            normed = self._add_and_norm(hidden, delta, self._input_norms[index])
        return linear(normed, weights.head)

    def _add_and_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        """The norm [T, hidden] of the sum, which `hidden` becomes."""
        num_dims, result = hidden.shape[1], torch.empty_like(hidden)
        kernels.add_and_norm[(len(hidden),)](
            hidden,
            hidden if delta is None else delta,
            weight,
            result,
            self.weights.eps,
            num_dims=num_dims,
            padded_dims=triton.next_power_of_2(num_dims),
            adds=delta is not None,
            num_warps=8 if num_dims >= LONG_ROW else 4,
        )
        return result


def _gate(gate_up: Tensor) -> Tensor:
    num_rows, num_dims = len(gate_up), gate_up.shape[1] // 2
    result = torch.empty(num_rows, num_dims, dtype=gate_up.dtype, device=gate_up.device)
    kernels.gate[(num_rows, triton.cdiv(num_dims, GATE_TILE_LEN))](
        gate_up, result, num_dims=num_dims, tile_len=GATE_TILE_LEN
    )
    return result
