"""Loads a model folder: checks it, reads its weights, and describes it to the node."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from flowkv_common.config import DTYPES
from flowkv_common.errors import CannotStart
from flowkv_common.fingerprint import fingerprint, model_files
from flowkv_common.wire.messages import ModelCard, PoolLayout
from flowkv_engine.engine.forward import IMPLEMENTATION, UnsupportedModel
from flowkv_engine.engine.servable import check_config, check_weights, max_model_len

CPU = torch.device("cpu")
DUMMY_SEED = 0


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights on their device, and what a node needs to know about them."""

    module: nn.Module
    device: torch.device
    dtype: torch.dtype
    card: ModelCard
    num_layers: int
    num_kv_heads: int
    head_dim: int

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
        raise CannotStart(f"FLOWKV_LOAD_FORMAT is {load_format!r}: choose one of auto, dummy")
    folder, has_weights = Path(path), load_format == "auto"
    config, (num_layers, num_kv_heads, head_dim) = check_config(folder)
    eos = eos_token_ids(folder, config)
    if has_weights:
        config = check_weights(folder, config)
    on_progress(f"loading {path} ({load_format})")
    module = _read_weights(folder, config, dtype).to(device) if has_weights else _dummy(config, dtype, device)
    module.eval().requires_grad_(False)
    card = ModelCard(
        name=name or folder.resolve().name,
        fingerprint=fingerprint(folder, str(dtype), has_weights=has_weights),
        max_model_len=max_model_len(config),
        vocab_size=config.vocab_size,
        eos_token_ids=eos,
        files=model_files(folder, has_weights=has_weights),
    )
    on_progress(f"loaded {card.name}: {sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters")
    weight = next(module.parameters())
    return LoadedModel(module, weight.device, weight.dtype, card, num_layers, num_kv_heads, head_dim)


def _read_weights(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
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


def weights_dtype(wanted: str, model_path: str, device: torch.device) -> torch.dtype:
    """`wanted`, or for "auto" float32 on a CPU, where others cost speed, and on a GPU the checkpoint's own.

    The checkpoint's own is that of its text where a model has other parts too. One that names none, or one
    that weights are not served in, counts as float32.
    """
    if wanted == "auto":
        wanted = "float32"
        if device.type != "cpu":
            try:
                config = json.loads(Path(model_path, "config.json").read_text())
            except (OSError, ValueError):  # `load_model` refuses it in words
                config = {}
            parts = (config.get("text_config") or {}, config)
            stored = [part.get("dtype") or part.get("torch_dtype") for part in parts]
            wanted = next((each for each in stored if each in DTYPES), "float32")
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def kv_dtype(wanted: str, weights: torch.dtype) -> str:
    """`wanted`, or for "auto" that of the weights: what attention computes in is what it should store."""
    return str(weights).removeprefix("torch.") if wanted == "auto" else wanted


class _EosIds(msgspec.Struct):
    """What generation_config.json and config.json say about the end of a text."""

    eos_token_id: int | list[int] | None = None
    text_config: _EosIds | None = None  # a model of several parts keeps its ids there

    def ids(self) -> list[int]:
        if self.eos_token_id is None:
            return self.text_config.ids() if self.text_config else []
        return self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]


class _EosText(msgspec.Struct):
    """What tokenizer_config.json and special_tokens_map.json say: their ids, if any, don't count."""

    eos_token: Any = None  # a text; older files write it as an object


class _AddedToken(msgspec.Struct):
    content: str
    id: int


class _Vocabulary(msgspec.Struct):
    vocab: dict[str, int] | list[Any] | None = None  # a list has no special tokens: those are added ones


class _Tokenizer(msgspec.Struct):
    added_tokens: list[_AddedToken] | None = None
    model: _Vocabulary | None = None


_Fields = TypeVar("_Fields", bound=msgspec.Struct)


def eos_token_ids(folder: Path, config: PretrainedConfig) -> list[int]:
    """The union of generation_config.json, config.json and the tokenizer's `eos_token`, each id once.

    Models are published whose files differ: one names the end of the text, another the end of a turn. Where
    no file names any, the default of the model's type counts. Ids outside the vocabulary are left out. Raises
    `UnsupportedModel` if one of the files can't be read.
    """
    ids = [*_read(folder / "generation_config.json", _EosIds).ids()]
    ids += _read(folder / "config.json", _EosIds).ids()
    texts: set[str] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read(folder / name, _EosText).eos_token
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token:
            texts.add(token)
    if texts:
        tokenizer = _read(folder / "tokenizer.json", _Tokenizer)
        vocab = tokenizer.model.vocab if tokenizer.model else None
        id_of = vocab if isinstance(vocab, dict) else {}
        id_of |= {token.content: token.id for token in tokenizer.added_tokens or ()}
        ids += [id_of[text] for text in sorted(texts) if text in id_of]
    ids = ids or msgspec.convert(config.to_dict(), _EosIds).ids()
    return [token_id for token_id in dict.fromkeys(ids) if 0 <= token_id < config.vocab_size]


def _read(file: Path, fields: type[_Fields]) -> _Fields:
    """The file's fields, or defaults without one. With Python's json: published files hold NaN, Infinity."""
    try:
        return msgspec.convert(json.loads(file.read_bytes()) if file.exists() else {}, fields)
    except ValueError as error:
        raise UnsupportedModel(f"{file} does not say which token ends a text: {error}") from error
