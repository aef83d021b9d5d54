"""Loads a model folder for a node. Served are models that answer as `transformers` does (docs/models.md).

Others are refused with a reason before their weights are read: by the config, a run without weights, and the
headers of the weight files. `Runner` compares logits before the node is ready.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import load_state_dict

from flowkv_common.config import DTYPES
from flowkv_common.errors import CannotStart, first_line
from flowkv_common.fingerprint import fingerprint, model_files, weight_files
from flowkv_common.grammar import Grammars
from flowkv_common.wire.messages import ModelCard, PoolLayout
from flowkv_engine.engine.attention import Span
from flowkv_engine.engine.dry_run import (
    LayerAttention,
    UnsupportedModel,
    dry_run,
    quiet,
)
from flowkv_engine.engine.fetch import name_of_folder
from flowkv_engine.engine.flat import is_flat
from flowkv_engine.engine.forward import IMPLEMENTATION
from flowkv_engine.engine.positions import fix_positions, max_model_len, unknown_rope_types
from flowkv_engine.engine.quantized import Codes, Quantization, quantization_of
from flowkv_engine.engine.stored import FORMS
from flowkv_engine.engine.stored_modules import (
    BLOCKS,
    STORED_FLOATS,
    blocks_as_floats,
    has_blocks,
    is_matrix,
    keep_stored,
    load_blocks,
    num_weights,
    place,
    stored_floats,
    tie_head,
    widen_embedding,
)
from flowkv_engine.engine.text_part import RENAMED, of_text, text_part

log = logging.getLogger(__name__)

CPU = torch.device("cpu")

LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}

FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
# Tensors that no model reads: buffers of older versions of `transformers` (each model computes its own),
# layers of a drafter, a value head of training.
HARMLESS = (
    r"\.(inv_freq|cos_cached|sin_cached|position_ids|masked_bias)$",
    r"(^|\.)mtp(\.|_)",
    r"^v_head\.",
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights on their device, and what a node needs to know about them."""

    module: nn.Module
    device: torch.device
    dtype: torch.dtype
    card: ModelCard
    layers: list[LayerAttention]
    grammars: Grammars

    @property
    def spans(self) -> list[Span]:
        """How far back each layer sees."""
        return [layer.span for layer in self.layers]

    @property
    def writers(self) -> list[int]:
        """The layers that write KV: a pool has these, in this order."""
        return sorted({layer.writer for layer in self.layers})

    def layout(self, block_size: int, kv_dtype: str) -> PoolLayout:
        """The layout of this model's pool: `block_size` tokens per block, of `kv_dtype`.

        "auto" is that of the weights: what attention computes in is what it should store.
        """
        stored = str(self.dtype).removeprefix("torch.") if kv_dtype == "auto" else kv_dtype
        return PoolLayout.of([self.layers[number].kv for number in self.writers], block_size, stored)


def load_model(
    path: str,
    *,
    name: str | None,
    dtype: str,
    load_format: str,
    device: torch.device = CPU,
    overrides: str = "",
    longest: int = 0,
) -> LoadedModel:
    """The model in the folder `path`, on `device`; random weights if `load_format` is "dummy".

    `dtype`: such as "float32", or "auto" (see `weights_dtype`). `overrides`: a JSON object whose fields count
    instead of those of config.json, objects field by field. `longest`: of a sequence, in tokens; 0: the
    model's own. Raises `CannotStart` for a bad one of these.

    Raises `UnsupportedModel`, a `ValueError`, before weights are read if the model can't be served.
    """
    if load_format not in ("auto", "dummy"):
        raise CannotStart(f"FLOWKV_LOAD_FORMAT is {load_format!r}: choose one of auto, dummy")
    folder, has_weights = Path(path), load_format == "auto"
    config, layers, is_part = _check_config(folder, _parse(overrides))
    if longest > (limit := max_model_len(config)):
        raise CannotStart(
            f"FLOWKV_MAX_MODEL_LEN is {longest}, but {folder} serves {limit} tokens at most: for more, set "
            "rope_parameters or max_position_embeddings by FLOWKV_HF_OVERRIDES"
        )
    max_len = longest or limit
    fix_positions(config, max_len)
    eos = eos_token_ids(folder, config)
    torch_dtype = weights_dtype(dtype, config, device)
    quantization = _check_weights(folder, config, is_part) if has_weights else None
    log.info("loading %s (%s)", path, load_format)
    module: nn.Module
    if has_weights:
        module = _load_weights(folder, config, is_part, quantization, torch_dtype, device)
    else:  # made where they stay: the same in every process on such a device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            module = AutoModelForCausalLM.from_config(
                config, dtype=torch_dtype, attn_implementation=IMPLEMENTATION
            )
    module.eval().requires_grad_(False)
    card = ModelCard(
        name=name or name_of_folder(folder),
        fingerprint=fingerprint(
            folder, str(torch_dtype), has_weights=has_weights, overrides=overrides, max_model_len=longest
        ),
        max_model_len=max_len,
        vocab_size=config.vocab_size,
        eos_token_ids=eos,
        files=model_files(folder, has_weights=has_weights),
        folder=str(folder.resolve()),
    )
    log.info("loaded %s: %.1f M parameters", card.name, num_weights(module) / 1e6)
    weight = next(module.parameters())
    grammars = Grammars(folder / "tokenizer.json", eos)
    return LoadedModel(
        module=module,
        device=weight.device,
        dtype=weight.dtype,
        card=card,
        layers=layers,
        grammars=grammars,
    )


