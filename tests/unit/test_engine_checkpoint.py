"""A folder is served only if its weight files hold all of the model, and nothing that would be left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from flowkv_engine.engine.dry_run import UnsupportedModel
from tests.drive import load_tiny
from tests.tiny_models import make_tiny_model

DOWN = "model.layers.1.mlp.down_proj.weight"
Tensors = dict[str, Tensor]


def refusal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Why the folder is not served; no weights are read until that is known."""

    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    with pytest.raises(UnsupportedModel) as caught:
        load_tiny(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make(folder: Path, change: Callable[[Tensors], object] | None = None, **config: Any) -> Path:
    """A tiny model whose tensors are changed, and whose config.json gets further entries."""
    make_tiny_model(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if change is not None:
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | config))
    return folder


def adding(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def move(tensors: Tensors, name: str, to: str) -> None:
    tensors[to] = tensors.pop(name)


def to_fp8(tensors: Tensors, scale_name: str) -> None:
    """Projections as 8-bit floats with one scale each."""
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[name.replace("weight", scale_name)] = scale.reshape(1, 1)


def test_a_missing_tensor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "m", lambda tensors: tensors.pop(DOWN))
    assert refusal(folder, monkeypatch) == f"the weights in {folder} lack {DOWN}"


def test_many_missing_tensors_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "m", num_hidden_layers=5)
    said = refusal(folder, monkeypatch)
    assert said.startswith(f"the weights in {folder} lack model.layers.3.")
    assert said.endswith("and 15 more")  # nine of each of two layers, three are named


def test_an_untied_head_may_not_be_missing_and_a_tied_one_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_head(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]

    load_tiny(make(tmp_path / "tied", without_head, tie_word_embeddings=True))
    folder = make(tmp_path / "untied", without_head)
    assert refusal(folder, monkeypatch) == f"the weights in {folder} lack lm_head.weight"


def test_layers_beyond_the_config_are_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "m", num_hidden_layers=2)
    said = refusal(folder, monkeypatch)
    assert "hold what the model has no place for: model.layers.2." in said
    assert said.endswith("and 6 more")


def test_both_are_said_of_a_tensor_of_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "m", lambda tensors: move(tensors, DOWN, "model.other"))
    assert refusal(folder, monkeypatch) == (
        f"the weights in {folder} lack {DOWN}, and hold what the model has no place for: model.other"
    )


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "m", adding(DOWN, torch.zeros(48, 95)))
    assert f"another shape than the model's: {DOWN} (48, 95) for (48, 96)" in refusal(folder, monkeypatch)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.cos_cached",
        "mtp.layers.0.weight",
        "v_head.summary.weight",
    ],
)
def test_what_no_model_reads_is_no_reason_to_refuse(tmp_path: Path, name: str) -> None:
    load_tiny(make(tmp_path / "m", adding(name, torch.zeros(8))))


@pytest.mark.parametrize("name", ["model.layers.0.attn.bias", "model.layers.0.attention.bias"])
def test_a_causal_mask_that_was_saved_is_no_reason_and_a_packed_bias_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for dtype in (torch.bool, torch.uint8):
        mask = torch.ones(1, 1, 8, 8, dtype=dtype)
        load_tiny(make(tmp_path / str(dtype), adding(name, mask)))
    for i, other in enumerate((torch.ones(8, dtype=torch.uint8), torch.ones(8, 8, dtype=torch.int8))):
        folder = make(tmp_path / str(i), adding(name, other))
        with monkeypatch.context() as patch:
            assert f"int8 ({name})" in refusal(folder, patch)
    folder = make(tmp_path / "floats", adding(name, torch.ones(8, 8)))
    assert refusal(folder, monkeypatch).endswith(f"hold what the model has no place for: {name}")


def test_layers_that_a_config_tells_to_be_a_drafters_are_harmless(tmp_path: Path) -> None:
    load_tiny(make(tmp_path / "m", num_hidden_layers=2, num_nextn_predict_layers=1))


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_file_beside_the_config_tells_of_a_quantization_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    folder = make(tmp_path / "m")
    (folder / file).write_text('{"bits": 3, "w_bit": 3, "quantization": {"quant_algo": "W3"}}')
    assert "its weights are quantized by" in refusal(folder, monkeypatch)


def test_scales_that_no_config_tells_of_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "m", lambda tensors: to_fp8(tensors, "weight_scale"))
    said = refusal(folder, monkeypatch)
    assert "it holds tensors of float8_e4m3fn (model.layers.0.mlp.down_proj.weight, " in said
    assert said.endswith("and 18 more), and config.json has no quantization_config")


def test_fp8_of_transformers_is_read_as_the_floats_that_it_stands_for(tmp_path: Path) -> None:
    make_tiny_model(
        tmp_path / "m", hidden_size=128, intermediate_size=128, head_dim=32, num_attention_heads=4
    )
    file, config_file = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    tensors = load_file(file)
    plain = tensors[DOWN].clone()
    to_fp8(tensors, "weight_scale_inv")
    save_file(tensors, file, metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config = json.loads(config_file.read_text()) | {"quantization_config": quantization}
    config_file.write_text(json.dumps(config))
    module: Any = load_tiny(tmp_path / "m").module
    read = module.model.layers[1].mlp.down_proj.weight
    assert (read - plain).abs().max() < plain.abs().max() / 16  # 3 bits of mantissa
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m",
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(weight_block_size=(128, 128), dequantize=True),
    )
    assert torch.equal(read, theirs.model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize("kept", [True, False], ids=["beside the model", "alone"])
def test_an_adapter_is_not_taken_for_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    folder = make(tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.zeros(1)}, folder / "adapter_model.safetensors")
    if not kept:
        (folder / "model.safetensors").unlink()
    assert "holds an adapter" in refusal(folder, monkeypatch)


def test_a_merged_model_may_keep_the_config_of_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    load_tiny(folder)
    (folder / "model.safetensors").unlink()
    assert "holds an adapter" in refusal(folder, monkeypatch)


def test_a_missing_shard_and_a_truncated_file_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "shards")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "one.safetensors") | {DOWN: "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks two.safetensors, which its index of weights names" in refusal(folder, monkeypatch)

    folder = make(tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert refusal(folder, monkeypatch).startswith(f"{file} can't be read: ")


def test_a_pickled_checkpoint_is_checked_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert len(load_tiny(folder).layers) == 3
    del tensors[DOWN]
    torch.save(tensors, folder / "pytorch_model.bin")
    assert refusal(folder, monkeypatch) == f"the weights in {folder} lack {DOWN}"
