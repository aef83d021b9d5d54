"""The positions of a model: how many there are, and that each rotates in one way in all sequences."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def max_model_len(config: PretrainedConfig) -> int:
    """Tokens of the longest sequence that the model is for.

    RoPE of type "dynamic" is for more, but beyond `max_position_embeddings` it rotates all positions anew at
    each token. YaRN is for its factor times the original length, which many configs keep as they had it.
    """
    limit = int(config.max_position_embeddings)
    for rope in _ropes(config):
        original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if rope["rope_type"] == "yarn" and original and factor and original <= limit:
            limit = max(limit, int(original * factor))
    if getattr(config, "attn_temperature_tuning", False):
        # From this length on Llama 4 scales queries by where they stand in the step, not in the sequence.
        limit = min(limit, int(config.floor_scale) - 1)
    return limit


def fix_positions(config: PretrainedConfig, max_len: int) -> None:
    """Keys in the KV cache must stay true: each position rotates as in a sequence of `max_len` tokens.

    RoPE of type "longrope" has factors for sequences up to the original length and others for longer ones.
    """
    for rope in _ropes(config):
        if rope["rope_type"] == "longrope":
            is_long = max_len > rope["original_max_position_embeddings"]
            used, other = ("long", "short") if is_long else ("short", "long")
            rope[f"{other}_factor"] = rope[f"{used}_factor"]


def unknown_rope_types(config: PretrainedConfig) -> list[str]:
    """Those that `transformers` would only warn of."""
    return sorted({rope["rope_type"] for rope in _ropes(config)} - {"default", *ROPE_INIT_FUNCTIONS})


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The RoPE of all layers, or one for each type of layer."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [each for each in rope.values() if isinstance(each, dict)]
