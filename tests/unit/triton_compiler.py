"""Compiles all kernels of the GPU path to machine code, as a process of its own; no GPU needed."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flowkv_common.engine import kernels_triton as kernels

HEADS = {"block_size": 16, "head_dim": 128, "padded_dim": 128}
NUMBERS = "*i32"
ARGUMENTS: dict[Any, tuple[dict[str, str], dict[str, int]]] = {
    kernels.write_kv: ({"slots": "*i64"}, HEADS),
    kernels.attend_prompts: (
        dict.fromkeys(("tables", "context_lens", "query_starts", "tile_items", "tile_firsts"), NUMBERS),
        {**HEADS, "group_size": 4, "num_rows": 64, "tile_len": 64},
    ),
    kernels.attend_part: (
        {"parts": "*fp32", "log_sums": "*fp32"} | dict.fromkeys(("rows", "tables", "context_lens"), NUMBERS),
        {**HEADS, "num_parts": 16, "group_size": 4, "padded_group": 16, "tile_len": 64},
    ),
    kernels.join_parts: (
        {"parts": "*fp32", "log_sums": "*fp32", "rows": NUMBERS},
        {"num_parts": 16, "head_dim": 128, "padded_dim": 128},
    ),
}


def main(capability: int, dtype: str) -> None:
    states = dict.fromkeys(("pool", "query", "result", "key", "value"), f"*{dtype}") | {"scale": "fp32"}
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
