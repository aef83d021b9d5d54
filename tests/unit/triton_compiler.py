"""Compiles all kernels of the GPU path to machine code, as a process of its own; no GPU needed."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flowkv_engine.engine.gpu import kernels as rows
from flowkv_engine.engine.gpu.attention import num_stages
from flowkv_engine.engine.gpu.kernels import attend_part, attend_prompts, join_parts

HEADS = {"block_size": 16, "head_dim": 128, "padded_dim": 128}
PARTS = {"num_parts": 32, "least_part_len": 128, "tile_len": 64}
NUMBERS = "*i32"
ITEM_BYTES = {"bf16": 2, "fp32": 4}
ARGUMENTS: dict[Any, tuple[dict[str, str], dict[str, int]]] = {
    rows.write_kv: ({"slots": "*i64"}, HEADS),
    attend_prompts: (
        dict.fromkeys(("tables", "context_lens", "query_starts", "tile_items", "tile_firsts"), NUMBERS),
        {**HEADS, "group_size": 4, "num_rows": 64, "tile_len": 64},
    ),
    attend_part: (
        {"parts": "*fp32", "log_sums": "*fp32"} | dict.fromkeys(("rows", "tables", "context_lens"), NUMBERS),
        {**HEADS, **PARTS, "group_size": 4, "padded_group": 16},
    ),
    join_parts: (
        {"parts": "*fp32", "log_sums": "*fp32", "rows": NUMBERS, "context_lens": NUMBERS},
        {**PARTS, "head_dim": 128, "padded_dim": 128},
    ),
    rows.add_and_norm: ({}, {"num_dims": 4096, "padded_dims": 4096, "adds": True}),
    rows.gate: ({}, {"num_dims": 14336, "tile_len": 1024}),
    rows.rotate_and_write: (
        {"slots": "*i64", "positions": "*i64"},
        {
            "has_norm": True,
            "group_size": 4,
            "padded_rows": 8,
            "block_size": 16,
            "head_dim": 128,
            "padded_half": 64,
        },
    ),
}
# Multiples of 16, as a model's sizes are: only so tiles are loaded ahead.
STRIDES = ("stride_", "query_stride", "result_stride", "key_stride", "value_stride")
ROWS = ("hidden", "delta", "weight", "gate_up", "qkv", "cos", "sin", "norm")


def main(capability: int, dtype: str) -> None:
    names = ("pool", "query", "result", "key", "value", *ROWS)
    states = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(("scale", "eps"), "fp32")
    launch: dict[Any, dict[str, int]] = {  # as `TritonAttention` and `TritonFlatForward` ask for
        attend_prompts: {"num_stages": num_stages(HEADS["head_dim"] * ITEM_BYTES[dtype])},
        attend_part: {"num_stages": 2},
        rows.add_and_norm: {"num_warps": 8},
        rows.rotate_and_write: {"num_warps": 1},
    }
    for kernel, (pointers, constants) in ARGUMENTS.items():
        kinds = states | pointers | dict.fromkeys(constants, "constexpr")
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
    main(int(sys.argv[1]), sys.argv[2])
