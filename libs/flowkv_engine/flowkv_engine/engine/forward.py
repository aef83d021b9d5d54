"""The forward pass: of any served model by its own `transformers` modules, of many in one flat loop.

`FlatForward` is in torch; `cpu/forward.py` and `gpu/forward.py` have it in kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm
from transformers import AttentionInterface

from flowkv_engine.engine.attention import Attention, Rule, Span
from flowkv_engine.engine.flat import FlatWeights, Layer, flat_weights, fuse
from flowkv_engine.engine.latents import absorb, expand, keep_latents
from flowkv_engine.engine.stored_modules import StoredExperts, StoredLinear, StoredWeight

IMPLEMENTATION = "flowkv"  # the name of our attention function in `transformers`


class Forward(ABC):
    """Token ids [T], position ids [T] and rows [S], all int64 -> logits [S, vocab] of these rows.

    The attention is bound to the step before. Logits are valid until the next call.
    """

    @abstractmethod
    def __call__(self, token_ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor: ...

    @abstractmethod
    def in_pieces(self, token_ids: Tensor, position_ids: Tensor, pieces: list[Tensor]) -> Iterator[Tensor]:
        """Logits of several lots of rows, no row in two of them: those of a long prompt are too large at
        once."""


class ModulesForward(Forward):
    """Works for every model; the fast paths must equal it."""

    def __init__(self, module: nn.Module, attention: Attention, spans: Sequence[Span]) -> None:
        keep_latents(module)
        self._module = module
        self._attention = attention, spans

    def __call__(self, token_ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
        output = self._module(
            token_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            logits_to_keep=rows,
            flowkv=self._attention,
        )
        logits: Tensor = output.logits[0]
        return logits

    def in_pieces(self, token_ids: Tensor, position_ids: Tensor, pieces: list[Tensor]) -> Iterator[Tensor]:
        """Computes all again for each piece: what a model does after its head only the model knows."""
        for rows in pieces:
            yield self(token_ids, position_ids, rows)


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, T, head_dim]
    key: Tensor,  # [1, num_kv_heads, T, head_dim]
    value: Tensor | None,  # None: `key` is latents
    attention_mask: Tensor | None,
    *,
    flowkv: tuple[Attention, Sequence[Span]],
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that `transformers` calls. Returns [1, T, num_heads, head_dim].

    `load_model` has refused models that ask for anything but causal attention over one cache per layer, and
    found how far back each sees.
    """
    layer: Any = module.layer_idx
    attention, spans = flowkv
    attention.write(layer, key[0].transpose(0, 1), None if value is None else value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = Rule(scale, spans[layer], softcap or 0.0, s_aux)
    queries = query[0].transpose(0, 1)
    if value is None:
        attended = expand(module, attention.attend(layer, absorb(module, queries), rule))
    else:
        attended = attention.attend(layer, queries, rule)
    return attended.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, paged_attention)


def make_forward(module: nn.Module, attention: Attention, spans: Sequence[Span]) -> Forward:
    """The fastest forward pass for the model and the backend. It may fuse or pack the model's weights."""
    weights = flat_weights(module, spans)
    if weights is None:
        return ModulesForward(module, attention, spans)
    if attention.name == "cpu":
        from flowkv_engine.engine.cpu.attention import CpuAttention
        from flowkv_engine.engine.cpu.forward import CpuFlatForward

        assert isinstance(attention, CpuAttention)
        if CpuFlatForward.fits(weights):
            return CpuFlatForward(weights, attention)
    kept = [each for each in module.modules() if isinstance(each, StoredWeight | StoredExperts)]
    if attention.name == "triton" and all(
        isinstance(each, StoredLinear) and each.stored.form.bits < 16 for each in kept
    ):
        from flowkv_engine.engine.gpu.attention import TritonAttention
        from flowkv_engine.engine.gpu.forward import TritonFlatForward

        assert isinstance(attention, TritonAttention)
        return TritonFlatForward(weights, attention)
    if kept:  # the others take floats
        return ModulesForward(module, attention, spans)
    return FlatForward(weights, attention)


