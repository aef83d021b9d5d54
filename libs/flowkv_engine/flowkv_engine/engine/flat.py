"""What the flat forward takes of a model: the weights of each layer, and how its parts go together.

An architecture is a row of `ARCHITECTURES`. What the modules show by themselves is not in it: fused
projections, norms of heads, layers without rotation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from flowkv_engine.engine.attention import Rule, Span
from flowkv_engine.engine.experts import Activation, Experts, Router
from flowkv_engine.engine.positions import max_model_len
from flowkv_engine.engine.stored_modules import StoredEmbedding, StoredExperts, StoredLinear, scale_of

Projection = nn.Linear | StoredLinear

# All of them rotate a position the same way in any batch, as `load_model` sets them.
ROPE_TYPES = {"default", "linear", "llama3", "yarn", "longrope", "dynamic"}


class Architecture(NamedTuple):
    """How its layers differ from Llama's."""

    mlp_norm: str = "post_attention_layernorm"
    attention_out_norm: str | None = None  # of what attention adds to the hidden states
    mlp_out_norm: str | None = None
    adds_one: bool = False  # to the weights of norms
    is_interleaved: bool = False  # see `Rotary`
    caps_scores: bool = False  # where its config says so
    routes_by_sigmoid: bool = False  # see `Router`


_GEMMA = Architecture(
    mlp_norm="pre_feedforward_layernorm",
    attention_out_norm="post_attention_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
    adds_one=True,
)
_GLM4 = Architecture(
    attention_out_norm="post_self_attn_layernorm", mlp_out_norm="post_mlp_layernorm", is_interleaved=True
)

# By the name of the class in `transformers`.
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(),
    "MistralForCausalLM": Architecture(),
    "Qwen2ForCausalLM": Architecture(),
    "Qwen3ForCausalLM": Architecture(),
    "SmolLM3ForCausalLM": Architecture(),
    "Phi3ForCausalLM": Architecture(),
    "GemmaForCausalLM": Architecture(adds_one=True),
    "Gemma2ForCausalLM": _GEMMA._replace(caps_scores=True),
    "Gemma3ForCausalLM": _GEMMA,
    "GlmForCausalLM": Architecture(is_interleaved=True),
    "Glm4ForCausalLM": _GLM4,
    "MixtralForCausalLM": Architecture(),
    "Qwen3MoeForCausalLM": Architecture(),
    "GptOssForCausalLM": Architecture(),
    "Glm4MoeForCausalLM": Architecture(routes_by_sigmoid=True),
    "MiniMaxM2ForCausalLM": Architecture(routes_by_sigmoid=True),
}


SILU = Activation(1.0)
_TWICE = 2 * math.sqrt(2 / math.pi)  # (1 + tanh(x)) / 2 is sigmoid(2 x)
ACTIVATIONS = {"silu": SILU, "gelu_pytorch_tanh": Activation(_TWICE, 0.044715 * _TWICE)}


class Rotary(NamedTuple):
    """How queries and keys are rotated: a pair of numbers of a head by one angle of each position.

    A pair is number `i` and `i + pairs`, or `2 i` and `2 i + 1` if `is_interleaved`. The numbers behind the
    pairs stay as they are.
    """

    cos: Tensor  # [positions, pairs], as `sin`
    sin: Tensor
    is_interleaved: bool

    def __call__(self, states: Tensor, position_ids: Tensor) -> Tensor:
        """`states` [T, heads, dim] at positions [T]."""
        cos, sin = (table[position_ids].unsqueeze(1) for table in (self.cos, self.sin))  # [T, 1, pairs]
        num_rotated = 2 * cos.shape[-1]
        rotated, rest = states[..., :num_rotated], states[..., num_rotated:]
        if self.is_interleaved:
            first, second = rotated[..., ::2], rotated[..., 1::2]
        else:
            first, second = rotated.chunk(2, dim=-1)
        pairs = first * cos - second * sin, second * cos + first * sin
        together = torch.stack(pairs, dim=-1).flatten(-2) if self.is_interleaved else torch.cat(pairs, dim=-1)
        return torch.cat((together, rest), dim=-1)


class Mlp(NamedTuple):
    gate_up: list[Projection]  # two, or one that is both
    down: Projection
    activation: Activation


