"""What a model folder's weight files hold, by their headers alone: all of the model, and nothing else?

Says so before weights are read. Whatever would be left out of a model, or made up for it, is a refusal.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
)
from transformers.modeling_utils import load_state_dict

from flowkv_common.fingerprint import weight_files
from flowkv_common.wire.messages import SamplingParams
from flowkv_engine.engine.attention import IMPLEMENTATION, paged_attention
from flowkv_engine.engine.batch import PackedBatch, WorkItem, pack
from flowkv_engine.engine.forward import ModulesForward
from flowkv_engine.engine.sequence import Sequence
from flowkv_engine.engine.servable import UnsupportedModel, first_line, max_model_len, quiet

SHOWN = 3  # names in a message
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
# Buffers that older versions of `transformers` wrote (each model computes its own), and what no model reads
# itself: layers that guess further tokens for a drafter, and a head that valued answers in training.
HARMLESS = (
    r"\.(inv_freq|cos_cached|sin_cached|position_ids|masked_bias)$",
    r"(^|\.)mtp(\.|_)",
    r"^v_head\.",
)
MASK_DTYPES = {torch.bool, torch.uint8}
DEQUANTIZED = "fp8"  # quantized weights that are read: as the floats that they stand for
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What other tools write beside config.json, each for weights that are not floats.
QUANTIZER_FILES = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
}


def readable_config(folder: Path, config: PretrainedConfig) -> PretrainedConfig:
    """`config` such that `transformers` makes plain floats of the weights in `folder`, on any device.

    Raises `UnsupportedModel` if it can't: they are quantized in another way, or only an adapter of a model.
    """
    if (folder / "adapter_config.json").is_file():  # a merged model may have kept it
        adapters = [name for name in ADAPTER_FILES if (folder / name).is_file()]
        if adapters or not weight_files(folder):
            raise UnsupportedModel(f"{folder} holds an adapter (LoRA), which is not served: merge it first")
    quantization: dict[str, Any] = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") or ("an unnamed method" if quantization else None)
    for name, tool in QUANTIZER_FILES.items():
        if method is None and (folder / name).is_file():
            method = f"{tool} ({name})"
    if method is None:
        return config
    if method != DEQUANTIZED:
        raise UnsupportedModel(
            f"{folder} can't be served: its weights are quantized by {method}, and only plain floats and "
            f"{DEQUANTIZED} of transformers are read"
        )
    config.quantization_config = {**quantization, "dequantize": True}
    return config


def refuse_incomplete(folder: Path, config: PretrainedConfig) -> None:
    """Raises `UnsupportedModel` if the weight files in `folder` hold less than the model, or more.

    Loads them as `transformers` would, but on torch's meta device: of every tensor the name, type and shape.
    """
    tensors = _headers(_checkpoint_files(folder))
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    ignored = [
        *HARMLESS,
        *_saved_masks(tensors),
        *_drafting_layers(config),
        *(model_class._keys_to_ignore_on_load_unexpected or []),
    ]
    if getattr(config, "quantization_config", None) is None:
        _refuse_packed(folder, _without(tensors, ignored), tensors)
    try:
        with quiet():
            _, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # of any model's code
        raise UnsupportedModel(f"transformers can't load {folder}: {first_line(error)}") from error
    missing, unexpected = sorted(info["missing_keys"]), _without(info["unexpected_keys"], ignored)
    other = sorted(f"{name} {tuple(has)} for {tuple(wants)}" for name, has, wants in info["mismatched_keys"])
    complaints = [
        f"{words} {_some(names)}"
        for words, names in (
            ("lack", missing),
            ("hold what the model has no place for:", unexpected),
            ("have another shape than the model's:", other),
            ("can't be read:", info["error_msgs"]),
        )
        if names
    ]
    if complaints:
        raise UnsupportedModel(f"the weights in {folder} {', and '.join(complaints)}")


def _checkpoint_files(folder: Path) -> list[Path]:
    files = weight_files(folder)
    if not files:
        raise UnsupportedModel(
            f"{folder} holds no weights: no model.safetensors, no pytorch_model.bin, no index of several "
            "such files; load format dummy makes random ones"
        )
    if absent := [file.name for file in files if not file.is_file()]:
        raise UnsupportedModel(f"{folder} lacks {_some(absent)}, which its index of weights names")
    return files


def _headers(files: list[Path]) -> dict[str, Tensor]:
    """Name, shape and type of every tensor, as tensors without values."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_state_dict(file, map_location="meta")
        except Exception as error:  # of several libraries: the file is not what its name says
            raise UnsupportedModel(f"{file} can't be read: {error}") from error
    return tensors


