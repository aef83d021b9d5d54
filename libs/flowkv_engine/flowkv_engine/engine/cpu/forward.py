"""Gives back the memory of weights that are mapped from a file, once they are packed elsewhere."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowkv_engine.engine.cpu.attention import CpuAttention
from flowkv_engine.engine.cpu.linear import gated_linear, linear, pack, rms_norm
from flowkv_engine.engine.cpu.simd import LANES
from flowkv_engine.engine.llama import FlatWeights, Layer

_MAPS = Path("/proc/self/maps")
_MADV_DONTNEED = 4


def give_back(weights: Iterable[Tensor]) -> None:
    """Drops their pages from this process; whoever reads them again reads the file.

    Only whole pages of private file mappings, as safetensors makes them: they hold what the file holds, for
    nobody writes to weights. Memory that no file backs stays. Does nothing where there is no /proc.
    """
    mapped = _file_mappings()
    for weight in weights:
        start = weight.data_ptr()
        stop = start + weight.numel() * weight.element_size()
        if any(first <= start and stop <= last for first, last in mapped):
            first_page = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            num_bytes = stop // mmap.PAGESIZE * mmap.PAGESIZE - first_page
            if num_bytes > 0:
                _madvise(first_page, num_bytes)


def _file_mappings() -> list[tuple[int, int]]:
    """Address ranges, private and of a file."""
    if not _MAPS.exists():
        return []
    found = []
    for line in _MAPS.read_text().splitlines():
        addresses, permissions, _, _, inode, *_ = line.split(maxsplit=5)
        if permissions.endswith("p") and inode != "0":
            start, stop = addresses.split("-")
            found.append((int(start, 16), int(stop, 16)))
    return found


def _madvise(address: int, num_bytes: int) -> None:
    # It is advice: where it is refused, nothing but memory is lost.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _MADV_DONTNEED)


Array = NDArray[np.float32]

_NOTHING: Array = np.empty(0, np.float32)


class _Packed(NamedTuple):
    """A layer as the kernels take it: panels and biases. A bias or norm that is not there has no elements."""

    input_norm: Array
    qkv: tuple[Array, Array]
    qk_norm: Array
    output: tuple[Array, Array]
    mlp_norm: Array
    gate_up: tuple[Array, Array, Array, Array]
    down: tuple[Array, Array]


class _Buffers:
    """What a step of up to `num_rows` rows writes into, named after what it holds."""

    def __init__(self, num_rows: int, hidden: int, heads: int, qkv: int, mlp: int, head_dim: int) -> None:
        self.num_rows = num_rows
        self.normed = np.empty((num_rows, hidden), np.float32)
        self.qkv = np.empty((num_rows, qkv), np.float32)
        self.query = np.empty((num_rows, heads, head_dim), np.float32)
        self.up = np.empty((num_rows, mlp), np.float32)
        self.gated = np.empty((num_rows, mlp), np.float32)


class CpuFlatForward:
    """Equal to `FlatForward` up to rounding, by test. Its logits are valid until the next call."""

    def __init__(self, weights: FlatWeights, attention: CpuAttention) -> None:
        """`weights` must be such that `fits` says yes to; `attention` the one that every call brings.

        The weights are packed into memory of their own: those of the model are not used any more, but for
        the embedding, and their memory is given back where they are mapped from a file.
        """
        self._weights = weights
        self._attention = attention
        self._layers = [_pack(layer) for layer in weights.layers]
        self._head = pack(weights.head.numpy())
        give_back([weights.head])
        self._norm = weights.norm.numpy()
        self._cos, self._sin = weights.cos.numpy(), weights.sin.numpy()
        self._eps = np.float32(weights.eps)
        self._buffers = self._make_buffers(1)
        self._logits = np.empty((0, len(self._head) * LANES), np.float32)

    @staticmethod
    def fits(weights: FlatWeights) -> bool:
        """Whether the kernels can do this model: float32, and sizes that fill vector registers."""
        layer = weights.layers[0]
        sizes = [
            weights.head_dim,
            *(each.in_features for each in (layer.qkv[0], layer.output, layer.down)),
        ]
        return weights.head.dtype == torch.float32 and not any(size % LANES for size in sizes)

    def __call__(self, token_ids: Tensor, position_ids: Tensor, logits_indices: Tensor) -> Tensor:
        num_rows = len(token_ids)
        if num_rows > self._buffers.num_rows:
            self._buffers = self._make_buffers(num_rows)
        hidden = self._weights.embedding[token_ids].numpy()  # [T, hidden]
        positions = position_ids.numpy()
        sampled = logits_indices.numpy()
        for index in range(len(self._layers)):
            hidden = self._layer(index, hidden, positions, sampled)
        return self._logits_of(hidden)

    def _layer(
        self, index: int, hidden: Array, positions: NDArray[np.int64], sampled: NDArray[np.int64]
    ) -> Array:
        """One layer on `hidden` [T, hidden], which it overwrites.

        Of the last layer only keys and values are wanted of all rows, else the sampled ones: [S, hidden].
        """
        layer, buffers, eps = self._layers[index], self._buffers, self._eps
        normed, qkv = buffers.normed[: len(hidden)], buffers.qkv[: len(hidden)]
        rms_norm(hidden, layer.input_norm, eps, normed)
        linear(normed, *layer.qkv, qkv, False)
        attended = self._attend(index, qkv, positions)
        if index == len(self._layers) - 1:
            hidden, attended = hidden[sampled], attended[sampled]
        num_rows = len(hidden)
        normed, up, gated = (each[:num_rows] for each in (buffers.normed, buffers.up, buffers.gated))
        linear(attended, *layer.output, hidden, True)
        rms_norm(hidden, layer.mlp_norm, eps, normed)
        gated_linear(normed, *layer.gate_up, up, gated)
        linear(gated, *layer.down, hidden, True)
        return hidden

    def _attend(self, index: int, qkv: Array, positions: NDArray[np.int64]) -> Array:
        """[T, heads * dim] out of queries, keys and values side by side, which are spoiled."""
        weights, num_rows = self._weights, len(qkv)
        query = self._buffers.query[:num_rows]
        states = qkv.reshape(num_rows, -1, weights.head_dim)
        turn = self._cos, self._sin, self._layers[index].qk_norm, self._eps
        self._attention.rotate_and_write(index, states, positions, *turn, query)
        attended = self._attention.attend(index, torch.from_numpy(query), weights.scale).numpy()
        return attended.reshape(num_rows, -1)

    def _logits_of(self, hidden: Array) -> Tensor:
        """Logits [S, vocab] of `hidden` [S, hidden]."""
        num_rows, num_cols = len(hidden), len(self._weights.head)
        normed = np.empty_like(hidden)
        rms_norm(hidden, self._norm, self._eps, normed)
        if num_rows > len(self._logits):
            self._logits = np.empty((num_rows, self._logits.shape[1]), np.float32)
        logits = self._logits[:num_rows]
        linear(normed, self._head, _NOTHING, logits, False)
        return torch.from_numpy(logits[:, :num_cols]).contiguous()

    def _make_buffers(self, num_rows: int) -> _Buffers:
        layer = self._weights.layers[0]
        return _Buffers(
            num_rows=num_rows,
            hidden=layer.qkv[0].in_features,
            heads=self._weights.num_heads,
            qkv=sum(each.out_features for each in layer.qkv),
            mlp=layer.down.in_features,
            head_dim=self._weights.head_dim,
        )


def _pack(layer: Layer) -> _Packed:
    packed = _Packed(
        input_norm=layer.input_norm.numpy(),
        qkv=_panels(*layer.qkv),
        qk_norm=np.empty((0, 0), np.float32) if layer.qk_norm is None else layer.qk_norm.numpy(),
        output=_panels(layer.output),
        mlp_norm=layer.mlp_norm.numpy(),
        gate_up=(*_panels(layer.gate), *_panels(layer.up)),
        down=_panels(layer.down),
    )
    give_back(each.weight for each in (*layer.qkv, layer.output, layer.gate, layer.up, layer.down))
    return packed


def _panels(*linears: nn.Linear) -> tuple[Array, Array]:
    """Panels and bias of projections of one input, side by side."""
    panels = pack(*(each.weight.detach().numpy() for each in linears))
    biases = [each.bias.detach().numpy() for each in linears if each.bias is not None]
    return panels, np.concatenate(biases) if biases else _NOTHING
