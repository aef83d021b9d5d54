"""What a model folder's weight files hold, by their headers alone: all of the model, and nothing else?

Says so before weights are read. Whatever would be left out of a model, or made up for it, is a refusal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.modeling_utils import load_state_dict

from flowkv_common.engine.quiet import first_line, quiet
from flowkv_common.engine.servable import UnsupportedModel
from flowkv_common.fingerprint import weight_files

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
