"""Chooses the attention backend by name; "auto" takes the fastest that runs here."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from flowkv_common.engine.attention import Attention
from flowkv_common.engine.attention_torch import TorchAttention

AUTO, TORCH, CPU = "auto", "torch", "cpu"


def make_attention(name: str, pool: Tensor) -> tuple[str, Attention]:
    """The backend `name` over `pool`, and the name of what was chosen.

    Raises `ValueError` if there is none of that name, or it can't run here or on this pool.
    """
    if name not in (AUTO, TORCH, CPU):
        raise ValueError(f"unknown attention {name!r}: auto, torch and cpu are")
    obstacle = _cpu_obstacle(pool)
    if name == TORCH or (name == AUTO and obstacle):
        return TORCH, TorchAttention(pool)
    if obstacle:
        raise ValueError(f"attention cpu can't be used: {obstacle}")
    from flowkv_common.engine.attention_cpu import CpuAttention

    return CPU, CpuAttention(pool)


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