class Layer(NamedTuple):
    """One layer's parts, as the model has them."""

    input_norm: Tensor  # [hidden], as all norms but that of heads
    qkv: list[Projection]  # three, or one that is all
    qk_norm: Tensor | None  # [heads + kv heads, dim], of each head
    norms_together: bool  # all heads of a query, and all of a key, by one mean
    rotary: Rotary
    rule: Rule  # of its attention
    output: Projection
    attention_out_norm: Tensor | None
    mlp_norm: Tensor
    mlp: Mlp | None  # beside experts: what all rows go to
    experts: Experts | None
    mlp_out_norm: Tensor | None  # not beside experts


class FlatWeights(NamedTuple):
    """A model's parts; its weights stay where they are."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    embedding: nn.Embedding | StoredEmbedding  # [vocab, hidden]
    embedding_scale: float
    layers: list[Layer]
    norm: Tensor
    head: Projection  # to [vocab]
    logit_cap: float  # not 0: a logit becomes `logit_cap * tanh(logit / logit_cap)`

    def cap(self, logits: Tensor) -> Tensor:
        """In place."""
        return logits.div_(self.logit_cap).tanh_().mul_(self.logit_cap) if self.logit_cap else logits


def is_flat(config: PretrainedConfig) -> bool:
    """Whether a model with this config has a flat forward."""
    ropes = config.rope_parameters if _architecture(config) else {}
    by_layer = [each for each in ropes.values() if isinstance(each, dict)] or [ropes]  # or of some kinds
    return (
        _architecture(config) is not None
        and _activation(config) in ACTIVATIONS
        and all(each["rope_type"] in ROPE_TYPES for each in by_layer)
    )


def _architecture(config: PretrainedConfig) -> Architecture | None:
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return ARCHITECTURES.get(getattr(model_class, "__name__", ""))


def _activation(config: Any) -> str:
    name: str = config.hidden_activation if hasattr(config, "hidden_activation") else config.hidden_act
    return name


@torch.no_grad()
def flat_weights(model: nn.Module, spans: Sequence[Span]) -> FlatWeights | None:
    """The parts of `model`, or `None` if it has no flat forward."""
    causal_lm: Any = model
    config, architecture = causal_lm.config, _architecture(causal_lm.config)
    if architecture is None or not is_flat(config):
        return None
    inner = causal_lm.model

    def norm_of(module: Any, name: str | None) -> Tensor | None:
        return None if name is None else _norm(getattr(module, name), architecture)

    rotaries = _rotaries(inner, config, architecture.is_interleaved)
    softcap = config.attn_logit_softcapping if architecture.caps_scores else None
    activation = ACTIVATIONS[_activation(config)]
    layers = []
    for number, (layer, span) in enumerate(zip(inner.layers, spans, strict=True)):
        attn, mlp = layer.self_attn, layer.mlp
        experts = None
        if hasattr(mlp, "experts"):
            experts = _experts(mlp, architecture, activation)
            mlp = getattr(mlp, "shared_experts", None)
        rotary = rotaries[number]
        if not getattr(attn, "use_rope", True):
            rotary = rotary._replace(cos=rotary.cos[:, :0], sin=rotary.sin[:, :0])
        qk_norm = _qk_norm(attn, config, architecture)
        layers.append(
            Layer(
                input_norm=_norm(layer.input_layernorm, architecture),
                qkv=[attn.qkv_proj] if hasattr(attn, "qkv_proj") else [attn.q_proj, attn.k_proj, attn.v_proj],
                qk_norm=qk_norm,
                norms_together=qk_norm is not None and attn.q_norm.weight.numel() > attn.head_dim,
                rotary=rotary,
                rule=Rule(attn.scaling, span, softcap or 0.0, getattr(attn, "sinks", None)),
                output=attn.o_proj,
                attention_out_norm=norm_of(layer, architecture.attention_out_norm),
                mlp_norm=_norm(getattr(layer, architecture.mlp_norm), architecture),
                mlp=None if mlp is None else _mlp(mlp, activation),
                experts=experts,
                mlp_out_norm=norm_of(layer, architecture.mlp_out_norm),
            )
        )
    # The model rounds it to the type of its weights.
    scale = torch.tensor(scale_of(inner.embed_tokens), dtype=inner.norm.weight.dtype)
    return FlatWeights(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=inner.layers[0].self_attn.head_dim,
        eps=config.rms_norm_eps,
        embedding=inner.embed_tokens,
        embedding_scale=scale.item(),
        layers=layers,
        norm=_norm(inner.norm, architecture),
        head=causal_lm.lm_head,
        logit_cap=getattr(config, "final_logit_softcapping", None) or 0.0,
    )


def _mlp(mlp: Any, activation: Activation) -> Mlp:
    gate_up = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
    return Mlp(gate_up, mlp.down_proj, activation)


def _experts(mlp: Any, architecture: Architecture, activation: Activation) -> Experts:
    router = mlp.router if hasattr(mlp, "router") else mlp.gate
    correction = getattr(mlp, "e_score_correction_bias", None)
    experts = mlp.experts.plain if isinstance(mlp.experts, StoredExperts) else mlp.experts
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if experts.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if hasattr(experts, "alpha"):  # GPT-OSS
        activation = Activation(experts.alpha, limit=experts.limit, shift=1.0)
    return Experts(
        router=Router(
            weight=router.weight,
            bias=getattr(router, "bias", None),
            top_k=router.top_k,
            is_sigmoid=architecture.routes_by_sigmoid,
            correction=getattr(router, "e_score_correction_bias", correction),
            num_groups=getattr(router, "num_group", 1),
            num_kept_groups=getattr(router, "topk_group", 1),
            normalizes=getattr(router, "norm_topk_prob", True),
            scale=getattr(router, "routed_scaling_factor", 1.0),
        ),
        gate_up=gate_up,
        gate_up_bias=getattr(experts, "gate_up_proj_bias", None),
        is_interleaved=not experts.is_concatenated,
        down=down,
        down_bias=getattr(experts, "down_proj_bias", None),
        activation=activation,
    )


def _qk_norm(attn: Any, config: Any, architecture: Architecture) -> Tensor | None:
    """[heads + kv heads, dim], of weights for each head or for all of them."""
    if not hasattr(attn, "q_norm"):
        return None
    sizes = config.num_attention_heads, config.num_key_value_heads
    norms = (_norm(norm, architecture).view(-1, attn.head_dim) for norm in (attn.q_norm, attn.k_norm))
    return torch.cat([norm.expand(size, -1) for norm, size in zip(norms, sizes, strict=True)])


def _norm(module: Any, architecture: Architecture) -> Tensor:
    """Its weight. One more than the model's would not fit the type that those have."""
    weight: Tensor = module.weight
    return 1 + weight.float() if architecture.adds_one else weight