def _saved_masks(tensors: Mapping[str, Tensor]) -> list[str]:
    """Patterns of the causal masks that models once kept as a buffer, under the name of a bias."""
    return [
        f"^{re.escape(name)}$"
        for name, tensor in tensors.items()
        if re.search(r"\.(attn|attention)\.bias$", name) and tensor.dtype in MASK_DTYPES and tensor.ndim >= 2
    ]


def _drafting_layers(config: PretrainedConfig) -> list[str]:
    """Patterns of the layers behind the last one that a config tells of; their tensors are numbered on."""
    first, count = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None) or 0
    return [rf"\.layers\.{first + i}\." for i in range(count)]


def _without(names: Iterable[str], ignored: list[str]) -> list[str]:
    return sorted(name for name in names if not any(re.search(pattern, name) for pattern in ignored))


def _refuse_packed(folder: Path, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Integers and small floats need scales to mean anything, and no config says how to apply them."""
    packed = [name for name in names if tensors[name].dtype not in FLOATS]
    if packed:
        dtypes = sorted({str(tensors[name].dtype).removeprefix("torch.") for name in packed})
        raise UnsupportedModel(
            f"{folder} can't be served: it holds tensors of {', '.join(dtypes)} ({_some(packed)}), and its "
            "config.json has no quantization_config"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


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


PROMPT_LENS = (9, 6)  # tokens; the last one of each is computed in a step of its own
# How far logits may lie from the model's own, as a share of their spread and in units of rounding: 3 % in
# float32, 50 % in bfloat16. Rounding costs up to 35 units; another position, mask or neighbour 20 % or more.
TOLERANCE = 64.0
FINEST = 5e-4  # a GPU may multiply float32 with 11 bits


class SelfCheck:
    """Two short prompts and what the model itself makes of them: a forward pass of its modules for each."""

    def __init__(self, module: nn.Module, pool: Tensor, max_model_len: int, vocab_size: int) -> None:
        """To be made while `module` has its weights. A pool of one block has room for one prompt only."""
        num_blocks, block_size = pool.shape[0], pool.shape[3]
        longest = min(block_size, max_model_len)
        lens = [min(wanted, longest) for wanted in PROMPT_LENS[:num_blocks]] if longest > 1 else []
        generator = torch.Generator().manual_seed(0)
        dtypes = {next(module.parameters()).dtype, pool.dtype}
        self._tolerance = TOLERANCE * max(FINEST, *(torch.finfo(dtype).eps for dtype in dtypes))
        self._block_size = block_size
        self._prompts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lens]
        self._expected = [_plain_logits(module, prompt) for prompt in self._prompts]

    def run(self, logits_of: Callable[[PackedBatch], Tensor]) -> None:
        """`logits_of` computes a batch: logits [S, vocab]. Raises `UnsupportedModel` if they are others."""
        for num_left in (1, 0) if self._prompts else ():  # all tokens but the last one, then the last one
            items, expected = [], []
            for block, (prompt, logits) in enumerate(zip(self._prompts, self._expected, strict=True)):
                end = len(prompt) - num_left
                start = len(prompt) - 1 if num_left == 0 else 0
                items.append(_item(prompt[:end], start, block))
                expected.append(logits[end - 1])
            self._compare(logits_of(pack(items, self._block_size)).float(), torch.stack(expected))

    def _compare(self, got: Tensor, expected: Tensor) -> None:
        spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
        error = ((got - expected).norm(dim=-1) / spread).max().item()
        if not error <= self._tolerance:  # NaN too
            raise UnsupportedModel(
                "its answers would be wrong: the forward pass that serves gives other logits than the model, "
                f"by {error:.0%} of their spread"
            )


def _item(token_ids: list[int], num_computed: int, block: int) -> WorkItem:
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    sequence = Sequence("", 0, "self-check", "", token_ids, [], sampling, 0.0, [block])
    sequence.num_computed_tokens = num_computed
    return WorkItem(sequence, len(token_ids) - num_computed)


@torch.inference_mode()
def _plain_logits(module: Any, token_ids: list[int]) -> Tensor:
    """[len(token_ids), vocab] in float32, with attention as the model's authors wrote it."""
    device = next(module.parameters()).device
    with quiet():
        module.set_attn_implementation("eager")
        output = module(torch.tensor([token_ids], device=device), use_cache=False)
        module.set_attn_implementation(IMPLEMENTATION)
    logits: Tensor = output.logits[0].float()
    return logits
