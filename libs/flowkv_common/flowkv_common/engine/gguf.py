"""Turns a GGUF file into a plain `transformers` folder: fp32 weights, tokenizer, chat template, configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def convert(gguf: Path, folder: Path, on_progress: Callable[[str], None]) -> None:
    """Writes the model in `gguf` to the new `folder`, dequantized to fp32."""
    import torch  # here, so that finding a converted model costs no import of torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_progress(f"converting {gguf.name} (once; seconds to minutes)")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # a model marked as quantized refuses to be saved
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, but a cache may be filled by root and read by others
    on_progress(f"converted {gguf.name}")