class FlatStates(Forward):
    """A forward pass in two parts: the states of rows, and the logits of those."""

    @abstractmethod
    def states(self, token_ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
        """Of ascending rows, [S, hidden]: what `logits` takes."""

    @abstractmethod
    def logits(self, states: Tensor) -> Tensor:
        """[S, vocab]"""

    def __call__(self, token_ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
        return self.logits(self.states(token_ids, position_ids, rows))

    def in_pieces(self, token_ids: Tensor, position_ids: Tensor, pieces: list[Tensor]) -> Iterator[Tensor]:
        rows, order = torch.cat(pieces).sort()
        states = self.states(token_ids, position_ids, rows)
        for places in torch.split(order.argsort(), [len(piece) for piece in pieces]):
            yield self.logits(states[places])


def norm_heads(qk: Tensor, layer: Layer, num_heads: int, eps: float) -> Tensor:
    """The RMS norm of heads [T, heads + kv heads, dim], each by itself or all of a side together."""
    assert layer.qk_norm is not None
    floats = qk.float()
    if layer.norms_together:
        sides = floats.tensor_split([num_heads], dim=1)
        normed = torch.cat([rms_norm(side, side.shape[1:], eps=eps) for side in sides], dim=1)
    else:
        normed = rms_norm(floats, floats.shape[2:], eps=eps)
    return (normed * layer.qk_norm).to(qk.dtype)


class FlatForward(FlatStates):
    """Equal to `ModulesForward` up to rounding, by test."""

    def __init__(self, weights: FlatWeights, attention: Attention) -> None:
        """The model's projections are fused in place."""
        self._weights = weights
        self._attention = attention
        self._fused = [
            (fuse(*layer.qkv), fuse(*layer.mlp.gate_up) if layer.mlp else None) for layer in weights.layers
        ]

    def states(self, token_ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
        weights = self._weights
        num_heads, num_kv_heads, head_dim = weights.num_heads, weights.num_kv_heads, weights.head_dim
        hidden = embedding(token_ids, weights.embedding.weight) * weights.embedding_scale  # [T, hidden]
        for index, (layer, (fused_qkv, gate_up)) in enumerate(zip(weights.layers, self._fused, strict=True)):
            qkv = linear(self._norm(hidden, layer.input_norm), *fused_qkv)
            qkv = qkv.view(len(qkv), -1, head_dim)  # [T, heads + 2 kv heads, dim]
            qk, value = torch.split(qkv, [num_heads + num_kv_heads, num_kv_heads], dim=1)
            if layer.qk_norm is not None:
                qk = norm_heads(qk, layer, num_heads, weights.eps)
            query, key = torch.split(layer.rotary(qk, position_ids), [num_heads, num_kv_heads], dim=1)
            self._attention.write(index, key, value)
            attended = self._attention.attend(index, query, layer.rule).flatten(1)
            added = linear(attended, layer.output.weight, layer.output.bias)
            hidden = hidden + self._norm(added, layer.attention_out_norm)
            normed = self._norm(hidden, layer.mlp_norm)
            if layer.mlp is not None and gate_up is not None:
                gates, ups = linear(normed, *gate_up).chunk(2, dim=-1)
                down = layer.mlp.down
                added = linear(layer.mlp.activation(gates, ups), down.weight, down.bias)
                hidden = hidden + self._norm(added, layer.mlp_out_norm)
            if layer.experts is not None:
                hidden = hidden + layer.experts(normed)
        return hidden[rows]

    def logits(self, states: Tensor) -> Tensor:
        weights = self._weights
        return weights.cap(linear(self._norm(states, weights.norm), weights.head.weight))

    def _norm(self, states: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return states
        return (rms_norm(states.float(), weight.shape, eps=self._weights.eps) * weight).to(states.dtype)