def _load_weights(
    folder: Path,
    config: PretrainedConfig,
    is_part: bool,
    quantization: Quantization | None,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """The model with its weights, on `device`. `is_part`: the folder holds other parts beside it.

    Weights that are stored in fewer bits stay so if the kernels take them: on a CPU where all is computed in
    float32, on a GPU those of 8 bits or less, but for the embedding.
    """
    module: nn.Module
    on_cpu = device.type == "cpu"
    packs = is_flat(config) and (dtype == torch.float32 or not on_cpu)
    if quantization is not None:
        try:
            read = _read_quantized(folder, quantization, is_part)
            if packs and (kept := _keep_quantized(config, read, dtype, keeps_floats=on_cpu)):
                return kept.to(device)
            return _widen_quantized(config, _read_quantized(folder, quantization, is_part), dtype).to(device)
        except ValueError as error:
            raise UnsupportedModel(f"{folder} can't be served: {error}") from error
    if has_blocks(folder):
        module = _to_fill(config, dtype)
        load_blocks(module, folder / BLOCKS, [each for each in FORMS if packs and (on_cpu or each.bits < 16)])
        if not on_cpu:
            widen_embedding(module, dtype)
        return module.to(device)
    stored = getattr(torch, str(config.dtype).removeprefix("torch."), None)
    keeps = packs and on_cpu and stored in (torch.float16, torch.bfloat16)
    with quiet() if is_part else contextlib.nullcontext():  # else it lists all tensors of the other parts
        module = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=stored if keeps else dtype,
            attn_implementation=IMPLEMENTATION,
            key_mapping=RENAMED if is_part else None,
        ).to(device)
    if keeps:
        keep_stored(module)
    return module


