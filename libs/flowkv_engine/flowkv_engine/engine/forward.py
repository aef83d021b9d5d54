"""The forward pass: of any served model by its own `transformers` modules, of the Llama family in one loop.

`LlamaForward` is in torch; `cpu/forward.py` and `gpu/forward.py` have it in kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm, silu
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PretrainedConfig

from flowkv_engine.engine.attention import Attention, Rule, Span
from flowkv_engine.engine.stored_modules import StoredEmbedding, StoredLinear, StoredWeight

IMPLEMENTATION = "flowkv"  # the name of our attention function in `transformers`

# The Llama family: Llama, Mistral, Qwen2, Qwen3.
ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}  # those that rotate a position the same way in any batch


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
    value: Tensor,
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
    attention.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = Rule(scale, spans[layer], softcap or 0.0, s_aux)
    return attention.attend(layer, query[0].transpose(0, 1), rule).unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, paged_attention)


def make_forward(module: nn.Module, attention: Attention, spans: Sequence[Span]) -> Forward:
    """The fastest forward pass for the model and the backend. It may fuse or pack the model's weights."""
    weights = llama_weights(module, spans)
    if weights is None:
        return ModulesForward(module, attention, spans)
    if attention.name == "cpu":
        from flowkv_engine.engine.cpu.attention import CpuAttention
        from flowkv_engine.engine.cpu.forward import CpuLlamaForward

        assert isinstance(attention, CpuAttention)
        if CpuLlamaForward.fits(weights):
            return CpuLlamaForward(weights, attention)
    if any(isinstance(each, StoredWeight) for each in module.modules()):  # the others take floats
        return ModulesForward(module, attention, spans)
    if attention.name == "triton":
        from flowkv_engine.engine.gpu.attention import TritonAttention
        from flowkv_engine.engine.gpu.forward import TritonLlamaForward

        assert isinstance(attention, TritonAttention)
        return TritonLlamaForward(weights, attention)
    return LlamaForward(weights, attention)


Projection = nn.Linear | StoredLinear


class Layer(NamedTuple):
    """One layer's parts, as the model has them."""

    input_norm: Tensor  # [hidden]
    qkv: list[Projection]
    qk_norm: Tensor | None  # [heads + kv heads, dim]: Qwen3 normalizes each head
    rule: Rule  # of its attention
    output: Projection
    mlp_norm: Tensor
    gate: Projection
    up: Projection
    down: Projection


class LlamaWeights(NamedTuple):
    """A model's parts; its weights stay where they are."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    embedding: nn.Embedding | StoredEmbedding  # [vocab, hidden]
    layers: list[Layer]
    norm: Tensor
    head: Projection  # to [vocab]
    cos: Tensor  # of all positions, [max positions, dim], as `sin`
    sin: Tensor


def is_llama(config: PretrainedConfig) -> bool:
    """Whether a model with this config is of the Llama family."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return (
        getattr(model_class, "__name__", "") in ARCHITECTURES
        and config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] in ROPE_TYPES
    )


@torch.no_grad()
def llama_weights(model: nn.Module, spans: Sequence[Span]) -> LlamaWeights | None:
    """The parts of `model`, or `None` if it is not of the Llama family."""
    causal_lm: Any = model
    config = causal_lm.config
    if not is_llama(config):
        return None
    inner, layers = causal_lm.model, []
    for layer, span in zip(inner.layers, spans, strict=True):
        attn, mlp = layer.self_attn, layer.mlp
        qk_norm = None
        if hasattr(attn, "q_norm"):
            norms = [attn.q_norm.weight] * config.num_attention_heads
            qk_norm = torch.stack(norms + [attn.k_norm.weight] * config.num_key_value_heads)
        layers.append(
            Layer(
                input_norm=layer.input_layernorm.weight,
                qkv=[attn.q_proj, attn.k_proj, attn.v_proj],
                qk_norm=qk_norm,
                rule=Rule(attn.scaling, span),
                output=attn.o_proj,
                mlp_norm=layer.post_attention_layernorm.weight,
                gate=mlp.gate_proj,
                up=mlp.up_proj,
                down=mlp.down_proj,
            )
        )
    norm = inner.norm.weight
    positions = torch.arange(config.max_position_embeddings, device=norm.device)
    cos, sin = inner.rotary_emb(norm, positions.unsqueeze(0))  # the model's own
    return LlamaWeights(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=inner.layers[0].self_attn.head_dim,
        eps=config.rms_norm_eps,
        embedding=inner.embed_tokens,
        layers=layers,
        norm=norm,
        head=causal_lm.lm_head,
        cos=cos[0],
        sin=sin[0],
    )


@torch.no_grad()
def fuse(*projections: Projection) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of one projection for several of the same input.

    Their own weights become views of it.
    """
    linears = [each for each in projections if isinstance(each, nn.Linear)]
    sizes = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    for part, view in zip(linears, torch.split(weight, sizes), strict=True):
        part.weight.data = view
    if weight.is_cuda:
        torch.cuda.empty_cache()  # what was fused is free now, and too small for the next
    return weight, torch.cat(biases) if biases else None


class LlamaStates(Forward):
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


class LlamaForward(LlamaStates):
    """Equal to `ModulesForward` up to rounding, by test."""

    def __init__(self, weights: LlamaWeights, attention: Attention) -> None:
        """The model's projections are fused in place."""
        self._weights = weights
        self._attention = attention
        self._fused = [(fuse(*layer.qkv), fuse(layer.gate, layer.up)) for layer in weights.layers]

    def states(self, token_ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
        weights = self._weights
        num_heads, num_kv_heads, head_dim = weights.num_heads, weights.num_kv_heads, weights.head_dim
        hidden = embedding(token_ids, weights.embedding.weight)  # [T, hidden]
        cos = weights.cos[position_ids].unsqueeze(1)  # [T, 1, dim]
        sin = weights.sin[position_ids].unsqueeze(1)
        for index, (layer, (fused_qkv, gate_up)) in enumerate(zip(weights.layers, self._fused, strict=True)):
            qkv = linear(self._norm(hidden, layer.input_norm), *fused_qkv)
            qkv = qkv.view(len(qkv), -1, head_dim)  # [T, heads + 2 kv heads, dim]
            qk, value = torch.split(qkv, [num_heads + num_kv_heads, num_kv_heads], dim=1)
            if layer.qk_norm is not None:
                qk = rms_norm(qk, (head_dim,), eps=weights.eps) * layer.qk_norm
            first, second = qk.chunk(2, dim=-1)
            qk = qk * cos + torch.cat((-second, first), dim=-1) * sin
            query, key = torch.split(qk, [num_heads, num_kv_heads], dim=1)
            self._attention.write(index, key, value)
            attended = self._attention.attend(index, query, layer.rule).flatten(1)
            hidden = hidden + linear(attended, layer.output.weight, layer.output.bias)
            gate, up = linear(self._norm(hidden, layer.mlp_norm), *gate_up).chunk(2, dim=-1)
            hidden = hidden + linear(silu(gate) * up, layer.down.weight, layer.down.bias)
        return hidden[rows]

    def logits(self, states: Tensor) -> Tensor:
        return linear(self._norm(states, self._weights.norm), self._weights.head.weight)

    def _norm(self, states: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(states, weight.shape, weight, self._weights.eps)
