"""The text part of a model that takes more than text: its config, and its weights by a text model's names."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from transformers import CONFIG_MAPPING, PretrainedConfig

# Types that compute of text what their text part computes, by test. Others may not: in PaliGemma each token
# of a prompt sees all of it.
WHOLES = {
    "aya_vision",
    "cohere2_vision",
    "gemma3",
    "gemma3n",
    "gemma4",
    "idefics3",
    "internvl",
    "kimi_k25",
    "lfm2_vl",
    "llama4",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "voxtral",
}
# Text parts without a causal model of their own -> the type, and fields, that compute the same of text, whose
# tokens have one place each where those of pictures have three.
_SAME_OF_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
}
# Starts of names in files of a whole, newer and older ones -> those in a text model.
RENAMED = {
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
    r"^model\.blocks\.": "model.layers.",  # in a Kimi that transformers has written
}
_OTHER_PARTS = re.compile(
    r"^(?:model\.)?(?:visual|vision_\w+|audio_\w+|\w+_projector|connector|embed_vision|embed_audio|image_newline)\b"
)

_Value = TypeVar("_Value")


def text_part(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the model's text part; `config` itself if it takes nothing but text.

    The whole may say for its part of which type the weights are, whether the head is tied, and how weights
    are quantized.
    """
    part = config.get_text_config(decoder=True)
    if part is config or config.is_encoder_decoder or config.model_type not in WHOLES:
        return config
    part = copy.deepcopy(part)
    if part.model_type in _SAME_OF_TEXT:
        part = _as_text_model(part)
    part.tie_word_embeddings = getattr(config, "tie_word_embeddings", part.tie_word_embeddings)
    if part.dtype is None:
        part.dtype = config.dtype
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        part.quantization_config = quantization
    return part


def _as_text_model(part: PretrainedConfig) -> PretrainedConfig:
    fields: dict[str, Any] = part.to_dict()
    model_type = fields.pop("model_type")
    same_type, further = _SAME_OF_TEXT[model_type]
    rope = fields.pop("rope_parameters")
    rope = {name: value for name, value in rope.items() if not name.startswith("mrope_")}
    if rope["rope_type"] == "mrope":
        rope["rope_type"] = "default"
    fields |= {"rope_parameters": rope, **further}
    config: PretrainedConfig = CONFIG_MAPPING[same_type](**fields)
    # `transformers` finds by this name that the files hold experts transposed.
    config.model_type = model_type.removesuffix("_text")
    return config


def text_name(name: str) -> str | None:
    """What a text model calls a tensor of the whole; None if it belongs to another part."""
    if _OTHER_PARTS.match(name):
        return None
    for start, renamed in RENAMED.items():
        name = re.sub(start, renamed, name)
    return name


def of_text(tensors: Iterable[tuple[str, _Value]]) -> Iterator[tuple[str, _Value]]:
    """Of the whole's tensors those of the text part, by a text model's names."""
    for name, tensor in tensors:
        if (renamed := text_name(name)) is not None:
            yield renamed, tensor
