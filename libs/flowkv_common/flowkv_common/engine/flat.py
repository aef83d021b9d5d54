"""The forward pass of the Llama family as one loop over fused weights.

The modules stay valid: their weights become views of the fused ones, so nothing is held twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm, silu

from flowkv_common.engine.attention import Attention

ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}  # those that turn a position the same way in any batch


class Linear(NamedTuple):
    """`x @ weight.T + bias`."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class Layer(NamedTuple):
    """The weights of one layer."""

    input_norm: Tensor  # [hidden]
    qkv: Linear
    qk_norm: Tensor | None  # [heads + kv heads, dim]: Qwen3 normalizes each head
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class FlatForward:
    """Equal to `ModulesForward` up to rounding, by test."""

    name = "flat"

    def __init__(self, model: Any) -> None:
        """`model`: a causal LM of one of `ARCHITECTURES`; its projections are fused in place."""
        config = model.config
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = model.model.layers[0].self_attn.head_dim
        self.scale: float = model.model.layers[0].self_attn.scaling
        self.eps: float = config.rms_norm_eps
        self.embedding: Tensor = model.model.embed_tokens.weight
        self.norm: Tensor = model.model.norm.weight
        self.head: Tensor = model.lm_head.weight
        self.layers = [self._fuse(layer) for layer in model.model.layers]
        self.cos, self.sin = _rope_tables(model)

    def __call__(
        self, token_ids: Tensor, position_ids: Tensor, attention: Attention, logits_indices: Tensor
    ) -> Tensor:
        hidden = embedding(token_ids, self.embedding)  # [T, hidden]
        cos = self.cos[position_ids].unsqueeze(1)  # [T, 1, dim]
        sin = self.sin[position_ids].unsqueeze(1)
        for index, layer in enumerate(self.layers):
            normed = self._rms(hidden, layer.input_norm)
            hidden = hidden + self._attend(index, layer, normed, cos, sin, attention)
            gate, up = linear(self._rms(hidden, layer.mlp_norm), *layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + linear(silu(gate) * up, *layer.down)
        return linear(self._rms(hidden[logits_indices], self.norm), self.head)

    def _attend(
        self, index: int, layer: Layer, normed: Tensor, cos: Tensor, sin: Tensor, attention: Attention
    ) -> Tensor:
        qkv = linear(normed, *layer.qkv).view(len(normed), -1, self.head_dim)  # [T, heads + 2 kv heads, dim]
        qk, value = torch.split(qkv, [self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if layer.qk_norm is not None:
            qk = rms_norm(qk, (self.head_dim,), eps=self.eps) * layer.qk_norm
        first, second = qk.chunk(2, dim=-1)
        qk = qk * cos + torch.cat((-second, first), dim=-1) * sin
        query, key = torch.split(qk, [self.num_heads, self.num_kv_heads], dim=1)
        attention.write(index, key, value)
        return linear(attention.attend(index, query, self.scale).flatten(1), *layer.output)

    def _rms(self, states: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(states, weight.shape, weight, self.eps)

    def _fuse(self, layer: Any) -> Layer:
        attn, mlp = layer.self_attn, layer.mlp
        qk_norm = None
        if hasattr(attn, "q_norm"):
            qk_norm = torch.stack(
                [attn.q_norm.weight] * self.num_heads + [attn.k_norm.weight] * self.num_kv_heads
            )
        return Layer(
            input_norm=layer.input_layernorm.weight,
            qkv=_fuse_linears(attn.q_proj, attn.k_proj, attn.v_proj),
            qk_norm=qk_norm,
            output=Linear(attn.o_proj.weight, attn.o_proj.bias),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=_fuse_linears(mlp.gate_proj, mlp.up_proj),
            down=Linear(mlp.down_proj.weight, mlp.down_proj.bias),
        )


def build_flat(model: nn.Module) -> FlatForward | None:
    """The fast path for `model`, or `None` if it is not of the Llama family."""
    config: Any = model.config
    if type(model).__name__ not in ARCHITECTURES or config.hidden_act != "silu":
        return None
    if config.rope_parameters["rope_type"] not in ROPE_TYPES:
        return None
    return FlatForward(model)


@torch.no_grad()
def _fuse_linears(*linears: nn.Linear) -> Linear:
    """One projection in place of several of the same input; theirs become views of it."""
    sizes = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    for part, view in zip(linears, torch.split(weight, sizes), strict=True):
        part.weight.data = view
    return Linear(weight, torch.cat(biases) if biases else None)


@torch.no_grad()
def _rope_tables(model: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, both [max positions, dim], from the model's own rotary."""
    weight = model.model.embed_tokens.weight
    positions = torch.arange(model.config.max_position_embeddings, device=weight.device).unsqueeze(0)
    cos, sin = model.model.rotary_emb(weight, positions)
    return cos[0], sin[0]
