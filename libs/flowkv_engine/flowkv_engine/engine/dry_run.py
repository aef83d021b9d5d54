"""A run of a model without weights: what its attention asks for, also of an unknown type."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig

from flowkv_common.errors import CannotStart, first_line
from flowkv_common.wire.messages import LayerKV
from flowkv_engine.engine.attention import Span
from flowkv_engine.engine.latents import keep_latents
from flowkv_engine.engine.positions import max_model_len

DRY_RUN = "flowkv_dry_run"  # the name in `transformers` of the attention function of the run without weights
DRY_RUN_TOKENS = 8
MASK_SAMPLES = 64  # positions at either end of the context, where a mask is looked at


class UnsupportedModel(CannotStart):
    """The model can't be served; the message says why."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """`transformers` prints nothing while it builds and loads a model."""
    verbosity, has_bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bar:
            transformers.logging.enable_progress_bar()


class LayerAttention(NamedTuple):
    """What a layer attends to."""

    kv: LayerKV
    writer: int  # the layer whose keys and values these are: itself, or one before it
    span: Span


class _Asked(NamedTuple):
    """What a layer gave the attention function."""

    key: Tensor
    value: Tensor | None
    attention: LayerAttention


def dry_run(config: PretrainedConfig) -> list[LayerAttention]:
    """Runs the model on torch's meta device -> what its layers ask for.

    Raises `UnsupportedModel`, with the reason, if it can't be served.
    """
    asked: dict[int, _Asked] = {}
    try:
        with quiet():
            with torch.device("meta"):
                module = AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation=DRY_RUN
                ).eval()
            keep_latents(module)
            if any(hasattr(part, "create_position_ids_from_input_ids") for part in module.modules()):
                raise UnsupportedModel("it counts positions on from the id of its padding token")
            token_ids = torch.zeros(DRY_RUN_TOKENS, dtype=torch.int64, device="meta")
            indices = torch.zeros(2, dtype=torch.int64, device="meta")
            with torch.inference_mode(), _Values():
                # As `ModulesForward` does.
                logits = module(
                    token_ids.unsqueeze(0),
                    position_ids=token_ids.unsqueeze(0),
                    use_cache=False,
                    logits_to_keep=indices,
                    flowkv=asked,
                ).logits[0]
    except UnsupportedModel:
        raise
    except Exception as error:  # of any model's code
        raise UnsupportedModel(f"transformers can't run it without weights: {first_line(error)}") from error
    if logits.shape != (len(indices), config.vocab_size):
        raise UnsupportedModel(f"for {len(indices)} tokens it gives logits of shape {tuple(logits.shape)}")
    if not asked:
        raise UnsupportedModel("its layers don't call the attention function they are given")
    if sorted(asked) != list(range(len(asked))):
        raise UnsupportedModel("only some of its layers have attention")
    return [asked[number].attention for number in range(len(asked))]


def _dry_run_attention(
    module: nn.Module,
    query: Tensor,  # shapes as of `paged_attention`
    key: Tensor,
    value: Tensor | None,
    attention_mask: Tensor | None,
    *,
    flowkv: dict[int, _Asked] | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Notes in `flowkv` what a layer asks for, and computes nothing.

    Raises `UnsupportedModel` if that is more than causal attention over one cache by some `Rule`.
    """
    if flowkv is None:
        raise UnsupportedModel("its attention does not hand on the keyword arguments of the forward pass")
    if position_bias is not None:
        raise UnsupportedModel("its attention has a position bias")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModel("its attention is not causal")
    span: Span | None = Span() if attention_mask is None else getattr(attention_mask, "span", None)
    if span is None:
        raise UnsupportedModel("its attention has a mask of its own, other than the causal one")
    if value is not None and (
        key.shape != value.shape or query.shape[2:] != key.shape[2:] or query.shape[1] % key.shape[1]
    ):
        sizes = ", ".join(f"{x.shape[1]} x {x.shape[3]}" for x in (query, key, value))
        raise UnsupportedModel(f"its queries, keys and values don't fit one cache: {sizes}")
    layer = module.layer_idx
    assert isinstance(layer, int)
    if layer in flowkv:
        raise UnsupportedModel("it computes the attention of a layer twice in a step")
    before = (number for number, other in flowkv.items() if other.key is key and other.value is value)
    kv = LayerKV(key.shape[1], key.shape[3], 1 if value is None else 2)
    flowkv[layer] = _Asked(key, value, LayerAttention(kv, next(before, layer), span))
    attended = query if value is not None else query[..., : module.v_head_dim]
    return torch.empty_like(attended.transpose(1, 2)), None


class _Values(TorchFunctionMode):
    """Answers for tensors without values: each value is 1 or true, and `nonzero` finds none."""

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


class _NoPadding(TorchFunctionMode):
    """A mask of chunks counts from each sequence's first token: here no sequence has padding before it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__ and args[0].is_meta and args[0].dim() == 1:  # by sequence
            return torch.zeros_like(args[1])
        return func(*args, **(kwargs or {}))


def _wanted_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    config: PretrainedConfig,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """None if the mask is causal. Else some mask, with its `span` if it has one; without, the run refuses it.

    `local_size`: of the window or the chunks, if any.
    """
    end = max_model_len(config)
    edges = (0, *((local_size, 2 * local_size) if local_size else ()), end)
    samples = {place for edge in edges for place in range(edge - MASK_SAMPLES, edge + MASK_SAMPLES)}
    positions = torch.tensor(sorted(place for place in samples if 0 <= place < end), device="cpu")
    query, key = positions.view(1, 1, -1, 1), positions.view(1, 1, 1, -1)
    zero = torch.zeros_like(query[:, :, :1])
    mask: Any = torch.empty(1, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    with contextlib.suppress(RuntimeError):  # raised if it reads values of the model's inputs
        with _NoPadding():
            allowed = mask_function(zero, zero, query, key)
        spans = [Span(), *((Span(window=local_size), Span(chunk=local_size)) if local_size else ())]
        for span in spans:
            seen = (key <= query) & (key >= span.first_seen(query))
            if not allowed.is_meta and bool((allowed == seen).all()):
                mask.span = span
                return None if span == Span() else mask
    return mask  # type: ignore[no-any-return]


AttentionInterface.register(DRY_RUN, _dry_run_attention)
AttentionMaskInterface.register(DRY_RUN, _wanted_mask)
