"""Quantizes tiny models into each served format, in plain numpy, and says which floats they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_models import make_tiny_model

Floats = NDArray[np.float32]
Packed = tuple[dict[str, Tensor], Floats]  # tensors by the ends of their names, and the weight they stand for

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that each code of a word is for
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


class Format(NamedTuple):
    name: str
    config: dict[str, Any]  # of quantization
    pack: Callable[[Floats], Packed]  # a weight [N, K]
    config_file: str = "config.json"


def make_quantized_model(folder: Path, form: Format, *, ignore: str = "lm_head", **config: Any) -> Path:
    """Writes a tiny model in bfloat16 whose projections are quantized, but for those that match `ignore`.

    -> the folder of the same model in float32.
    """
    values: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "head_dim": 64,
    }
    values |= {"num_attention_heads": 4, "initializer_range": 0.1}
    make_tiny_model(folder, **{**values, **config})
    floats = folder.with_name(f"{folder.name}-floats")
    make_tiny_model(floats, **{**values, **config})
    tensors: dict[str, Tensor] = {}
    widened: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if name.endswith("_proj.weight") and not re.search(ignore, layer):
            parts, weight = form.pack(tensor.numpy())
            tensors |= {f"{layer}.{end}": part.contiguous() for end, part in parts.items()}
            widened[name] = torch.from_numpy(weight).contiguous()
        else:
            tensors[name] = tensor.bfloat16()
            widened[name] = tensors[name].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(widened, floats / "model.safetensors", metadata={"format": "pt"})
    file = folder / form.config_file
    entry = {"dtype": "bfloat16", "quantization_config": form.config}
    if file.exists():
        file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    else:
        file.write_text(json.dumps(form.config))
    return floats


def _integers(weight: Floats, bits: int, group: int, asymmetric: bool) -> tuple[NDArray[Any], ...]:
    """Codes from 0 on [N, K], scales [N, G] that float16 and bfloat16 hold, zeros [N, G]."""
    groups = weight.reshape(len(weight), -1, group)
    top = 2**bits - 1
    low, high = groups.min(-1), groups.max(-1)
    scales = (high - low) / top if asymmetric else 2 * np.abs(groups).max(-1) / top
    scales = torch.from_numpy(scales).bfloat16().half().float().numpy()
    zeros = np.clip(np.round(-low / scales), 0, top) if asymmetric else np.full_like(scales, (top + 1) // 2)
    codes = np.clip(np.round(groups / scales[..., None]) + zeros[..., None], 0, top)
    return codes.reshape(weight.shape).astype(np.uint32), scales, zeros.astype(np.uint32)


def _stands_for(codes: NDArray[Any], scales: Floats, zeros: NDArray[Any]) -> Floats:
    """Number by number."""
    each = codes.shape[1] // scales.shape[1]
    weight = np.empty(codes.shape, np.float32)
    for col in range(codes.shape[1]):
        group = col // each
        less_zero = codes[:, col].astype(np.float32) - zeros[:, group].astype(np.float32)
        weight[:, col] = scales[:, group] * less_zero
    return weight


def _words(codes: NDArray[Any], bits: int) -> Tensor:
    """[R, C] -> int32 [R, C * bits / 32], the first code lowest."""
    per_word = 32 // bits
    words = np.zeros((len(codes), codes.shape[1] // per_word), np.uint32)
    for i in range(per_word):
        words |= codes[:, i::per_word].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(words.view(np.int32))


def _gptq(bits: int, group: int, *, adds_one: bool, act_order: bool = False) -> Callable[[Floats], Packed]:
    def pack(weight: Floats) -> Packed:
        length = weight.shape[1]
        order = np.random.default_rng(3).permutation(length) if act_order else np.arange(length)
        codes, scales, zeros = _integers(weight[:, order], bits, group, asymmetric=True)
        group_of = np.empty(length, np.int32)
        group_of[order] = np.arange(length) // group
        back = np.argsort(order)
        stored_zeros = (zeros.astype(np.int64) - adds_one) % 2**bits
        parts = {
            "qweight": _words(codes[:, back], bits).T,  # packed along K
            "qzeros": _words(stored_zeros.T, bits),
            "scales": torch.from_numpy(scales.T.copy()).half(),
            "g_idx": torch.from_numpy(group_of),
        }
        return parts, _stands_for(codes, scales, zeros)[:, back]

    return pack


def _awq(weight: Floats) -> Packed:
    codes, scales, zeros = _integers(weight, 4, 128, asymmetric=True)

    def words(numbers: NDArray[Any]) -> Tensor:  # [N, any], eight rows in a word
        across = numbers.T.reshape(numbers.shape[1], -1, 8)[..., AWQ_ORDER]
        return _words(across.reshape(numbers.shape[1], -1), 4)

    parts = {
        "qweight": words(codes),
        "qzeros": words(zeros),
        "scales": torch.from_numpy(scales.T.copy()).half(),
    }
    return parts, _stands_for(codes, scales, zeros)


def _packed(bits: int, group: int, asymmetric: bool, act_order: bool = False) -> Callable[[Floats], Packed]:
    def pack(weight: Floats) -> Packed:
        length = weight.shape[1]
        order = np.random.default_rng(3).permutation(length) if act_order else np.arange(length)
        codes, scales, zeros = _integers(weight[:, order], bits, group or length, asymmetric)
        back = np.argsort(order)
        parts = {
            "weight_packed": _words(codes[:, back], bits),
            "weight_scale": torch.from_numpy(scales).bfloat16(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if asymmetric:
            parts["weight_zero_point"] = _words(zeros.T, bits).T
        if act_order:
            group_of = np.empty(length, np.int32)
            group_of[order] = np.arange(length) // group
            parts["weight_g_idx"] = torch.from_numpy(group_of)
        return parts, _stands_for(codes, scales, zeros)[:, back]

    return pack


def _int8(weight: Floats) -> Packed:
    codes, scales, zeros = _integers(weight, 8, weight.shape[1], asymmetric=False)
    signed = torch.from_numpy(codes.astype(np.int16) - 128).to(torch.int8)
    return {"weight": signed, "weight_scale": torch.from_numpy(scales).bfloat16()}, _stands_for(
        codes, scales, zeros
    )


def _float8(
    rows: int, cols: int, name: str, unused: str = "", *, four_axes: bool = False
) -> Callable[[Floats], Packed]:
    """A scale for each block of so many rows and columns; 0: of all."""

    def pack(weight: Floats) -> Packed:
        num_rows, length = weight.shape
        rows_each, cols_each = rows or num_rows, cols or length
        scales = np.empty((-(-num_rows // rows_each), -(-length // cols_each)), np.float32)
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        stands_for = np.empty_like(weight)
        for i, j in np.ndindex(*scales.shape):
            part = np.s_[i * rows_each : (i + 1) * rows_each, j * cols_each : (j + 1) * cols_each]
            scales[i, j] = np.abs(weight[part]).max() / 448
            codes[part] = torch.from_numpy(weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            stands_for[part] = codes[part].float().numpy() * scales[i, j]
        parts = {"weight": codes, name: torch.from_numpy(scales)}
        if not rows:
            parts[name] = parts[name].reshape(())
        if four_axes:  # [a, 1, b, 1]
            parts[name] = parts[name][:, None, :, None]
        if unused:
            parts[unused] = torch.ones(())
        return parts, stands_for

    return pack


def _mxfp4(weight: Floats) -> Packed:
    groups = weight.reshape(len(weight), -1, 32)
    exponents = np.ceil(np.log2(np.abs(groups).max(-1) / 6))
    scaled = groups / 2.0 ** exponents[..., None]
    nearest = np.abs(np.abs(scaled)[..., None] - E2M1).argmin(-1)
    codes = (nearest | (scaled < 0) << 3).astype(np.uint8).reshape(weight.shape)
    stands_for = np.copysign(E2M1[nearest], scaled) * 2.0 ** exponents[..., None]
    parts = {
        "weight_packed": torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4),
        "weight_scale": torch.from_numpy((exponents + 127).astype(np.uint8)),
    }
    return parts, stands_for.reshape(weight.shape).astype(np.float32)


def _compressed(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": layout}
    ignore = ["lm_head", "re:.*layers.1.mlp.down_proj"]
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def _gptq_config(bits: int = 4, **others: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 128, "sym": False, **others}


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FORMATS = (
    Format("fp8 in blocks", {**_FP8, "weight_block_size": [128, 128]}, _float8(128, 128, "weight_scale_inv")),
    Format(
        "fp8 of one scale",
        {**_FP8, "weight_block_size": None, "activation_scheme": "static"},
        _float8(0, 0, "weight_scale_inv", "activation_scale"),
    ),
    Format(
        "compressed float8, channels",
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        _float8(1, 0, "weight_scale"),
    ),
    Format(
        "compressed float8, blocks",
        _compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[64, 128]),
        _float8(64, 128, "weight_scale"),
    ),
    Format(
        "modelopt fp8",
        {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        },
        _float8(0, 0, "weight_scale", "input_scale"),
        "hf_quant_config.json",
    ),
    Format(
        "modelopt fp8 in blocks",
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
        _float8(128, 128, "weight_scale", four_axes=True),
    ),
    Format("gptq", _gptq_config(), _gptq(4, 128, adds_one=True)),
    Format("gptq v2", _gptq_config(checkpoint_format="gptq_v2"), _gptq(4, 128, adds_one=False)),
    Format("gptq act-order", _gptq_config(desc_act=True), _gptq(4, 128, adds_one=True, act_order=True)),
    Format("gptq 8 bits", _gptq_config(8, group_size=32), _gptq(8, 32, adds_one=True)),
    Format("awq", {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, _awq),
    Format(
        "compressed int4",
        _compressed(
            "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True
        ),
        _packed(4, 32, asymmetric=False),
    ),
    Format(
        "compressed int4, zeros",
        _compressed(
            "pack-quantized", num_bits=4, type="int", strategy="group", group_size=128, symmetric=False
        ),
        _packed(4, 128, asymmetric=True),
    ),
    Format(
        "compressed int4, act-order",
        _compressed(
            "pack-quantized", num_bits=4, type="int", strategy="group", group_size=128, actorder="group"
        ),
        _packed(4, 128, asymmetric=False, act_order=True),
    ),
    Format(
        "compressed int8, packed",
        _compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        _packed(8, 0, asymmetric=True),
    ),
    Format(
        "compressed int8", _compressed("int-quantized", num_bits=8, type="int", strategy="channel"), _int8
    ),
    Format(
        "compressed mxfp4",
        _compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        _mxfp4,
    ),
)
