"""The forward pass of any servable model, through its own `transformers` modules."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm, silu

from flowkv_engine.engine.attention import CPU, TRITON, Attention
from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.servable import UnsupportedModel


class Forward(Protocol):
    """A packed row of T tokens in, logits of S of its places out."""

    name: str

    def __call__(
        self, token_ids: Tensor, position_ids: Tensor, attention: Attention, logits_indices: Tensor
    ) -> Tensor:
        """`token_ids` and `position_ids` [T], `logits_indices` [S], all int64 -> logits [S, vocab]."""
        ...


class ModulesForward:
    """Works for every model; the fast path must equal it."""

    name = "modules"

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(
        self, token_ids: Tensor, position_ids: Tensor, attention: Attention, logits_indices: Tensor
    ) -> Tensor:
        output = self._module(
            token_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            logits_to_keep=logits_indices,
            flowkv=_OneStep(attention),
        )
        logits: Tensor = output.logits[0]
        return logits


class _OneStep:
    """An `Attention` for one step of a model, which may write to each layer's cache once."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self._written: set[int] = set()

    def bind(self, batch: PackedBatch) -> None:
        self._attention.bind(batch)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        if layer in self._written:
            raise UnsupportedModel(f"its attention of layer {layer} is computed twice in a step")
        self._written.add(layer)
        self._attention.write(layer, key, value)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        return self._attention.attend(layer, query, scale)


ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}  # those that turn a position the same way in any batch


class Layer(NamedTuple):
    """One layer's parts, as the model has them."""

    input_norm: Tensor  # [hidden]
    qkv: list[nn.Linear]
    qk_norm: Tensor | None  # [heads + kv heads, dim]: Qwen3 normalizes each head
    output: nn.Linear
    mlp_norm: Tensor
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear


class FlatWeights(NamedTuple):
    """A model's parts; its weights stay where they are."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of the scores
    eps: float
    embedding: Tensor  # [vocab, hidden]
    layers: list[Layer]
    norm: Tensor
    head: Tensor  # [vocab, hidden]
    cos: Tensor  # of all positions, [max positions, dim], as `sin`
    sin: Tensor


def flat_weights(model: nn.Module) -> FlatWeights | None:
    """The parts of `model`, or `None` if it is not of the Llama family."""
    causal_lm: Any = model
    config = causal_lm.config
    if type(model).__name__ not in ARCHITECTURES or config.hidden_act != "silu":
        return None
    if config.rope_parameters["rope_type"] not in ROPE_TYPES:
        return None
    inner = causal_lm.model
    cos, sin = _rope_tables(model)
    return FlatWeights(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=inner.layers[0].self_attn.head_dim,
        scale=inner.layers[0].self_attn.scaling,
        eps=config.rms_norm_eps,
        embedding=inner.embed_tokens.weight,
        layers=[_layer(layer, config) for layer in inner.layers],
        norm=inner.norm.weight,
        head=causal_lm.lm_head.weight,
        cos=cos,
        sin=sin,
    )


def _layer(layer: Any, config: Any) -> Layer:
    attn, mlp = layer.self_attn, layer.mlp
    qk_norm = None
    if hasattr(attn, "q_norm"):
        query, key = (norm.weight.detach() for norm in (attn.q_norm, attn.k_norm))
        qk_norm = torch.stack([query] * config.num_attention_heads + [key] * config.num_key_value_heads)
    return Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=[attn.q_proj, attn.k_proj, attn.v_proj],
        qk_norm=qk_norm,
        output=attn.o_proj,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
    )


@torch.no_grad()
def _rope_tables(model: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, both [max positions, dim], from the model's own rotary."""
    weight = model.model.embed_tokens.weight
    positions = torch.arange(model.config.max_position_embeddings, device=weight.device).unsqueeze(0)
    cos, sin = model.model.rotary_emb(weight, positions)
    return cos[0], sin[0]


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


def make_forward(module: nn.Module, attention_name: str, attention: Attention) -> Forward:
    """`attention`, a backend of that name, must come with every call."""
    weights = flat_weights(module)
    if weights is None:
        return ModulesForward(module)
    if attention_name == TRITON:
        from flowkv_engine.engine.gpu.attention import TritonAttention
        from flowkv_engine.engine.gpu.forward import TritonFlatForward

        assert isinstance(attention, TritonAttention)
        return TritonFlatForward(weights, attention)
    if attention_name == CPU:
        from flowkv_engine.engine.cpu.attention import CpuAttention
        from flowkv_engine.engine.cpu.forward import CpuFlatForward

        if isinstance(attention, CpuAttention) and CpuFlatForward.fits(weights):
            return CpuFlatForward(weights, attention)
    return FlatForward(weights)
