"""Where the settings leave the dtype open, it is float32 on a CPU and the stored one on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from flowkv_common.config import NodeSettings
from flowkv_engine.engine.model import weights_dtype
from flowkv_node.host import served_model
from tests.drive import load_tiny
from tests.tiny_models import make_tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("config", "on_gpu"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"dtype": None}, torch.float32),
        ({"dtype": "float8_e4m3fn"}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_is_the_stored_dtype_on_a_gpu_alone(
    config: dict[str, object], on_gpu: torch.dtype, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    read = AutoConfig.from_pretrained(tmp_path)
    assert weights_dtype("auto", read, GPU) == on_gpu
    assert weights_dtype("auto", read, CPU) == torch.float32
    assert weights_dtype("float16", read, GPU) == torch.float16


def test_the_stored_dtype_is_that_of_the_file_whatever_the_model_is_checked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model(tmp_path / "m")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float16"}))
    stored = []

    def noted(wanted: str, config: PretrainedConfig, device: torch.device) -> torch.dtype:
        stored.append(config.dtype)
        return weights_dtype(wanted, config, device)

    monkeypatch.setattr("flowkv_engine.engine.model.weights_dtype", noted)
    load_tiny(folder)
    assert stored == [torch.float16]


@pytest.mark.parametrize(
    ("set_to", "weights", "stored"),
    [
        ("auto", "float32", "float32"),
        ("auto", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
        ("float8_e4m3fn", "float32", "float8_e4m3fn"),
    ],
)
def test_kv_is_stored_as_the_weights_are_unless_it_is_set(
    set_to: Any, weights: str, stored: str, tmp_path: Path
) -> None:
    model = load_tiny(make_tiny_model(tmp_path, "llama"), getattr(torch, weights))
    assert served_model(model, NodeSettings(model_path="", kv_dtype=set_to)).layout.dtype == stored