def _to_fill(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A model whose weights hold anything."""
    with no_init_weights():
        module: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=IMPLEMENTATION
        )
    return module


def _read_quantized(
    folder: Path, quantization: Quantization, is_part: bool
) -> Iterator[tuple[str, Tensor | Codes]]:
    weights = quantization.read(folder)
    return of_text(weights) if is_part else weights


def _keep_quantized(
    config: PretrainedConfig,
    weights: Iterator[tuple[str, Tensor | Codes]],
    dtype: torch.dtype,
    *,
    keeps_floats: bool,
) -> nn.Module | None:
    """None if the file has other names than the model: only `transformers` knows what they stand for.

    `keeps_floats`: also those of 16 bits, and an embedding, stay as they are.
    """
    module = _to_fill(config, dtype)
    left = {name for name, _ in module.named_parameters()}
    if config.tie_word_embeddings:
        left.discard("lm_head.weight")
    for name, weight in weights:
        if name not in left:  # checked: it is harmless
            continue
        left.remove(name)
        if isinstance(weight, Codes):
            stored = weight.stored()
            place(
                module, name, torch.from_numpy(weight.widened()) if stored is None else stored, weight.order
            )
        elif keeps_floats and weight.dtype in STORED_FLOATS and is_matrix(module, name):
            place(module, name, stored_floats(weight))
        else:
            # Experts have no layers of their own.
            place(module, name, weight, keeps_type=keeps_floats and weight.ndim == 3)
    if left:
        return None
    tie_head(module)
    if keeps_floats:
        keep_stored(module)
    else:
        widen_embedding(module, dtype)
    return module


def _widen_quantized(
    config: PretrainedConfig, weights: Iterator[tuple[str, Tensor | Codes]], dtype: torch.dtype
) -> nn.Module:
    """Hands floats of all weights to `transformers`."""
    state = {
        name: torch.from_numpy(weight.widened()).to(dtype) if isinstance(weight, Codes) else weight
        for name, weight in weights
    }
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    module: nn.Module = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, attn_implementation=IMPLEMENTATION
    )
    return module


def weights_dtype(wanted: str, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """`wanted`, or for "auto" float32 on a CPU, where others cost speed, and on a GPU the checkpoint's own.

    A checkpoint that names none, or one that weights are not served in, counts as float32.
    """
    if wanted == "auto":
        stored = str(config.dtype).removeprefix("torch.")
        wanted = stored if device.type != "cpu" and stored in DTYPES else "float32"
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def _parse(overrides: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(overrides or "{}", type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise CannotStart(f"FLOWKV_HF_OVERRIDES is no JSON object: {error}") from error


def _overridden(config: PretrainedConfig, overrides: dict[str, Any]) -> PretrainedConfig:
    """`config` with other values; "rope_scaling", as older files say, counts as "rope_parameters"."""
    fields = config.to_dict()
    if "rope_scaling" in overrides:
        overrides = {**overrides, "rope_parameters": overrides["rope_scaling"]}
        del overrides["rope_scaling"]
    if unknown := sorted(overrides.keys() - fields.keys()):
        raise CannotStart(
            f"FLOWKV_HF_OVERRIDES sets {_some(unknown)}, which configs of type {config.model_type} don't have"
        )
    return type(config).from_dict(_merged(fields, overrides))


def _merged(fields: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`overrides` over `fields`, objects field by field."""
    merged = fields | overrides
    for name, value in overrides.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            merged[name] = _merged(fields[name], value)
    return merged


def _check_config(
    folder: Path, overrides: dict[str, Any]
) -> tuple[PretrainedConfig, list[LayerAttention], bool]:
    """The folder's config, the attention of each of the model's layers, and whether it is but the text part.

    Raises `UnsupportedModel` if FlowKV can't serve such a model.
    """
    if not folder.is_dir():
        raise UnsupportedModel(f"there is no model folder at {folder}")
    if not (folder / "config.json").is_file():
        raise UnsupportedModel(f"{folder} has no config.json, so it is no model of transformers")
    try:
        config = AutoConfig.from_pretrained(folder)
        if overrides:
            config = _overridden(config, overrides)
    except CannotStart:
        raise
    except Exception as error:  # of any model's code, which checks its config in its own way
        raise UnsupportedModel(
            f"{folder} has no config that transformers knows: {first_line(error)}"
        ) from error
    try:
        part = text_part(config)
        if (reason := _why_not(part)) is None:
            return part, dry_run(part), part is not config
    except UnsupportedModel as error:
        reason = str(error)
    except Exception as error:  # a config that lacks a field may raise anything
        reason = f"its config does not say what is needed: {first_line(error)}"
    raise UnsupportedModel(f"{folder} ({config.model_type}) can't be served: {reason}")


def _why_not(config: PretrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, only decoder-only models are"
    if config.get_text_config() is not config:
        return "it takes more than text, and is none of the types whose text part is served"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "it is not a causal language model"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    layer_types = set(getattr(config, "layer_types", None) or ())
    if model_class._is_stateful or layer_types & {"linear_attention", "mamba"}:
        return "it keeps a recurrent state beside its KV cache"
    if "conv" in layer_types:
        return "it keeps a convolutional state beside its KV cache"
    if getattr(config, "index_topk", None):
        return "an indexer picks the tokens that its attention sees (sparse attention)"
    if not model_class._supports_attention_backend:
        return f"{model_class.__name__} of transformers does not let its attention be replaced"
    if unknown := layer_types - LAYER_TYPES:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    if unknown_ropes := unknown_rope_types(config):
        return f"it has RoPE of type {', '.join(unknown_ropes)}, which transformers doesn't know"
    if not getattr(config, "max_position_embeddings", None):
        return "its config has no max_position_embeddings, so its longest context is unknown"
    return None


def _check_weights(folder: Path, config: PretrainedConfig, is_part: bool) -> Quantization | None:
    """How the weights in `folder` are quantized, if they are; `config` speaks of it no more.

    Raises `UnsupportedModel` if they can't be read, or if a tensor is missing or has no place in the model.
    Loads the files as `transformers` does, but on torch's meta device: only name, type and shape of each
    tensor.
    """
    _check_adapter(folder)
    try:
        quantization = quantization_of(folder, config)
        tensors = _headers(folder)
        if quantization is not None:
            tensors = quantization.as_floats(tensors)
        if is_part:
            tensors = dict(of_text(tensors.items()))
    except UnsupportedModel:
        raise
    except ValueError as error:
        raise UnsupportedModel(f"{folder} can't be served: {error}") from error
    config.__dict__.pop("quantization_config", None)  # all are floats for `transformers`
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    ignored = [*HARMLESS, *(model_class._keys_to_ignore_on_load_unexpected or [])]
    for name, tensor in tensors.items():
        # A causal mask, which models once kept as a buffer under the name of a bias.
        is_mask = tensor.dtype in (torch.bool, torch.uint8) and tensor.ndim >= 2
        if is_mask and re.search(r"\.(attn|attention)\.bias$", name):
            ignored.append(f"^{re.escape(name)}$")
    # Layers of a drafter that the config names: they are numbered on behind the last layer.
    num_drafting = getattr(config, "num_nextn_predict_layers", None) or 0
    ignored += [rf"\.layers\.{config.num_hidden_layers + i}\." for i in range(num_drafting)]

    def used(names: Iterable[str]) -> list[str]:
        return sorted(name for name in names if not any(re.search(pattern, name) for pattern in ignored))

    # Integers and small floats need scales, and the config must say how to apply them.
    packed = [name for name in used(tensors) if tensors[name].dtype not in FLOATS]
    if packed:
        dtypes = sorted({str(tensors[name].dtype).removeprefix("torch.") for name in packed})
        raise UnsupportedModel(
            f"{folder} can't be served: it holds tensors of {', '.join(dtypes)} ({_some(packed)}), and "
            + ("config.json has no quantization_config" if quantization is None else "no scales for them")
        )
    try:
        with quiet():
            _, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # of any model's code
        raise UnsupportedModel(f"transformers can't load {folder}: {first_line(error)}") from error
    other = [f"{name} {tuple(has)} for {tuple(wants)}" for name, has, wants in info["mismatched_keys"]]
    complaints = {
        "lack": sorted(info["missing_keys"]),
        "hold what the model has no place for:": used(info["unexpected_keys"]),
        "have another shape than the model's:": sorted(other),
        "can't be read:": info["error_msgs"],
    }
    said = [f"{words} {_some(names)}" for words, names in complaints.items() if names]
    if said:
        raise UnsupportedModel(f"the weights in {folder} {', and '.join(said)}")
    return quantization


def _check_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():  # a merged model may have kept it
        has_adapter = any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin"))
        if has_adapter or not weight_files(folder):
            raise UnsupportedModel(f"{folder} holds an adapter (LoRA), which is not served: merge it first")


def _headers(folder: Path) -> dict[str, Tensor]:
    """Name, shape and type of every tensor in the folder's weight files, as tensors without values."""
    files = weight_files(folder)
    if not files:
        raise UnsupportedModel(
            f"{folder} holds no weights: no model.safetensors, no pytorch_model.bin, no index of several "
            "such files; load format dummy makes random ones"
        )
    if absent := [file.name for file in files if not file.is_file()]:
        raise UnsupportedModel(f"{folder} lacks {_some(absent)}, which its index of weights names")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            found = load_state_dict(file, map_location="meta")
            if has_blocks(folder):
                found |= blocks_as_floats(file)
            tensors |= found
        except Exception as error:  # of several libraries: the file is not what its name says
            raise UnsupportedModel(f"{file} can't be read: {error}") from error
    return tensors


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
