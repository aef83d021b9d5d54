"""Checks greedy output against plain `transformers` (docs/architecture.md, rule 13)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@functools.cache
def _reference(model_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


@torch.inference_mode()
def check_identity(
    model_path: Path | str, prompt_ids: list[int], output_ids: list[int], tolerance: float = 1e-3
) -> None:
    """Asserts that `output_ids` are what `transformers` alone would choose, up to `tolerance` in logits."""
    assert output_ids, "there is no output to check"
    model = _reference(Path(model_path).resolve())
    token_ids = torch.tensor([prompt_ids + output_ids[:-1]])
    logits = model(token_ids, use_cache=False).logits[0, len(prompt_ids) - 1 :]  # [outputs, vocab]
    chosen = logits[torch.arange(len(output_ids)), torch.tensor(output_ids)]
    gaps = logits.max(dim=-1).values - chosen
    wrong = (gaps > tolerance).nonzero().flatten().tolist()
    assert not wrong, (
        f"output {wrong[0]} of {len(output_ids)} is token {output_ids[wrong[0]]}, whose logit lies "
        f"{gaps[wrong[0]]:.4f} below that of token {int(logits[wrong[0]].argmax())}"
    )
