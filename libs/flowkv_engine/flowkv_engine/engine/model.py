"""Loads a model folder for a node. Served are models that answer as `transformers` does (docs/models.md).

Others are refused with a reason before their weights are read: by the config, a run without weights, and the
headers of the weight files. `Runner` compares logits before the node is ready.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import load_state_dict

from flowkv_common.config import DTYPES
from flowkv_common.errors import CannotStart
from flowkv_common.fingerprint import fingerprint, model_files, weight_files
from flowkv_common.grammar import Grammars
from flowkv_common.wire.messages import ModelCard, PoolLayout
from flowkv_engine.engine.attention import Span
from flowkv_engine.engine.forward import IMPLEMENTATION, is_llama
from flowkv_engine.engine.quantized import Codes, Quantization, quantization_of
from flowkv_engine.engine.stored_modules import (
    BLOCKS,
    STORED_FLOATS,
    StoredWeight,
    blocks_as_floats,
    has_blocks,
    keep_stored,
    load_blocks,
    place,
    stored_floats,
    tie_head,
)

log = logging.getLogger(__name__)

CPU = torch.device("cpu")

DRY_RUN = "flowkv_dry_run"  # the name in `transformers` of the attention function of the run without weights
DRY_RUN_TOKENS = 8
MASK_SAMPLES = 64  # positions at either end of the context, where a mask is looked at

LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}

FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
# Tensors that no model reads: buffers of older versions of `transformers` (each model computes its own),
# layers of a drafter, a value head of training.
HARMLESS = (
    r"\.(inv_freq|cos_cached|sin_cached|position_ids|masked_bias)$",
    r"(^|\.)mtp(\.|_)",
    r"^v_head\.",
)


class UnsupportedModel(CannotStart):
    """The model can't be served; the message says why."""


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
    spans: list[Span]  # of each layer
    grammars: Grammars

    def layout(self, block_size: int, kv_dtype: str) -> PoolLayout:
        """The layout of this model's pool: `block_size` tokens per block, of `kv_dtype`.

        "auto" is that of the weights: what attention computes in is what it should store.
        """
        return PoolLayout(
            num_layers=self.num_layers,
            block_size=block_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=str(self.dtype).removeprefix("torch.") if kv_dtype == "auto" else kv_dtype,
        )


def load_model(
    path: str,
    *,
    name: str | None,
    dtype: str,
    load_format: str,
    device: torch.device = CPU,
) -> LoadedModel:
    """The model in the folder `path`, on `device`; random weights if `load_format` is "dummy".

    `dtype`: such as "float32", or "auto" (see `weights_dtype`).

    Raises `UnsupportedModel`, a `ValueError`, before weights are read if the model can't be served.
    """
    if load_format not in ("auto", "dummy"):
        raise CannotStart(f"FLOWKV_LOAD_FORMAT is {load_format!r}: choose one of auto, dummy")
    folder, has_weights = Path(path), load_format == "auto"
    config, layers = _check_config(folder)
    eos = eos_token_ids(folder, config)
    torch_dtype = weights_dtype(dtype, config, device)
    quantization = _check_weights(folder, config) if has_weights else None
    log.info("loading %s (%s)", path, load_format)
    module: nn.Module
    if has_weights:
        module = _load_weights(folder, config, quantization, torch_dtype, device)
    else:  # made where they stay: the same in every process on such a device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            module = AutoModelForCausalLM.from_config(
                config, dtype=torch_dtype, attn_implementation=IMPLEMENTATION
            )
    module.eval().requires_grad_(False)
    card = ModelCard(
        name=name or folder.resolve().name,
        fingerprint=fingerprint(folder, str(torch_dtype), has_weights=has_weights),
        max_model_len=_max_model_len(config),
        vocab_size=config.vocab_size,
        eos_token_ids=eos,
        files=model_files(folder, has_weights=has_weights),
    )
    num_parameters = sum(each.numel() for each in module.parameters())
    kept = (each.stored for each in module.modules() if isinstance(each, StoredWeight))
    num_parameters += sum(math.prod(each.shape) for each in kept)
    log.info("loaded %s: %.1f M parameters", card.name, num_parameters / 1e6)
    weight = next(module.parameters())
    grammars = Grammars(folder / "tokenizer.json", eos)
    return LoadedModel(
        module=module,
        device=weight.device,
        dtype=weight.dtype,
        card=card,
        num_layers=len(layers),
        num_kv_heads=layers[0].num_kv_heads,
        head_dim=layers[0].head_dim,
        spans=[layer.span for layer in layers],
        grammars=grammars,
    )


