"""Makes weights of any stored form, and tiny models of them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flowkv_engine.engine.stored import BFLOAT16, Form, Stored, stored_groups
from flowkv_engine.engine.stored_modules import FORMS_KEY, STORED_FLOATS
from tests.tiny_models import FLAT, make_tiny_model

LENGTH = 512  # two blocks of the longest


def random_blocks(form: Form, num_rows: int, length: int = LENGTH, seed: int = 0) -> NDArray[np.uint8]:
    """Rows of any bytes whose float16 numbers are finite and about as large as a model's."""
    random = np.random.default_rng(seed)
    if form.bits == 16:
        numbers = (random.standard_normal((num_rows, length)) / 16).astype(np.float32)
        if form is BFLOAT16:
            return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return numbers.astype(np.float16).view(np.uint8)
    numbers_each, num_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[form.name]]
    rows = random.integers(0, 256, (num_rows, length // numbers_each, num_bytes), dtype=np.uint8)
    halves = [208] if form.name == "Q6_K" else [0, 2] if form.has_offset else [0]
    largest = 0.5 / 2**form.bits / (64 if form.has_supers else 1)
    for place in halves:
        scales = (random.random((*rows.shape[:2], 1)) * largest).astype(np.float16)
        rows[..., place : place + 2] = scales.view(np.uint8)
    return rows.reshape(num_rows, -1)


def random_weight(form: Form, num_cols: int, num_blocks: int, seed: int = 0) -> Stored:
    """Of a form without floats of 16 bits, so many blocks long, without NaN."""
    if not form.has_full_scales:
        length = num_blocks * (256 if form.has_supers else 32)
        return Stored(form, random_blocks(form, num_cols, length, seed))
    random = np.random.default_rng(seed)
    shape = (num_cols, num_blocks * form.group)
    codes = random.integers(0, 16 if form.bits == 4 else 256, shape, dtype=np.uint8)
    if form.is_e4m3:
        codes[codes & 127 == 127] = 1  # NaN
    scales = (random.random((num_cols, num_blocks)) / 64).astype(np.float32)
    zeros = random.integers(0, 16, scales.shape).astype(np.float16) if form.has_zeros else None
    return stored_groups(form, codes.view(np.int8) if form.bits == 8 else codes, scales, zeros)


def make_stored_model(folder: Path, forms: list[Form], arch: str = "llama") -> Path:
    """A tiny model whose projections and embedding have these forms in turn.

    Of one form with 16 bits it is a folder as `transformers` writes it, else one as `convert_gguf` does.
    """
    make_tiny_model(
        folder,
        arch,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3 if arch in FLAT else 2,
        num_attention_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        **FLAT.get(arch, {}),
    )
    if len(forms) == 1 and forms[0] in STORED_FLOATS.values():
        dtype = next(dtype for dtype, form in STORED_FLOATS.items() if form == forms[0])
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
        return folder
    tensors, names = load_file(folder / "model.safetensors"), {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if tensor.ndim == 2:
            form = forms[number % len(forms)]
            names[name] = form.name
            tensors[name] = torch.from_numpy(random_blocks(form, len(tensor), tensor.shape[1], seed=number))
    save_file(tensors, folder / "model.safetensors", metadata={FORMS_KEY: json.dumps(names), "format": "pt"})
    return folder
