"""Which dtype weights and KV have where the settings leave it open: `auto`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
from flowkv_engine.engine.attention import IMPLEMENTATION
from flowkv_engine.engine.checks import dry_run, readable_config, refuse_incomplete
from flowkv_engine.engine.servable import UnsupportedModel, max_model_len, refusal, servable_config


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


_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")


class _Ids(msgspec.Struct):
    """One id, a list of them, or none; a model of several parts keeps them in its text part."""

    eos_token_id: int | list[int] | None = None
    text_config: _Ids | None = None

    def __iter__(self) -> Iterator[int]:
        if self.eos_token_id is None:
            yield from self.text_config or ()
        else:
            yield from self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]


class _Specials(msgspec.Struct):
    eos_token: Any = None

    def eos(self) -> str | None:
        """Older files write a token as an object."""
        token = self.eos_token.get("content") if isinstance(self.eos_token, dict) else self.eos_token
        return token if isinstance(token, str) else None


class _AddedToken(msgspec.Struct):
    content: str
    id: int


class _Vocabulary(msgspec.Struct):
    vocab: dict[str, int] | list[Any] | None = (
        None  # a list of texts and scores: special tokens are added ones
    )


class _Tokenizer(msgspec.Struct):
    added_tokens: list[_AddedToken] | None = None
    model: _Vocabulary | None = None

    def id_of(self, text: str) -> int | None:
        vocab = self.model.vocab if self.model is not None else None
        known = vocab if isinstance(vocab, dict) else {}
        added = {token.content: token.id for token in self.added_tokens or ()}
        return added.get(text, known.get(text))


_Fields = TypeVar("_Fields", bound=msgspec.Struct)


def eos_token_ids(folder: Path, config: PretrainedConfig) -> list[int]:
    """The union of generation_config.json, config.json and the tokenizer's `eos_token`, each id once.

    Models are published whose files differ: one names the end of the text, another the end of a turn. Where
    no file names any, the default of the model's type counts. Ids outside the vocabulary are left out. Raises
    `UnsupportedModel` if one of the files can't be read.
    """
    named = [
        *_read(folder / "generation_config.json", _Ids),
        *_read(folder / "config.json", _Ids),
        *_ids_of_tokenizer(folder),
    ] or list(msgspec.convert(config.to_dict(), _Ids))
    return [token_id for token_id in dict.fromkeys(named) if 0 <= token_id < config.vocab_size]


def _ids_of_tokenizer(folder: Path) -> Iterator[int]:
    texts = {text for name in _TOKENIZER_CONFIGS if (text := _read(folder / name, _Specials).eos())}
    if texts:
        tokenizer = _read(folder / "tokenizer.json", _Tokenizer)
        for text in sorted(texts):
            if (found := tokenizer.id_of(text)) is not None:
                yield found


def _read(file: Path, fields: type[_Fields]) -> _Fields:
    """Of an absent file the defaults. By Python's json, as published files have NaN and Infinity in them."""
    try:
        return msgspec.convert(json.loads(file.read_bytes()) if file.exists() else {}, fields)
    except ValueError as error:
        raise UnsupportedModel(f"{file} does not say which token ends a text: {error}") from error


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