def _load_weights(
    folder: Path,
    config: PretrainedConfig,
    quantization: Quantization | None,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """The model with its weights, on `device`.

    On a CPU, where all is computed in float32, weights that are stored in fewer bits stay so if the compiled
    forward takes them.
    """
    module: nn.Module
    packs = device.type == "cpu" and dtype == torch.float32 and is_llama(config)
    if quantization is not None:
        try:
            if packs:
                return _keep_quantized(folder, config, quantization)
            return _widen_quantized(folder, config, quantization, dtype).to(device)
        except ValueError as error:
            raise UnsupportedModel(f"{folder} can't be served: {error}") from error
    if has_blocks(folder):
        module = _to_fill(config, dtype)
        load_blocks(module, folder / BLOCKS, keeps=packs)
        return module.to(device)
    stored = getattr(torch, str(config.dtype).removeprefix("torch."), None)
    keeps = packs and stored in (torch.float16, torch.bfloat16)
    module = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=stored if keeps else dtype, attn_implementation=IMPLEMENTATION
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


def _keep_quantized(folder: Path, config: PretrainedConfig, quantization: Quantization) -> nn.Module:
    module = _to_fill(config, torch.float32)
    left = {name for name, _ in module.named_parameters()}
    if config.tie_word_embeddings:
        left.discard("lm_head.weight")
    for name, weight in quantization.read(folder):
        if name not in left:  # checked: it is harmless
            continue
        left.remove(name)
        if isinstance(weight, Codes):
            stored = weight.stored()
            place(
                module, name, torch.from_numpy(weight.widened()) if stored is None else stored, weight.order
            )
        elif weight.ndim == 2 and weight.dtype in STORED_FLOATS:
            place(module, name, stored_floats(weight))
        else:
            place(module, name, weight)
    if left:  # `transformers` knows them by other names
        raise ValueError(f"its quantized weights don't have the model's names, such as {_some(sorted(left))}")
    tie_head(module)
    return module


def _widen_quantized(
    folder: Path, config: PretrainedConfig, quantization: Quantization, dtype: torch.dtype
) -> nn.Module:
    """Hands floats of all weights to `transformers`."""
    state = {
        name: torch.from_numpy(weight.widened()).to(dtype) if isinstance(weight, Codes) else weight
        for name, weight in quantization.read(folder)
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """`transformers` prints nothing while it builds and loads a model."""
    verbosity, has_bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bar:
            transformers.logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


class LayerAttention(NamedTuple):
    """What a layer writes into its KV cache, and how far back it sees."""

    num_kv_heads: int
    head_dim: int
    span: Span


def _check_config(folder: Path) -> tuple[PretrainedConfig, list[LayerAttention]]:
    """The folder's config, and the attention of each of the model's layers.

    Raises `UnsupportedModel` if FlowKV can't serve such a model.
    """
    if not folder.is_dir():
        raise UnsupportedModel(f"there is no model folder at {folder}")
    if not (folder / "config.json").is_file():
        raise UnsupportedModel(f"{folder} has no config.json, so it is no model of transformers")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of any model's code, which checks its config in its own way
        raise UnsupportedModel(
            f"{folder} has no config that transformers knows: {_first_line(error)}"
        ) from error
    try:
        if (reason := _why_not(config)) is None:
            return config, _dry_run(config)
    except UnsupportedModel as error:
        reason = str(error)
    except Exception as error:  # a config that lacks a field may raise anything
        reason = f"its config does not say what is needed: {_first_line(error)}"
    raise UnsupportedModel(f"{folder} ({config.model_type}) can't be served: {reason}")


def _why_not(config: PretrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, only decoder-only models are"
    if config.get_text_config() is not config:
        return "it takes more than text"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "it is not a causal language model"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model_class._is_stateful:
        return "it keeps a recurrent state beside its KV cache"
    if not model_class._supports_attention_backend:
        return f"{model_class.__name__} of transformers does not let its attention be replaced"
    if getattr(config, "kv_lora_rank", None):
        return "its KV cache is compressed (MLA)"
    if unknown := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    if not getattr(config, "max_position_embeddings", None):
        return "its config has no max_position_embeddings, so its longest context is unknown"
    return None


def _max_model_len(config: PretrainedConfig) -> int:
    """The longest sequence for which fixed positions equal the model's."""
    limit = int(config.max_position_embeddings)
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond this length all positions rotate differently, also those whose keys are cached.
        limit = min(limit, int(rope["original_max_position_embeddings"]))
    if getattr(config, "attn_temperature_tuning", False):
        # From this length on Llama 4 scales queries by where they stand in the step, not in the sequence.
        limit = min(limit, int(config.floor_scale) - 1)
    return limit


def _dry_run(config: PretrainedConfig) -> list[LayerAttention]:
    """Runs the model on torch's meta device -> what its layers ask for; all write KV of one shape.

    Raises `UnsupportedModel`, with the reason, if it can't be served.
    """
    asked: dict[int, LayerAttention] = {}
    try:
        with quiet():
            with torch.device("meta"):
                module = AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation=DRY_RUN
                ).eval()
            if any(hasattr(part, "create_position_ids_from_input_ids") for part in module.modules()):
                raise UnsupportedModel("it counts positions on from the id of its padding token")
            token_ids = torch.zeros(DRY_RUN_TOKENS, dtype=torch.int64, device="meta")
            indices = torch.zeros(2, dtype=torch.int64, device="meta")
            with torch.inference_mode(), _Values():
                # As `ModulesForward` does.
                logits = module(
                    token_ids.unsqueeze(0),
                    position_ids=token_ids.unsqueeze(0),
                    use_cache=False,
                    logits_to_keep=indices,
                    flowkv=asked,
                ).logits[0]
    except UnsupportedModel:
        raise
    except Exception as error:  # of any model's code
        raise UnsupportedModel(f"transformers can't run it without weights: {_first_line(error)}") from error
    if logits.shape != (len(indices), config.vocab_size):
        raise UnsupportedModel(f"for {len(indices)} tokens it gives logits of shape {tuple(logits.shape)}")
    if not asked:
        raise UnsupportedModel("its layers don't call the attention function they are given")
    if sorted(asked) != list(range(len(asked))):
        raise UnsupportedModel("only some of its layers have attention")
    shapes = {(layer.num_kv_heads, layer.head_dim) for layer in asked.values()}
    if len(shapes) > 1:
        sizes = " and ".join(f"{heads} x {dim}" for heads, dim in sorted(shapes))
        raise UnsupportedModel(f"its layers' KV caches differ in shape ({sizes}), and a pool has one")
    return [asked[number] for number in range(len(asked))]


def _dry_run_attention(
    module: nn.Module,
    query: Tensor,  # shapes as of `paged_attention`
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    flowkv: dict[int, LayerAttention] | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Notes in `flowkv` what a layer asks for, and computes nothing.

    Raises `UnsupportedModel` if that is more than causal attention over one cache by some `Rule`.
    """
    if flowkv is None:
        raise UnsupportedModel("its attention does not hand on the keyword arguments of the forward pass")
    if position_bias is not None:
        raise UnsupportedModel("its attention has a position bias")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModel("its attention is not causal")
    span: Span | None = Span() if attention_mask is None else getattr(attention_mask, "span", None)
    if span is None:
        raise UnsupportedModel("its attention has a mask of its own, other than the causal one")
    if key.shape != value.shape or query.shape[2:] != key.shape[2:] or query.shape[1] % key.shape[1]:
        sizes = ", ".join(f"{x.shape[1]} x {x.shape[3]}" for x in (query, key, value))
        raise UnsupportedModel(f"its queries, keys and values don't fit one cache: {sizes}")
    layer = module.layer_idx
    assert isinstance(layer, int)
    if layer in flowkv:
        raise UnsupportedModel(f"its attention of layer {layer} is computed twice in a step")
    flowkv[layer] = LayerAttention(key.shape[1], key.shape[3], span)
    return torch.empty_like(query.transpose(1, 2)), None


class _Values(TorchFunctionMode):
    """Answers for tensors without values: each value is 1 or true, and `nonzero` finds none."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func in (Tensor.item, Tensor.__int__, Tensor.__index__, Tensor.__float__):
                return 1
            if func in (Tensor.__bool__, Tensor.__contains__):
                return True
            if func is Tensor.tolist:
                return torch.ones(args[0].shape, dtype=args[0].dtype, device="cpu").tolist()
            if func in (torch.nonzero, Tensor.nonzero):
                return torch.empty(0, args[0].dim(), dtype=torch.int64, device="meta")
        return func(*args, **(kwargs or {}))


class _NoPadding(TorchFunctionMode):
    """A mask of chunks counts from each sequence's first token: here no sequence has padding before it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__ and args[0].is_meta and args[0].dim() == 1:  # by sequence
            return torch.zeros_like(args[1])
        return func(*args, **(kwargs or {}))


def _wanted_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    config: PretrainedConfig,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """None if the mask is causal. Else some mask, with its `span` if it has one; without, the run refuses it.

    `local_size`: of the window or the chunks, if any.
    """
    end = _max_model_len(config)
    edges = (0, *((local_size, 2 * local_size) if local_size else ()), end)
    samples = {place for edge in edges for place in range(edge - MASK_SAMPLES, edge + MASK_SAMPLES)}
    positions = torch.tensor(sorted(place for place in samples if 0 <= place < end), device="cpu")
    query, key = positions.view(1, 1, -1, 1), positions.view(1, 1, 1, -1)
    zero = torch.zeros_like(query[:, :, :1])
    mask: Any = torch.empty(1, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    with contextlib.suppress(RuntimeError):  # raised if it reads values of the model's inputs
        with _NoPadding():
            allowed = mask_function(zero, zero, query, key)
        spans = [Span(), *((Span(window=local_size), Span(chunk=local_size)) if local_size else ())]
        for span in spans:
            seen = (key <= query) & (key >= span.first_seen(query))
            if not allowed.is_meta and bool((allowed == seen).all()):
                mask.span = span
                return None if span == Span() else mask
    return mask  # type: ignore[no-any-return]


AttentionInterface.register(DRY_RUN, _dry_run_attention)
AttentionMaskInterface.register(DRY_RUN, _wanted_mask)


def _check_weights(folder: Path, config: PretrainedConfig) -> Quantization | None:
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
        raise UnsupportedModel(f"transformers can't load {folder}: {_first_line(error)}") from error
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
