"""What the flat forward passes take from a model of the Llama family, and which models they can do."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
