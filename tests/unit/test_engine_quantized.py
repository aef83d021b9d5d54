"""Quantized safetensors stand for exactly the floats that their format says, and are served as these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from flowkv_engine.engine import stored
from flowkv_engine.engine.cpu.forward import CpuFlatForward
from flowkv_engine.engine.cpu.linear import linear, pack, unpack_rows
from flowkv_engine.engine.cpu.panels import pack_stored
from flowkv_engine.engine.cpu.simd import LANES
from flowkv_engine.engine.dry_run import UnsupportedModel
from flowkv_engine.engine.quantized import Codes, quantization_of
from flowkv_engine.engine.runner import Runner
from flowkv_engine.engine.stored import BFLOAT16, GROUPED_FORMS
from flowkv_engine.engine.stored_modules import StoredExperts, StoredLinear
from tests.drive import generate, load_tiny, make_pool, make_sequence
from tests.oracle import check_identity
from tests.quantized_models import FORMATS, Format, make_quantized_model
from tests.tiny_models import make_tiny_model

BY_NAME = {form.name: form for form in FORMATS}
DOWN = "layers.1.mlp.down_proj"
IGNORED = {"lm_head", f"model.{DOWN}"}
PROMPTS = [(0, 50), (8, 7)]  # first block, tokens


def read(folder: Path, form: Format, weight: NDArray[np.float32]) -> tuple[Codes, NDArray[np.float32]]:
    """A folder with one quantized layer -> that, and the floats that it stands for."""
    parts, floats = form.pack(weight)
    save_file({f"x.{end}": part.contiguous() for end, part in parts.items()}, folder / "model.safetensors")
    if form.config_file == "config.json":
        config = PretrainedConfig(quantization_config=form.config)
    else:
        config = PretrainedConfig()
        (folder / form.config_file).write_text(json.dumps(form.config))
    quantization = quantization_of(folder, config)
    assert quantization is not None
    [(name, codes)] = quantization.read(folder)
    assert name == "x.weight"
    assert isinstance(codes, Codes)
    return codes, floats


@pytest.mark.parametrize("form", FORMATS, ids=list(BY_NAME))
def test_a_weight_is_the_floats_that_it_stands_for(tmp_path: Path, form: Format) -> None:
    """And they keep their bits: not one more than half a bit for the scales of groups of 32, 16 for wider."""
    weight = np.random.default_rng(0).standard_normal((200, 384)).astype(np.float32)
    codes, floats = read(tmp_path, form, weight)
    assert np.array_equal(codes.widened(), floats)
    assert 0.9 < np.corrcoef(weight.flat, floats.flat)[0, 1] < 1
    kept = codes.stored()
    assert kept is not None
    assert np.array_equal(StoredLinear(kept, None, codes.order).weight.numpy(), floats)
    num_bits = int(codes.kind[3]) if codes.kind.startswith("INT") else 8
    assert 8 * kept.blocks.size / weight.size <= num_bits + (1.5 if kept.form.group == 32 else 0.375)


@pytest.mark.parametrize(("rows", "length"), [(130, 160), (64, 144), (7, 130)])
def test_blocks_that_the_sizes_do_not_fill(tmp_path: Path, rows: int, length: int) -> None:
    weight = np.random.default_rng(0).standard_normal((rows, length)).astype(np.float32)
    codes, floats = read(tmp_path, BY_NAME["fp8 in blocks"], weight)
    assert np.array_equal(codes.widened(), floats)
    kept = codes.stored()
    assert (kept is None) == (length % 32 > 0)
    assert kept is None or np.array_equal(stored.widened(kept), floats)


def test_parts_of_a_weight_may_stand_in_several_files_but_not_in_pickled_ones(tmp_path: Path) -> None:
    form, weight = BY_NAME["awq"], np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    parts, floats = form.pack(weight)
    files = {}
    for number, (end, part) in enumerate(parts.items()):
        files[f"x.{end}"] = f"model-{number}.safetensors"
        save_file({f"x.{end}": part.contiguous()}, tmp_path / files[f"x.{end}"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    config = PretrainedConfig(quantization_config=form.config)
    quantization = quantization_of(tmp_path, config)
    assert quantization is not None
    [(_, codes)] = quantization.read(tmp_path)
    assert isinstance(codes, Codes)
    assert np.array_equal(codes.widened(), floats)
    for file in tmp_path.iterdir():
        file.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"quantized and in pytorch_model.bin: only safetensors"):
        quantization_of(tmp_path, config)


def test_groups_of_any_lengths_are_read(tmp_path: Path) -> None:
    """Where an order of columns does not make their groups equally long."""
    form = BY_NAME["gptq"]
    weight = np.random.default_rng(0).standard_normal((64, 384)).astype(np.float32)
    read(tmp_path, form, weight)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    group_of = np.minimum(np.arange(384) // 100, 2).astype(np.int32)
    save_file({**tensors, "x.g_idx": torch.from_numpy(group_of)}, file)
    quantization = quantization_of(tmp_path, PretrainedConfig(quantization_config=form.config))
    assert quantization is not None
    [(_, codes)] = quantization.read(tmp_path)
    assert isinstance(codes, Codes)
    numbers = codes.numbers.astype(np.float32)
    zeros = np.stack([tensors["x.qzeros"].numpy().view(np.uint32) >> 4 * i & 15 for i in range(8)], -1)
    zeros = (zeros.reshape(3, 64) + 1 & 15).astype(np.float32)
    scales = tensors["x.scales"].float().numpy()
    assert np.array_equal(codes.widened(), (numbers - zeros[group_of].T) * scales[group_of].T)


# To compile a form's kernels takes seconds. A default test of one: tests/integration/test_several_models.py.


@pytest.mark.full
@pytest.mark.parametrize("form", GROUPED_FORMS, ids=[form.name for form in GROUPED_FORMS])
def test_panels_of_groups_give_the_bits_of_float32(form: stored.Form) -> None:
    """Of any codes, also small floats and those of a last panel that is not full."""
    num_cols, length = 2 * LANES + 5, 384
    random = np.random.default_rng(0)
    codes = random.integers(0, 16 if form.bits == 4 else 256, (num_cols, length), dtype=np.uint8)
    if form.is_e4m3:
        codes[codes & 127 == 127] = 1  # NaN
    scales = (random.random((num_cols, length // form.group)) / 64).astype(np.float32)
    zeros = random.integers(0, 16, scales.shape).astype(np.float16) if form.has_zeros else None
    weight = stored.stored_groups(form, codes.view(np.int8) if form.bits == 8 else codes, scales, zeros)
    panels, floats = pack_stored(weight), pack(stored.widened(weight))
    unpacked = np.empty((num_cols, length), np.float32)
    unpack_rows(panels, np.arange(num_cols), unpacked)
    assert np.array_equal(unpacked, stored.widened(weight))
    for num_rows in (1, 7, 13):
        x = random.standard_normal((num_rows, length)).astype(np.float32)
        expected, got = (np.empty((num_rows, 3 * LANES), np.float32) for _ in range(2))
        linear(x, floats, np.empty(0, np.float32), expected, False)
        linear(x, panels, np.empty(0, np.float32), got, False)
        assert np.array_equal(got, expected)


@pytest.mark.full
@pytest.mark.parametrize("form", FORMATS, ids=list(BY_NAME))
def test_a_quantized_model_answers_as_its_floats_do(tmp_path: Path, form: Format) -> None:
    floats = make_quantized_model(tmp_path / "m", form, ignore=DOWN)
    expected = load_file(floats / "model.safetensors")
    for name, parameter in load_tiny(tmp_path / "m", torch.bfloat16).module.named_parameters():
        assert torch.equal(parameter, expected[name].bfloat16())
    model = load_tiny(tmp_path / "m")
    layers = model.module.named_modules()
    forms = {name: layer.stored.form for name, layer in layers if isinstance(layer, StoredLinear)}
    assert len(forms) == 15
    assert {name for name, form_of in forms.items() if form_of is BFLOAT16} == IGNORED
    runner = Runner(model, make_pool(model, 16), attention="auto")
    assert isinstance(runner.forward, CpuFlatForward)
    sequences = [make_sequence(list(range(3, 3 + n)), list(range(start, start + 8))) for start, n in PROMPTS]
    generate(runner, sequences, 12)
    for sequence in sequences:
        check_identity(floats, sequence.prompt_ids, sequence.output_ids)


@pytest.mark.full
@pytest.mark.parametrize("name", ["gptq act-order", "compressed int4", "fp8 in blocks"])
def test_tied_embeddings_and_odd_sizes(tmp_path: Path, name: str) -> None:
    """Also without the compiled forward, and where blocks and rows of panels don't fit the sizes."""
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    if name == "fp8 in blocks":
        sizes = {"hidden_size": 192, "intermediate_size": 144, "head_dim": 48}
    floats = make_quantized_model(
        tmp_path / "m", BY_NAME[name], ignore=DOWN, tie_word_embeddings=True, **sizes
    )
    model = load_tiny(tmp_path / "m")
    sequence = make_sequence(list(range(3, 20)), list(range(8)))
    generate(Runner(model, make_pool(model, 16), attention="torch"), [sequence], 4)
    check_identity(floats, sequence.prompt_ids, sequence.output_ids)


