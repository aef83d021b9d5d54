"""Compiles all kernels of the GPU path to machine code, as a process of its own; no GPU needed."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flowkv_common.engine import kernels_triton as kernels
from flowkv_common.engine import kernels_triton_rows as row_kernels

HEADS = {"block_size": 16, "head_dim": 128, "padded_dim": 128}
PARTS = {"num_parts": 16, "least_part_len": 128, "tile_len": 64}
NUMBERS = "*i32"
ARGUMENTS: dict[Any, tuple[dict[str, str], dict[str, int]]] = {
    kernels.write_kv: ({"slots": "*i64"}, HEADS),
    kernels.attend_prompts: (
        dict.fromkeys(("tables", "context_lens", "query_starts", "tile_items", "tile_firsts"), NUMBERS),
        {**HEADS, "group_size": 4, "num_rows": 64, "tile_len": 64},
    ),
    kernels.attend_part: (
        {"parts": "*fp32", "log_sums": "*fp32"} | dict.fromkeys(("rows", "tables", "context_lens"), NUMBERS),
        {**HEADS, **PARTS, "group_size": 4, "padded_group": 16},
    ),
    kernels.join_parts: (
        {"parts": "*fp32", "log_sums": "*fp32", "rows": NUMBERS, "context_lens": NUMBERS},
        {**PARTS, "head_dim": 128, "padded_dim": 128},
    ),
    row_kernels.add_and_norm: ({}, {"num_dims": 4096, "padded_dims": 4096, "adds": True}),
    row_kernels.gate: ({}, {"num_dims": 14336, "tile_len": 1024}),
    row_kernels.rotate_and_write: (
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
ROWS = ("hidden", "delta", "weight", "gate_up", "qkv", "cos", "sin", "norm")


def main(capability: int, dtype: str) -> None:
    names = ("pool", "query", "result", "key", "value", *ROWS)
    states = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(("scale", "eps"), "fp32")
    options = {"num_stages": 1 if dtype == "fp32" else 3}  # as `TritonAttention` asks for
    for kernel, (pointers, constants) in ARGUMENTS.items():
        kinds = states | pointers | dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            fn=kernel,
            signature={name: kinds.get(name, "i32") for name in kernel.arg_names},
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(kernel.__name__, len(compiled.asm["cubin"]), compiled.metadata.shared)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
