"""The forward pass of any servable model, through its own `transformers` modules."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from flowkv_common.engine.attention import Attention
from flowkv_common.engine.batch import PackedBatch
from flowkv_common.engine.servable import UnsupportedModel


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
