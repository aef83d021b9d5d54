"""The text part of models that take more than text, against the whole model without pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM

from flowkv_engine.engine.dry_run import UnsupportedModel
from flowkv_engine.engine.runner import Runner
from flowkv_engine.engine.text_part import text_name
from tests.drive import BLOCK_SIZE, generate, load_tiny, make_pool, make_sequence
from tests.every_model import LATENTS

NUM_OUTPUTS = 8
TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP = {**VISION, "model_type": "clip_vision_model"}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
# Not square with the hidden size: `transformers` tells by the shape whether experts are stored transposed.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CHUNKS = {
    "attention_chunk_size": 24,
    "num_local_experts": 2,
    "floor_scale": 1000,
    "intermediate_size_mlp": 96,
}
PROJECTED = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
GEMMA_4 = {
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 512,
}
KIMI = {
    "model_type": "deepseek_v3",
    **LATENTS,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
GEMMA_4_VISION = {**VISION, "head_dim": 16, "global_head_dim": 16, "num_key_value_heads": 2}
GEMMA_3N = {
    "model_type": "gemma3n_text",
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 512,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 4,
}
# Type of the whole -> what its text part has beside `TEXT`, its vision part, what else the whole has.
WHOLES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "aya_vision": ({"model_type": "cohere2", "sliding_window": 24}, SIGLIP, {}),
    "cohere2_vision": ({"model_type": "cohere2", "sliding_window": 24}, SIGLIP, {}),
    "gemma3": ({"model_type": "gemma3_text", "sliding_window": 24}, VISION, {"mm_tokens_per_image": 4}),
    "gemma3n": (GEMMA_3N, {}, {}),
    "gemma4": ({"model_type": "gemma4_text", **GEMMA_4}, GEMMA_4_VISION, {"audio_config": None}),
    "idefics3": ({"model_type": "llama"}, VISION, {}),
    "internvl": ({"model_type": "qwen2"}, {**VISION, "image_size": [28, 28], "patch_size": [14, 14]}, {}),
    "kimi_k25": (KIMI, VISION, {}),
    "lfm2_vl": ({"model_type": "lfm2"}, VISION, {}),
    "llama4": ({"model_type": "llama4_text", **CHUNKS}, {**VISION, **PROJECTED}, {}),
    "llava": ({"model_type": "llama"}, CLIP, {}),
    "llava_next": ({"model_type": "llama"}, CLIP, {}),
    "llava_onevision": ({"model_type": "qwen2"}, SIGLIP, {}),
    "mistral3": ({"model_type": "mistral"}, {**VISION, "model_type": "pixtral"}, {}),
    "qwen2_5_vl": (ROPE, {**QWEN_VISION, "fullatt_block_indexes": [0]}, {}),
    "qwen2_vl": (ROPE, {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}, {}),
    "qwen3_vl": (ROPE, {**QWEN_VISION, "deepstack_visual_indexes": [0]}, {}),
    "qwen3_vl_moe": ({**ROPE, **EXPERTS}, {**QWEN_VISION, "deepstack_visual_indexes": [0]}, {}),
    "smolvlm": ({"model_type": "llama"}, VISION, {}),
    "voxtral": ({"model_type": "llama"}, {}, {"audio_config": VISION}),
}


def save_whole(folder: Path, model_type: str, *, tie: bool = False) -> torch.nn.Module:
    text, vision, further = WHOLES[model_type]
    parts = {"vision_config": vision} if vision else {}
    config = AutoConfig.for_model(
        model_type, text_config={**TEXT, **text}, tie_word_embeddings=tie, **parts, **further
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    whole: torch.nn.Module = model
    return whole


@torch.inference_mode()
def check_text(whole: Any, folder: Path) -> None:
    """A prompt longer than windows and chunks gets the whole model's greedy tokens."""
    model = load_tiny(folder)
    prompt = [token * 7 % 500 + 3 for token in range(70)]
    num_blocks = -(-(len(prompt) + NUM_OUTPUTS) // BLOCK_SIZE)
    sequence = make_sequence(prompt, list(range(num_blocks)))
    runner = Runner(model, make_pool(model, num_blocks), attention="torch")
    generate(runner, [sequence], NUM_OUTPUTS, chunk_tokens=32)
    token_ids = torch.tensor([prompt + sequence.output_ids[:-1]])
    logits = whole(input_ids=token_ids, use_cache=False).logits[0, len(prompt) - 1 :]
    chosen = logits[torch.arange(NUM_OUTPUTS), torch.tensor(sequence.output_ids)]
    assert (logits.max(dim=-1).values - chosen).max() < 1e-3


@pytest.mark.parametrize(
    "model_type",
    ["gemma3", *(pytest.param(name, marks=pytest.mark.full) for name in WHOLES if name != "gemma3")],
)
def test_text_is_answered_as_by_the_whole_model(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model_type == "gemma3n":  # a library of pictures makes its towers, which text does not pass
        from_config = AutoModel.from_config
        monkeypatch.setattr(
            AutoModel,
            "from_config",
            lambda config, **more: (
                from_config(config, **more) if config.model_type == "gemma3n_text" else torch.nn.Identity()
            ),
        )
    check_text(save_whole(tmp_path / "m", model_type), tmp_path / "m")


@pytest.mark.full
def test_a_tied_head_of_the_whole_is_tied_in_its_part(tmp_path: Path) -> None:
    check_text(save_whole(tmp_path / "m", "gemma3", tie=True), tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "is_called"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.model.blocks.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.text_model.norm.weight", "model.norm.weight"),
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("vision_tower.encoder.layers.0.weight", None),
        ("model.visual.patch_embed.proj.weight", None),
        ("multi_modal_projector.linear_1.weight", None),
        ("model.embed_vision.embedding.weight", None),
        ("image_newline", None),
    ],
)
def test_a_tensor_of_the_text_part_has_the_name_of_a_text_models(name: str, is_called: str | None) -> None:
    assert text_name(name) == is_called


def test_the_text_part_of_another_type_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    """In PaliGemma each token of a prompt sees all of it."""
    AutoConfig.for_model("paligemma").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="takes more than text, and is none of the types whose text"):
        load_tiny(tmp_path)
