"""Checks greedy output against plain `transformers` (docs/architecture.md, rule 13)."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, dequantize
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM


def load_reference(folder: Path) -> Any:
    """Plain `transformers` in float32. Blocks of a GGUF file become floats by the `gguf` package."""
    file = folder / "model.safetensors"
    if not file.is_file():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with safe_open(file, framework="np") as tensors:
        forms = json.loads((tensors.metadata() or {}).get("flowkv_forms", "{}"))
        if not forms:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        state = {name: torch.from_numpy(tensors.get_tensor(name)) for name in sorted(tensors.keys())}
    for name, form in forms.items():
        state[name] = torch.from_numpy(dequantize(state[name].numpy(), GGMLQuantizationType[form]))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    model.tie_weights()
    return model.eval()


def write_floats(folder: Path, target: Path) -> None:
    """The model in float32, to the new folder `target`: for programs that read no blocks."""
    load_reference(folder).save_pretrained(target)
    for file in (*folder.glob("tokenizer*"), *folder.glob("chat_template*")):
        shutil.copy(file, target)


_reference = functools.cache(load_reference)


@torch.inference_mode()
def check_identity(
    model_path: Path | str, prompt_ids: list[int], output_ids: list[int], tolerance: float = 1e-3
) -> None:
    """Asserts that `output_ids` are what `transformers` alone would choose, up to `tolerance` in logits."""
    assert output_ids, "there is no output to check"
    model = _reference(Path(model_path).resolve())
    token_ids = torch.tensor([prompt_ids + output_ids[:-1]])
    # Of the whole prompt they take gigabytes where the vocabulary is large.
    logits = model(token_ids, use_cache=False, logits_to_keep=len(output_ids)).logits[0]  # [outputs, vocab]
    chosen = logits[torch.arange(len(output_ids)), torch.tensor(output_ids)]
    gaps = logits.max(dim=-1).values - chosen
    wrong = (gaps > tolerance).nonzero().flatten().tolist()
    assert not wrong, (
        f"output {wrong[0]} of {len(output_ids)} is token {output_ids[wrong[0]]}, whose logit lies "
        f"{gaps[wrong[0]]:.4f} below that of token {int(logits[wrong[0]].argmax())}"
    )
