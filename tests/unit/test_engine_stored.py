from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numba
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from torch import nn

from flowkv_engine.engine.batch import WorkItem
from flowkv_engine.engine.batch import pack as pack_batch
from flowkv_engine.engine.cpu.forward import CpuFlatForward
from flowkv_engine.engine.cpu.linear import gated_linear, linear, pack, unpack_rows
from flowkv_engine.engine.cpu.panels import pack_stored, widen_panel
from flowkv_engine.engine.cpu.simd import LANES
from flowkv_engine.engine.flat import SILU
from flowkv_engine.engine.runner import Runner
from flowkv_engine.engine.stored import BFLOAT16, FLOAT16, FORMS, Q4_1, Q8_0, Form, Stored, widened
from tests.drive import BLOCK_SIZE, generate, load_tiny, make_pool, make_sequence
from tests.oracle import check_identity, load_reference, write_floats
from tests.stored_models import LENGTH, make_stored_model, random_blocks

NOTHING = np.empty(0, np.float32)
FORM_IDS = [form.name for form in FORMS]
PROMPTS = [(0, 50), (8, 7)]  # first block, tokens
# To compile the kernels of a form takes seconds: the others are tried in the full run.
EACH_FORM = [
    pytest.param(form, id=form.name, marks=() if form is Q4_1 else (pytest.mark.full,)) for form in FORMS
]


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


@pytest.mark.full  # the default is held below, over a whole model
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


@pytest.mark.full
def test_gates_of_a_stored_form_give_the_bits_of_float32() -> None:
    gates, ups = (Stored(Q4_1, random_blocks(Q4_1, 4 * LANES, seed=n)) for n in (1, 2))
    x = np.random.default_rng(0).standard_normal((9, LENGTH)).astype(np.float32)
    outs = []
    for packed in ((pack_stored(gates), pack_stored(ups)), (pack(widened(gates)), pack(widened(ups)))):
        scratch, out = (np.empty((9, 4 * LANES), np.float32) for _ in range(2))
        activation = tuple(map(np.float32, SILU))
        gated_linear(x, packed[0], NOTHING, packed[1], NOTHING, activation, scratch, out)
        outs.append(out)
    assert np.array_equal(outs[0], outs[1])


@pytest.mark.parametrize(
    ("arch", "kept"),
    [
        ("llama", [Q4_1]),
        *(
            pytest.param(*each, marks=pytest.mark.full)
            for each in [
                ("llama", [BFLOAT16]),
                ("llama", [FLOAT16]),
                ("llama", [Q8_0, Q4_1, BFLOAT16]),
                ("gemma3_text", [BFLOAT16]),
                ("gemma3_text", [Q8_0, Q4_1]),
                ("phi3", [BFLOAT16]),
                ("glm4", [Q8_0, Q4_1]),
                ("qwen3_moe", [BFLOAT16]),
                ("gpt_oss", [FLOAT16]),
            ]
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else ", ".join(form.name for form in each),
)
def test_a_stored_model_gives_the_bits_of_its_floats(tmp_path: Path, arch: str, kept: list[Form]) -> None:
    """Also where neighbours have different forms. Weights of 16 bits come from a folder of `transformers`."""
    folder, floats = tmp_path / "m", tmp_path / "floats"
    make_stored_model(folder, kept, arch)
    write_floats(folder, floats)
    logits = []
    for each in (folder, floats):
        model = load_tiny(each)
        runner = Runner(model, make_pool(model, 16), attention="auto")
        assert isinstance(runner.forward, CpuFlatForward)
        sequences = [
            make_sequence(list(range(3, 3 + n)), list(range(start, start + 8))) for start, n in PROMPTS
        ]
        generate(runner, sequences, 12)
        for sequence in sequences:
            check_identity(floats, sequence.prompt_ids, sequence.output_ids)
        logits.append(
            runner._logits(pack_batch([WorkItem(each, 1) for each in sequences], BLOCK_SIZE)).clone()
        )
    assert torch.equal(*logits)


@pytest.mark.parametrize("form", [FLOAT16, BFLOAT16], ids=["F16", "BF16"])
def test_weights_of_16_bits_stay_so_and_stand_for_what_an_upcast_gives(tmp_path: Path, form: Form) -> None:
    make_stored_model(tmp_path, [form])
    kept, floats = load_tiny(tmp_path).module, load_reference(tmp_path)
    others = dict(floats.named_modules())
    for name, module in kept.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            raise AssertionError(f"{name} is kept in float32")
        weight = getattr(module, "weight", None)
        assert weight is None or torch.equal(weight, others[name].weight), name
        for buffer, numbers in module.named_buffers(recurse=False):
            assert torch.equal(numbers, others[name].get_buffer(buffer)), buffer
