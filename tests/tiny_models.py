"""Makes tiny random models on the spot, one per architecture, as plain `transformers` folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

VOCAB_SIZE = 512
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")
_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
# What further architectures with a flat forward need to show all they have, and those that most tests try.
FLAT_OFTEN = {"gemma3_text", "gpt_oss", "glm4_moe"}
FLAT: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {"sliding_window": 8, "layer_types": _SLIDING, "attn_logit_softcapping": 2.0},
    "gemma3_text": {
        "sliding_window": 8,
        "layer_types": _SLIDING,
        "query_pre_attn_scalar": 12,
        "final_logit_softcapping": 5.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    },
    "phi3": {"partial_rotary_factor": 0.75, "sliding_window": 8},
    "glm": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": _SLIDING,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
        },
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 2, "rotary_dim": 8},
}

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large enough for logits to differ: greedy tokens must not hang on rounding
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}


def make_tiny_model(
    folder: Path, arch: str = "llama", seed: int = 0, *, vocab_size: int = VOCAB_SIZE, **config: Any
) -> Path:
    """Writes config and fp32 safetensors of a random model of type `arch`, such as "llama" or "gpt2"."""
    values: dict[str, Any] = {**_COMMON, "vocab_size": vocab_size, **config}
    if arch == "gpt2":  # knows neither, and would believe them
        del values["num_key_value_heads"], values["head_dim"]
        values["hidden_size"] = 96  # heads of 16, also wide enough for vectors of AVX-512
    if arch == "mistral":
        values.setdefault("sliding_window", None)
    save_random(AutoConfig.for_model(arch, **values), folder, seed)
    return folder


def save_random(config: PretrainedConfig, folder: Path, seed: int = 0) -> None:
    """Writes a model of this config, with fp32 weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):
                # As initialized they change nothing, and a test could not see them forgotten.
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.2)
    model.save_pretrained(folder)
