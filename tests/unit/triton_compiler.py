"""Compiles all kernels of the GPU path to machine code, as a process of its own; no GPU needed."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flowkv_engine.engine.gpu import attention, kernels, latents, linear
from flowkv_engine.engine.stored import FORMS, GROUPED_FORMS

HEADS = {"block_size": 16, "num_kv_heads": 8, "head_dim": 128, "padded_dim": 128}
LATENTS = {  # of DeepSeek V3
    "num_heads": 128,
    "num_rows": latents.NUM_ROWS,
    "block_size": 16,
    "head_dim": 576,
    "main_dim": 512,
    "rest_dim": 64,
    "tile_len": 32,
}
SPLITS = {"num_splits": 32, "min_split_len": 128}
SPANS = {"window": 0, "chunk": 0}
PLAIN = {**SPANS, "has_softcap": False, "has_sinks": False}
NUMBERS = "*i32"
ITEM_BYTES = {"bf16": 2, "fp32": 4}
ARGUMENTS: dict[Any, tuple[dict[str, str], dict[str, int]]] = {
    kernels.write_kv: ({"slots": "*i64"}, {**HEADS, "has_values": True}),
    latents.attend_latents: (
        {"splits": "*fp32", "log_sums": "*fp32"}
        | dict.fromkeys(("tables", "items", "context_lens"), NUMBERS),
        {**SPLITS, **SPANS, **LATENTS},
    ),
    kernels.attend_prompts: (
        dict.fromkeys(("tables", "context_lens", "query_starts", "tile_items", "tile_firsts"), NUMBERS),
        {**HEADS, **PLAIN, "group_size": 4, "num_rows": 64},
    ),
    kernels.attend_splits: (
        {"splits": "*fp32", "log_sums": "*fp32"}
        | dict.fromkeys(("query_starts", "tables", "context_lens"), NUMBERS),
        {**HEADS, **SPLITS, **PLAIN, "group_size": 4, "padded_group": 16},
    ),
    kernels.merge_splits: (
        {"splits": "*fp32", "log_sums": "*fp32", "query_starts": NUMBERS, "context_lens": NUMBERS},
        {**SPLITS, **SPANS, "head_dim": 128, "padded_dim": 128},
    ),
    kernels.add_and_norm: ({}, {"num_dims": 4096, "padded_dims": 4096, "adds": True}),
    kernels.gate: ({}, {"num_dims": 14336, "tile_len": 1024}),
    kernels.rotate_and_write: (
        {"slots": "*i64", "positions": "*i64"},
        {
            **HEADS,
            "has_norm": True,
            "num_pairs": 64,
            "is_interleaved": False,
            "group_size": 4,
            "padded_rows": 8,
        },
    ),
}
# Compiled once more with these: Gemma's and GPT-OSS's layers. Kernels take what they know of.
OTHER_RULES = {"window": 1024, "has_softcap": True, "has_sinks": True}
# Multiples of 16, as a model's sizes are: only so tiles are loaded ahead.
STRIDES = ("stride_", "query_stride", "key_stride", "value_stride", "num_cols")
ROWS = ("hidden", "delta", "weight", "gate_up", "qkv", "cos", "sin", "norm", "states", "bias")


Variant = tuple[Any, dict[str, str], dict[str, int]]


def products() -> list[Variant]:
    """Of each form of weights, with few rows and with many."""
    variants: list[Variant] = []
    for form in (form for form in (*FORMS, *GROUPED_FORMS) if form.bits < 16):
        scales = "*fp32" if form.has_full_scales or form.has_supers else "*fp16"
        pointers = {
            "codes": "*i8" if form.bits == 8 and not form.is_e4m3 else "*u8",
            "scales": scales,
            "shifts": "*fp16" if form.has_zeros else scales,
        }
        for tile_rows in (linear.FEW_ROWS, linear.MANY_ROWS):
            constants = {**linear.constants_of(form, 4096, tile_rows), "has_bias": True}
            variants.append((kernels.multiply_groups, pointers, constants))
    return variants


def main(capability: int, dtype: str, stores: str) -> None:
    """`stores`: floats, or codes, of which KV and weights are then."""
    kv_dtype = dtype if stores == "floats" else "u8"
    names = ("pool", "query", "result", "key", "value", "sinks", *ROWS)
    states = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(("pool", "key", "value"), f"*{kv_dtype}")
    states |= dict.fromkeys(("scale", "softcap", "eps", "slope", "cubic", "limit", "shift"), "fp32")
    launch: dict[Any, dict[str, int]] = {  # as `TritonAttention` and `TritonFlatForward` ask for
        kernels.attend_prompts: {"num_stages": attention.num_stages(HEADS["head_dim"] * ITEM_BYTES[dtype])},
        kernels.attend_splits: {"num_stages": 2},
        kernels.multiply_groups: {"num_stages": linear.num_stages(ITEM_BYTES[dtype])},
        latents.attend_latents: {"num_stages": latents.NUM_STAGES},
        kernels.add_and_norm: {"num_warps": 8},
        kernels.rotate_and_write: {"num_warps": 1},
    }
    variants = [(kernel, *arguments) for kernel, arguments in ARGUMENTS.items()]
    variants += [
        (kernel, pointers, constants | {name: OTHER_RULES[name] for name in OTHER_RULES if name in constants})
        for kernel, pointers, constants in variants
        if "window" in constants
    ]
    if stores == "codes":
        variants += products()
    for kernel, pointers, constants in variants:
        kinds = states | pointers | dict.fromkeys(constants, "constexpr")
        if "tile_len" in constants and kernel is latents.attend_latents:
            constants = constants | {"tile_len": latents.tile_len(ITEM_BYTES[dtype])}
        signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attrs={
                (place,): [["tt.divisibility", 16]]
                for place, (name, kind) in enumerate(signature.items())
                if kind.startswith("*") or (name.startswith(STRIDES) and name != "stride_table")
            },
        )
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=launch.get(kernel, {}))
        print(kernel.__name__, len(compiled.asm["cubin"]), compiled.metadata.shared)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
