from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numba
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from flowkv_engine.engine.cpu.forward import CpuLlamaForward
from flowkv_engine.engine.cpu.linear import gated_linear, linear, pack, unpack_rows
from flowkv_engine.engine.cpu.panels import pack_stored, widen_panel
from flowkv_engine.engine.cpu.simd import LANES
from flowkv_engine.engine.runner import Runner
from flowkv_engine.engine.stored import BFLOAT16, FORMS, Q4_1, Form, Stored, widened
from flowkv_engine.engine.stored_modules import FORMS_KEY
from tests.drive import generate, load_tiny, make_pool, make_sequence
from tests.oracle import check_identity
from tests.tiny_models import make_tiny_model

NOTHING = np.empty(0, np.float32)
FORM_IDS = [form.name for form in FORMS]
LENGTH = 512  # two blocks of the longest
PROMPTS = [(0, 50), (8, 7)]  # first block, tokens
# To compile the kernels of a form takes seconds: the others are tried in the full run.
EACH_FORM = [
    pytest.param(form, id=form.name, marks=() if form is Q4_1 else (pytest.mark.full,)) for form in FORMS
]


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


def by_gguf(form: Form, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    floats: NDArray[np.float32] = gguf.dequantize(blocks, GGMLQuantizationType[form.name])
    return floats


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_widened_is_what_gguf_gives(form: Form) -> None:
    blocks = random_blocks(form, 5)
    stored = Stored(form, blocks)
    assert stored.shape == (5, LENGTH)
    expected = by_gguf(form, blocks)
    assert 0.3 < np.ptp(expected) < 3
    assert np.array_equal(widened(stored), expected)
    assert np.array_equal(widened(stored.rows(np.array([3, 0]))), expected[[3, 0]])


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_a_panel_of_any_form_widens_to_its_numbers(form: Form) -> None:
    @numba.njit  # type: ignore[untyped-decorator]
    def widen(panels: Any, out: Any) -> None:
        for panel in range(panels.shape[0]):
            widen_panel(panels, panel, out, panel)

    stored = Stored(form, random_blocks(form, 2 * LANES))
    wide = np.empty((2, LENGTH, LANES), np.float32)
    widen(pack_stored(stored), wide)
    assert np.array_equal(wide.transpose(0, 2, 1).reshape(2 * LANES, LENGTH), widened(stored))


@pytest.mark.parametrize("form", EACH_FORM)
def test_panels_of_any_form_give_the_bits_of_float32(form: Form) -> None:
    """Also with rows that fill a tile, with a last panel that is not full, and on top of other sums."""
    num_cols = 3 * LANES + 5
    first, second = (Stored(form, random_blocks(form, n, seed=n)) for n in (num_cols - 9, 9))
    panels, floats = pack_stored(first, second), pack(widened(first), widened(second))
    bias = np.random.default_rng(1).standard_normal(4 * LANES).astype(np.float32)
    for num_rows in (1, 2, 3, 7, 8, 13):
        x = np.random.default_rng(num_rows).standard_normal((num_rows, LENGTH)).astype(np.float32)
        expected, got = (np.full((num_rows, 4 * LANES), 0.5, np.float32) for _ in range(2))
        linear(x, floats, bias, expected, True)
        linear(x, panels, bias, got, True)
        assert np.array_equal(got, expected)
    rows = np.array([num_cols - 1, 0, 17])
    unpacked = np.empty((3, LENGTH), np.float32)
    unpack_rows(panels, rows, unpacked)
    assert np.array_equal(unpacked, np.concatenate([widened(first), widened(second)])[rows])


def test_gates_of_a_stored_form_give_the_bits_of_float32() -> None:
    gates, ups = (Stored(Q4_1, random_blocks(Q4_1, 4 * LANES, seed=n)) for n in (1, 2))
    x = np.random.default_rng(0).standard_normal((9, LENGTH)).astype(np.float32)
    outs = []
    for packed in ((pack_stored(gates), pack_stored(ups)), (pack(widened(gates)), pack(widened(ups)))):
        scratch, out = (np.empty((9, 4 * LANES), np.float32) for _ in range(2))
        gated_linear(x, packed[0], NOTHING, packed[1], NOTHING, scratch, out)
        outs.append(out)
    assert np.array_equal(outs[0], outs[1])


def make_stored_model(folder: Path, forms: list[Form]) -> None:
    """A tiny Llama whose projections and embedding have these forms in turn."""
    make_tiny_model(
        folder,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    tensors, names = load_file(folder / "model.safetensors"), {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if tensor.ndim == 2:
            form = forms[number % len(forms)]
            names[name] = form.name
            tensors[name] = torch.from_numpy(random_blocks(form, len(tensor), tensor.shape[1], seed=number))
    save_torch(tensors, folder / "model.safetensors", metadata={FORMS_KEY: json.dumps(names), "format": "pt"})


@pytest.mark.parametrize(
    "names",
    [["Q4_1"], pytest.param(["BF16", "Q8_0", "Q4_1"], marks=pytest.mark.full)],
    ids=", ".join,
)
def test_a_stored_model_answers_as_its_floats_do(tmp_path: Path, names: list[str]) -> None:
    """Also where neighbours have different forms."""
    make_stored_model(tmp_path, [form for form in FORMS if form.name in names])
    model = load_tiny(tmp_path)
    runner = Runner(model, make_pool(model, 16), attention="auto")
    assert isinstance(runner.forward, CpuLlamaForward)
    sequences = [make_sequence(list(range(3, 3 + n)), list(range(start, start + 8))) for start, n in PROMPTS]
    generate(runner, sequences, 12)
    for sequence in sequences:
        check_identity(tmp_path, sequence.prompt_ids, sequence.output_ids)
