"""The flat forward on a CPU: few rows go through compiled kernels, many through BLAS, in buffers that stay.

BLAS is at the machine's rate for a prompt's rows, and far below that of memory for the few rows of decode.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import rms_norm

from flowkv_common.engine.attention import Attention
from flowkv_common.engine.attention_cpu import CpuAttention
from flowkv_common.engine.flat import FlatForward, Layer, Linear
from flowkv_common.engine.kernels_linear import gate, gated_linear, linear
from flowkv_common.engine.kernels_linear import rms_norm as few_rms_norm
from flowkv_common.engine.vector_ir import LANES

FEW_ROWS = 64  # up to so many, the kernels read weights faster than BLAS does

Array = NDArray[np.float32]


class _Weights(NamedTuple):
    """A layer as the kernels take it. A bias or norm that is not there has no elements."""

    input_norm: Array
    qkv: tuple[Array, Array]  # [out, in], [out or 0]
    qk_norm: Array
    output: tuple[Array, Array]
    mlp_norm: Array
    gate_up: tuple[Array, Array]
    down: tuple[Array, Array]


class _Buffers:
    """What a step of up to `num_rows` rows writes into, named after what it holds."""

    def __init__(self, num_rows: int, hidden: int, heads: int, qkv: int, gate_up: int, head_dim: int) -> None:
        self.num_rows = num_rows
        self.normed = torch.empty(num_rows, hidden)
        self.qkv = torch.empty(num_rows, qkv)
        self.query = torch.empty(num_rows, heads, head_dim)
        self.gate_up = torch.empty(num_rows, gate_up)
        self.gated = torch.empty(num_rows, gate_up // 2)


class CpuFlatForward:
    """Equal to `FlatForward` up to rounding, by test. Its logits are valid until the next call."""

    name = "flat"

    def __init__(self, flat: FlatForward, attention: CpuAttention) -> None:
        """`flat` must be one that `fits` says yes to; `attention` the one that every call brings."""
        self._flat = flat
        self._attention = attention
        self._layers = [_weights(layer) for layer in flat.layers]
        self._cos, self._sin = flat.cos.numpy(), flat.sin.numpy()
        self._head = flat.head.numpy(), _NOTHING
        self._eps = np.float32(flat.eps)
        self._buffers = self._make_buffers(FEW_ROWS)
        self._logits = torch.empty(0, len(flat.head))
        gate(np.zeros((1, 2 * LANES), np.float32))  # compiled now, as all else is by the first token

    @staticmethod
    def fits(flat: FlatForward) -> bool:
        """Whether the kernels can do this model: float32, and sizes that fill vector registers."""
        layer = flat.layers[0]
        sizes = [flat.head_dim, *(each.weight.shape[1] for each in (layer.qkv, layer.output, layer.down))]
        return flat.head.dtype == torch.float32 and not any(size % LANES for size in sizes)

    def __call__(
        self, token_ids: Tensor, position_ids: Tensor, attention: Attention, logits_indices: Tensor
    ) -> Tensor:
        assert attention is self._attention
        num_rows = len(token_ids)
        if num_rows > self._buffers.num_rows:
            self._buffers = self._make_buffers(num_rows)
        hidden = self._flat.embedding[token_ids]  # [T, hidden]
        step = self._few if num_rows <= FEW_ROWS else self._many
        positions = position_ids.numpy()
        for index in range(len(self._layers)):
            step(index, hidden, positions)
        return self._sampled(hidden[logits_indices])

    def _few(self, index: int, hidden: Tensor, positions: NDArray[np.int64]) -> None:
        """One layer, `hidden` in place, by kernels."""
        layer, buffers, eps, num_rows = self._layers[index], self._buffers, self._eps, len(hidden)
        rows = hidden.numpy()
        normed, qkv, gate_up, gated = (
            each[:num_rows].numpy() for each in (buffers.normed, buffers.qkv, buffers.gate_up, buffers.gated)
        )
        few_rms_norm(rows, layer.input_norm, eps, normed)
        linear(normed, *layer.qkv, qkv, False)
        attended = self._attend(index, buffers.qkv[:num_rows], positions)
        linear(attended.numpy(), *layer.output, rows, True)
        few_rms_norm(rows, layer.mlp_norm, eps, normed)
        gated_linear(normed, *layer.gate_up, gate_up, gated)
        linear(gated, *layer.down, rows, True)

    def _many(self, index: int, hidden: Tensor, positions: NDArray[np.int64]) -> None:
        """One layer, `hidden` in place, by BLAS."""
        layer, buffers, num_rows = self._flat.layers[index], self._buffers, len(hidden)
        qkv, gate_up = buffers.qkv[:num_rows], buffers.gate_up[:num_rows]
        _multiply(rms_norm(hidden, layer.input_norm.shape, layer.input_norm, self._flat.eps), layer.qkv, qkv)
        _add_product(self._attend(index, qkv, positions), layer.output, hidden)
        _multiply(
            rms_norm(hidden, layer.mlp_norm.shape, layer.mlp_norm, self._flat.eps), layer.gate_up, gate_up
        )
        gate(gate_up.numpy())
        _add_product(gate_up[:, : gate_up.shape[1] // 2], layer.down, hidden)

    def _attend(self, index: int, qkv: Tensor, positions: NDArray[np.int64]) -> Tensor:
        """[T, heads * dim] out of queries, keys and values side by side, which are spoiled."""
        flat, num_rows = self._flat, len(qkv)
        query = self._buffers.query[:num_rows]
        states = qkv.view(num_rows, -1, flat.head_dim).numpy()
        turn = self._cos, self._sin, self._layers[index].qk_norm, self._eps
        self._attention.rotate_and_write(index, states, positions, *turn, query.numpy())
        return self._attention.attend(index, query, flat.scale).flatten(1)

    def _sampled(self, hidden: Tensor) -> Tensor:
        """Logits [S, vocab] of `hidden` [S, hidden]."""
        num_rows = len(hidden)
        normed = rms_norm(hidden, self._flat.norm.shape, self._flat.norm, self._flat.eps)
        if num_rows > len(self._logits):
            self._logits = torch.empty(num_rows, len(self._flat.head))
        logits = self._logits[:num_rows]
        if num_rows <= FEW_ROWS:
            linear(normed.numpy(), *self._head, logits.numpy(), False)
        else:
            torch.mm(normed, self._flat.head.t(), out=logits)
        return logits

    def _make_buffers(self, num_rows: int) -> _Buffers:
        layer = self._flat.layers[0]
        return _Buffers(
            num_rows=num_rows,
            hidden=layer.qkv.weight.shape[1],
            heads=self._flat.num_heads,
            qkv=layer.qkv.weight.shape[0],
            gate_up=layer.gate_up.weight.shape[0],
            head_dim=self._flat.head_dim,
        )


_NOTHING: Array = np.empty(0, np.float32)


def _multiply(states: Tensor, linear: Linear, out: Tensor) -> None:
    if linear.bias is None:
        torch.mm(states, linear.weight.t(), out=out)
    else:
        torch.addmm(linear.bias, states, linear.weight.t(), out=out)


def _add_product(states: Tensor, linear: Linear, total: Tensor) -> None:
    total.addmm_(states, linear.weight.t())
    if linear.bias is not None:
        total += linear.bias


def _weights(layer: Layer) -> _Weights:
    def arrays(linear: Linear) -> tuple[Array, Array]:
        return linear.weight.numpy(), _NOTHING if linear.bias is None else linear.bias.numpy()

    return _Weights(
        input_norm=layer.input_norm.numpy(),
        qkv=arrays(layer.qkv),
        qk_norm=np.empty((0, 0), np.float32) if layer.qk_norm is None else layer.qk_norm.contiguous().numpy(),
        output=arrays(layer.output),
        mlp_norm=layer.mlp_norm.numpy(),
        gate_up=arrays(layer.gate_up),
        down=arrays(layer.down),
    )
