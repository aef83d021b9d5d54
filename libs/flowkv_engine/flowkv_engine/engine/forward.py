"""The forward pass of any servable model: its own `transformers` modules, with our attention in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from flowkv_common.errors import CannotStart
from flowkv_engine.engine.attention import Attention
from flowkv_engine.engine.llama import LlamaForward, llama_weights

# The name of our attention function in `transformers`.
IMPLEMENTATION = "flowkv"
# Keyword arguments of attention that some models pass and FlowKV does not compute.
UNSUPPORTED = {"softcap": "caps on scores", "s_aux": "attention sinks", "position_bias": "a position bias"}


class UnsupportedModel(CannotStart):
    """The model can't be served; the message says why."""


# Token ids [T], position ids [T] and places to sample from [S], all int64 -> logits [S, vocab]. The attention
# is bound to the step before.
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class ModulesForward:
    """Works for every model; the fast paths must equal it."""

    def __init__(self, module: nn.Module, attention: Attention) -> None:
        self._module = module
        self._attention = attention

    def __call__(self, token_ids: Tensor, position_ids: Tensor, logits_indices: Tensor) -> Tensor:
        written: set[int] = set()
        output = self._module(
            token_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            logits_to_keep=logits_indices,
            flowkv=(self._attention, written),
        )
        logits: Tensor = output.logits[0]
        return logits


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, T, head_dim]
    key: Tensor,  # [1, num_kv_heads, T, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    flowkv: tuple[Attention, set[int]] | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that `transformers` calls. Returns [1, T, num_heads, head_dim].

    `flowkv`: the step's attention, and the layers that it was called for. Raises `UnsupportedModel` if a
    model asks for anything but causal attention over one cache per layer.
    """
    if flowkv is None:
        raise UnsupportedModel("its attention does not hand on the keyword arguments of the forward pass")
    for name, wanted in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedModel(f"its attention has {wanted}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModel("its attention is not causal")
    if attention_mask is not None:
        raise UnsupportedModel("its attention has a mask of its own, other than the causal one")
    if key.shape != value.shape or query.shape[2:] != key.shape[2:] or query.shape[1] % key.shape[1]:
        sizes = ", ".join(f"{x.shape[1]} x {x.shape[3]}" for x in (query, key, value))
        raise UnsupportedModel(f"its queries, keys and values don't fit one cache: {sizes}")
    layer = module.layer_idx
    assert isinstance(layer, int)
    attention, written = flowkv
    if layer in written:
        raise UnsupportedModel(f"its attention of layer {layer} is computed twice in a step")
    written.add(layer)
    attention.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention.attend(layer, query[0].transpose(0, 1), scale).unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, paged_attention)


def make_forward(module: nn.Module, attention: Attention) -> Forward:
    """The fastest forward pass for the model and the backend. It may fuse or pack the model's weights."""
    weights = llama_weights(module)
    if weights is None:
        return ModulesForward(module, attention)
    if attention.name == "triton":
        from flowkv_engine.engine.gpu.attention import TritonAttention
        from flowkv_engine.engine.gpu.forward import TritonLlamaForward

        assert isinstance(attention, TritonAttention)
        return TritonLlamaForward(weights, attention)
    if attention.name == "cpu":
        from flowkv_engine.engine.cpu.attention import CpuAttention
        from flowkv_engine.engine.cpu.forward import CpuLlamaForward

        assert isinstance(attention, CpuAttention)
        if CpuLlamaForward.fits(weights):
            return CpuLlamaForward(weights, attention)
    return LlamaForward(weights, attention)
