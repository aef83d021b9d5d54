"""The flat forward on the CPU: compiled kernels over packed weights, and memory kept between steps."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowkv_engine.engine.attention import Rule
from flowkv_engine.engine.cpu.attention import CpuAttention, Scratch, rotate_and_write
from flowkv_engine.engine.cpu.experts import (
    add_weighted,
    experts_gated_linear,
    experts_linear,
    route,
    sort_by_expert,
    take_rows,
)
from flowkv_engine.engine.cpu.linear import gated_linear, linear, pack, rms_norm, unpack_rows
from flowkv_engine.engine.cpu.panels import block_len, pack_stored
from flowkv_engine.engine.cpu.simd import LANES
from flowkv_engine.engine.experts import Activation, Experts
from flowkv_engine.engine.flat import FlatWeights, Layer, Mlp, Projection, Rotary, halves
from flowkv_engine.engine.forward import FlatStates
from flowkv_engine.engine.stored import Form
from flowkv_engine.engine.stored_modules import (
    STORED_FLOATS,
    StoredEmbedding,
    StoredLinear,
    StoredWeight,
    stored_floats,
)

_MAPS = Path("/proc/self/maps")
_MADV_DONTNEED = 4

Array = NDArray[np.float32]

_NOTHING: Array = np.empty(0, np.float32)


class _Part(NamedTuple):
    """Projections of one input whose weights have one form and one order of inputs, side by side."""

    panels: NDArray[Any]
    bias: Array  # no elements without one
    num_cols: int
    order: NDArray[np.int64] | None  # the input of each step of K, if they are not in order

    def inputs(self, states: Array) -> Array:
        return states if self.order is None else np.take(states, self.order, axis=1)


class _PackedMlp(NamedTuple):
    gate: _Part
    up: _Part
    down: list[_Part]
    activation: tuple[np.float32, ...]


class _PackedExperts(NamedTuple):
    """Weights [experts, ...] in panels; what is missing has no elements."""

    router: _Part
    routing: tuple[Any, ...]  # arguments of `route`
    top_k: int
    gate: NDArray[Any]
    gate_bias: Array
    up: NDArray[Any]
    up_bias: Array
    down: NDArray[Any]
    down_bias: Array
    activation: tuple[np.float32, ...]


class _Packed(NamedTuple):
    """A layer as the kernels take it. A missing norm of heads has no elements."""

    input_norm: Array
    qkv: list[_Part]
    qk_norm: Array
    norms_together: bool
    rotary: tuple[Array, Array, bool]
    rule: Rule
    output: list[_Part]
    attention_out_norm: Array | None
    mlp_norm: Array
    mlp: _PackedMlp | None
    experts: _PackedExperts | None
    mlp_out_norm: Array | None


class CpuFlatForward(FlatStates):
    """Equal to `FlatForward` up to rounding, by test. Its logits are valid until the next call."""

    def __init__(self, weights: FlatWeights, attention: CpuAttention) -> None:
        """`weights` must fit (see `fits`).

        Packs the weights into new memory, in the form that they have. Of the model's own only an embedding
        in float32 is used from then on; the others' memory is given back where it is mapped from a file.
        """
        self._weights = weights
        self._attention = attention
        self._layers = [_pack(layer) for layer in weights.layers]
        stored = weights.embedding.stored if isinstance(weights.embedding, StoredEmbedding) else None
        is_tied = isinstance(weights.head, StoredLinear) and weights.head.stored is stored
        self._head = _parts(weights.head)
        _release(weights.head)
        self._embedding: NDArray[Any] | None = None  # packed, if it is stored in fewer bits
        if stored is not None:
            self._embedding = self._head[0].panels if is_tied else pack_stored(stored)
        _release(weights.embedding)
        self._scratch = Scratch()

    @staticmethod
    def fits(weights: FlatWeights) -> bool:
        """Whether the kernels can do this model: float32 or stored, and sizes that fill vector registers."""
        sizes = {weights.head_dim}
        for layer in weights.layers:
            sizes |= {layer.qkv[0].in_features, layer.output.in_features}
            if layer.mlp is not None:
                sizes.add(layer.mlp.down.in_features)
            if layer.experts is not None:
                sizes.add(layer.experts.down.shape[2])
        return weights.norm.dtype == torch.float32 and not any(size % LANES for size in sizes)

    def states(self, token_ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
        weights, num_rows, layer = self._weights, len(token_ids), self._weights.layers[0]
        eps, positions = np.float32(weights.eps), position_ids.numpy()
        hidden = self._embed(token_ids)  # [T, hidden]
        normed = self._scratch.array("normed", *hidden.shape)
        heads = self._scratch.array("qkv", num_rows, sum(each.out_features for each in layer.qkv))
        states = heads.reshape(num_rows, -1, weights.head_dim)  # [T, heads + 2 kv heads, dim]
        query = self._scratch.array("query", num_rows, weights.num_heads, weights.head_dim)
        for index, packed in enumerate(self._layers):
            rms_norm(hidden, packed.input_norm, eps, normed, False)
            self._project(normed, packed.qkv, heads)
            pool, slots = self._attention.layers[index], self._attention.slots
            norms = packed.qk_norm, packed.norms_together, eps
            rotate_and_write(*pool, slots, states, positions, packed.rotary, *norms, query)
            attended = self._attention.attend(index, torch.from_numpy(query), packed.rule).numpy()
            attended = attended.reshape(num_rows, -1)
            if index == len(self._layers) - 1:  # the other rows need only keys and values
                wanted = rows.numpy()
                hidden, attended, normed = hidden[wanted], attended[wanted], normed[: len(wanted)]
            self._add(hidden, attended, packed.output, packed.attention_out_norm)
            rms_norm(hidden, packed.mlp_norm, eps, normed, False)
            if packed.mlp is not None:
                self._add(hidden, self._gated(normed, packed.mlp), packed.mlp.down, packed.mlp_out_norm)
            if packed.experts is not None:
                self._mix(hidden, normed, packed.experts)
        return torch.from_numpy(hidden)

    def logits(self, states: Tensor) -> Tensor:
        weights, hidden = self._weights, states.numpy()
        normed = self._scratch.array("normed", *hidden.shape)
        [head] = self._head
        logits = self._scratch.array("logits", len(hidden), len(head.panels) * LANES)
        rms_norm(hidden, weights.norm.numpy(), np.float32(weights.eps), normed, False)
        linear(head.inputs(normed), head.panels, head.bias, logits, False)
        return weights.cap(torch.from_numpy(logits[:, : head.num_cols]).contiguous())

    def _embed(self, token_ids: Tensor) -> Array:
        if self._embedding is None:
            hidden: Array = self._weights.embedding(token_ids).numpy()
        else:
            hidden = np.empty((len(token_ids), self._weights.layers[0].qkv[0].in_features), np.float32)
            unpack_rows(self._embedding, token_ids.numpy(), hidden)
            if self._weights.embedding_scale != 1:
                hidden *= np.float32(self._weights.embedding_scale)
        return hidden

    def _gated(self, states: Array, mlp: _PackedMlp) -> Array:
        up, gated = (self._scratch.array(name, len(states), mlp.up.num_cols) for name in ("up", "gated"))
        gated_linear(
            mlp.gate.inputs(states),
            mlp.gate.panels,
            mlp.gate.bias,
            mlp.up.panels,
            mlp.up.bias,
            mlp.activation,
            up,
            gated,
        )
        return gated

    def _mix(self, hidden: Array, states: Array, experts: _PackedExperts) -> None:
        """`hidden +=` what the experts make of `states`."""
        num_experts, num_rows = len(experts.gate), len(states)
        logits = self._scratch.array("logits", num_rows, len(experts.router.panels) * LANES)
        linear(states, experts.router.panels, experts.router.bias, logits, False)
        ids, weights = (
            np.empty((num_rows, experts.top_k), np.int64),
            np.empty((num_rows, experts.top_k), np.float32),
        )
        route(logits, num_experts, *experts.routing, ids, weights)
        rows, places, blocks = sort_by_expert(ids, num_experts)
        taken = self._scratch.array("taken", len(rows), states.shape[1])
        take_rows(states, rows, taken)
        size = experts.gate.shape[1] * LANES
        up, gated = (self._scratch.array(name, len(rows), size) for name in ("up", "gated"))
        experts_gated_linear(
            taken,
            blocks,
            experts.gate,
            experts.gate_bias,
            experts.up,
            experts.up_bias,
            experts.activation,
            up,
            gated,
        )
        experts_linear(gated, blocks, experts.down, experts.down_bias, taken)
        add_weighted(taken, places, weights, hidden)

    def _add(self, hidden: Array, states: Array, parts: Sequence[_Part], norm: Array | None) -> None:
        """`hidden += states @ weight.T + bias`, normalized before if there is a norm."""
        if norm is None:
            self._project(states, parts, hidden, adds=True)
            return
        added = self._scratch.array("added", *hidden.shape)
        self._project(states, parts, added)
        rms_norm(added, norm, np.float32(self._weights.eps), hidden, True)

    def _project(self, states: Array, parts: Sequence[_Part], out: Array, *, adds: bool = False) -> None:
        """`out [M, N] = states [M, K] @ weight.T + bias`, or `+=` if `adds`, which one part alone can."""
        if len(parts) == 1:
            linear(parts[0].inputs(states), parts[0].panels, parts[0].bias, out, adds)
            return
        start = 0
        for part in parts:
            columns = self._scratch.array("columns", len(states), part.num_cols)
            linear(part.inputs(states), part.panels, part.bias, columns, False)
            out[:, start : start + part.num_cols] = columns
            start += part.num_cols


def _pack(layer: Layer) -> _Packed:
    packed = _Packed(
        input_norm=layer.input_norm.numpy(),
        qkv=_parts(*layer.qkv),
        qk_norm=np.empty((0, 0), np.float32) if layer.qk_norm is None else layer.qk_norm.numpy(),
        norms_together=layer.norms_together,
        rotary=_arrays(layer.rotary),
        rule=layer.rule,
        output=_parts(layer.output),
        attention_out_norm=_optional(layer.attention_out_norm),
        mlp_norm=layer.mlp_norm.numpy(),
        mlp=None if layer.mlp is None else _pack_mlp(layer.mlp),
        experts=None if layer.experts is None else _pack_experts(layer.experts),
        mlp_out_norm=_optional(layer.mlp_out_norm),
    )
    _release(*layer.qkv, layer.output, *((*layer.mlp.gate_up, layer.mlp.down) if layer.mlp else ()))
    if layer.experts is not None:
        give_back([layer.experts.gate_up, layer.experts.down])
    return packed


def _pack_mlp(mlp: Mlp) -> _PackedMlp:
    gate, up = halves(mlp.gate_up[0]) if len(mlp.gate_up) == 1 else mlp.gate_up
    kind = _kind(gate)
    if kind != _kind(up):  # the kernel takes two of one kind
        kind = None
    return _PackedMlp(_part([gate], kind), _part([up], kind), _parts(mlp.down), _float32s(mlp.activation))


def _float32s(activation: Activation) -> tuple[np.float32, ...]:
    return tuple(map(np.float32, activation))


def _pack_experts(experts: Experts) -> _PackedExperts:
    router, num_experts = experts.router, len(experts.gate_up)
    gate, up = experts.halves(experts.gate_up, 1)
    gate_bias, up_bias = None, None
    if experts.gate_up_bias is not None:
        gate_bias, up_bias = experts.halves(experts.gate_up_bias, 1)
    bias = np.zeros(-(-num_experts // LANES) * LANES, np.float32)  # of whole panels
    if router.bias is not None:
        bias[:num_experts] = router.bias.numpy()
    return _PackedExperts(
        router=_Part(pack(router.weight.numpy()), bias, num_experts, None),
        routing=(
            router.is_sigmoid,
            _NOTHING if router.correction is None else router.correction.numpy(),
            router.num_groups,
            router.num_kept_groups,
            router.normalizes,
            router.scale,
        ),
        top_k=router.top_k,
        gate=_pack_each(gate),
        gate_bias=_biases(gate_bias, num_experts),
        up=_pack_each(up),
        up_bias=_biases(up_bias, num_experts),
        down=_pack_each(experts.down),
        down_bias=_biases(experts.down_bias, num_experts),
        activation=_float32s(experts.activation),
    )


def _pack_each(weights: Tensor) -> NDArray[Any]:
    """Weights [experts, N, K] -> panels [experts, ...], of the form that they have."""
    form = STORED_FLOATS.get(weights.dtype)
    is_kept = form is not None and weights.shape[2] % block_len(form) == 0
    panels: NDArray[Any] | None = None
    for number, weight in enumerate(weights):
        packed = pack_stored(stored_floats(weight)) if is_kept else pack(weight.float().numpy())
        if panels is None:
            panels = np.empty((len(weights), *packed.shape), packed.dtype)
        panels[number] = packed
    assert panels is not None
    return panels


def _biases(biases: Tensor | None, num_experts: int) -> Array:
    return np.empty((num_experts, 0), np.float32) if biases is None else biases.float().contiguous().numpy()


def _arrays(rotary: Rotary) -> tuple[Array, Array, bool]:
    return rotary.cos.contiguous().numpy(), rotary.sin.contiguous().numpy(), rotary.is_interleaved


def _optional(norm: Tensor | None) -> Array | None:
    return None if norm is None else norm.numpy()


def _parts(*projections: Projection) -> list[_Part]:
    """Neighbours of one kind become one part."""
    return [_part(list(group), kind) for kind, group in groupby(projections, _kind)]


def _kind(projection: Projection) -> tuple[Form, bytes] | None:
    """The form of its weight, and the order of inputs; None where float32 is packed instead, since no whole
    number of blocks fits."""
    if isinstance(projection, nn.Linear) or projection.in_features % block_len(projection.stored.form):
        return None
    return projection.stored.form, b"" if projection.order is None else projection.order.tobytes()


def _part(projections: Sequence[Projection], kind: tuple[Form, bytes] | None) -> _Part:
    order = None
    if kind is None:
        packed: NDArray[Any] = pack(*(each.weight.detach().numpy() for each in projections))
    else:
        kept = [each for each in projections if isinstance(each, StoredLinear)]
        packed, order = pack_stored(*(each.stored for each in kept)), kept[0].order
    biases = [each.bias.detach().numpy() for each in projections if each.bias is not None]
    num_cols = sum(each.out_features for each in projections)
    return _Part(packed, np.concatenate(biases) if biases else _NOTHING, num_cols, order)


def _release(*layers: nn.Module) -> None:
    """Weights that have been packed. An embedding in float32 has not."""
    kept = [layer for layer in layers if isinstance(layer, StoredWeight)]
    plain = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    give_back([*plain, *(torch.from_numpy(layer.stored.blocks) for layer in kept)])
    for layer in kept:
        layer.release()


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