def test_another_architecture_is_served_as_floats(tmp_path: Path) -> None:
    """Also experts, which `transformers` puts together."""
    form = BY_NAME["gptq act-order"]
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    floats = make_quantized_model(tmp_path / "m", form, arch="qwen3_moe", num_hidden_layers=1, **experts)
    expected = dict(load_tiny(floats).module.named_parameters())
    got = dict(load_tiny(tmp_path / "m").module.named_parameters())
    assert any("experts" in name for name in got)
    assert got.keys() == expected.keys()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in got.items())


def test_experts_of_gpt_oss_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4}
    folder = make_tiny_model(tmp_path / "m", "gpt_oss", num_hidden_layers=2, head_dim=16, **sizes)
    file = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(file).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            num_experts, length, num_rows = tensor.shape
            blocks = torch.randint(0, 256, (num_experts, num_rows, length // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, blocks.shape[:3], dtype=torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            expected[name] = convert_moe_packed_tensors(blocks, scales)
        else:
            tensors[name] = expected[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    entry = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    config = json.loads((folder / "config.json").read_text()) | entry
    (folder / "config.json").write_text(json.dumps(config))
    module = load_tiny(folder).module
    got = dict(module.named_parameters())
    for parent, each in module.named_modules():
        if isinstance(each, StoredExperts):
            got |= {f"{parent}.{name}": parameter for name, parameter in each.plain.named_parameters()}
    assert sum("_blocks" in name for name in tensors) == 4
    assert got.keys() == expected.keys()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in got.items())
    assert sum(parameter.dtype == torch.bfloat16 for parameter in got.values()) == 4


GROUP = {"weights": {"num_bits": 4, "type": "int"}, "format": "pack-quantized"}
PACKED = {"quant_method": "compressed-tensors", "config_groups": {"g": GROUP}, "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        *(({"quant_method": name}, f"by {name}, and") for name in ("bitsandbytes", "torchao", "new")),
        ({"bits": 4}, "an unnamed method"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 in e5m2"),
        ({"quant_method": "gptq", "bits": 3}, "gptq of 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:x": {"bits": 8}}}, "gptq of several sizes"),
        ({"quant_method": "gptq"}, "gptq with settings that can't be read (KeyError: 'bits')"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "gptq in the layout marlin (int32)",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq of 4 bits in the layout gemv"),
        (
            PACKED | {"config_groups": {"g": {**GROUP, "weights": {"num_bits": 3}}}},
            "compressed-tensors of 3 bits",
        ),
        (
            PACKED | {"config_groups": {"g": {**GROUP, "format": "nvfp4-pack-quantized"}}},
            "nvfp4-pack-quantized",
        ),
        (PACKED | {"transform_config": {"R1": {}}}, "compressed-tensors with rotations"),
        (
            PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "weights left out (sparse-24-bitmask)",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt with NVFP4"),
    ],
    ids=str,
)
def test_what_is_not_served_is_named(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    folder = make_tiny_model(tmp_path / "m", num_hidden_layers=1)
    entry = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(entry))
    with pytest.raises(UnsupportedModel) as caught:
        load_tiny(folder)
    said = str(caught.value)
    assert said.startswith(f"{folder} can't be served: its weights are quantized by ")
    assert says in said
    assert "and served are FP8 of transformers and ModelOpt, " in said


def test_parts_that_are_missing_or_have_other_sizes_are_named(tmp_path: Path) -> None:
    make_quantized_model(tmp_path / "m", BY_NAME["gptq"], num_hidden_layers=1)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.scales"
    for scales, says in (
        (None, "model.layers.0.mlp.down_proj.qweight has no scales beside it"),
        (tensors[name][:, :100].clone(), "its 100 scales don't fit 256 numbers"),
    ):
        changed = {**tensors, name: scales} if scales is not None else dict(tensors)
        if scales is None:
            del changed[name]
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(UnsupportedModel, match=says):
            load_tiny(tmp_path / "m")