def _rotaries(inner: Any, config: Any, is_interleaved: bool) -> list[Rotary]:
    """Of each layer; layers of one type share theirs, which the model itself computes."""
    norm: Tensor = inner.norm.weight
    positions = torch.arange(max_model_len(config), device=norm.device).unsqueeze(0)
    layer_types = getattr(config, "layer_types", None)
    if not layer_types or layer_types[0] not in config.rope_parameters:
        layer_types = [None] * len(inner.layers)
    made: dict[str | None, Rotary] = {}
    for kind in dict.fromkeys(layer_types):
        num_pairs = getattr(inner.rotary_emb, f"{kind}_inv_freq" if kind else "inv_freq").numel()
        tables = inner.rotary_emb(norm, positions, *([kind] if kind else []))
        cos, sin = (table[0, :, :num_pairs].contiguous() for table in tables)
        made[kind] = Rotary(cos, sin, is_interleaved)
    return [made[kind] for kind in layer_types]


@torch.no_grad()
def fuse(*projections: Projection) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of one projection for several of the same input.

    Their own weights become views of it.
    """
    linears = [each for each in projections if isinstance(each, nn.Linear)]
    if len(linears) == 1:
        return linears[0].weight.detach(), linears[0].bias
    sizes = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    for part, view in zip(linears, torch.split(weight, sizes), strict=True):
        part.weight.data = view
    if weight.is_cuda:
        torch.cuda.empty_cache()  # what was fused is free now, and too small for the next
    return weight, torch.cat(biases) if biases else None


def halves(projection: Projection) -> list[Projection]:
    """Those that `projection` does side by side, each of half of its outputs; views of its weight."""
    size = projection.out_features // 2
    parts: list[Projection] = []
    for rows in (slice(0, size), slice(size, None)):
        bias = None if projection.bias is None else projection.bias[rows]
        if isinstance(projection, StoredLinear):
            parts.append(StoredLinear(projection.stored.rows(rows), bias, projection.order))
        else:
            part = nn.Linear(projection.in_features, size, bias=bias is not None, device="meta")
            part.weight = nn.Parameter(projection.weight[rows], requires_grad=False)
            if bias is not None:
                part.bias = nn.Parameter(bias, requires_grad=False)
            parts.append(part)
    return parts
