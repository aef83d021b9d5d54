"""Loads a causal language model of `transformers` with its attention replaced by ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from flowkv_common.engine.attention import IMPLEMENTATION
from flowkv_common.engine.checkpoint import readable_config, refuse_incomplete
from flowkv_common.engine.dry_run import dry_run
from flowkv_common.engine.eos import eos_token_ids
from flowkv_common.engine.servable import UnsupportedModel, max_model_len, refusal, servable_config
from flowkv_common.errors import CannotStart
from flowkv_common.fingerprint import fingerprint, model_files
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
    if load_format not in ("auto", "dummy"):
        raise CannotStart(f"FLOWKV_LOAD_FORMAT is {load_format!r}, not auto or dummy")
    is_dummy = load_format == "dummy"
    folder, config = Path(path), servable_config(path)
    try:
        kv_shape = dry_run(config)
    except UnsupportedModel as error:
        raise refusal(path, config, error) from error
    eos = eos_token_ids(folder, config)
    if not is_dummy:
        config = readable_config(folder, config)
        refuse_incomplete(folder, config)
    on_progress(f"loading {path} ({load_format})")
    module = _dummy(config, dtype, device) if is_dummy else _from_folder(folder, config, dtype).to(device)
    module.eval().requires_grad_(False)
    card = ModelCard(
        name=name or folder.resolve().name,
        fingerprint=fingerprint(folder, str(dtype), has_weights=not is_dummy),
        max_model_len=max_model_len(config),
        vocab_size=config.vocab_size,
        eos_token_ids=eos,
        files=model_files(folder, has_weights=not is_dummy),
    )
    on_progress(f"loaded {card.name}: {sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters")
    return LoadedModel(
        module=module,
        card=card,
        num_layers=kv_shape.num_layers,
        num_kv_heads=kv_shape.num_kv_heads,
        head_dim=kv_shape.head_dim,
    )


def _from_folder(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    module: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation=IMPLEMENTATION
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
