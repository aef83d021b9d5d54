"""Chooses the forward pass: the fastest that does this model on this device."""

from __future__ import annotations

from torch import nn

from flowkv_common.engine.attention import Attention
from flowkv_common.engine.flat import build_flat
from flowkv_common.engine.modules import Forward, ModulesForward


def make_forward(module: nn.Module, attention: Attention) -> Forward:
    """`attention` must come with every call."""
    flat = build_flat(module)
    if flat is None:
        return ModulesForward(module)
    from flowkv_common.engine.attention_torch import TorchAttention

    if type(attention) is TorchAttention:
        return flat
    from flowkv_common.engine.attention_cpu import CpuAttention
    from flowkv_common.engine.flat_cpu import CpuFlatForward

    if isinstance(attention, CpuAttention) and CpuFlatForward.fits(flat):
        return CpuFlatForward(flat, attention)
    return flat
