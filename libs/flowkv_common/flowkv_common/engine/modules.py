"""The forward pass of any servable model, through its own `transformers` modules."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from flowkv_common.engine.attention import Attention


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
            flowkv=attention,
        )
        logits: Tensor = output.logits[0]
        return logits
