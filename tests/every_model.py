"""A walk over every type of causal language model that `transformers` knows: a tiny config of each.

`python -m tests.every_model` writes the tables of docs/models.md from it.
"""

from __future__ import annotations

import inspect
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flowkv_engine.engine.dry_run import UnsupportedModel
from flowkv_engine.engine.text_part import WHOLES
from tests.drive import load_tiny

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MODEL_TYPES: list[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB_SIZE = 512

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 24,
    "local_attention": 24,
    "attention_chunk_size": 24,
    "initializer_range": 0.3,  # large enough for logits to differ: greedy tokens must not hang on rounding
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_k": 2,
}
# As the compressed KV of all heads is 32 and 16 numbers of a token (MLA).
LATENTS = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Its full layers have one KV head of 32 dimensions, those with a window two of 16.
_GEMMA_4: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "attention_k_eq_v": True,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
}
# What a type needs beside its sizes, or it can't be built so small.
_FURTHER: dict[str, dict[str, Any]] = {
    "beam": {"n_group": 2, "topk_group": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCAB_SIZE},
    "gemma4_text": {
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        **_GEMMA_4,
    },
    "gemma4_unified_text": _GEMMA_4,
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 8},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **further: Any) -> PretrainedConfig:
    """Four layers of 64 dimensions, 512 tokens, positions up to 256; `further` wins over all of it."""
    kind = CONFIG_MAPPING[model_type]
    known = {*kind.__dataclass_fields__, *inspect.signature(kind).parameters, *kind.attribute_map}
    sizes = {name: size for name, size in _SIZES.items() if name in known}
    if "kv_lora_rank" in known:
        sizes |= {name: size for name, size in LATENTS.items() if name in known}
    config: PretrainedConfig = AutoConfig.for_model(
        model_type, **{**sizes, **_FURTHER.get(model_type, {}), **further}
    )
    return config


# Those that are served in this form, by the tests; all others are refused, with a reason.
FAMILIES = {
    "Llama and its like": (
        "llama mistral ministral ministral3 qwen2 qwen3 smollm3 granite granite_swa helium arcee seed_oss "
        "hyperclovax internlm3 iquestcoder apertus bitnet hunyuan_v1_dense jais2 nanochat ernie4_5 mellum cwm"
    ),
    "Gemma, Cohere, OLMo, Phi, GLM": (
        "gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text vaultgemma cohere cohere2 "
        "cohere_compass_text olmo olmo2 olmo3 phi phi3 phi4_multimodal glm glm4"
    ),
    "mixtures of experts": (
        "mixtral gpt_oss llama4_text qwen2_moe qwen3_moe glm4_moe minimax_m2 minimax_m3_vl_text ernie4_5_moe "
        "granitemoe granitemoeshared granitemoe_swa olmoe flex_olmo phimoe dbrx dots1 hunyuan_v1_moe hy_v3 "
        "solar_open cohere2_moe exaone_moe aria_text afmoe beam kolibri1 laguna"
    ),
    "latents (MLA)": "deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 longcat_flash youtu axk1",
    "others": (
        "gpt2 gpt-sw3 gpt_bigcode gpt_neox opt starcoder2 exaone4 persimmon ctrl modernbert-decoder moshi "
        "flint"
    ),
}
SERVED = [name for names in FAMILIES.values() for name in names.split()]
# Those of the walk whose text part is served: it must answer as the whole (test_engine_text_part.py).
SERVED_PARTS = ["gemma3", "gemma3n", "gemma4", "llama4"]

# Of a refusal what is not the mechanism: its beginning, and what only one type or config has.
_NOT_THE_MECHANISM = re.compile(
    r"^.* can't be served: |\w+ of (?=transformers does not let)"
    r"|(?<=does not say what is needed).*|(?<=fit one cache).*|(?<=run it without weights).*"
    r"|(?<=differ in shape).*"
)


def why_refused(config: PretrainedConfig, folder: Path) -> str | None:
    """The one sentence, as said of a folder that holds the config and no weights; None if it is served."""
    config.save_pretrained(folder)
    try:
        load_tiny(folder)
    except UnsupportedModel as error:
        return None if "holds no weights" in str(error) else str(error)
    raise AssertionError(f"{folder} was served without weights")


def walk(folder: Path) -> dict[str, str | None]:
    """Each type -> why it is refused, or None."""
    return {name: why_refused(tiny_config(name), folder / name) for name in MODEL_TYPES}


def mechanism(sentence: str) -> str:
    """What all types say that are refused for one reason."""
    return _NOT_THE_MECHANISM.sub("", sentence)


def tables(said: dict[str, str | None]) -> str:
    """What docs/models.md tells of the walk."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, why in said.items():
        if why is not None:
            reasons[mechanism(why)].append(name)
    num_refused = sum(map(len, reasons.values()))
    lines = [
        f"Of the {len(said)} types of causal language model in transformers 5.23, {len(said) - num_refused} "
        f"are served and {num_refused} are refused.",
        "",
        "| served | types |",
        "|---|---|",
        *(f"| {family} | {', '.join(names.split())} |" for family, names in FAMILIES.items()),
        f"| the text part of | {', '.join(sorted(WHOLES))}, unless its own type is refused |",
        "",
        "| refused, since | types | number |",
        "|---|---|---|",
    ]
    for reason, names in sorted(reasons.items(), key=lambda entry: -len(entry[1])):
        lines.append(f"| {reason} | {', '.join(names)} | {len(names)} |")
    return "\n".join(lines)


def page_with(said: dict[str, str | None]) -> str:
    """docs/models.md with these tables."""
    begin, end = "<!-- begin: written by python -m tests.every_model -->\n", "\n<!-- end -->"
    page = PAGE.read_text()
    head, tail = page.split(begin)[0], page.split(end)[1]
    return f"{head}{begin}{tables(said)}{end}{tail}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page_with(walk(Path(folder))))
