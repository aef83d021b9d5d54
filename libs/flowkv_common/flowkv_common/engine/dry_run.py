"""Runs a model without its weights, to see whether the KV pool can hold what its attention writes.

The forward pass is the one that serves, on torch's meta device, where tensors have shapes but no values. So a
model that asks for more than causal attention over one cache is refused in a moment, however large it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
)

from flowkv_common.engine.attention import paged_attention
from flowkv_common.engine.modules import ModulesForward
from flowkv_common.engine.quiet import first_line, quiet
from flowkv_common.engine.servable import UnsupportedModel, max_model_len

# The attention function that serves; under this name `transformers` also shows the mask that a layer wants.
DRY_RUN = "flowkv_dry_run"
NUM_TOKENS = 8
MASK_SAMPLES = 64  # positions at either end of the context, where a mask is looked at


class KVShape(NamedTuple):
    """What a model's layers keep of each token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def dry_run(config: PretrainedConfig) -> KVShape:
    """What the layers of such a model write. Raises `UnsupportedModel`, with the reason, if it can't be
    served."""
    attention = _Witness()
    try:
        with quiet():
            with torch.device("meta"):
                module = AutoModelForCausalLM.from_config(
                    config, dtype=torch.bfloat16, attn_implementation=DRY_RUN
                ).eval()
            if any(hasattr(part, "create_position_ids_from_input_ids") for part in module.modules()):
                raise UnsupportedModel("it counts positions on from the id of its padding token")
            token_ids = torch.zeros(NUM_TOKENS, dtype=torch.int64, device="meta")
            indices = torch.zeros(2, dtype=torch.int64, device="meta")
            with torch.inference_mode(), _Values():
                logits = ModulesForward(module)(token_ids, token_ids, attention, indices)
    except UnsupportedModel:
        raise
    except Exception as error:  # of any model's code
        raise UnsupportedModel(f"transformers can't run it without weights: {first_line(error)}") from error
    if logits.shape != (len(indices), config.vocab_size):
        raise UnsupportedModel(f"for {len(indices)} tokens it gives logits of shape {tuple(logits.shape)}")
    return attention.shape()


class _Witness:
    """An `Attention` that computes nothing and remembers what it was asked for."""

    def __init__(self) -> None:
        self._written: dict[int, tuple[int, int]] = {}

    def bind(self, batch: object) -> None:
        raise NotImplementedError

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._written[layer] = (key.shape[1], key.shape[2])

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        return torch.empty_like(query)

    def shape(self) -> KVShape:
        num_layers, shapes = len(self._written), set(self._written.values())
        if not shapes:
            raise UnsupportedModel("its layers don't call the attention function they are given")
        if sorted(self._written) != list(range(num_layers)):
            raise UnsupportedModel("only some of its layers have attention")
        if len(shapes) > 1:
            sizes = " and ".join(f"{heads} x {dim}" for heads, dim in sorted(shapes))
            raise UnsupportedModel(f"its layers' KV caches differ in shape ({sizes}), and a pool has one")
        return KVShape(num_layers, *shapes.pop())


class _Values(TorchFunctionMode):
    """Where a model asks a tensor without values for one, it is 1 or true; no place of it is not zero."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func in (Tensor.item, Tensor.__int__, Tensor.__index__, Tensor.__float__):
                return 1
            if func in (Tensor.__bool__, Tensor.__contains__):
                return True
            if func is Tensor.tolist:
                return torch.ones(args[0].shape, dtype=args[0].dtype, device="cpu").tolist()
            if func in (torch.nonzero, Tensor.nonzero):
                return torch.empty(0, args[0].dim(), dtype=torch.int64, device="meta")
        return func(*args, **(kwargs or {}))


def _wanted_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    config: PretrainedConfig,
    **kwargs: Any,
) -> Tensor | None:
    """None where the mask is causal as far as the model is served, else a mask, which attention refuses."""
    end = max_model_len(config)
    samples = sorted({*range(min(MASK_SAMPLES, end)), *range(max(0, end - MASK_SAMPLES), end)})
    positions = torch.tensor(samples, device="cpu")
    query, key = positions.view(1, 1, -1, 1), positions.view(1, 1, 1, -1)
    zero = torch.zeros_like(query[:, :, :1])
    with contextlib.suppress(RuntimeError):  # it asks for values of the model's inputs
        allowed = mask_function(zero, zero, query, key)
        if not allowed.is_meta and bool((allowed == (key <= query)).all()):
            return None
    return torch.empty(1, 1, q_length, kv_length, dtype=torch.bool, device="meta")


AttentionInterface.register(DRY_RUN, paged_attention)
AttentionMaskInterface.register(DRY_RUN, _wanted_mask)
