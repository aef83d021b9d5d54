"""What attention is to the engine: KV goes into the pool, queries read it through block tables.

Also lets any `transformers` model whose attention is pluggable run on it, under the name "flowkv".
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from flowkv_common.engine.batch import PackedBatch
from flowkv_common.engine.servable import UnsupportedModel

IMPLEMENTATION = "flowkv"
# What some models want of attention, and we don't do.
UNSUPPORTED = {"softcap": "caps on scores", "s_aux": "attention sinks", "position_bias": "a position bias"}


class Attention(Protocol):
    """Causal attention over a pool `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`.

    `bind` once per step, then per layer `write` before `attend`. One thread only.
    """

    def bind(self, batch: PackedBatch) -> None:
        """Makes `batch` the one that the calls below are about."""
        ...

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Stores the step's keys and values, both [T, num_kv_heads, head_dim], at the batch's slots."""
        ...

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """`query` [T, num_heads, head_dim] attends to its items' contexts: the same shape and dtype."""
        ...


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, T, head_dim]
    key: Tensor,  # [1, num_kv_heads, T, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    flowkv: Attention | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that `transformers` calls; the step's `Attention` comes as keyword `flowkv`.

    Raises `UnsupportedModel` if a model asks for anything but causal attention over one cache per layer.
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
    flowkv.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return flowkv.attend(layer, query[0].transpose(0, 1), scale).unsqueeze(0), None  # [1, T, heads, dim]


AttentionInterface.register(IMPLEMENTATION, paged_attention)
