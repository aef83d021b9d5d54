"""Which dtype weights and KV have where the settings leave it open: `auto`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from flowkv_common.config import DTYPES


def weights_dtype(wanted: str, model_path: str, device: torch.device) -> torch.dtype:
    """`wanted`, or for "auto" float32 on a CPU, where others cost speed, and on a GPU the checkpoint's own.

    A checkpoint that names none, or one that weights are not served in, counts as float32.
    """
    if wanted == "auto":
        wanted = "float32" if device.type == "cpu" else _stored_dtype(Path(model_path, "config.json"))
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def kv_dtype(wanted: str, weights: torch.dtype) -> str:
    """`wanted`, or for "auto" that of the weights: what attention computes in is what it should store."""
    return str(weights).removeprefix("torch.") if wanted == "auto" else wanted


def _stored_dtype(config_file: Path) -> str:
    """As config.json says, of the text where a model has other parts too; by its old name or its new one."""
    try:
        config = json.loads(config_file.read_text())
    except (OSError, ValueError):  # whoever loads the model refuses it in words
        config = {}
    for part in (config.get("text_config") or {}, config):
        stored = part.get("dtype") or part.get("torch_dtype")
        if stored in DTYPES:
            return str(stored)
    return "float32"
