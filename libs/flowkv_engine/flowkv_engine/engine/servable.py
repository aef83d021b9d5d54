"""`transformers` at a word: its tables and progress bars off, its errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig

from flowkv_common.errors import CannotStart


@contextmanager
def quiet() -> Iterator[None]:
    """Without what `transformers` prints while it builds and loads a model."""
    verbosity, has_bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bar:
            transformers.logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What an error of somebody's code says, for a sentence of ours."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


LAYER_TYPES = {"full_attention", "sliding_attention"}


class UnsupportedModel(CannotStart):
    """The model can't be served; the message says why."""


def servable_config(path: str) -> PretrainedConfig:
    """The config in the folder `path`. Raises `UnsupportedModel` if FlowKV can't serve such a model."""
    if not Path(path).is_dir():
        raise UnsupportedModel(f"there is no model folder at {path}")
    if not Path(path, "config.json").is_file():
        raise UnsupportedModel(f"{path} has no config.json, so it is no model of transformers")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # of any model's code, which checks its config in its own way
        raise UnsupportedModel(
            f"{path} has no config that transformers knows: {first_line(error)}"
        ) from error
    try:
        reason = _why_not(config)
    except Exception as error:  # configs answer a question that they can't with errors of their own
        reason = f"its config does not say what is needed: {first_line(error)}"
    if reason:
        raise refusal(path, config, reason)
    return config


def refusal(path: str, config: PretrainedConfig, reason: object) -> UnsupportedModel:
    """One sentence: which folder, of what type, and what it is or wants that FlowKV does not do."""
    return UnsupportedModel(f"{path} ({config.model_type}) can't be served: {reason}")


def _why_not(config: PretrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, only decoder-only models are"
    if config.get_text_config() is not config:
        return "it takes more than text"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "it is not a causal language model"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model_class._is_stateful:
        return "it keeps a recurrent state beside its KV cache"
    if not model_class._supports_attention_backend:
        return f"{model_class.__name__} of transformers does not let its attention be replaced"
    if getattr(config, "kv_lora_rank", None):
        return "its KV cache is compressed (MLA)"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention caps logits"
    if unknown := set(_layer_types(config)) - LAYER_TYPES:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    if not getattr(config, "max_position_embeddings", None):
        return "its config has no max_position_embeddings, so its longest context is unknown"
    return None


def _layer_types(config: PretrainedConfig) -> list[str]:
    return getattr(config, "layer_types", None) or []


def max_model_len(config: PretrainedConfig) -> int:
    """The longest sequence that full attention with fixed positions computes as the model means it."""
    limits = [int(config.max_position_embeddings), *_window(config)]
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond this length all positions turn differently, those whose keys are cached too.
        limits.append(int(rope["original_max_position_embeddings"]))
    return min(limits)


def _window(config: PretrainedConfig) -> list[int]:
    """The sliding window if any layer has one: up to its length it is full attention."""
    window = getattr(config, "sliding_window", None)
    types = _layer_types(config)
    is_used = "sliding_attention" in types if types else getattr(config, "use_sliding_window", True)
    return [int(window)] if window and is_used else []
