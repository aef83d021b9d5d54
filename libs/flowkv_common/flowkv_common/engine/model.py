"""Loads a causal language model of `transformers` with its attention replaced by ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from flowkv_common.engine.attention import IMPLEMENTATION
from flowkv_common.engine.eos import eos_token_ids
from flowkv_common.engine.servable import UnsupportedModel, max_model_len, servable_config
from flowkv_common.fingerprint import fingerprint, model_files, weight_files
from flowkv_common.wire.parts import ModelCard, PoolLayout

DUMMY_SEED = 0
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights on their device, and what others must know of them."""

    module: nn.Module
    card: ModelCard
    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def eos_token_ids(self) -> list[int]:
        return self.card.eos_token_ids

    def layout(self, block_size: int, kv_dtype: str) -> PoolLayout:
        """The layout of this model's pool: `block_size` tokens per block, a dtype such as "float32"."""
        return PoolLayout(
            num_layers=self.num_layers,
            block_size=block_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=kv_dtype,
        )


def load_model(
    path: str,
    *,
    name: str | None,
    dtype: torch.dtype,
    load_format: str,
    on_progress: Callable[[str], None],
    device: torch.device = CPU,
) -> LoadedModel:
    """The model in the folder `path`, in `dtype`, on `device`; random weights if `load_format` is "dummy".

    Raises `UnsupportedModel`, a `ValueError`, before weights are read if the model can't be served.
    """
    folder = Path(path)
    config = servable_config(path)
    if load_format not in ("auto", "dummy"):
        raise ValueError(f"unknown load format {load_format!r}: auto and dummy are")
    on_progress(f"loading {path} ({load_format})")
    is_dummy = load_format == "dummy"
    module = _dummy(config, dtype, device) if is_dummy else _from_folder(folder, dtype).to(device)
    module.eval().requires_grad_(False)
    card = ModelCard(
        name=name or folder.resolve().name,
        fingerprint=fingerprint(folder, str(dtype), has_weights=not is_dummy),
        max_model_len=max_model_len(config),
        vocab_size=config.vocab_size,
        eos_token_ids=eos_token_ids(folder, config),
        files=model_files(folder, has_weights=not is_dummy),
    )
    on_progress(f"loaded {card.name}: {sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters")
    num_heads = config.num_attention_heads
    return LoadedModel(
        module=module,
        card=card,
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
    )


def _from_folder(folder: Path, dtype: torch.dtype) -> nn.Module:
    if not weight_files(folder):
        raise UnsupportedModel(f"{folder} holds no weights; load format dummy makes random ones")
    module: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=IMPLEMENTATION
    )
    return module


def _dummy(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Random weights, made where they stay: the same in every process on such a device."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(DUMMY_SEED)
        module: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=IMPLEMENTATION
        )
    return module
