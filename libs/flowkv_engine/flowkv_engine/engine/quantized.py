"""Quantized safetensors: which tensors of a checkpoint make a weight, and that weight in a stored form.

Weights are `scale * (code - zero)`, in float32 and not rounded further, whatever type the scales have. What a
file holds says which layers are quantized; those that its config leaves out are floats there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_utils import load_state_dict

from flowkv_common.fingerprint import weight_files
from flowkv_engine.engine.stored import GROUPED_FORMS, Stored, stored_groups

_SERVED = (
    "served are FP8 of transformers and ModelOpt, MXFP4, GPTQ of 4 and 8 bits, AWQ of 4 bits (gemm), "
    "compressed-tensors of 4 and 8 bits, and plain floats"
)
# Files that quantizers write beside config.json, or instead of its entry; the method they tell of.
_QUANTIZER_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
_COMPRESSED = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
)
_MODELOPT = ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN")

# What ends the names of codes -> their types, the ends of what must stand beside them, and of what may.
_BESIDE_WEIGHT = ("weight_scale_inv", "weight_zero_point")
_PARTS: dict[str, tuple[set[torch.dtype], tuple[str, ...], tuple[str, ...]]] = {
    "weight": ({torch.float8_e4m3fn, torch.int8}, ("weight_scale",), _BESIDE_WEIGHT),
    "weight_packed": (
        {torch.int32, torch.uint8},
        ("weight_scale",),
        ("weight_zero_point", "weight_shape", "weight_g_idx"),
    ),
    "qweight": ({torch.int32}, ("scales", "qzeros"), ("g_idx",)),
}
# Scales of activations and of KV: neither is quantized here.
_UNUSED = re.compile(r"\.(input|output|activation|q|k|v|kv|prob)_(scale|zero_point)(_inv)?$")

_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word the codes of eight columns stand
_E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)

Array = NDArray[Any]


class Codes(NamedTuple):
    """A weight [N, K]. Each row has G groups of equal length, each with a scale, and a zero if there are any.

    `kind`: INT4 (uint8 up to 15), INT8 (int8), E4M3 (its bits as uint8). `order`: the input that each column
    is for, if they are not in order.
    """

    kind: str
    numbers: Array  # [N, K]
    scales: NDArray[np.float32]  # [N, G]
    zeros: NDArray[np.float16] | None  # [N, G]
    order: NDArray[np.int64] | None = None  # [K]

    def stored(self) -> Stored | None:
        """In the form for it; None if there is none for groups of this length."""
        name = f"{self.kind}_{self.numbers.shape[1] // self.scales.shape[1]}"
        form = next((form for form in GROUPED_FORMS if form.name == name), None)
        return form and stored_groups(form, self.numbers, self.scales, self.zeros)

    def widened(self) -> NDArray[np.float32]:
        """[N, K] in float32, columns in order."""
        groups = self.numbers.reshape(*self.scales.shape, -1)
        if self.kind == "E4M3":
            floats = torch.from_numpy(groups).view(torch.float8_e4m3fn).float().numpy()
        else:
            floats = groups.astype(np.float32)
        if self.zeros is not None:
            floats -= self.zeros[..., None]
        floats *= self.scales[..., None]
        floats = floats.reshape(self.numbers.shape)
        return floats if self.order is None else floats[:, np.argsort(self.order)]


class Quantization(NamedTuple):
    """How a checkpoint's weights are stored, as far as its tensors don't say."""

    method: str
    bits: int = 8  # of a code in a word
    block: tuple[int, int] = (128, 128)  # rows and columns that share a scale, where several of both do
    adds_one: bool = False  # zeros are stored less one

    def weights_in(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
        """The names of quantized weights -> their parts: the ends of names, and the names in the file.

        Of the tensors only name and type count. Raises ValueError if a part is missing.
        """
        found: dict[str, dict[str, str]] = {}
        for name, tensor in tensors.items():
            layer, _, end = name.rpartition(".")
            if end.endswith("_blocks") and tensor.dtype == torch.uint8:
                experts = name.removesuffix("_blocks")
                if f"{experts}_scales" not in tensors:
                    raise ValueError(f"{name} has no {experts}_scales beside it")
                found[experts] = {"blocks": name, "scales": f"{experts}_scales"}
            if end not in _PARTS or tensor.dtype not in _PARTS[end][0]:
                continue
            _, needed, others = _PARTS[end]
            parts = {each: f"{layer}.{each}" for each in (end, *needed, *others)}
            parts = {each: part for each, part in parts.items() if part in tensors}
            if "weight_scale_inv" in parts:  # not inverse, for all its name
                parts["weight_scale"] = parts.pop("weight_scale_inv")
            if lacks := [each for each in needed if each not in parts]:
                raise ValueError(f"{name} has no {lacks[0]} beside it")
            found[f"{layer}.weight"] = parts
        return found

    def as_floats(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a checkpoint, of which the quantized ones become floats without values."""
        weights = self.weights_in(tensors)
        used = {part for parts in weights.values() for part in parts.values()}
        floats = {
            name: each for name, each in tensors.items() if name not in used and not _UNUSED.search(name)
        }
        for name, parts in weights.items():
            end, part = next(iter(parts.items()))
            shape = self._shape(end, tensors[part])
            floats[name] = torch.empty(shape, dtype=torch.float32, device="meta")
        return floats

    def read(self, folder: Path) -> Iterator[tuple[str, Tensor | Codes]]:
        """The checkpoint's tensors in the order of their names, the quantized ones as codes."""
        headers: dict[str, Tensor] = {}
        files: dict[str, Path] = {}
        for file in weight_files(folder):
            found = load_state_dict(file, map_location="meta")
            headers |= found
            files |= dict.fromkeys(found, file)

        def value(name: str) -> Tensor:
            # Opened for each: what has been read leaves this process's memory with its tensor.
            with safe_open(files[name], framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
            return tensor

        weights = self.weights_in(headers)
        for name in sorted(self.as_floats(headers)):
            parts = {end: value(part) for end, part in weights.get(name, {}).items()}
            if "blocks" in parts:
                yield name, _experts(**parts)
            else:
                yield name, self._codes(parts) if parts else value(name)

    def _shape(self, end: str, codes: Tensor) -> tuple[int, ...]:
        """Of the weight whose codes these are."""
        if end == "blocks":
            num_experts, num_rows, num_groups, num_bytes = codes.shape
            return num_experts, num_groups * num_bytes * 2, num_rows
        num_rows, num_cols = codes.shape
        per_item = 2 if codes.dtype == torch.uint8 else 32 // self.bits
        if end == "weight":
            return num_rows, num_cols
        if end == "weight_packed":
            return num_rows, num_cols * per_item
        return (num_cols * per_item, num_rows) if self.method == "awq" else (num_cols, num_rows * per_item)

    def _codes(self, parts: Mapping[str, Tensor]) -> Codes:
        if "qweight" in parts:
            return self._awq(parts) if self.method == "awq" else self._gptq(parts)
        scales, zeros = parts["weight_scale"], parts.get("weight_zero_point")
        if "weight_packed" in parts:
            packed = parts["weight_packed"].numpy()
            if packed.dtype == np.uint8:  # halves are floats, and their doubles integers
                return self._grouped("INT8", _E2M1_DOUBLED[_unpacked(packed, 4)], _floats(scales) / 2)
            numbers = _unpacked(packed, self.bits)
            if zeros is not None:  # packed along the rows
                zeros = torch.from_numpy(_unpacked(zeros.T.contiguous().numpy(), self.bits).T[: len(numbers)])
            return self._grouped(
                f"INT{self.bits}", numbers, _floats(scales), zeros, parts.get("weight_g_idx")
            )
        weight = parts["weight"]
        if weight.dtype == torch.int8:
            return self._grouped("INT8", weight.numpy(), _floats(scales), zeros)
        return self._grouped("E4M3", weight.view(torch.uint8).numpy(), _floats(scales))

    def _gptq(self, parts: Mapping[str, Tensor]) -> Codes:
        """Codes packed along the columns of the weight's transpose, zeros along its rows."""
        numbers = _unpacked(parts["qweight"].T.contiguous().numpy(), self.bits)
        zeros: Array = _unpacked(parts["qzeros"].numpy(), self.bits).T
        if self.adds_one:  # and wraps around
            zeros = zeros + 1 & (1 << self.bits) - 1
        return self._grouped(
            f"INT{self.bits}", numbers, _floats(parts["scales"]).T, zeros, parts.get("g_idx")
        )

    def _awq(self, parts: Mapping[str, Tensor]) -> Codes:
        """Both packed along the rows, eight of them in an order of their own."""
        numbers, zeros = (
            _unpacked(parts[end].numpy(), 4).reshape(len(parts[end]), -1, 8)[..., _AWQ_PLACES]
            for end in ("qweight", "qzeros")
        )
        scales = _floats(parts["scales"]).T
        return self._grouped(
            "INT4", numbers.reshape(len(numbers), -1).T, scales, zeros.reshape(len(zeros), -1).T
        )

    def _grouped(
        self,
        kind: str,
        numbers: Array,
        scales: Array,
        zeros: Array | Tensor | None = None,
        group_of: Tensor | None = None,
    ) -> Codes:
        """`scales` and `zeros` [a, b] stand for equal parts of the rows and of the columns.

        `group_of` [K]: the columns of each. Unsigned codes of 8 bits, and their zeros, become signed.
        """
        if kind == "INT8" and numbers.dtype == np.uint8:
            numbers = (numbers ^ 128).view(np.int8)
            zeros = None if zeros is None else np.asarray(zeros, np.int16) - 128
        num_rows, length = numbers.shape
        rows_each, cols_each = (
            _each(*sizes) for sizes in zip(numbers.shape, scales.shape, self.block, strict=True)
        )
        if zeros is not None:
            zeros = np.broadcast_to(_matrix(np.asarray(zeros)), scales.shape).astype(np.float16)
        elif kind != "E4M3":
            zeros = np.full(scales.shape, 8 if kind == "INT4" else 0, np.float16)
        group = next(
            (each for each in (128, 32) if length % each == cols_each % each == 0),
            math.gcd(length, cols_each),
        )
        cols, order = np.arange(0, length, group) // cols_each, None
        if group_of is not None and int(group_of.min()) >= 0:  # else it says nothing
            in_order = np.arange(length) // cols_each
            if not np.array_equal(group_of.numpy(), in_order):
                order = np.argsort(group_of.numpy(), kind="stable")
                if np.array_equal(group_of.numpy()[order], in_order):
                    numbers = np.take(numbers, order, axis=1)
                else:  # groups of other lengths than they should have
                    cols, order = group_of.numpy(), None
        rows = np.arange(num_rows) // rows_each
        zeros = None if zeros is None else zeros[rows][:, cols]
        return Codes(kind, numbers, scales[rows][:, cols], zeros, order)


def _experts(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 of GPT-OSS [experts, rows, groups, 16 bytes] -> [experts, columns, rows], exact in bfloat16."""
    packed = blocks.numpy()
    numbers = _E2M1_DOUBLED[np.stack([packed & 15, packed >> 4], axis=-1)].reshape(*packed.shape[:3], -1)
    halves = scales.view(torch.float8_e8m0fnu).float() / 2
    floats = torch.from_numpy(numbers) * halves[..., None]
    return floats.flatten(2).transpose(1, 2).bfloat16()


def _each(size: int, num_parts: int, block: int) -> int:
    """Numbers that share a scale, where `num_parts` of them are for `size` numbers."""
    if -(-size // block) == num_parts:
        return block
    if size % num_parts:
        raise ValueError(f"its {num_parts} scales don't fit {size} numbers")
    return size // num_parts


def _matrix(numbers: Any) -> Any:
    """Of scales for blocks, channels, or all."""
    if numbers.ndim == 4:  # ModelOpt: [a, 1, b, 1]
        return numbers[:, 0, :, 0]
    return numbers if numbers.ndim == 2 else numbers.reshape(-1, 1)


def _floats(scales: Tensor) -> NDArray[np.float32]:
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    floats: NDArray[np.float32] = _matrix(scales.float().numpy())
    return floats


def _unpacked(words: Array, bits: int) -> NDArray[np.uint8]:
    """[R, C] -> [R, codes], each word's lowest first. The words are contiguous."""
    codes = np.ascontiguousarray(words).view(np.uint8)
    return codes if bits == 8 else np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(words), -1)


def quantization_of(folder: Path, config: PretrainedConfig) -> Quantization | None:
    """As the config says, or else a quantizer's file beside it; None if neither speaks of quantization.

    Raises ValueError, which says what it is, for one that is not served.
    """
    settings: dict[str, Any] = getattr(config, "quantization_config", None) or {}
    method = source = str(settings.get("quant_method") or ("an unnamed method" if settings else ""))
    for name, tells_of in _QUANTIZER_FILES.items():
        if not method and (folder / name).is_file():
            method, settings = tells_of, json.loads((folder / name).read_bytes())
            source = f"{method} ({name})"
    if not method:
        return None
    try:
        quantization = _READERS[method](settings) if method in _READERS else source
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        quantization = f"{source} with settings that can't be read ({type(error).__name__}: {error})"
    if isinstance(quantization, str):
        raise ValueError(f"its weights are quantized by {quantization}, and {_SERVED}")
    if other := [file.name for file in weight_files(folder) if file.suffix != ".safetensors"]:
        raise ValueError(f"its weights are quantized and in {other[0]}: only safetensors are read then")
    return quantization


# Each gives the words for what is not served.


def _fp8(settings: dict[str, Any]) -> Quantization | str:
    if settings.get("fmt", "e4m3") != "e4m3":
        return f"fp8 in {settings['fmt']}"
    rows, cols = settings.get("weight_block_size") or (128, 128)
    return Quantization("fp8", block=(rows, cols))


def _gptq(settings: dict[str, Any]) -> Quantization | str:
    layout, bits = settings.get("checkpoint_format") or "gptq", settings["bits"]
    if layout not in ("gptq", "gptq_v2") or settings.get("pack_dtype", "int32") != "int32":
        return f"gptq in the layout {layout} ({settings.get('pack_dtype', 'int32')})"
    if bits not in (4, 8):
        return f"gptq of {bits} bits"
    if any(each.get("bits", bits) != bits for each in (settings.get("dynamic") or {}).values()):
        return "gptq of several sizes"
    return Quantization("gptq", bits, adds_one=layout == "gptq")


def _awq(settings: dict[str, Any]) -> Quantization | str:
    layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits = settings["w_bit"] if "w_bit" in settings else settings["bits"]
    if (layout, bits) != ("gemm", 4):
        return f"awq of {bits} bits in the layout {layout}"
    return Quantization("awq", bits)


def _compressed_tensors(settings: dict[str, Any]) -> Quantization | str:
    groups = list((settings.get("config_groups") or {}).values())
    formats = {group.get("format") or settings.get("format") for group in groups}
    if others := sorted(str(each) for each in formats - set(_COMPRESSED)):
        return f"compressed-tensors in the format {others[0]}"
    if settings.get("transform_config"):
        return "compressed-tensors with rotations (transform_config)"
    if (sparsity := (settings.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        return f"compressed-tensors with weights left out ({sparsity})"
    weights = [group["weights"] for group in groups if group.get("weights")]
    sizes = {each["num_bits"] for each in weights}
    if others := sorted(sizes - {4, 8}):
        return f"compressed-tensors of {others[0]} bits"
    if "pack-quantized" in formats and len(sizes) > 1:
        return "compressed-tensors of several sizes"
    blocks = [each["block_structure"] for each in weights if each.get("block_structure")]
    rows, cols = blocks[0] if blocks else (128, 128)
    return Quantization("compressed-tensors", min(sizes, default=8), (rows, cols))


def _modelopt(settings: dict[str, Any]) -> Quantization | str:
    inner: dict[str, Any] = settings.get("quantization") or settings
    algorithm = inner.get("quant_algo")
    if algorithm not in _MODELOPT:
        return f"modelopt with {algorithm or 'an unnamed algorithm'}"
    return Quantization("modelopt")


def _mxfp4(settings: dict[str, Any]) -> Quantization | str:
    return Quantization("mxfp4")


_READERS = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
}
