"""What attention is to the engine: KV goes into the pool, queries read it through block tables.

Also lets any `transformers` model whose attention is pluggable run on it, under the name "flowkv".
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from flowkv_common.engine.batch import PackedBatch

IMPLEMENTATION = "flowkv"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # what some models want of attention, and we don't do


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
    flowkv: Attention,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that `transformers` calls; the step's `Attention` comes as keyword `flowkv`."""
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} needs {name}, which FlowKV does not do")
    layer = module.layer_idx
    assert isinstance(layer, int)
    flowkv.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return flowkv.attend(layer, query[0].transpose(0, 1), scale).unsqueeze(0), None  # [1, T, heads, dim]


AttentionInterface.register(IMPLEMENTATION, paged_attention)
