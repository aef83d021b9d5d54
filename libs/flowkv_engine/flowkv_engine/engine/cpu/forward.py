"""The Llama forward on the CPU: compiled kernels over packed weights, and memory kept between steps."""

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

from flowkv_engine.engine.cpu.attention import CpuAttention, Scratch, rotate_and_write
from flowkv_engine.engine.cpu.linear import gated_linear, linear, pack, rms_norm
from flowkv_engine.engine.cpu.simd import LANES
from flowkv_engine.engine.forward import Layer, LlamaStates, LlamaWeights

_MAPS = Path("/proc/self/maps")
_MADV_DONTNEED = 4

Array = NDArray[np.float32]

_NOTHING: Array = np.empty(0, np.float32)


class _Packed(NamedTuple):
    """A layer as the kernels take it: panels and biases. A missing bias or norm has no elements."""

    input_norm: Array
    qkv: tuple[Array, Array]
    qk_norm: Array
    output: tuple[Array, Array]
    mlp_norm: Array
    gate_up: tuple[Array, Array, Array, Array]
    down: tuple[Array, Array]


class CpuLlamaForward(LlamaStates):
    """Equal to `LlamaForward` up to rounding, by test. Its logits are valid until the next call."""

    def __init__(self, weights: LlamaWeights, attention: CpuAttention) -> None:
        """`weights` must fit (see `fits`).

        Packs the weights into new memory. Of the model's own only the embedding is used from then on; the
        memory of the others is given back where they are mapped from a file.
        """
        self._weights = weights
        self._attention = attention
        self._layers = [_pack(layer) for layer in weights.layers]
        self._head = pack(weights.head.numpy())
        give_back([weights.head])
        self._scratch = Scratch()

    @staticmethod
    def fits(weights: LlamaWeights) -> bool:
        """Whether the kernels can do this model: float32, and sizes that fill vector registers."""
        layer = weights.layers[0]
        inputs = [each.in_features for each in (layer.qkv[0], layer.output, layer.down)]
        return weights.head.dtype == torch.float32 and not any(
            size % LANES for size in (weights.head_dim, *inputs)
        )

    def states(self, token_ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
        weights, num_rows, layer = self._weights, len(token_ids), self._weights.layers[0]
        eps, head_dim = np.float32(weights.eps), weights.head_dim
        cos, sin, positions = weights.cos.numpy(), weights.sin.numpy(), position_ids.numpy()
        hidden = weights.embedding[token_ids].numpy()  # [T, hidden]
        normed = self._scratch.array("normed", *hidden.shape)
        heads = self._scratch.array("qkv", num_rows, sum(each.out_features for each in layer.qkv))
        states = heads.reshape(num_rows, -1, head_dim)  # [T, heads + 2 kv heads, dim]
        query = self._scratch.array("query", num_rows, weights.num_heads, head_dim)
        up = self._scratch.array("up", num_rows, layer.down.in_features)
        gated = self._scratch.array("gated", num_rows, layer.down.in_features)
        for index, packed in enumerate(self._layers):
            rms_norm(hidden, packed.input_norm, eps, normed)
            linear(normed, *packed.qkv, heads, False)
            pool, slots = self._attention.pool_array, self._attention.slots
            rotate_and_write(pool, index, slots, states, positions, cos, sin, packed.qk_norm, eps, query)
            attended = self._attention.attend(index, torch.from_numpy(query), weights.scale).numpy()
            attended = attended.reshape(num_rows, -1)
            if index == len(self._layers) - 1:  # the other rows need only keys and values
                wanted = rows.numpy()
                hidden, attended = hidden[wanted], attended[wanted]
                normed, up, gated = (each[: len(wanted)] for each in (normed, up, gated))
            linear(attended, *packed.output, hidden, True)
            rms_norm(hidden, packed.mlp_norm, eps, normed)
            gated_linear(normed, *packed.gate_up, up, gated)
            linear(gated, *packed.down, hidden, True)
        return torch.from_numpy(hidden)

    def logits(self, states: Tensor) -> Tensor:
        weights, hidden = self._weights, states.numpy()
        normed = self._scratch.array("normed", *hidden.shape)
        logits = self._scratch.array("logits", len(hidden), len(self._head) * LANES)
        rms_norm(hidden, weights.norm.numpy(), np.float32(weights.eps), normed)
        linear(normed, self._head, _NOTHING, logits, False)
        return torch.from_numpy(logits[:, : len(weights.head)]).contiguous()


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


def give_back(weights: Iterable[Tensor]) -> None:
    """Drops the pages of `weights` from this process; a later read reads the file.

    Only whole pages of private file mappings, as safetensors makes them: they hold what the file holds, for
    nothing writes to weights. Memory that no file backs stays. Does nothing where there is no /proc.
    """
    mapped = []
    for line in _MAPS.read_text().splitlines() if _MAPS.exists() else ():
        addresses, permissions, _, _, inode, *_ = line.split(maxsplit=5)
        if permissions.endswith("p") and inode != "0":
            start, stop = addresses.split("-")
            mapped.append((int(start, 16), int(stop, 16)))
    for weight in weights:
        begin = weight.data_ptr()
        end = begin + weight.numel() * weight.element_size()
        first_page = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        num_bytes = end // mmap.PAGESIZE * mmap.PAGESIZE - first_page
        if num_bytes > 0 and any(start <= begin and end <= stop for start, stop in mapped):
            # It is advice: where it is refused, nothing but memory is lost.
            address, size = ctypes.c_void_p(first_page), ctypes.c_size_t(num_bytes)
            ctypes.CDLL(None).madvise(address, size, _MADV_DONTNEED)
