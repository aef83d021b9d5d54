"""Chooses the attention backend by name; "auto" takes the fastest that runs here."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from flowkv_common.engine.attention import Attention
from flowkv_common.engine.attention_torch import TorchAttention
from flowkv_common.errors import CannotStart

AUTO, TORCH, CPU, TRITON = "auto", "torch", "cpu", "triton"


def make_attention(name: str, pool: Tensor) -> tuple[str, Attention]:
    """The backend `name` over `pool`, and the name of what was chosen.

    Raises `CannotStart` if there is none of that name, or it can't run here or on this pool.
    """
    obstacles = {TORCH: None, CPU: _cpu_obstacle(pool), TRITON: _triton_obstacle(pool)}
    if name == AUTO:
        name = next(one for one in (TRITON, CPU, TORCH) if not obstacles[one] and not _is_slow(one, pool))
    if name not in obstacles:
        raise CannotStart(f"unknown attention {name!r}: auto, {', '.join(obstacles)} are")
    if obstacle := obstacles[name]:
        raise CannotStart(f"attention {name} can't be used: {obstacle}")
    if name == TRITON:
        from flowkv_common.engine.attention_triton import TritonAttention

        return name, TritonAttention(pool)
    if name == CPU:
        from flowkv_common.engine.attention_cpu import CpuAttention

        return name, CpuAttention(pool)
    return name, TorchAttention(pool)


def _is_slow(name: str, pool: Tensor) -> bool:
    """Triton interprets its kernels on the CPU, for tests."""
    return name == TRITON and pool.device.type == "cpu"


def _triton_obstacle(pool: Tensor) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if pool.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the pool is on {pool.device}, it has to be on a GPU"
    return None


def _cpu_obstacle(pool: Tensor) -> str | None:
    if pool.device.type != "cpu":
        return f"the pool is on {pool.device}"
    if pool.dtype not in (torch.float32, torch.bfloat16):
        return f"its pool is float32 or bfloat16, not {pool.dtype}"
    if find_spec("numba") is None:
        return "numba is not installed"
    from flowkv_common.engine.vector_ir import LANES

    if pool.shape[5] % LANES:
        return f"its heads have a multiple of {LANES} dimensions, not {pool.shape[5]}"
    return None
